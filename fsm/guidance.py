"""Grammars for llguidance: what no automaton can have, in the words of the library whose parser masks it on the host.

Used by the grammar compiler for what the other files of fsm/ refuse as too large or not regular. Texts are those of
the library's matcher (matcher.py). Invariant: what a grammar admits is what the client asked for, or less of it, never
more: JSON is written with the whitespace of spelling.py, and what llguidance would pass over is refused here.
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import llguidance

from .ecma import parse_ecma
from .errors import BudgetError, EmptyLanguage, PatternError
from .formats import format_syntax
from .gbnf import char_class, looks_like_gbnf, parse_gbnf, rules_to_lark
from .json_schema import schema_to_syntax
from .schema_reader import ANNOTATIONS, COMBINATORS, TYPED, Reader, find, type_names
from .schema_types import TRIVIAL, step
from .shapes import Object, SchemaError, Shape, Unsupported, Values, meet, of_type, spread, union
from .spelling import DEFAULT, Whitespace
from .syntax import Chars, Choice, Concat, Node, Repeat, Text

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_PATTERN: Final = 1 << 20
"""Characters of a regular expression that we write."""
REFUSED: Final = (TRIVIAL.keys() | {"uniqueItems"}) - {"patternProperties"}
"""Known keywords that llguidance does not have."""
SILENT: Final = frozenset("then else minContains maxContains".split())
"""Without `if` and `contains`, which are refused. llguidance would refuse them too."""
EXACT: Final = 1 << 53
"""Integers up to here are doubles."""
BOUNDS: Final = {"minimum": math.inf, "exclusiveMinimum": math.inf, "maximum": -math.inf, "exclusiveMaximum": -math.inf}
"""Keyword -> where the values are that it admits."""

_NO_WORD: Final = re.compile("[^0-9A-Za-z]", re.DOTALL)
_SCHEMAS: Final = frozenset(
    "items additionalItems additionalProperties contains propertyNames not if then else".split()
)
_LISTS: Final = frozenset("anyOf allOf oneOf prefixItems items".split())
_NAMED: Final = frozenset("properties patternProperties $defs definitions dependentSchemas".split())


def grammar_of(node: Node) -> str:
    """A regular language as a grammar. Raises BudgetError if it is too long to be written."""
    return str(llguidance.LLMatcher.grammar_from_regex(rust_pattern(node)))


def ebnf_grammar(text: str) -> str:
    """GBNF or Lark as a grammar. Raises GrammarError for malformed GBNF; the matcher reads Lark."""
    lark = rules_to_lark(parse_gbnf(text)) if looks_like_gbnf(text) else text
    return str(llguidance.LLMatcher.grammar_from_lark(lark))


def json_grammar(schema: Any, whitespace: Whitespace = DEFAULT, checked: bool = False) -> str:
    """The values of a JSON schema as a grammar. `checked`: schema_to_syntax has taken it.

    Raises as `prepared` does, and Unsupported for other whitespace than separators.
    """
    return _grammar(prepared(schema, "", checked), whitespace)


def _grammar(schema: dict[str, Any], whitespace: Whitespace = DEFAULT) -> str:
    options = json_options(whitespace)
    try:  # as text, since an object may have no integers beyond 64 bits
        return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))
    except ValueError as error:
        raise Unsupported(f"llguidance cannot read the schema: {error}", "") from None


def json_options(whitespace: Whitespace = DEFAULT) -> "JsonCompileOptions":
    """llguidance's options for JSON in which nothing is approximated. Raises Unsupported."""
    if whitespace.max_run or whitespace.indent is not None:
        raise Unsupported("a schema that no table can have is for json_whitespace spaced or compact", "")
    return {
        "whitespace_flexible": False,
        "item_separator": whitespace.comma,
        "key_separator": whitespace.colon,
        "coerce_one_of": False,
        "lenient": False,
    }


def prepared(schema: Any, pointer: str, checked: bool = False) -> dict[str, Any]:
    """A schema as llguidance is to read it: patterns in our words, since dialects differ; undeclared members left out
    where silence would admit them, as in json_schema.py; without the client's own options for llguidance.

    Raises SchemaError where json_schema.py knows that the schema is invalid or contradictory; Unsupported for keywords
    that nobody obeys. Pointers begin at `pointer`.
    """
    if not checked:
        with contextlib.suppress(Unsupported):  # that is why we are asked
            schema_to_syntax(schema)
    if isinstance(schema, bool):
        return {}  # false is a contradiction
    if not _closable(schema):
        return _changed(schema, pointer, close=False)
    if any(_alternatives(schema)):
        _refuse_overlap(schema, pointer)
    return _changed(schema, pointer, close=True)


