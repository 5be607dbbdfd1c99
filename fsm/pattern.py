r"""Regular expressions to syntax trees.

Used by whoever compiles a `regex` constraint, and for the patterns of JSON schemas. The dialect is that of Python's
`re` with re.ASCII off, as `re.fullmatch` reads it; a matched text is a whole output:

- literals, `.` (all but \n), [classes] with ranges, negation and escapes
- \d \D \s \S \w \W as `re` defines them for Unicode; \t \n \r \f \v \a \0, octal, \xHH \uHHHH \UHHHHHHHH \N{NAME};
  any escaped punctuation
- (groups), (?:groups), (?P<name>groups), (?#comments), alternation
- * + ? {m} {m,} {m,n} {,n}; lazy ones too, which match the same texts
- flags i, s, a and u for the whole pattern, (?i), or for a group, (?i:...) and (?-i:...)
- ^ $ \A \Z where they change nothing: before all else and after all else

Look-around, back-references, \b, possessive and atomic groups, conditionals and other flags are refused by name and
position. Invariant: a text matches the tree exactly if `re.fullmatch` finds it (tests/fsm/test_pattern.py).
"""

from dataclasses import dataclass, replace
from typing import Final

from .charsets import NEWLINE
from .errors import PatternError
from .pattern_reader import Flags, PatternReader, literal
from .syntax import Choice, Concat, Node, Repeat, Text, chars

__all__ = ["PatternError", "parse_pattern"]

MAX_DEPTH: Final = 100
"""Nested groups."""

