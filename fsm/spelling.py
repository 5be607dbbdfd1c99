"""How JSON is written: strings, constants, whitespace, and the joining of syntax nodes. Used by all that turns schemas
into syntax.

One value has one spelling. Strings are raw UTF-8 but for `"`, `\\` and control characters, which take the escape that
`json.dumps(..., ensure_ascii=False)` gives them; whitespace is what the policy says. Invariant: what `concat`,
`choice` and `repeat` return is `NOTHING` whenever a part's emptiness makes it so, hence an unsatisfiable place of a
schema shows at the top.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from .syntax import NOTHING, Chars, Choice, Concat, Node, Ranges, Repeat, Text, chars

EMPTY: Final = Text("")
ANY_CHARACTER: Final = chars((), negated=True)
BLANK: Final = chars([(0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20)])
MAX_RUN: Final = 64
"""The most whitespace in one place that a policy may allow."""
MAX_FLAT: Final = 16
MAX_JOINED: Final = 4096
"""Parts of longer sequences and choices, and longer texts, are left as they are: they may be shared many times over."""

ESCAPED: Final = {code: json.dumps(chr(code))[1:-1] for code in (*range(0x20), ord('"'), ord("\\"))}
"""Code points that never stand raw in a JSON string, and how they are written instead."""


# ------------------------------------------------------------------ joining


def is_nothing(node: Node) -> bool:
    """Whether the node was built as the empty language (a cheap test, not a proof)."""
    return (isinstance(node, Choice) and not node.options) or (isinstance(node, Chars) and not node.ranges)


def concat(*parts: Node) -> Node:
    """The parts one after another: flat, neighbouring texts joined; NOTHING if one of them is."""
    flat: list[Node] = []
    for part in parts:
        if is_nothing(part):
            return NOTHING
        for piece in part.parts if isinstance(part, Concat) and len(part.parts) <= MAX_FLAT else (part,):
            last = flat[-1] if flat else None
            if isinstance(piece, Text) and isinstance(last, Text) and len(piece.text) + len(last.text) <= MAX_JOINED:
                flat[-1] = Text(last.text + piece.text)
            elif piece != EMPTY:
                flat.append(piece)
    if not flat:
        return EMPTY
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def choice(options: Iterable[Node]) -> Node:
    """Any of the options, flat, without those that are NOTHING and without repeated texts."""
    flat: list[Node] = []
    texts: set[str] = set()
    for option in options:
        for piece in option.options if isinstance(option, Choice) and len(option.options) <= MAX_FLAT else (option,):
            if is_nothing(piece) or (isinstance(piece, Text) and piece.text in texts):
                continue
            if isinstance(piece, Text):
                texts.add(piece.text)
            flat.append(piece)
    if not flat:
        return NOTHING
    return flat[0] if len(flat) == 1 else Choice(tuple(flat))


def repeat(node: Node, low: int, high: int | None) -> Node:
    """`low` to `high` times `node`; NOTHING if the bounds contradict each other, or `node` is and must occur."""
    if high is not None and low > high:
        return NOTHING
    if high == 0 or node == EMPTY or is_nothing(node):
        return NOTHING if low and is_nothing(node) else EMPTY
    return node if low == high == 1 else Repeat(node, low, high)


def optional(node: Node) -> Node:
    return repeat(node, 0, 1)


# ------------------------------------------------------------------ strings


def escape(text: str) -> str:
    """How these characters stand between the quotes of a JSON string."""
    return text.translate(ESCAPED)


def spell(node: Node) -> Node:
    """The language of `node`, written between the quotes of JSON strings: every character by its one spelling."""
    match node:
        case Text(text):
            return Text(escape(text))
        case Chars(ranges):
            return _spell_characters(ranges)
        case Concat(parts):
            return concat(*map(spell, parts))
        case Choice(options):
            return choice(map(spell, options))
        case Repeat(body, low, high):
            return repeat(spell(body), low, high)


@lru_cache(maxsize=256)
def _spell_characters(ranges: Ranges) -> Node:
    raw: list[tuple[int, int]] = []
    escapes: dict[str, list[int]] = {}
    for code, written in ESCAPED.items():
        if any(a <= code <= b for a, b in ranges):  # by all but the last character: few nodes for 34 escapes
            escapes.setdefault(written[:-1], []).append(ord(written[-1]))
    for a, b in ranges:
        start = a
        for code in sorted(ESCAPED):
            if start <= code <= b:
                raw.append((start, code - 1))
                start = code + 1
        raw.append((start, b))
    written_out = [concat(Text(start), chars([(c, c) for c in ends])) for start, ends in escapes.items()]
    return choice([Chars(tuple((a, b) for a, b in raw if a <= b)), *written_out])


def quoted(node: Node) -> Node:
    """The JSON strings whose decoded text is in the language of `node`."""
    return concat(Text('"'), spell(node), Text('"'))


def other_strings(excluded: Iterable[str]) -> Node:
    """All texts but these. For each prefix of an excluded text: the ways to leave it there. Flat, as keys are short."""
    words = set(excluded)
    following: dict[str, set[int]] = {"": set()}
    for word in words:
        for end in range(len(word) + 1):
            following.setdefault(word[:end], set())
            if end < len(word):
                following[word[:end]].add(ord(word[end]))
    ways: list[Node] = []
    for prefix, codes in following.items():
        leaving = concat(chars([(c, c) for c in codes], negated=True), repeat(ANY_CHARACTER, 0, None))
        ways.append(concat(Text(prefix), leaving if prefix in words else optional(leaving)))
    return choice(ways)


# ------------------------------------------------------------------ whitespace


@dataclass(frozen=True, slots=True)
class Whitespace:
    """Where whitespace stands between the tokens of a JSON text; always bounded.

    comma, colon    what separates members, and a key from its value
    indent          None: all on one line; else each member on a line of its own, as json.dumps(indent=...) does
    max_run         above 0: up to so many spaces, tabs and newlines beside each bracket, comma and colon, and the
                    other fields have no effect
    """

    comma: str = ", "
    colon: str = ": "
    indent: int | None = None
    max_run: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.max_run <= MAX_RUN or not 0 <= (self.indent or 0) <= MAX_RUN:
            raise ValueError(f"whitespace runs and indents are of 0 to {MAX_RUN} characters")

    def _around(self, mark: str) -> Node:
        return concat(self._blanks(), Text(mark), self._blanks())

    def _blanks(self) -> Node:
        return repeat(BLANK, 0, self.max_run)

    def _line(self, depth: int) -> str:
        return "" if self.indent is None else "\n" + " " * (self.indent * depth)

    def key_mark(self) -> Node:
        """What stands between a key and its value."""
        return self._around(":") if self.max_run else Text(self.colon)

    def separator(self, depth: int) -> Node:
        """What stands between two members of a container; `depth` counts the brackets around them."""
        if self.max_run:
            return self._around(",")
        return Text(self.comma if self.indent is None else self.comma.rstrip() + self._line(depth))

    def enclose(self, brackets: str, members: Node, depth: int) -> Node:
        """The brackets around one or more members; `depth` counts these brackets too."""
        opening, closing = Text(brackets[0]), Text(brackets[1])
        if self.max_run:
            return concat(opening, self._blanks(), members, self._blanks(), closing)
        return concat(opening, Text(self._line(depth)), members, Text(self._line(depth - 1)), closing)

    def empty(self, brackets: str) -> Node:
        """The container without members."""
        return concat(Text(brackets[0]), self._blanks(), Text(brackets[1]))


DEFAULT: Final = Whitespace()
"""`{"a": 1, "b": [2, 3]}`, as json.dumps writes by default."""
SPACED: Final = DEFAULT
COMPACT: Final = Whitespace(comma=",", colon=":")


def indented(width: int) -> Whitespace:
    """Each member on a line of its own, `width` spaces deeper than its container. ValueError beyond MAX_RUN."""
    return Whitespace(indent=width)


def any_whitespace(max_run: int) -> Whitespace:
    """Up to `max_run` blanks wherever JSON allows them inside the text. ValueError unless 1 <= max_run <= MAX_RUN."""
    if max_run < 1:
        raise ValueError("max_run is at least 1; use COMPACT for none")
    return Whitespace(max_run=max_run)


FIXED: Final = {"spaced": SPACED, "compact": COMPACT}
COUNTED: Final[dict[str, Callable[[int], Whitespace]]] = {"any": any_whitespace, "indent": indented}


def policy(name: str) -> Whitespace:
    """The whitespace of a policy by its name: `spaced`, `compact`, `any N` or `indent N`. ValueError for others."""
    kind, _, number = name.partition(" ")
    if kind in FIXED and not number:
        return FIXED[kind]
    if kind in COUNTED and number.isdecimal():
        return COUNTED[kind](int(number))
    raise ValueError(f"{name} is no policy of whitespace")


# ------------------------------------------------------------------ constants


def constant(value: Any, whitespace: Whitespace, depth: int = 0) -> Node:
    """This JSON value's spelling: members in their order, numbers as json.dumps writes them. At most 64 deep."""
    if isinstance(value, dict):
        pairs = [
            concat(Text(f'"{escape(key)}"'), whitespace.key_mark(), constant(item, whitespace, depth + 1))
            for key, item in value.items()
        ]
        return container("{}", pairs, whitespace, depth)
    if isinstance(value, list):
        return container("[]", [constant(item, whitespace, depth + 1) for item in value], whitespace, depth)
    if isinstance(value, str):
        return Text(f'"{escape(value)}"')
    return Text(json.dumps(value))


def container(brackets: str, members: list[Node], whitespace: Whitespace, depth: int) -> Node:
    """An array or object of exactly these members, inside `depth` other brackets."""
    if not members:
        return whitespace.empty(brackets)
    separator = whitespace.separator(depth + 1)
    rest = [part for member in members[1:] for part in (separator, member)]
    return whitespace.enclose(brackets, concat(members[0], *rest), depth + 1)
