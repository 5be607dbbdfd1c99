"""Finding markers in text that arrives in pieces: where the first one is, and what may still become one.

The parsers of reasoning and tool calls use it. Invariant: if no marker of a set contains another one, the marker that
is found first does not depend on how the text was cut.
"""

from collections.abc import Sequence

from .parse_events import SPACE


def first_marker(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """Where the first marker begins, and which it is."""
    found = ((at, marker) for marker in markers if (at := text.find(marker)) >= 0)
    return min(found, default=None)


def safe_length(text: str, markers: Sequence[str]) -> int:
    """How much of a text without markers can be no part of one, nor of the whitespace before one."""
    longest = max(map(len, markers), default=0)
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(marker.startswith(text[at:]) for marker in markers):
            text = text[:at]
            break
    return len(text.rstrip(SPACE))
