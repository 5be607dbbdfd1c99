"""Sets of JSON values as data: what a schema means, before it is spelled. Made by schema_reader.py, written out as
syntax by json_schema.py.

A set (`Values`) is a union of constants and shapes; a shape describes values of one type by their bounds. Sets are
intersected, and tested for a value. Invariant: a set holds exactly the values that the schema admits; only at the very
end does json_schema.py leave out what its spelling leaves out. Shapes that are provably empty are dropped at once.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Final

from .errors import GrammarError
from .lengths import matches
from .syntax import Node


class SchemaError(GrammarError):
    """The schema is invalid, too large, or admits no value. `pointer` leads to the keyword at fault; `reason` is
    the message without it."""

    code = "invalid_json_schema"

    def __init__(self, message: str, pointer: str) -> None:
        super().__init__(f"{message} (at {pointer or 'the root'} of the schema)")
        self.reason, self.pointer = message, pointer


class Unsupported(SchemaError):
    """A valid schema that finite syntax cannot express exactly: another backend may take it."""

    code = "unsupported_json_schema"


MAX_WORK: Final = 1_000_000
PAIR: Final = 10
"""What it costs to intersect two shapes, against 1 for looking up a constant in a shape."""


class Work:
    """How much may still be intersected: combinators multiply."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, cost: int, pointer: str) -> None:
        self.left -= cost
        if self.left < 0:
            raise Unsupported("its combinations of alternatives are too many", pointer)


# ------------------------------------------------------------------ data