def _changed(schema: dict[str, Any], pointer: str, close: bool) -> dict[str, Any]:
    """See prepared. `close`: leave undeclared members out."""
    references: list[tuple[str, str]] = []
    seen: set[str] = set()

    def changed(place: dict[str, Any], where: str) -> dict[str, Any]:
        seen.add(where)
        if isinstance(place.get("$ref"), str):
            references.append((place["$ref"], step(where, "$ref")))
        _leave_what_counts(place, where)
        _leave_exact_numbers(place, where)
        if isinstance(place.get("pattern"), str):
            place["pattern"] = _exact_pattern(place["pattern"], step(where, "pattern"))
        if isinstance(place.get("format"), str):
            _say_format(place, step(where, "format"))
        if close and _is_open(place):
            place["additionalProperties"] = False
        return place

    whole = _mapped(schema, pointer, changed)
    for reference, where in references:
        try:
            target, found = find(schema, reference, where)
        except SchemaError:  # maybe nobody comes there
            continue
        if isinstance(target, dict) and pointer + found not in seen:  # it was left as it is
            raise Unsupported("references to places that hold no schemas are not supported here", where)
    return {keyword: value for keyword, value in whole.items() if keyword != "x-guidance"}


# ------------------------------------------------------------------ regular languages


def rust_pattern(node: Node) -> str:
    """A tree as Rust's regular expressions have it. Raises EmptyLanguage, BudgetError."""
    parts: list[str] = []
    size = 0
    for piece in _pieces(node):
        parts.append(piece)
        size += len(piece)
        if size > MAX_PATTERN:
            raise BudgetError("characters of pattern", MAX_PATTERN)
    return "".join(parts)


def _pieces(node: Node) -> Iterator[str]:
    match node:
        case Text(text):
            yield _NO_WORD.sub(lambda found: f"\\x{{{ord(found[0]):x}}}", text)
        case Chars(ranges):
            yield char_class(ranges)
        case Concat(parts):
            for part in parts:
                yield from _pieces(part)
        case Choice(options):
            if not options:
                raise EmptyLanguage
            for number, option in enumerate(options):
                yield "|" if number else "(?:"
                yield from _pieces(option)
            yield ")"
        case Repeat(inner, low, high):
            yield "(?:"
            yield from _pieces(inner)
            yield f"){{{low},{'' if high is None else high}}}"


# ------------------------------------------------------------------ JSON schemas


def _mapped(schema: Any, pointer: str, change: Callable[[dict[str, Any], str], dict[str, Any]]) -> Any:
    """A copy of a schema in which `change` was applied to a copy of each schema in it and the pointer to it."""
    if not isinstance(schema, dict):
        return schema
    copy = dict(schema)
    for keyword, value in schema.items():
        place = step(pointer, keyword)
        if keyword in _NAMED and isinstance(value, dict):
            copy[keyword] = {name: _mapped(inner, step(place, name), change) for name, inner in value.items()}
        elif keyword in _LISTS and isinstance(value, list):
            copy[keyword] = [_mapped(inner, step(place, i), change) for i, inner in enumerate(value)]
        elif keyword in _SCHEMAS:
            copy[keyword] = _mapped(value, place, change)
    return change(copy, pointer)


def _exact_pattern(pattern: str, pointer: str) -> str:
    """A pattern with the meaning that ecma.py gives it."""
    try:
        return f"^(?:{rust_pattern(parse_ecma(pattern))})$"
    except PatternError as error:
        raise Unsupported(f"the pattern cannot be read: {error}", pointer) from None


def _say_format(schema: dict[str, Any], pointer: str) -> None:
    """Put a pattern for the format: llguidance's own ones are others, with leap seconds and a year 0."""
    try:
        node = format_syntax(schema.pop("format"))
    except LookupError as error:
        raise Unsupported(f"the format {error.args[0]} is not supported", pointer) from None
    if node is None:
        return
    said = {"pattern": f"^(?:{rust_pattern(node)})$"}
    if "pattern" not in schema:
        schema |= said
    elif isinstance(others := schema.get("allOf", []), list):
        schema["allOf"] = [*others, said]


