"""Patterns of JSON Schema: ECMA-262 regular expressions that search, rewritten for parse_pattern, which reads Python's
dialect and matches whole texts. Used by schema_reader.py.

Where the dialects differ (`\\d`, `\\s`, `.`, `$` and their kin), the result is what both accept, so that no validator
refuses what it allows. Invariant: what is passed on means the same in both dialects; all else is refused.
"""

import re
from dataclasses import dataclass
from typing import Final

from .errors import PatternError
from .pattern import parse_pattern
from .spelling import ANY_CHARACTER, choice, concat, repeat
from .syntax import Node

# Whitespace of both dialects, and of either one.
_SPACE: Final = r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACE_OF_EITHER: Final = r"\t-\r\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_NO_SPACE_OF_EITHER: Final = (
    r"\u0000-\u0008\u000e-\u001b!-\u0084\u0086-\u009f\u00a1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e"
    r"\u2060-\u2fff\u3001-\ufefe\uff00-\U0010ffff"
)
_NO_SPACE: Final = (
    r"\u0000-\u0008\u000e-\u001f!-\u009f\u00a1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e"
    r"\u2060-\u2fff\u3001-\U0010ffff"
)
SETS: Final = {
    "d": ("0-9", r"\d"),
    "D": (r"\D", r"\u0000-/:-\U0010ffff"),
    "w": ("A-Za-z0-9_", r"\w"),
    "W": (r"\W", r"\u0000-/:-@\[-\^`{-\U0010ffff"),
    "s": (_SPACE, _SPACE_OF_EITHER),
    "S": (_NO_SPACE_OF_EITHER, _NO_SPACE),
}
"""Class escape -> the inside of a Python class that is in both dialects' sets, and (for [^...]) one covering both."""

DOT: Final = r"[^\n\r\u2028\u2029]"
CONTROLS: Final = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "0": "\0"}
ANY_TEXT: Final = repeat(ANY_CHARACTER, 0, None)
MAX_GROUPS: Final = 64
MAX_PATTERN: Final = 65_536

_QUANTIFIER: Final = re.compile(r"([*+?]|\{[0-9]+(?:,[0-9]*)?\})\??")
_AMBIGUOUS: Final = re.compile(r"\{,[0-9]*\}")
_PLAIN_GROUP: Final = re.compile(r"\?:|\?<[A-Za-z_$][A-Za-z0-9_$]*>")
_HEX: Final = {"x": re.compile("([0-9A-Fa-f]{2})"), "u": re.compile("([0-9A-Fa-f]{4})")}
_LOW_SURROGATE: Final = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})")
_LETTER: Final = re.compile("[A-Za-z]")


@dataclass(frozen=True, slots=True)
class _Group:
    """A group: its alternatives, and the quantifier behind it ("" for none)."""

    alternatives: "list[list[_Piece]]"
    quantifier: str = ""


_Piece = str | _Group
"""A part of an alternative: source in Python's dialect, one of the anchors `^` and `$`, or a group."""


def parse_ecma(pattern: str) -> Node:
    """The texts in which the pattern finds a match.

    Raises PatternError: the pattern is malformed, or means something that is not regular or differs between dialects
    in more than the characters of a class (look-around, back-references, `\\b`, `\\p`, flags, anchors inside a group).
    """
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"it has more than {MAX_PATTERN} characters")
    return choice(map(_searched, _Scanner(pattern).alternatives(0)))


def _searched(pieces: list[_Piece]) -> Node:
    """The texts in which one alternative is found. A group around all of it is opened, as it may hold anchors."""
    match pieces:
        case [_Group(alternatives, "")]:
            return choice(map(_searched, alternatives))
    start = pieces[:1] == ["^"]
    end = len(pieces) > start and pieces[-1] == "$"
    matched = parse_pattern(_source(pieces[start : len(pieces) - end]))
    return concat(*[ANY_TEXT] * (not start), matched, *[ANY_TEXT] * (not end))


def _source(pieces: list[_Piece]) -> str:
    """The pieces in Python's dialect."""
    source = ""
    for piece in pieces:
        if piece in ("^", "$"):
            raise PatternError(f"the anchor {piece} is only read at the ends of an alternative")
        if isinstance(piece, _Group):
            source += f"(?:{'|'.join(map(_source, piece.alternatives))}){piece.quantifier}"
        else:
            source += piece
    return source


