"""Readers of tool calls that are JSON: a whole call as an object, its arguments alone, or its name alone.

ToolParser walks through a family's markup and hands the text inside to these. A call starts (CallStart) when its name
and the first character of its arguments are known; from there on the arguments are streamed as the model wrote them.
Invariant: before the start a reader has emitted nothing, so a call that turns out malformed can still become content;
after it the emitted arguments are the beginning of a JSON object.
"""

import json
import re
from typing import Final

from msgspec import Struct

from .call_sink import CallSink, Verdict
from .json_scanner import JsonScanner
from .parse_events import SPACE


class CallKeys(Struct, frozen=True):
    """How a family spells a call as an object.

    `lone`: no marker announces it, so it must look like a call and nothing else: only these keys, and arguments.
    """

    names: tuple[str, ...] = ("name",)
    arguments: tuple[str, ...] = ("arguments", "parameters")
    extras: tuple[str, ...] = ("id", "type", "tool_call_id")
    lone: bool = False


class CallReader:
    """{"name": ..., "arguments": {...}}: keys in any order, each once; other keys are left out.

    Arguments that are a string are taken as JSON text in a string; null or none count as {}.
    """

    __slots__ = (
        "_ahead",
        "_held",
        "_key",
        "_keys",
        "_name",
        "_role",
        "_scanner",
        "_seen",
        "_sink",
        "_state",
        "verdict",
    )

    def __init__(self, sink: CallSink, keys: CallKeys) -> None:
        self.verdict = Verdict.MORE
        self._sink = sink
        self._keys = keys
        self._ahead = 0
        """How much of the object's rest was read after its arguments: content, if the object breaks off there."""
        self._state = "open"
        self._role = ""
        """What the scanner reads: key, name, object (arguments), text (arguments in a string) or other."""
        self._scanner: JsonScanner | None = None
        self._key = ""
        self._name: str | None = None
        self._held: str | None = None
        """Arguments that came before the name."""
        self._seen: set[str] = set()

    def read(self, text: str, at: int) -> int:
        here = at + self._ahead
        while here < len(text) and self.verdict is Verdict.MORE:
            rest = self._sink.open and self._sink.whole
            if self._scanner is not None:
                here = self._scan(self._scanner, text, here)
            elif text[here] in SPACE and self._state != "open":
                here += 1
            else:
                here += self._step(text[here])
            if not rest:
                at = here
        if self.verdict is Verdict.DONE:
            at = here
        self._ahead = here - at
        return at

    def _step(self, char: str) -> int:
        """One character between keys and values; return 0 if a key or value begins with it, or it is wrong."""
        match self._state, char:
            case ("open", "{"):
                self._state = "first key"
            case ("first key" | "key", '"'):
                return self._begin("key")
            case ("colon", ":"):
                self._state = "value"
            case ("value", _):
                return self._begin_value(char)
            case ("next", ","):
                self._state = "key"
            case ("next" | "first key", "}"):
                return self._close()
            case _:
                return self._fail()
        return 1

    def _begin(self, role: str) -> int:
        self._role, self._scanner = role, JsonScanner()
        return 0

    def _begin_value(self, char: str) -> int:
        """What to do with the value of this key."""
        kind = "name" if self._key in self._keys.names else "arguments" if self._key in self._keys.arguments else ""
        if not kind:
            lost = self._keys.lone and self._key not in self._keys.extras
            return self._fail() if lost else self._begin("other")
        if kind in self._seen:
            return self._fail()
        self._seen.add(kind)
        if kind == "name":
            return self._begin("name") if char == '"' else self._fail()
        if char == "{":
            if self._name is not None:
                self._sink.start(self._name)
            return self._begin("object")
        return self._begin({'"': "text", "n": "other"}[char]) if char in '"n' else self._fail()

    def _scan(self, scanner: JsonScanner, text: str, at: int) -> int:
        at = scanner.scan(text, at)
        if self._role == "object":
            self._emit(scanner.take())
        if scanner.broken:
            self._fail()
        elif scanner.done:
            self._scanner = None
            self._state = "colon" if self._role == "key" else "next"
            self._ended(scanner)
        return at

    def _ended(self, scanner: JsonScanner) -> None:
        """A key or value is whole."""
        match self._role:
            case "key":
                self._key = json.loads(scanner.take())
            case "name":
                name = json.loads(scanner.take())
                if not self._sink.accepts(name):
                    self._fail()
                    return
                self._name = name
                if self._held is not None:
                    self._sink.start(name)
                    self._emit(self._held)
                    self._sink.whole = True
            case "object":
                self._sink.whole = self._sink.open
            case "text":
                self._unpack(json.loads(scanner.take()))

    def _unpack(self, text: str) -> None:
        """Arguments that came as a string."""
        arguments = object_text(text)
        if arguments is None:
            self._fail()
            return
        if self._name is not None:
            self._sink.start(self._name)
            self._sink.whole = True
        self._emit(arguments)

    def _emit(self, arguments: str) -> None:
        if self._sink.open:
            self._sink.arguments(arguments)
        else:
            self._held = (self._held or "") + arguments

    def _close(self) -> int:
        if self._name is None or (self._keys.lone and "arguments" not in self._seen):
            return self._fail()
        if self._sink.open:
            self._sink.end()
        else:
            self._sink.whole_call(self._name, "{}")
        self.verdict = Verdict.DONE
        return 1

    def _fail(self) -> int:
        self.verdict = Verdict.FAIL
        return 0


class ArgumentsReader:
    """{...} after a name that stands by itself (CallSink.name)."""

    __slots__ = ("_scanner", "_sink", "verdict")

    def __init__(self, sink: CallSink) -> None:
        self.verdict = Verdict.MORE
        self._sink = sink
        self._scanner: JsonScanner | None = None

    def read(self, text: str, at: int) -> int:
        if self._scanner is None:
            if not text.startswith("{", at):
                self.verdict = Verdict.MORE if at == len(text) else Verdict.FAIL
                return at
            self._scanner = JsonScanner()
            self._sink.start(self._sink.name)
        at = self._scanner.scan(text, at)
        self._sink.arguments(self._scanner.take())
        if self._scanner.broken:
            self.verdict = Verdict.FAIL
        elif self._scanner.done:
            self._sink.whole = True
            self._sink.end()
            self.verdict = Verdict.DONE
        return at


_NAME: Final = re.compile(r"[\w.:/-]*")


class NameReader:
    """A function's name that stands by itself; it ends where something else begins."""

    __slots__ = ("_is_name", "_name", "_sink", "verdict")

    def __init__(self, sink: CallSink, is_name: bool = True) -> None:
        """`is_name` False: some other word, which is left out."""
        self.verdict = Verdict.MORE
        self._sink = sink
        self._is_name = is_name
        self._name = ""

    def read(self, text: str, at: int) -> int:
        end = _NAME.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string, too
        self._name += text[at:end]
        if end < len(text):
            fits = bool(self._name) if not self._is_name else self._sink.accepts(self._name)
            self.verdict = Verdict.DONE if fits else Verdict.FAIL
            if self._is_name:
                self._sink.name = self._name
        return end


def object_text(text: str) -> str | None:
    """The text of a JSON object that can be sent, as JsonScanner gives it out; None if it is something else."""
    scanner = JsonScanner()
    if not text.startswith("{") or scanner.scan(text, 0) < len(text) or not scanner.done:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return None
    return scanner.take()
