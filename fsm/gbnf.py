"""GBNF, the EBNF of llama.cpp and xgrammar: `root ::= ...` to a syntax tree or, where rules call themselves, to Lark.

Used by guidance.py and the grammar compiler. A rule ends where the next one begins (`name ::=`); `root` is the first.
Strings, classes, groups, `*` `+` `?` `{m}` `{m,}` `{m,n}`, `|`, `.` (any character), `#` comments, the escapes of C and
\\xHH \\uHHHH \\UHHHHHHHH. Invariant: tree and Lark have exactly the grammar's texts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from .errors import GrammarError, NotRegular
from .syntax import LAST, SURROGATES, Chars, Choice, Concat, Node, Repeat, Text, chars

ROOT: Final = "root"
MAX_DEPTH: Final = 100
"""Nested groups, and rules inside rules."""
_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*) | (?P<name>[A-Za-z_][A-Za-z0-9_-]*) | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<chars>\[(?:[^\]\\]|\\.)*\]) | (?P<count>\{\s*\d{1,9}\s*(?:,\s*(?:\d{1,9})?\s*)?\})
    | (?P<mark>::=|[()|*+?.])""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTER: Final = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|(.)", re.DOTALL)
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "b": "\b", "0": "\0"}
_COUNTS: Final = {"*": (0, None), "+": (1, None), "?": (0, 1)}
ANY: Final = chars([], negated=True)


@dataclass(frozen=True, slots=True)
class Call:
    """What another rule has."""

    name: str
    place: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """All parts, one after another."""

    parts: "tuple[Part, ...]"


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Any of the options."""

    options: "tuple[Part, ...]"


@dataclass(frozen=True, slots=True)
class Times:
    """`low` to `high` times `part`; high None: without bound."""

    part: "Part"
    low: int
    high: int | None


Part = Call | Sequence | Alternatives | Times | Text | Chars


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    place: int


def looks_like_gbnf(text: str) -> bool:
    """Whether this is GBNF rather than Lark: it has a rule with `::=`."""
    return re.search(r"(?m)^[ \t]*[A-Za-z_][\w-]*[ \t]*::=", text) is not None


def parse_gbnf(text: str) -> dict[str, Part]:
    """Return the rules by name, `root` among them, all calls of which are answered.

    Raises GrammarError: malformed; the message has the position.
    """
    rules = _Parser(text).rules()
    if ROOT not in rules:
        raise GrammarError(f"there is no rule {ROOT}")
    for rule in rules.values():
        for call in _calls(rule):
            if call.name not in rules:
                raise GrammarError(f"there is no rule {call.name} (position {call.place})")
    return rules


def rules_to_syntax(rules: dict[str, Part]) -> Node:
    """Return the tree of `root`'s texts. Raises NotRegular if a rule that it calls calls itself."""
    known: dict[str, Node] = {}
    open_rules: list[str] = []

    def tree(part: Part) -> Node:
        match part:
            case Call(name):
                return rule(name)
            case Sequence(parts):
                return Concat(tuple(map(tree, parts)))
            case Alternatives(options):
                return Choice(tuple(map(tree, options)))
            case Times(inner, low, high):
                return Repeat(tree(inner), low, high)
            case _:
                return part

    def rule(name: str) -> Node:
        if name in open_rules:
            raise NotRegular(f"the rule {name} calls itself")
        if name not in known:
            if len(open_rules) >= MAX_DEPTH:
                raise NotRegular(f"rules call each other more than {MAX_DEPTH} deep")
            open_rules.append(name)
            known[name] = tree(rules[name])
            open_rules.pop()
        return known[name]

    return rule(ROOT)


def rules_to_lark(rules: dict[str, Part]) -> str:
    """Return llguidance's Lark. Its lexer is greedy, so that every lexeme is one character: then all is for its parser,
    which takes every way."""
    names = {name: f"r{i}" for i, name in enumerate(rules)}

    def lark(part: Part) -> str:
        match part:
            case Call(name):
                return names[name]
            case Sequence(parts):
                return " ".join(map(group, parts)) or '""'
            case Alternatives(options):
                return " | ".join(map(lark, options))
            case Times(high=0):  # llguidance has no {0}
                return '""'
            case Times(inner, low, high):
                return f"({lark(inner)}){{{low},{'' if high is None else high}}}"
            case Text(text):
                return " ".join(f"/{char_class(((ord(c), ord(c)),))}/" for c in text) or '""'
            case Chars(ranges):
                return f"/{char_class(ranges)}/"

    def group(part: Part) -> str:
        return f"({lark(part)})" if isinstance(part, Alternatives) else lark(part)

    lines = [f"start: {names[ROOT]}", *(f"{names[name]}: {lark(part)}" for name, part in rules.items())]
    return "\n".join(lines) + "\n"


