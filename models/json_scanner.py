"""JsonScanner: reads one JSON value that arrives in pieces, and knows at each character whether it can still be one.

The readers of tool calls stream arguments through it. Invariant: what it has taken is the beginning of a valid JSON
value, whatever the cutting; `done` comes with the value's last character, `broken` at the first that does not fit.
It is as strict as RFC 8259, but for raw control characters in strings (models write code with real line ends): those
are taken and given out escaped, so that the client's decoder can read them.
"""

import json
import re
from typing import Final

MAX_DEPTH: Final = 128
"""Deeper nesting counts as broken: clients' decoders give up, too."""

_SPACE: Final = frozenset(" \t\n\r")
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]*')
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_WORDS: Final = {"t": "rue", "f": "alse", "n": "ull"}
_CLOSES: Final = {"{": "}", "[": "]"}
_DIGITS: Final = "0123456789"

# A number's states, and where each class of characters leads: 0, another digit, point, e, sign.
_NUMBER: Final[dict[str, dict[str, str]]] = {
    "minus": {"0": "zero", "9": "int"},
    "zero": {".": "point", "e": "e"},
    "int": {"0": "int", "9": "int", ".": "point", "e": "e"},
    "point": {"0": "fraction", "9": "fraction"},
    "fraction": {"0": "fraction", "9": "fraction", "e": "e"},
    "e": {"0": "exponent", "9": "exponent", "+": "sign"},
    "sign": {"0": "exponent", "9": "exponent"},
    "exponent": {"0": "exponent", "9": "exponent"},
}
_WHOLE: Final = frozenset({"zero", "int", "fraction", "exponent"})
_CLASS: Final = {"0": "0", ".": ".", "e": "e", "E": "e", "+": "+", "-": "+"} | dict.fromkeys("123456789", "9")


class JsonScanner:
    """One value. The states: which character may come next."""

    __slots__ = ("_key", "_number", "_out", "_rest", "_stack", "_state", "broken", "done")

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._state = "value"
        self._stack: list[str] = []
        """The brackets that are open, as the ones that close them."""
        self._key = False
        """The string that is read is a key."""
        self._rest = ""
        """What of true, false or null, or of a \\u escape (as its length), must still come."""
        self._number = ""
        self._out: list[str] = []

    def scan(self, text: str, at: int) -> int:
        """Take `text[at:]` as far as it belongs to the value; return where it ends or breaks."""
        begin = at
        while at < len(text) and not (self.done or self.broken):
            if self._state == "string":
                at = _PLAIN.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string, too
                if at == len(text):
                    break
                if text[at] < " ":
                    self._out += text[begin:at], json.dumps(text[at])[1:-1]
                    begin = at = at + 1
                    continue
            at += self._step(text[at])
        self._out.append(text[begin:at])
        return at

    def take(self) -> str:
        """What was scanned since the last call, with control characters in strings escaped."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def _step(self, char: str) -> int:
        """Take one character; return 0 if it is not part of the value (a number ends before it, or it is wrong)."""
        match self._state:
            case "string":
                return self._in_string(char)
            case "escape" | "hex":
                return self._in_escape(char)
            case "word":
                return self._in_word(char)
            case "number":
                return self._in_number(char)
        if char in _SPACE and (self._stack or self._state != "value"):
            return 1
        match self._state:
            case "value" | "first":
                return self._begin(char)
            case "key" | "first key" if char == '"':
                self._state, self._key = "string", True
                return 1
            case "colon" if char == ":":
                self._state = "value"
                return 1
            case "next" if char == ",":
                self._state = "key" if self._stack[-1] == "}" else "value"
                return 1
            case "next" | "first key" if char == self._stack[-1]:
                return self._close()
        return self._break()

    def _begin(self, char: str) -> int:
        """The first character of a value, or the end of an empty array."""
        if char in _CLOSES and len(self._stack) < MAX_DEPTH:
            self._stack.append(_CLOSES[char])
            self._state = "first key" if char == "{" else "first"
        elif char == '"':
            self._state, self._key = "string", False
        elif char in _WORDS:
            self._state, self._rest = "word", _WORDS[char]
        elif char == "-" or char in _DIGITS:
            self._state, self._number = "number", {"-": "minus", "0": "zero"}.get(char, "int")
        elif self._state == "first" and char == "]":
            return self._close()
        else:
            return self._break()
        return 1

    def _in_string(self, char: str) -> int:
        if char == "\\":
            self._state = "escape"
        elif self._key:
            self._state = "colon"
        else:
            self._ended()
        return 1

    def _in_escape(self, char: str) -> int:
        if self._state == "escape":
            if char not in '"\\/bfnrtu':
                return self._break()
            self._state, self._rest = ("hex", "0000") if char == "u" else ("string", "")
            return 1
        if char not in _HEX:
            return self._break()
        self._rest = self._rest[1:]
        if not self._rest:
            self._state = "string"
        return 1

    def _in_word(self, char: str) -> int:
        if char != self._rest[0]:
            return self._break()
        self._rest = self._rest[1:]
        if not self._rest:
            self._ended()
        return 1

    def _in_number(self, char: str) -> int:
        after = _NUMBER[self._number].get(_CLASS.get(char, ""))
        if after is not None:
            self._number = after
            return 1
        if self._number not in _WHOLE:
            return self._break()
        self._ended()
        return 0

    def _close(self) -> int:
        self._stack.pop()
        self._ended()
        return 1

    def _ended(self) -> None:
        """A value is whole."""
        self._state = "next"
        self.done = not self._stack

    def _break(self) -> int:
        self.broken = True
        return 0
