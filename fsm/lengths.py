"""How long the texts of a syntax tree are, whether one text is among them, and the part of a tree within length bounds.
Used by shapes.py for constants, json_schema.py for minLength and maxLength beside a pattern or format, and compiler.py.

Lengths count characters. Invariant: `within` is exact; where it would need to multiply the tree out, it says so.
"""

from typing import Final

from .spelling import EMPTY, choice, concat, repeat
from .syntax import NOTHING, Chars, Choice, Concat, Node, Repeat, Text

Span = tuple[int, int | None]
"""Least and greatest length; None: without bound."""
UNKNOWN: Final[Span] = (-1, -1)


def span(node: Node, known: dict[int, Span | None] | None = None) -> Span | None:
    """The least and greatest length of a text of `node`; None if it has no texts. `known`: by the ids of nodes, for
    trees whose parts are shared many times over."""
    known = {} if known is None else known
    found = known.get(id(node), UNKNOWN)
    if found == UNKNOWN:
        found = known[id(node)] = _span(node, known)
    return found


def _span(node: Node, known: dict[int, Span | None]) -> Span | None:
    match node:
        case Text(text):
            return len(text), len(text)
        case Chars(ranges):
            return (1, 1) if ranges else None
        case Concat(parts):
            return _sum(parts, known)
        case Choice(options):
            spans = [inner for inner in (span(option, known) for option in options) if inner is not None]
            highs = [high for _, high in spans]
            if not spans:
                return None
            return min(low for low, _ in spans), None if None in highs else max(h for h in highs if h is not None)
        case Repeat(body, low, high):
            inner = span(body, known)
            if inner is None:
                return None if low else (0, 0)
            return inner[0] * low, _times(inner[1], high)


def least_states(node: Node) -> int:
    """How many states every automaton of this language has at least; found without multiplying repeats out.

    The states along its longest text differ in how much may still come at most; where texts have no greatest length,
    those along its shortest one in how much must still come.
    """
    try:
        lengths = span(node)
    except RecursionError:  # nfa.py has a limit of its own, and says so
        return 0
    if lengths is None:
        return 0
    low, high = lengths
    return 1 + (low if high is None else high)


def _sum(parts: tuple[Node, ...], known: dict[int, Span | None]) -> Span | None:
    low: int = 0
    high: int | None = 0
    for part in parts:
        inner = span(part, known)
        if inner is None:
            return None
        low += inner[0]
        high = None if high is None or inner[1] is None else high + inner[1]
    return low, high


def _times(a: int | None, b: int | None) -> int | None:
    if a == 0 or b == 0:
        return 0
    return None if a is None or b is None else a * b


def within(node: Node, low: int, high: int | None) -> Node | None:
    """The texts of `node` of low to high characters, or None where this function cannot tell them exactly.

    It can where lengths are implied, or where one repetition of a fixed length decides them in each alternative.
    """
    whole = span(node)
    if whole is None or (high is not None and (high < low or whole[0] > high)):
        return NOTHING
    if whole[1] is not None and whole[1] < low:
        return NOTHING
    if whole[0] >= low and (high is None or (whole[1] is not None and whole[1] <= high)):
        return node
    match node:
        case Choice(options):
            parts = [within(option, low, high) for option in options]
            return None if None in parts else choice(part for part in parts if part is not None)
        case Repeat(body, least, most):
            return _fewer(body, least, most, low, high)
        case Concat(parts):
            return _one_varies(parts, low, high)
        case _:
            return None


def _fewer(body: Node, least: int, most: int | None, low: int, high: int | None) -> Node | None:
    """`within` of a repetition whose body has a fixed length or occurs at most once."""
    inner = span(body)
    if inner is not None and inner[0] == inner[1]:
        first = max(least, -(-low // inner[0]))
        last = most if high is None else min(high // inner[0], most if most is not None else high)
        return repeat(body, first, last)
    if (least, most) == (0, 1):
        once = within(body, low, high)
        return None if once is None else choice([EMPTY if low <= 0 else NOTHING, once])
    return None


def _one_varies(parts: tuple[Node, ...], low: int, high: int | None) -> Node | None:
    """`within` of a sequence in which only one part varies in length."""
    spans = [span(part) for part in parts]
    varying = [i for i, inner in enumerate(spans) if inner is not None and inner[0] != inner[1]]
    if len(varying) != 1:
        return None
    i = varying[0]
    fixed = sum(inner[0] for j, inner in enumerate(spans) if inner is not None and j != i)
    part = within(parts[i], max(0, low - fixed), None if high is None else high - fixed)
    return None if part is None else concat(*parts[:i], part, *parts[i + 1 :])


# ------------------------------------------------------------------ membership


def matches(node: Node, text: str) -> bool:
    """Whether `text` is in the language of `node`. Time is polynomial: sets of places, no backtracking."""
    return len(text) in _ends(node, text, {0})


def _ends(node: Node, text: str, starts: set[int]) -> set[int]:
    """Where a text of `node` can end that starts at one of these places."""
    match node:
        case Text(literal):
            return {i + len(literal) for i in starts if text.startswith(literal, i)}
        case Chars(ranges):
            return {i + 1 for i in starts if i < len(text) and any(a <= ord(text[i]) <= b for a, b in ranges)}
        case Concat(parts):
            for part in parts:
                if not starts:
                    break
                starts = _ends(part, text, starts)
            return starts
        case Choice(options):
            return set().union(*(_ends(option, text, starts) for option in options)) if starts else set()
        case Repeat(body, low, high):
            return _repeat_ends(body, low, high, text, starts)


def _repeat_ends(body: Node, low: int, high: int | None, text: str, starts: set[int]) -> set[int]:
    for _ in range(low):
        after = _ends(body, text, starts)
        if after == starts:
            break
        starts = after
    ends, fresh, count = set(starts), starts, low
    while fresh and (high is None or count < high):
        fresh = _ends(body, text, fresh) - ends
        ends |= fresh
        count += 1
    return ends
