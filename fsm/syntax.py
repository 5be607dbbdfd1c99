"""The syntax tree of a regular language over Unicode text: what patterns and JSON schemas become, and automata are
made from.

Written by pattern.py (regexes) and json_schema.py, read by nfa.py, which lowers characters to UTF-8 bytes. Nodes are
immutable and compare by value, so equal subtrees may be shared. Invariant: every `Chars` holds Unicode scalar values
only (no surrogates), in sorted, disjoint, non-adjacent ranges.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

SURROGATES: Final = (0xD800, 0xDFFF)
LAST: Final = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
"""Inclusive ranges of code points."""


@dataclass(frozen=True, slots=True)
class Text:
    """Exactly this string; "" matches the empty string."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of these; () matches nothing. Make them with `chars`."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Concat:
    """All parts, one after another."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Choice:
    """Any of the options; without options it matches nothing."""

    options: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Repeat:
    """`low` to `high` times `node`; high None: without bound."""

    node: "Node"
    low: int
    high: int | None


Node = Text | Chars | Concat | Choice | Repeat

NOTHING: Final = Choice(())


def chars(ranges: Iterable[tuple[int, int]], negated: bool = False) -> Chars:
    """Return the set of these inclusive ranges (any order, may overlap), or of all other characters."""
    merged = _merge([*ranges, SURROGATES] if negated else ranges)
    if negated:
        starts = [0, *(high + 1 for _, high in merged)]
        ends = [*(low - 1 for low, _ in merged), LAST]
        return Chars(tuple((a, b) for a, b in zip(starts, ends, strict=True) if a <= b))
    below = [(a, min(b, SURROGATES[0] - 1)) for a, b in merged if a < SURROGATES[0]]
    above = [(max(a, SURROGATES[1] + 1), b) for a, b in merged if b > SURROGATES[1]]
    return Chars((*below, *above))


def _merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
