"""StopMatcher: finds stop strings in text that arrives in pieces, and shows nothing of them too early.

The text actor has one per request with stop strings. Invariant: what it shows and which string it names depend on the
text alone, not on how it was cut into pieces, and equal a search of the whole text.
Which match counts: the one that is complete first, for there the output ends; of several that end at the same
character, the one that begins first (the longest).
"""

from collections.abc import Sequence


class StopMatcher:
    """After a match it shows nothing more."""

    __slots__ = ("_firsts", "_held", "_keep", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], trim: bool = True) -> None:
        """`trim` False: the stop string itself is shown, too. `stops` are not empty strings."""
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._keep = not trim
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take the next piece; return what is safe to show. Look at `matched` afterwards."""
        if self.matched is not None:
            return ""
        if not self._held and self._firsts.isdisjoint(text):
            return text
        seen = self._held + text
        found = self._first_match(seen)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return seen[: start + len(self.matched)] if self._keep else seen[:start]
        hold = self._hold_from(seen)
        self._held = seen[hold:]
        return seen[:hold]

    def finish(self) -> str:
        """The output ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = ((start, stop) for stop in self._stops if (start := text.find(stop)) >= 0)
        return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _hold_from(self, text: str) -> int:
        """Where the longest end of `text` begins that may become a stop string."""
        for i in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[i] in self._firsts and any(stop.startswith(text[i:]) for stop in self._stops):
                return i
        return len(text)
