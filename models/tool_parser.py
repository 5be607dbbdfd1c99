"""ToolParser: tool calls in a model's output, as it arrives: visible text, and calls with their arguments.

parsers.py makes one for each choice of a request with tools. It looks for the family's openers and walks through its
table of states from there; text that may become markup is held back, and becomes content as soon as it cannot.
Invariants: the joined events depend on the text alone, not on its cutting; all text is content, a call's name or
arguments, or markup, in order, once.
What is malformed: before a call starts, its opener is content, and what follows it is looked at again; in a call that
started, the call ends incomplete and what follows the last good character is content. Both streamed and not.
Whitespace next to the markup of a call (before, between, after) belongs to the markup.
"""

from .call_sink import CallSink, Reader, Verdict
from .markers import first_marker, safe_length
from .parse_events import SPACE, Event, Known, NewId
from .tool_families import END, ToolFamily


class ToolParser:
    __slots__ = (
        "_at",
        "_calls",
        "_family",
        "_fresh",
        "_opener",
        "_openers",
        "_reader",
        "_sink",
        "_state",
        "_text",
        "_trim",
    )

    def __init__(self, family: ToolFamily, new_id: NewId, known: Known | None = None) -> None:
        """`known` None: any function name will do; else calls of other functions are content."""
        self._family = family
        self._openers = tuple(family.openers)
        self._sink = CallSink(new_id, known)
        self._text = ""
        """What has arrived and is not decided."""
        self._fresh = bool(family.bare)
        """Nothing but whitespace so far: a call without a marker may begin."""
        self._trim = False
        """Whitespace that comes next follows a call."""
        # In a region of calls:
        self._state: str | None = None
        self._reader: Reader | None = None
        self._at = 0
        """How far `_text` is read."""
        self._opener = 0
        """Length of the opener at its start, with the whitespace before it; 0 after the region's first call."""
        self._calls = 0
        """Calls that had ended when the region began."""

    def feed(self, text: str) -> list[Event]:
        """Take the next chunk; return what it decides."""
        self._text += text
        return self._run(final=False)

    def finish(self) -> list[Event]:
        """The text ended: what was held back is content, and a call that is open is incomplete."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Event]:
        while self._look(final) if self._state is None else self._walk(self._state, final):
            pass
        return self._sink.take()

    # ------------------------------------------------------------------ outside of regions

    def _look(self, final: bool) -> bool:
        """Pass on content up to the next opener; return whether a region begins."""
        if self._trim:
            self._text = self._text.lstrip(SPACE)
            self._trim = not self._text
        text = self._text
        if self._fresh and (first := text.lstrip(SPACE)[:1]):
            self._fresh = False
            if first in self._family.bare:
                self._enter(self._family.bare[first], text.index(first), 0)
                return True
        found = first_marker(text, self._openers)
        if found is not None:
            begin, marker = found
            shown = len(text[:begin].rstrip(SPACE))
            self._show(shown)
            end = begin + len(marker) - shown
            self._enter(self._family.openers[marker], end, end)
            return True
        self._show(len(text) if final else safe_length(text, self._openers))
        return False

    def _show(self, length: int) -> None:
        self._sink.content(self._text[:length])
        self._text = self._text[length:]

    def _enter(self, state: str, at: int, opener: int) -> None:
        self._state, self._at, self._opener = state, at, opener
        self._calls = self._sink.ended

    # ------------------------------------------------------------------ in a region

    def _walk(self, name: str, final: bool) -> bool:
        """Go one state further, or out of the region; return False if that takes more text."""
        state, text = self._family.states[name], self._text
        if self._reader is None:
            while self._at < len(text) and text[self._at] in SPACE:
                self._at += 1
            for literal, then in state.literals:
                if text.startswith(literal, self._at):
                    self._at += len(literal)
                    return self._go(then)
                if literal.startswith(text[self._at :]):
                    return final and self._leave()
            if self._at == len(text):
                return final and self._leave()
            if state.reader is None:
                return self._leave()
            self._reader = self._family.reader(state.reader, self._sink)
        return self._read(self._reader, state.then, final)

    def _read(self, reader: Reader, then: str, final: bool) -> bool:
        ended = self._sink.ended
        self._at = reader.read(self._text, self._at)
        if self._sink.open or self._sink.ended > ended:  # nothing before this can become content any more
            self._text, self._at, self._opener = self._text[self._at :], 0, 0
        match reader.verdict:
            case Verdict.DONE:
                self._reader = None
                return self._go(then)
            case Verdict.FAIL:
                return self._leave()
        return final and self._leave()

    def _go(self, then: str) -> bool:
        self._state = then
        if then == END and self._sink.ended > self._calls:
            self._text = self._text[self._at :]
            return self._out(trim=True)
        return then != END or self._leave()

    def _leave(self) -> bool:
        """The region cannot go on, or the text ended in it."""
        if self._sink.open:
            self._sink.end()
            return self._out(trim=self._sink.whole)
        if self._sink.ended > self._calls:
            return self._out(trim=True)
        self._show(self._opener)
        return self._out(trim=False)

    def _out(self, trim: bool) -> bool:
        self._state, self._reader, self._trim, self._at = None, None, trim, 0
        return True