_REFUSED: Final = {
    "(?=": "look-ahead (?=",
    "(?!": "look-ahead (?!",
    "(?<=": "look-behind (?<=",
    "(?<!": "look-behind (?<!",
    "(?>": "an atomic group (?>",
    "(?(": "a conditional group (?(",
    "(?P=": "a back-reference (?P=",
}


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of the pattern: its tree, whether a ^ begins it, and the position of a $ that ends it."""

    node: Node
    begins: bool = False
    ends: int | None = None


def parse_pattern(pattern: str) -> Node:
    """Return the language of `pattern`: the texts that `re.fullmatch` accepts.

    Raises PatternError: malformed, or a construct outside the dialect.
    """
    return _Parser(pattern).whole()


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.reader = PatternReader(text)
        self.depth = 0
        self.names: set[str] = set()

    def whole(self) -> Node:
        part = self._alternatives(self._global_flags(), first=True)
        if self.reader.at < len(self.text):
            self.reader.fail("unbalanced parenthesis", self.reader.at)
        return part.node

    def _alternatives(self, flags: Flags, first: bool) -> _Part:
        """Reads up to a `)` or the end. `first`: nothing of the pattern can have matched before."""
        parts = [self._sequence(flags, first)]
        while self.reader.take("|"):
            parts.append(self._sequence(flags, first))
        node = parts[0].node if len(parts) == 1 else Choice(tuple(part.node for part in parts))
        ends = [part.ends for part in parts if part.ends is not None]
        return _Part(node, any(part.begins for part in parts), ends[0] if ends else None)

    def _sequence(self, flags: Flags, first: bool) -> _Part:
        reader = self.reader
        items: list[Node] = []
        begins, ends = False, None
        while reader.at < len(self.text) and self.text[reader.at] not in "|)":
            here = reader.at
            if reader.comment():
                continue
            if (anchor := reader.anchor()) == "$":
                ends = here
                continue
            if ends is not None:
                reader.fail("$ is supported only at the very end", ends)
            if anchor == "^":
                if items or not first:
                    reader.fail("^ is supported only at the very beginning", here)
                begins = True
                continue
            if plain := reader.plain(flags):
                items.append(Text(plain))
                continue
            part = self._atom(flags, first and not items)
            begins, ends = begins or part.begins, part.ends
            items.append(self._repeated(part, here))
        return _Part(_concat(items), begins, ends)

    def _atom(self, flags: Flags, first: bool) -> _Part:
        reader = self.reader
        here = reader.at
        if reader.bounds() is not None:
            reader.fail("nothing to repeat", here)
        c = reader.next(here)
        if c == "(":
            return self._group(flags, first, here)
        if c == "[":
            return _Part(reader.character_class(flags, here))
        if c == ".":
            return _Part(chars(() if flags.dot_all else NEWLINE, negated=True))
        if c == "\\":
            return _Part(reader.escape(flags, here))
        return _Part(literal(ord(c), flags))

    def _repeated(self, part: _Part, here: int) -> Node:
        """The atom that begins at `here` with the quantifier that follows it, if one does."""
        reader = self.reader
        while reader.comment():
            pass
        start = reader.at
        bounds = reader.bounds()
        if bounds is None:
            return part.node
        if part.begins or part.ends is not None:
            reader.fail("an anchor inside a repeated group is not supported", here)
        if reader.take("+"):
            reader.fail("a possessive quantifier is not supported", start)
        reader.take("?")
        start = reader.at
        if reader.bounds() is not None:
            reader.fail("multiple repeat", start)
        return Repeat(part.node, *bounds)

    def _group(self, flags: Flags, first: bool, here: int) -> _Part:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.reader.fail(f"more than {MAX_DEPTH} nested groups", here)
        if self.reader.take("?"):
            flags = self._extension(flags, here)
        part = self._alternatives(flags, first)
        if not self.reader.take(")"):
            self.reader.fail("missing ), unterminated group", here)
        self.depth -= 1
        return part

    def _extension(self, flags: Flags, here: int) -> Flags:
        """Reads what follows `(?` and returns the flags inside the group."""
        reader = self.reader
        if reader.take(":"):
            return flags
        for mark, name in _REFUSED.items():
            if self.text.startswith(mark, here):
                reader.fail(f"{name} is not supported", here)
        if reader.take("P<"):
            name = self.text[reader.at :].partition(">")[0]
            if not name.isidentifier() or not self.text.startswith(">", reader.at + len(name)):
                reader.fail("bad or missing group name", reader.at)
            if name in self.names:
                reader.fail(f"the group name {name!r} is used twice", reader.at)
            self.names.add(name)
            reader.at += len(name) + 1
            return flags
        inside = self._letters(flags, here)
        if not reader.take(":"):
            reader.fail("flags for the whole pattern are supported only at its start", here)
        return inside

    def _global_flags(self) -> Flags:
        """Reads (?i) and the like at the start; leaves (?i:...) for later."""
        reader = self.reader
        flags = Flags()
        while self.text.startswith("(?", reader.at) and self.text[reader.at + 2 : reader.at + 3] not in "P(#:<=!>-":
            here = reader.at
            reader.at += 2
            inside = self._letters(flags, here)
            if not reader.take(")"):
                reader.at = here
                break
            if "-" in self.text[here : reader.at]:
                reader.fail("missing :", reader.at - 1)
            flags = inside
        return flags

    def _letters(self, flags: Flags, here: int) -> Flags:
        """Reads flag letters: i-s and the like."""
        reader = self.reader
        start, on = reader.at, True
        while reader.at < len(self.text) and self.text[reader.at] not in "):":
            c = self.text[reader.at]
            if c == "-" and on:
                on = False
            elif (c if not on else "a" if c == "u" else "u" if c == "a" else "-") in self.text[start : reader.at]:
                reader.fail("incompatible flags", reader.at)
            elif c == "i":
                flags = replace(flags, ignore_case=on)
            elif c == "s":
                flags = replace(flags, dot_all=on)
            elif c in "au" and on:
                flags = replace(flags, ascii_only=c == "a")
            elif c in "Lmxaut":
                reader.fail(f"the inline flag {c!r} is not supported here", reader.at)
            else:
                reader.fail(f"unknown extension (?{c}", here)
            reader.at += 1
        if reader.at == start or self.text[reader.at - 1] == "-":
            reader.fail("missing flag", reader.at)
        return flags


def _concat(items: list[Node]) -> Node:
    """One after another; characters in a row become one text."""
    parts: list[Node] = []
    for item in items:
        if isinstance(item, Text) and parts and isinstance(parts[-1], Text):
            parts[-1] = Text(parts[-1].text + item.text)
        else:
            parts.append(item)
    return parts[0] if len(parts) == 1 else Concat(tuple(parts)) if parts else Text("")
