"""The keywords of each JSON type, as shapes. Used by schema_reader.py, which hands in itself to read subschemas.

Each function takes a schema and the pointer to it, and returns the shape of one type as the schema's own keywords
bound it. Invariant: a keyword of the type is obeyed or refused, never passed over; those of other types have no effect.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

from .digits import MAX_BOUND_DIGITS, countable
from .ecma import parse_ecma
from .errors import PatternError
from .formats import format_syntax
from .shapes import Array, Language, Number, Object, SchemaError, String, Unsupported, Values

Read = Callable[[Any, str], Values]
"""Reads the subschema at a pointer."""

Schema = dict[str, Any]

KEYWORDS: Final = {
    "string": "minLength maxLength pattern format".split(),
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split(),
    "array": "items prefixItems additionalItems minItems maxItems uniqueItems contains unevaluatedItems".split(),
    "object": (
        "properties required additionalProperties minProperties maxProperties patternProperties propertyNames "
        "dependentRequired dependentSchemas dependencies unevaluatedProperties"
    ).split(),
}
"""Type -> the keywords that concern it alone; those of "number" concern "integer" too."""

TRIVIAL: Final[dict[str, list[Any]]] = {
    "contains": [],
    "unevaluatedItems": [True, {}],
    "unevaluatedProperties": [True, {}],
    "patternProperties": [{}],
    "propertyNames": [True, {}, {"type": "string"}],
    "dependentRequired": [{}],
    "dependentSchemas": [{}],
    "dependencies": [{}],
}
"""Keywords that are refused -> the values with which they say nothing."""


def step(pointer: str, *names: str | int) -> str:
    """The JSON pointer (RFC 6901) further down."""
    return pointer + "".join("/" + str(name).replace("~", "~0").replace("/", "~1") for name in names)


def refuse_unsupported(schema: Schema, kind: str, pointer: str) -> None:
    """Raise Unsupported at the first keyword of this type that cannot be expressed."""
    for keyword in KEYWORDS[kind]:
        if keyword in TRIVIAL and keyword in schema and schema[keyword] not in TRIVIAL[keyword]:
            raise Unsupported(f"{keyword} is not supported", step(pointer, keyword))


def _count(schema: Schema, keyword: str, pointer: str) -> int | None:
    value = schema.get(keyword)
    if keyword not in schema:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise SchemaError(f"{keyword} is a whole number from 0", step(pointer, keyword))
    return int(value)


def _typed(schema: Schema, keyword: str, kind: type, default: Any, pointer: str) -> Any:
    value = schema.get(keyword, default)
    if not isinstance(value, kind):
        name = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}[kind]
        raise SchemaError(f"{keyword} is {name}", step(pointer, keyword))
    return value


# ------------------------------------------------------------------ scalars


def string_shape(schema: Schema, pointer: str) -> String:
    """Raises SchemaError for malformed bounds, Unsupported for patterns and formats that have no exact syntax."""
    languages = []
    if "pattern" in schema:
        source, place = _typed(schema, "pattern", str, "", pointer), step(pointer, "pattern")
        try:
            languages.append(Language(f"pattern {source}", parse_ecma(source), place))
        except PatternError as error:
            raise Unsupported(f"the pattern cannot be read: {error}", place) from None
    if "format" in schema:
        name, place = _typed(schema, "format", str, "", pointer), step(pointer, "format")
        try:
            node = format_syntax(name)
        except LookupError:
            raise Unsupported(f"the format {name} is not supported", place) from None
        if node is not None:
            languages.append(Language(f"format {name}", node, place, partial=True))
    low, high = _count(schema, "minLength", pointer), _count(schema, "maxLength", pointer)
    return String(pointer, low or 0, high, tuple(languages))


def _bound(schema: Schema, keyword: str, pointer: str) -> Decimal | None:
    value = schema.get(keyword)
    if keyword not in schema:
        return None
    if isinstance(value, bool):
        raise Unsupported(f"{keyword} as true or false is of draft 4: give the bound itself", step(pointer, keyword))
    if not isinstance(value, int | float):
        raise SchemaError(f"{keyword} is a number", step(pointer, keyword))
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def number_shape(schema: Schema, pointer: str, integer: bool) -> Number:
    """Raises SchemaError for malformed bounds, Unsupported for huge ones and multiples that digits cannot decide."""
    lows = [(_bound(schema, "minimum", pointer), False), (_bound(schema, "exclusiveMinimum", pointer), True)]
    highs = [(_bound(schema, "maximum", pointer), True), (_bound(schema, "exclusiveMaximum", pointer), False)]
    low, low_open = max(((b, is_open) for b, is_open in lows if b is not None), default=(None, False))
    high, high_closed = min(((b, closed) for b, closed in highs if b is not None), default=(None, True))
    multiple = _bound(schema, "multipleOf", pointer)
    place = step(pointer, "multipleOf")
    if multiple is not None and multiple <= 0:
        raise SchemaError("multipleOf is above 0", place)
    if multiple is not None and not countable(multiple):
        raise Unsupported("only multiples of integers that divide a small power of ten are supported", place)
    integer = integer or multiple is not None
    for keyword in KEYWORDS["number"] if integer else ():
        bound = _bound(schema, keyword, pointer)
        if bound is not None and bound.adjusted() >= MAX_BOUND_DIGITS:
            raise Unsupported(f"bounds of integers have at most {MAX_BOUND_DIGITS} digits", step(pointer, keyword))
    return Number(pointer, integer, low, low_open, high, not high_closed, int(multiple or 1))


# ------------------------------------------------------------------ containers


def array_shape(schema: Schema, pointer: str, read: Read) -> Array:
    """Raises SchemaError for malformed keywords, Unsupported for those that need to look at several items at once."""
    refuse_unsupported(schema, "array", pointer)
    prefix_word, rest_word = "prefixItems", "items"
    if isinstance(schema.get("items"), list):  # before draft 2020-12
        prefix_word, rest_word = "items", "additionalItems"
    prefix = _typed(schema, prefix_word, list, [], pointer)
    unique = _typed(schema, "uniqueItems", bool, False, pointer)
    low, high = _count(schema, "minItems", pointer), _count(schema, "maxItems", pointer)
    rest = read(schema.get(rest_word, True), step(pointer, rest_word) if rest_word in schema else pointer)
    items = tuple(read(item, step(pointer, prefix_word, i)) for i, item in enumerate(prefix))
    return Array(pointer, rest, items, low or 0, high, unique)


def object_shape(schema: Schema, pointer: str, read: Read) -> Object:
    """Raises SchemaError for malformed keywords, Unsupported for those that let members depend on each other."""
    refuse_unsupported(schema, "object", pointer)
    properties = _typed(schema, "properties", dict, {}, pointer)
    names = _typed(schema, "required", list, [], pointer)
    required = {}
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise SchemaError("required is an array of names", step(pointer, "required", i))
        required[name] = step(pointer, "required", i)
    additional = None
    if "additionalProperties" in schema:
        additional = read(schema["additionalProperties"], step(pointer, "additionalProperties"))
    return Object(
        pointer,
        {name: read(schema, step(pointer, "properties", name)) for name, schema in properties.items()},
        required,
        additional,
        "properties" in schema,
        _count(schema, "minProperties", pointer) or 0,
        _count(schema, "maxProperties", pointer),
    )
