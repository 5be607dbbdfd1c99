"""Numbers by their digits: ranges of integers and decimals as syntax, without enumerating them. Used by json_schema.py.

Spelling: integers are `0` or digits without leading zeros, with `-` in front of negative ones; decimals may add a
point and digits, free ones (`NUMBER`) an exponent too. Digits are bounded, so that no number runs on endlessly.
Invariant: a text belongs to a range exactly when its value does; and texts of a bounded range have few enough digits
to stay on their side of the bound when they are read as doubles.
"""

from decimal import Decimal
from typing import Final

from .spelling import EMPTY, choice, concat, optional, repeat
from .syntax import NOTHING, Chars, Node, Text, chars

INTEGER_DIGITS: Final = 16
"""Digits before the point where no bound says otherwise: all integers up to 2^53 have no more."""
FRACTION_DIGITS: Final = 17
"""Digits after the point of a free number: as many as a double's shortest spelling has."""
BOUNDED_FRACTION_DIGITS: Final = 10
"""Digits after the point where there are bounds."""
EXACT_DIGITS: Final = 15
"""Decimals of so many significant digits are different doubles."""
MAX_BOUND_DIGITS: Final = 40
MAX_TAILS: Final = 1000

DIGIT: Final = chars([(0x30, 0x39)])
NONZERO: Final = chars([(0x31, 0x39)])

_EXPONENT: Final = concat(
    chars([(0x45, 0x45), (0x65, 0x65)]), optional(chars([(0x2B, 0x2B), (0x2D, 0x2D)])), repeat(DIGIT, 1, 2)
)
NUMBER: Final = concat(
    optional(Text("-")),
    choice([Text("0"), concat(NONZERO, repeat(DIGIT, 0, INTEGER_DIGITS - 1))]),
    optional(concat(Text("."), repeat(DIGIT, 1, FRACTION_DIGITS))),
    optional(_EXPONENT),
)
"""A number without bounds: with two digits of exponent it never overflows a double."""


def integers(low: int | None, high: int | None, multiple: int = 1) -> Node | None:
    """The integers of [low, high] that are multiples of `multiple`; None as a bound: no bound.

    None where last digits do not decide the multiples, see `countable`.
    """
    if not countable(Decimal(multiple)):
        return None
    low, high = _close(low, high)
    negative, positive = _multiples(max(1, -high), -low, multiple), _multiples(max(1, low), high, multiple)
    return choice([Text("0") if low <= 0 <= high else NOTHING, positive, concat(Text("-"), negative)])


def _close(low: int | None, high: int | None) -> tuple[int, int]:
    """The range with its open ends closed: INTEGER_DIGITS, or one digit more than the bound at the other end."""
    digits = max(INTEGER_DIGITS, *(len(str(abs(bound))) + 1 for bound in (low, high) if bound is not None), 0)
    limit = 10**digits - 1
    return (-limit if low is None else low, limit if high is None else high)


def countable(multiple: Decimal) -> bool:
    """Whether few enough last digits (MAX_TAILS endings) decide divisibility by `multiple`."""
    if multiple.adjusted() >= MAX_BOUND_DIGITS or multiple != multiple.to_integral_value():
        return False
    k = _cycle(int(multiple))
    return k is not None and 10**k // int(multiple) <= MAX_TAILS


def _cycle(multiple: int) -> int | None:
    """How many last digits decide divisibility by `multiple`; None if it divides no power of ten."""
    return next((k for k in range(MAX_BOUND_DIGITS) if 10**k % multiple == 0), None)