@dataclass(frozen=True, slots=True, eq=False)
class Number:
    """Numbers between two bounds (`open`: without the bound); multiples of `multiple`, an integer, if `integer`."""

    pointer: str
    integer: bool = False
    low: Decimal | None = None
    low_open: bool = False
    high: Decimal | None = None
    high_open: bool = False
    multiple: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Language:
    """Texts allowed by a keyword. `source` names it: equal sources are equal languages. `partial`: a subset of them."""

    source: str
    node: Node
    pointer: str
    partial: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class String:
    """Strings of low to high characters that are in each of the languages."""

    pointer: str
    low: int = 0
    high: int | None = None
    languages: tuple[Language, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """Arrays of low to high items: the first ones by `prefix`, all others by `rest`."""

    pointer: str
    rest: "Values"
    prefix: "tuple[Values, ...]" = ()
    low: int = 0
    high: int | None = None
    unique: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Object:
    """Objects of low to high members.

    properties   what the members of these names are, in the order in which they are written
    required     names that must be there -> where the schema says so
    additional   what all other members are; None: the schema is silent, which admits anything
    declared     whether the schema lists properties, be they none
    """

    pointer: str
    properties: "dict[str, Values]" = field(default_factory=dict)
    required: dict[str, str] = field(default_factory=dict)
    additional: "Values | None" = None
    declared: bool = False
    low: int = 0
    high: int | None = None


Shape = Number | String | Array | Object


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """A set of JSON values. `anything`: all of them, whatever the other fields say."""

    pointer: str
    constants: dict[Any, Any] = field(default_factory=dict)
    """identity -> value"""
    shapes: tuple[Shape, ...] = ()
    anything: bool = False

    @property
    def empty(self) -> bool:
        """Whether this is provably the empty set."""
        return not (self.anything or self.constants or self.shapes)


def identity(value: Any) -> Any:
    """A hashable that is equal for equal JSON values: 1 and 1.0 are, 1 and true are not, members have no order."""
    if isinstance(value, dict):
        return "object", frozenset((key, identity(item)) for key, item in value.items())
    if isinstance(value, list):
        return "array", tuple(map(identity, value))
    return ("number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__), value


def constants(values: Iterable[Any], pointer: str) -> Values:
    return Values(pointer, {identity(value): value for value in values})


TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")


def of_type(name: str, pointer: str) -> Values:
    """All values of a JSON type."""
    match name:
        case "null":
            return constants([None], pointer)
        case "boolean":
            return constants([True, False], pointer)
        case "array":
            return Values(pointer, shapes=(Array(pointer, Values(pointer, anything=True)),))
        case "object":
            return Values(pointer, shapes=(Object(pointer),))
        case "string":
            return Values(pointer, shapes=(String(pointer),))
    return Values(pointer, shapes=(Number(pointer, integer=name == "integer"),))


def spread(values: Values) -> Values:
    """The same set without the short form `anything`."""
    if not values.anything:
        return values
    return union([of_type(name, values.pointer) for name in TYPES if name != "integer"], values.pointer)


def union(sets: Iterable[Values], pointer: str) -> Values:
    sets = list(sets)
    together: dict[Any, Any] = {}
    for one in sets:
        together |= one.constants
    shapes = tuple(shape for one in sets for shape in one.shapes)
    return Values(pointer, together, shapes, anything=any(one.anything for one in sets))


# ------------------------------------------------------------------ membership


def admits(values: Values, value: Any) -> bool:
    """Whether the value is in the set. Raises Unsupported where only a subset of a format is known."""
    return values.anything or identity(value) in values.constants or any(_fits(s, value) for s in values.shapes)


def _fits(shape: Shape, value: Any) -> bool:
    match shape, value:
        case Number(), int() | float() if not isinstance(value, bool):
            return _number_fits(shape, Decimal(value) if isinstance(value, int) else Decimal(repr(value)))
        case String(), str():
            return _in_range(len(value), shape) and all(_speaks(language, value) for language in shape.languages)
        case Array(), list():
            unique = not shape.unique or len({identity(item) for item in value}) == len(value)
            items = (shape.prefix[i] if i < len(shape.prefix) else shape.rest for i in range(len(value)))
            return unique and _in_range(len(value), shape) and all(map(admits, items, value))
        case Object(), dict():
            known = all(admits(member(shape, key), item) for key, item in value.items())
            return known and _in_range(len(value), shape) and all(key in value for key in shape.required)
    return False


def _in_range(count: int, shape: String | Array | Object) -> bool:
    return shape.low <= count and (shape.high is None or count <= shape.high)


def _number_fits(shape: Number, value: Decimal) -> bool:
    low = shape.low is None or value > shape.low or (value == shape.low and not shape.low_open)
    high = shape.high is None or value < shape.high or (value == shape.high and not shape.high_open)
    return low and high and (not shape.integer or (value == int(value) and int(value) % shape.multiple == 0))


def _speaks(language: Language, text: str) -> bool:
    if matches(language.node, text):
        return True
    if language.partial:
        raise Unsupported("a constant that this format may or may not admit", language.pointer)
    return False


def member(shape: Object, name: str) -> Values:
    """What the schema says of the member of this name."""
    found = shape.properties.get(name, shape.additional)
    return Values(shape.pointer, anything=True) if found is None else found


# ------------------------------------------------------------------ intersection


def meet(a: Values, b: Values, work: Work) -> Values:
    """The intersection. Raises Unsupported when there are too many pairs of alternatives."""
    if a.anything or b.anything:
        return b if a.anything else a
    work.spend(len(a.constants) * len(b.shapes) + len(b.constants) * len(a.shapes), a.pointer)
    both = {key: value for key, value in a.constants.items() if admits(b, value)}
    both |= {key: value for key, value in b.constants.items() if key not in both and admits(a, value)}
    return Values(a.pointer, both, tuple(_meet_shapes(a.shapes, b.shapes, work)))


def _meet_shapes(a: tuple[Shape, ...], b: tuple[Shape, ...], work: Work) -> Iterator[Shape]:
    for one in a:
        work.spend(PAIR * (len(b) + 1), one.pointer)
        for other in b:
            shape = _meet_pair(one, other, work)
            if shape is not None and not is_empty(shape):
                yield shape


def _meet_pair(a: Shape, b: Shape, work: Work) -> Shape | None:
    match a, b:
        case Number(), Number():
            return _meet_numbers(a, b)
        case String(), String():
            known = {language.source for language in a.languages}
            more = tuple(language for language in b.languages if language.source not in known)
            return replace(a, low=max(a.low, b.low), high=_least(a.high, b.high), languages=a.languages + more)
        case Array(), Array():
            count = max(len(a.prefix), len(b.prefix))
            prefix = tuple(meet(_item(a, i), _item(b, i), work) for i in range(count))
            unique, rest = a.unique or b.unique, meet(a.rest, b.rest, work)
            return Array(a.pointer, rest, prefix, max(a.low, b.low), _least(a.high, b.high), unique)
        case Object(), Object():
            return _meet_objects(a, b, work)
    return None


def _item(shape: Array, index: int) -> Values:
    return shape.prefix[index] if index < len(shape.prefix) else shape.rest


def _least(a: int | None, b: int | None) -> int | None:
    return min((bound for bound in (a, b) if bound is not None), default=None)


def _meet_numbers(a: Number, b: Number) -> Number:
    lows = [(s.low, s.low_open) for s in (a, b) if s.low is not None]
    highs = [(s.high, not s.high_open) for s in (a, b) if s.high is not None]
    low, low_open = max(lows, default=(None, False))
    high, high_closed = min(highs, default=(None, True))
    multiple = math.lcm(a.multiple, b.multiple)
    return Number(a.pointer, a.integer or b.integer, low, low_open, high, not high_closed, multiple)


def _meet_objects(a: Object, b: Object, work: Work) -> Object:
    names = [*a.properties, *(name for name in b.properties if name not in a.properties)]
    work.spend(PAIR * len(names), a.pointer)
    # Required members first: where two variants differ in a constant, the rest need not be looked at.
    required = b.required | a.required
    met = {name: meet(member(a, name), member(b, name), work) for name in names if name in required}
    clash = next((name for name, values in met.items() if values.empty), None)
    if clash is not None:
        return replace(a, properties={clash: met[clash]}, required=required)
    met |= {name: meet(member(a, name), member(b, name), work) for name in names if name not in required}
    if a.additional is None or b.additional is None:
        additional = a.additional if b.additional is None else b.additional
    else:
        additional = meet(a.additional, b.additional, work)
    low, high, declared = max(a.low, b.low), _least(a.high, b.high), a.declared or b.declared
    return Object(a.pointer, {name: met[name] for name in names}, required, additional, declared, low, high)


def is_empty(shape: Shape) -> bool:
    """Whether the shape provably admits nothing."""
    if not isinstance(shape, Number) and shape.high is not None and shape.low > shape.high:
        return True
    match shape:
        case Number():
            if shape.integer:
                low, high = whole_bounds(shape)
                return low is not None and high is not None and -(-low // shape.multiple) * shape.multiple > high
            return (
                shape.low is not None
                and shape.high is not None
                and (shape.low > shape.high or (shape.low == shape.high and (shape.low_open or shape.high_open)))
            )
        case Array():
            return any(_item(shape, i).empty for i in range(min(shape.low, len(shape.prefix) + 1)))
        case Object():
            too_many = shape.high is not None and len(shape.required) > shape.high
            return too_many or any(member(shape, name).empty for name in shape.required)
    return False


def whole_bounds(shape: Number) -> tuple[int | None, int | None]:
    """The least and greatest integer within the bounds."""
    low = None if shape.low is None else math.floor(shape.low) + 1 if shape.low_open else math.ceil(shape.low)
    high = None if shape.high is None else math.ceil(shape.high) - 1 if shape.high_open else math.floor(shape.high)
    return low, high