def char_class(ranges: tuple[tuple[int, int], ...]) -> str:
    """A set of characters as regular expressions of Rust write it; all of it is escaped."""
    if not ranges:
        return rf"[^\x{{0}}-\x{{{LAST:x}}}]"
    return "[" + "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in ranges) + "]"


def _calls(part: Part) -> Iterator[Call]:
    match part:
        case Call():
            yield part
        case Sequence(parts) | Alternatives(parts):
            for inner in parts:
                yield from _calls(inner)
        case Times(inner):
            yield from _calls(inner)


class _Parser:
    """Recursive descent over one grammar."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, Part]:
        found: dict[str, Part] = {}
        while self._token.kind != "end":
            name = self._token
            if not self._begins_rule():
                raise _unexpected(name, "a rule: name ::= ...")
            self._at += 2
            if name.text in found:
                raise GrammarError(f"there are two rules {name.text} (position {name.place})")
            found[name.text] = self._alternatives()
        return found

    @property
    def _token(self) -> _Token:
        return self._tokens[self._at]

    def _begins_rule(self) -> bool:
        return self._token.kind == "name" and self._tokens[self._at + 1].text == "::="

    def _alternatives(self) -> Part:
        options = [self._sequence()]
        while self._token.text == "|":
            self._at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Alternatives(tuple(options))

    def _sequence(self) -> Part:
        parts: list[Part] = []
        while self._token.kind != "end" and self._token.text not in ("|", ")") and not self._begins_rule():
            parts.append(self._counted(self._item()))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _item(self) -> Part:
        token = self._token
        self._at += 1
        match token.kind, token.text:
            case "name", name:
                return Call(name, token.place)
            case "string", text:
                return Text("".join(map(chr, _characters(text[1:-1], token.place))))
            case "chars", text:
                return _class(text[1:-1], token.place)
            case _, ".":
                return ANY
            case _, "(":
                return self._group(token)
        raise _unexpected(token, "a name, a string, a [class] or a group")

    def _group(self, token: _Token) -> Part:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise GrammarError(f"groups are nested more than {MAX_DEPTH} deep (position {token.place})")
        part = self._alternatives()
        if self._token.text != ")":
            raise _unexpected(self._token, ")")
        self._at += 1
        self._depth -= 1
        return part

    def _counted(self, part: Part) -> Part:
        while self._token.kind == "count" or self._token.text in _COUNTS:
            token = self._token
            self._at += 1
            if token.kind == "count":
                low, comma, high = token.text[1:-1].partition(",")
                least, most = int(low), int(high) if high.strip() else None if comma else int(low)
                if most is not None and most < least:
                    raise GrammarError(f"a repetition of at least {least} and at most {most} (position {token.place})")
            else:
                least, most = _COUNTS[token.text]
            part = Times(part, least, most)
        return part


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise _unexpected(_Token("", text[at : at + 12], at), "something of a grammar")
        if found.lastgroup != "space":
            yield _Token(found.lastgroup or "", found[0], at)
        at = found.end()
    yield _Token("end", "", at)
    yield _Token("end", "", at)


def _unexpected(token: _Token, wanted: str) -> GrammarError:
    shown = "the end" if token.kind == "end" else repr(token.text[:32])
    return GrammarError(f"{shown} where {wanted} is expected (position {token.place})")


def _characters(text: str, place: int) -> Iterator[int]:
    """The code points of a string or class, escapes resolved."""
    for found in _CHARACTER.finditer(text):
        code = next((int(digits, 16) for digits in found.groups()[:3] if digits), None)
        if code is None:
            escaped, plain = found[4], found[5]
            if escaped is not None and escaped.isalnum() and escaped not in _ESCAPES:
                raise GrammarError(f"an unknown escape \\{escaped} (position {place})")
            code = ord(_ESCAPES.get(escaped, escaped) if escaped is not None else plain)
        if code > LAST or SURROGATES[0] <= code <= SURROGATES[1]:
            raise GrammarError(f"U+{code:04X} is no character (position {place})")
        yield code


def _class(text: str, place: int) -> Chars:
    negated = text.startswith("^")
    text = text[1:] if negated else text
    found = list(_CHARACTER.finditer(text))
    codes = list(_characters(text, place))
    ranges, at = [], 0
    while at < len(codes):
        is_range = at + 2 < len(codes) and found[at + 1][0] == "-"
        high = codes[at + 2] if is_range else codes[at]
        if high < codes[at]:
            raise GrammarError(f"a range whose end is before its beginning (position {place})")
        ranges.append((codes[at], high))
        at += 3 if is_range else 1
    return chars(ranges, negated)
