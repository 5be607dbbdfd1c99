r"""The characters of a regular expression: reading it from left to right, escapes and [classes].

Used by pattern.py, which knows the structure. Invariant: what an escape or a class means is what it means to `re`; a
malformed one raises PatternError with its position.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Final, NoReturn

from .charsets import category, escaped, ignoring_case
from .errors import PatternError
from .syntax import LAST, SURROGATES, Chars, Node, Text, chars

MAX_REPEAT: Final = (1 << 32) - 2

_SIMPLE: Final = {"a": 7, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_HEX: Final = {"x": 2, "u": 4, "U": 8}
_HEX_DIGITS: Final = frozenset("0123456789abcdefABCDEF")
_OCTAL: Final = frozenset("01234567")
_DIGITS: Final = frozenset("0123456789")
_PLAIN: Final = re.compile(r"[^\\[\](){}|*+?^$.\ud800-\udfff]+(?![*+?{(])")
"""Characters that stand for themselves, up to the one before a quantifier (or comment)."""


@dataclass(frozen=True, slots=True)
class Flags:
    """The inline flags i, s and a."""

    ignore_case: bool = False
    dot_all: bool = False
    ascii_only: bool = False


class PatternReader:
    """A pattern and how far it is read: every method leaves `at` behind what it has read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, message: str, position: int) -> NoReturn:
        raise PatternError(message, position)

    def take(self, mark: str) -> bool:
        """Reads `mark` if it comes next."""
        found = self.text.startswith(mark, self.at)
        if found:
            self.at += len(mark)
        return found

    def next(self, start: int) -> str:
        """Reads a character of an escape that began at `start`."""
        if self.at >= len(self.text):
            self.fail("bad escape (end of pattern)", start)
        self.at += 1
        return self.text[self.at - 1]

    def some(self, allowed: frozenset[str], most: int = 1 << 30) -> str:
        """Reads as many of these characters as come next."""
        start = self.at
        while self.at < len(self.text) and self.at - start < most and self.text[self.at] in allowed:
            self.at += 1
        return self.text[start : self.at]

    def plain(self, flags: Flags) -> str:
        """Reads characters that stand for themselves, as many as are sure to: maybe none."""
        found = None if flags.ignore_case else _PLAIN.match(self.text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found[0]

    def bounds(self) -> tuple[int, int | None] | None:
        """Reads a quantifier; None, and nothing is read, if there is none: {x} is three characters."""
        start = self.at
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(mark):
                return bounds
        if not self.take("{"):
            return None
        low = self.some(_DIGITS)
        comma = self.take(",")
        high = self.some(_DIGITS) if comma else low
        if not self.take("}") or self.at - start == 2:
            self.at = start
            return None
        if max(len(low), len(high)) > len(str(MAX_REPEAT)):
            self.fail("the repetition number is too large", start)
        least, most = int(low or "0"), int(high) if high else None
        if max(least, most or 0) > MAX_REPEAT:
            self.fail("the repetition number is too large", start)
        if most is not None and most < least:
            self.fail("min repeat greater than max repeat", start)
        return least, most

    def anchor(self) -> str:
        r"""Reads ^ or \A, as "^", or $ or \Z, as "$"; "" if there is none."""
        for mark, anchor in (("^", "^"), ("\\A", "^"), ("$", "$"), ("\\Z", "$")):
            if self.take(mark):
                here = self.at
                if self.bounds() is not None:
                    self.fail("nothing to repeat", here)
                return anchor
        return ""

    def comment(self) -> bool:
        """Reads (?#...) if it comes next."""
        start = self.at
        if not self.take("(?#"):
            return False
        self.at = self.text.find(")", start) + 1
        if not self.at:
            self.fail("missing ), unterminated comment", start)
        return True

    def character_class(self, flags: Flags, here: int) -> Chars:
        """Reads a class whose [ is at `here` and read."""
        negated = self.take("^")
        ranges: list[tuple[int, int]] = []
        source = ""  # the same for ignoring_case
        start = self.at
        while self.at == start or not self.take("]"):
            item = self._member(here)
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                dash = self.at
                self.at += 1
                last = self._member(here)
                if isinstance(item, str) or isinstance(last, str) or last < item:
                    self.fail("bad character range", dash)
            else:
                last = item
            if isinstance(item, str) or isinstance(last, str):
                ranges += category(str(item), flags.ascii_only)
                source += f"\\{item}"
            else:
                ranges.append((item, last))
                source += escaped([(item, last)])
        plain = chars(ranges, negated)
        if not flags.ignore_case:
            return plain
        return ignoring_case(plain, f"[{'^' * negated}{source}]", flags.ascii_only)

    def escape(self, flags: Flags, start: int) -> Node:
        """Reads an escape outside a class, whose backslash is at `start` and read."""
        c = self.next(start)
        if c in "dDsSwW":
            return Chars(category(c, flags.ascii_only))
        if c in "bB":
            self.fail(f"the word boundary \\{c} is not supported", start)
        if c in _DIGITS:
            ahead = self.text[self.at : self.at + 2]
            if c != "0" and not (c in _OCTAL and len(ahead) == 2 and set(ahead) <= _OCTAL):
                self.fail(f"the back-reference \\{c} is not supported", start)
            return literal(self._octal(c, start), flags)
        return literal(self._code(c, start), flags)

    def _member(self, here: int) -> int | str:
        """Reads one character of a class, or the letter of a category."""
        if self.at >= len(self.text):
            self.fail("unterminated character set", here)
        start, c = self.at, self.text[self.at]
        self.at += 1
        if c != "\\":
            return ord(c)
        c = self.next(start)
        if c in "dDsSwW":
            return c
        if c == "b":
            return 8
        return self._octal(c, start) if c in _OCTAL else self._code(c, start)

    def _octal(self, first: str, start: int) -> int:
        code = int(first + self.some(_OCTAL, 2), 8)
        if code > 0o377:
            self.fail("octal escape outside of range 0-0o377", start)
        return code

    def _code(self, c: str, start: int) -> int:
        """The character of an escape that is neither a category nor octal."""
        if c in _SIMPLE:
            return _SIMPLE[c]
        if c in _HEX:
            digits = self.some(_HEX_DIGITS, _HEX[c])
            if len(digits) < _HEX[c]:
                self.fail(f"incomplete escape \\{c}{digits}", start)
            if int(digits, 16) > LAST:
                self.fail(f"no such character: \\{c}{digits}", start)
            return int(digits, 16)
        if c == "N" and self.take("{"):
            name, brace, _ = self.text[self.at :].partition("}")
            self.at += len(name) + len(brace)
            try:
                return ord(unicodedata.lookup(name))
            except (KeyError, TypeError):
                self.fail(f"undefined character name {name!r}", start)
        if c.isascii() and c.isalnum():
            self.fail(f"bad escape \\{c}", start)
        return ord(c)


def literal(code: int, flags: Flags) -> Node:
    """The tree of one character."""
    if SURROGATES[0] <= code <= SURROGATES[1]:
        return Chars(())  # no text that is UTF-8 has one
    plain = Chars(((code, code),))
    if flags.ignore_case:
        plain = ignoring_case(plain, escaped([(code, code)])[: len(r"\U00000000")], flags.ascii_only)
    return Text(chr(code)) if plain.ranges == ((code, code),) else plain