def _leave_what_counts(schema: dict[str, Any], pointer: str) -> None:
    """Take out of a schema the keywords that say nothing, and refuse those that llguidance refuses, passes over because
    it does not know them, or reads otherwise: it counts members of the same name as several."""
    for keyword, value in list(schema.items()):
        silent = keyword in SILENT or value in TRIVIAL.get(keyword, ()) or (keyword == "uniqueItems" and not value)
        known = keyword in ANNOTATIONS | COMBINATORS or keyword in TYPED or keyword.startswith("x-")
        obeyed = keyword not in REFUSED and not (keyword.startswith("exclusive") and isinstance(value, bool))
        if silent:
            del schema[keyword]
        elif not known or not obeyed or (keyword == "$id" and pointer):
            raise Unsupported(f"{keyword} is not supported", step(pointer, keyword))
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise SchemaError("required is an array of names", step(pointer, "required"))
    if isinstance(least, int) and least > len(required) and least > 1:
        raise Unsupported("minProperties above what is required is not supported here", step(pointer, "minProperties"))


def _leave_exact_numbers(schema: dict[str, Any], pointer: str) -> None:
    """Refuse constants that llguidance, whose numbers are doubles, would write as others, and move bounds that are no
    doubles to the next one inside."""
    for keyword in ("const", "enum"):
        _refuse_inexact(schema.get(keyword), step(pointer, keyword))
    for keyword, way in BOUNDS.items():
        bound = schema.get(keyword)
        if isinstance(bound, int) and abs(bound) > EXACT:
            try:
                near = float(bound)
            except OverflowError:
                raise Unsupported("a bound beyond all doubles", step(pointer, keyword)) from None
            outside = near < bound if way > 0 else near > bound
            schema[keyword] = math.nextafter(near, way) if outside else near


def _refuse_inexact(value: Any, pointer: str) -> None:
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_inexact(item, step(pointer, name))
    elif isinstance(value, int | float) and abs(value) > EXACT:
        raise Unsupported("llguidance cannot write numbers beyond 2**53", pointer)


def _closable(schema: Any) -> bool:
    """Whether objects can be closed one by one: no two schemas speak of the same value."""
    shared = []

    def look(place: dict[str, Any], _: str) -> dict[str, Any]:
        combined = place.keys() & {"allOf", "anyOf", "oneOf", "$ref", "not", "if", "dependentSchemas"}
        alone = len(combined) == 1 and place.keys() <= ANNOTATIONS | combined | {"type"}
        shared.append("allOf" in combined or not (alone or not combined))
        return place

    _mapped(schema, "", look)
    return not any(shared)


def _is_open(schema: dict[str, Any]) -> bool:
    """Whether only silence admits members that are not declared, and none of them is required."""
    declared = schema.get("properties")
    silent = "additionalProperties" not in schema and "patternProperties" not in schema
    return isinstance(declared, dict) and silent and all(name in declared for name in schema.get("required", []))


# ------------------------------------------------------------------ oneOf


class _Loose(Reader):
    """Reads sets that hold at least what the schema admits: all values, where there is no exact set."""

    def read(self, schema: Any, pointer: str) -> Values:
        try:
            return super().read(schema, pointer)
        except Unsupported:
            return Values(pointer, anything=True)


def _alternatives(schema: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The schemas in this one that have a `oneOf`, and the pointers to them."""
    found: list[tuple[dict[str, Any], str]] = []

    def look(place: dict[str, Any], where: str) -> dict[str, Any]:
        if isinstance(place.get("oneOf"), list):
            found.append((place, where))
        return place

    _mapped(schema, "", look)
    return found


def _refuse_overlap(schema: dict[str, Any], pointer: str) -> None:
    """Raise Unsupported where closing objects could hide that a value is in two alternatives of a `oneOf`.

    It hides nothing where llguidance tells the open ones apart, nor where each closed one has no value of an open one.
    """
    if not llguidance.LLMatcher.validate_grammar(_grammar(_changed(schema, pointer, close=False))):
        return
    reader = _Loose(schema)
    for place, where in _alternatives(schema):
        own = union([of_type(name, where) for name in type_names(place, where)], where)
        branches = [reader.read(branch, step(where, "oneOf", i)) for i, branch in enumerate(place["oneOf"])]
        sets = [meet(own, spread(branch), reader.work) for branch in branches]
        for i, j in itertools.permutations(range(len(sets)), 2):
            if not meet(_closed(sets[i]), sets[j], reader.work).empty:
                raise Unsupported("the alternatives of oneOf may overlap: use anyOf", step(pointer + where, "oneOf", j))


def _closed(values: Values) -> Values:
    """What is left of a set where its objects have only declared members: as _is_open has it, at the top alone."""
    return replace(values, shapes=tuple(map(_without_others, values.shapes)))


def _without_others(shape: Shape) -> Shape:
    if not isinstance(shape, Object) or shape.additional is not None or not shape.declared:
        return shape
    if not shape.required.keys() <= shape.properties.keys():
        return shape
    return replace(shape, additional=Values(shape.pointer))