def _multiples(low: int, high: int, multiple: int) -> Node:
    """The multiples in [low, high], low >= 1. Split as 10^k * head + tail, where the tails repeat for every head."""
    k = _cycle(multiple)
    assert k is not None, multiple
    if low > high:
        return NOTHING
    if k == 0:
        return _between(low, high)
    first, last = low // 10**k, high // 10**k

    def of_head(head: int) -> Node:
        """Multiples with this head, within the bounds."""
        start, stop = max(low, head * 10**k), min(high, (head + 1) * 10**k - 1)
        return choice(Text(str(n)) for n in range(-(-start // multiple) * multiple, stop + 1, multiple))

    if last - first < 2:
        return choice(of_head(head) for head in range(first, last + 1))
    tails = choice(Text(f"{tail:0{k}}") for tail in range(0, 10**k, multiple))
    return choice([of_head(first), concat(_between(first + 1, last - 1), tails), of_head(last)])


def _between(low: int, high: int) -> Node:
    """The integers of [low, high], low >= 1, without leading zeros."""
    a, b = str(low), str(high)
    if len(a) == len(b):
        return _same_length(a, b)
    options = [_at_least(a), _at_most(b, leading=True)]
    if len(b) - len(a) > 1:
        options.append(concat(NONZERO, repeat(DIGIT, len(a), len(b) - 2)))
    return choice(options)


def _digit(low: int, high: int) -> Node:
    if low > high:
        return NOTHING
    return Text(str(low)) if low == high else Chars(((0x30 + low, 0x30 + high),))


def _any(count: int) -> Node:
    return repeat(DIGIT, count, count)


def _at_least(digits: str) -> Node:
    """Digit strings of this length that are not below it: equal up to some place, and larger there."""
    larger = [concat(Text(digits[:i]), _digit(int(d) + 1, 9), _any(len(digits) - i - 1)) for i, d in enumerate(digits)]
    return choice([Text(digits), *larger])


def _at_most(digits: str, leading: bool = False) -> Node:
    """Digit strings of this length that are not above it; `leading`: without a zero in front."""
    smaller = [
        concat(Text(digits[:i]), _digit(int(leading and i == 0), int(d) - 1), _any(len(digits) - i - 1))
        for i, d in enumerate(digits)
    ]
    return choice([Text(digits), *smaller])


def _same_length(a: str, b: str) -> Node:
    """Digit strings from a to b, which are equally long, a <= b."""
    if a == b:
        return Text(a)
    same = next(i for i in range(len(a)) if a[i] != b[i])
    rest = len(a) - same - 1
    inner = concat(_digit(int(a[same]) + 1, int(b[same]) - 1), _any(rest))
    first, last = _at_least(a[same + 1 :]), _at_most(b[same + 1 :])
    return concat(Text(a[:same]), choice([concat(Text(a[same]), first), inner, concat(Text(b[same]), last)]))


# ------------------------------------------------------------------ decimals


def decimals(low: Decimal | None, low_open: bool, high: Decimal | None, high_open: bool) -> Node | None:
    """The decimals between the bounds (`open`: without the bound itself), or None where digits cannot decide it.

    They have no exponent and no negative zero. A bound beyond 10^15 has no effect on an end that is that far out; a
    bound of more than EXACT_DIGITS digits, or a range wholly beyond 10^15, cannot be told by doubles.
    """
    limit = Decimal(10**EXACT_DIGITS)
    bounds = [bound for bound in (low, high) if bound is not None and abs(bound) < limit]
    whole = max((len(str(abs(int(bound)))) for bound in bounds), default=1)
    places = min(BOUNDED_FRACTION_DIGITS, EXACT_DIGITS - whole)
    if (low is not None and low >= limit) or (high is not None and high <= -limit) or places < 1:
        return None
    if any(len(bound.as_tuple().digits) > EXACT_DIGITS for bound in bounds):
        return None
    scale = 10**places
    start = -(10**EXACT_DIGITS) * scale + 1 if low is None or low <= -limit else _up(low * scale, low_open)
    stop = 10**EXACT_DIGITS * scale - 1 if high is None or high >= limit else -_up(-high * scale, high_open)
    positive = _grid(max(start, 0), stop, places)
    negative = _grid(max(-stop, 1), -start, places)
    return choice([positive, concat(Text("-"), negative)])


def _up(value: Decimal, open_end: bool) -> int:
    """The smallest integer not below `value`, or above it."""
    floor = int(value // 1) - (value % 1 < 0)
    return floor + 1 if open_end or floor != value else floor


def _grid(start: int, stop: int, places: int) -> Node:
    """Decimals of up to `places` places from start to stop, both >= 0 and counted in units of the last place."""
    if start > stop:
        return NOTHING
    scale = 10**places
    (first, low), (last, high) = divmod(start, scale), divmod(stop, scale)
    if first == last:
        return concat(Text(str(first)), _fraction(low, high, places))
    return choice(
        [
            concat(Text(str(first)), _fraction(low, scale - 1, places)),
            concat(_between(first + 1, last - 1) if first + 1 < last else NOTHING, _fraction(0, scale - 1, places)),
            concat(Text(str(last)), _fraction(0, high, places)),
        ]
    )


def _fraction(low: int, high: int, places: int) -> Node:
    """Nothing, or a point and 1 to `places` digits, worth low to high units of the last place."""
    absent = EMPTY if low == 0 else NOTHING
    if low == 0 and high == 10**places - 1:
        return optional(concat(Text("."), repeat(DIGIT, 1, places)))
    options = []
    for count in range(1, places + 1):
        unit = 10 ** (places - count)
        a, b = -(-low // unit), high // unit
        options.append(_same_length(f"{a:0{count}}", f"{b:0{count}}") if a <= b else NOTHING)
    return choice([absent, concat(Text("."), choice(options))])
