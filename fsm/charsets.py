r"""Sets of characters as `re` defines them: \d, \s, \w and what (?i) adds.

Used by pattern.py. Nothing is retold here: the standard library's `re` is asked which characters match, so that our
dialect is that of the Python we run on, whichever Unicode it knows.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Final

import numpy as np

from .syntax import LAST, Chars, Ranges, chars

CASED_END: Final = 0x20000
"""No character with an upper or lower case lies beyond."""

NEWLINE: Final[Ranges] = ((10, 10),)


@cache
def category(letter: str, ascii_only: bool) -> Ranges:
    r"""The characters of \d, \s or \w, or of their complements \D, \S, \W."""
    if letter.isupper():
        return chars(category(letter.lower(), ascii_only), negated=True).ranges
    everything = np.arange(LAST + 1, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    runs = re.compile(rf"\{letter}+", re.ASCII if ascii_only else 0).finditer(everything)
    return chars((run.start(), run.end() - 1) for run in runs).ranges


def ignoring_case(plain: Chars, source: str, ascii_only: bool) -> Chars:
    """What the class or character `source`, which matches `plain`, matches under (?i).

    Only characters that have a case can make a difference, so only those are tried.
    """
    text, ranges = _cased()
    found = re.compile(source, re.IGNORECASE | (re.ASCII if ascii_only else 0)).finditer(text)
    uncased = chars([*chars(plain.ranges, negated=True).ranges, *ranges], negated=True)
    return chars([*uncased.ranges, *((ord(match[0]), ord(match[0])) for match in found)])


def escaped(ranges: Iterable[tuple[int, int]]) -> str:
    """Source of a class with these ranges, without the brackets."""
    return "".join(rf"\U{low:08X}-\U{high:08X}" for low, high in ranges)


@cache
def _cased() -> tuple[str, Ranges]:
    """All characters with a case, as text and as ranges."""
    some = [c for c in map(chr, range(CASED_END)) if c.lower() != c or c.upper() != c]
    return "".join(some), chars((ord(c), ord(c)) for c in some).ranges