def _code(character: str) -> str:
    """A character as it may stand anywhere in a Python pattern."""
    if character.isascii() and character.isalnum():
        return character
    if 0xD800 <= ord(character) <= 0xDFFF:
        raise PatternError("a lone surrogate is no character")
    return f"\\U{ord(character):08x}"


class _Scanner:
    """Reads a pattern from left to right; `at` is the index of the next character."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        """Step over what the expression matches here."""
        found = expression.match(self.pattern, self.at)
        self.at = found.end() if found else self.at
        return found

    def next(self) -> str:
        if self.at >= len(self.pattern):
            raise PatternError("the pattern ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def alternatives(self, depth: int) -> list[list[_Piece]]:
        """Everything up to the end of this group, or of the pattern at depth 0."""
        if depth > MAX_GROUPS:
            raise PatternError(f"groups are nested more than {MAX_GROUPS} deep")
        result: list[list[_Piece]] = [[]]
        while self.peek() not in ("", ")"):
            if self.peek() == "|":
                self.at += 1
                result.append([])
            else:
                result[-1].append(self.term(depth))
        if (self.peek() == ")") != (depth > 0):
            raise PatternError("parentheses do not match")
        return result

    def term(self, depth: int) -> _Piece:
        """An anchor, or an atom with its quantifier."""
        if self.take(_QUANTIFIER):
            raise PatternError("nothing to repeat")
        c = self.next()
        piece: _Piece
        match c:
            case "^" | "$":
                return c
            case "(":
                piece = self.group(depth)
            case "[":
                piece = self.character_class()
            case ".":
                piece = DOT
            case "\\":
                character, name = self.escape()
                piece = f"[{SETS[name][0]}]" if name else _code(character)
            case _:
                piece = _code(c)
        found = self.take(_QUANTIFIER)
        if self.take(_AMBIGUOUS):
            raise PatternError("{,n} counts in one dialect and stands for itself in another")
        if found is None:
            return piece
        return _Group(piece.alternatives, found[1]) if isinstance(piece, _Group) else piece + found[1]

    def group(self, depth: int) -> _Group:
        if self.peek() == "?" and not self.take(_PLAIN_GROUP):
            raise PatternError("look-around and flags are not supported")
        inner = _Group(self.alternatives(depth + 1))
        self.at += 1
        return inner

    def escape(self) -> tuple[str, str]:
        """What follows a backslash: (the character, "") or ("", the name of a set)."""
        c = self.next()
        if c in SETS:
            return "", c
        if c == "0" and self.peek().isdigit():
            raise PatternError("octal escapes are not supported")
        if c in CONTROLS:
            return CONTROLS[c], ""
        if found := self.take(_HEX[c]) if c in _HEX else None:
            return self.surrogates(int(found[1], 16)), ""
        if c == "c" and (letter := self.take(_LETTER)):
            return chr(ord(letter[0]) % 32), ""
        if c.isalnum() or c == "_":
            raise PatternError(f"\\{c} is not supported")
        return c, ""

    def surrogates(self, code: int) -> str:
        """The character of this code, with the other half of its surrogate pair."""
        if 0xD800 <= code <= 0xDBFF and (low := self.take(_LOW_SURROGATE)):
            return chr(0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00)
        return chr(code)

    def character_class(self) -> str:
        negated = self.peek() == "^"
        self.at += negated
        items = ""
        while self.peek() != "]":
            character, name = self.class_member()
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last, other = self.class_member()
                if name or other or last < character:
                    raise PatternError("a range from or to a set, or backwards")
                items += f"{_code(character)}-{_code(last)}"
            else:
                items += SETS[name][negated] if name else _code(character)
        self.at += 1
        if not items:
            raise PatternError("an empty class")
        return f"[^{items}]" if negated else f"[{items}]"

    def class_member(self) -> tuple[str, str]:
        c = self.next()
        if c != "\\":
            return c, ""
        if self.peek() == "b":
            self.at += 1
            return "\b", ""
        return self.escape()
