"""Grammars for llguidance: what no automaton can have, in the words of the library whose parser masks it on the host.

Used by the grammar compiler for what the other files of fsm/ refuse as too large or not regular. Texts are those of
the library's matcher (matcher.py). Invariant: what a grammar admits is what the client asked for, or less of it, never
more: JSON is written with the whitespace of spelling.py, and what llguidance would pass over is refused here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import llguidance

from .errors import BudgetError, EmptyLanguage
from .gbnf import char_class, looks_like_gbnf, parse_gbnf, rules_to_lark
from .json_schema import schema_to_syntax
from .schema_reader import ANNOTATIONS, COMBINATORS, TYPED
from .schema_types import step
from .shapes import Unsupported
from .syntax import Chars, Choice, Concat, Node, Repeat, Text

JSON_OPTIONS: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
"""spelling.DEFAULT's, and nothing approximated."""
MAX_PATTERN: Final = 1 << 20
"""Characters of a regular expression that we write."""
NOT: Final = frozenset("not if $dynamicRef $recursiveRef $recursiveAnchor".split())
"""Keywords that llguidance itself refuses by name, beside those of TYPED."""

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


def json_grammar(schema: Any) -> str:
    """The values of a JSON schema as a grammar. Raises as `prepared` does."""
    return str(llguidance.LLMatcher.grammar_from_json_schema(prepared(schema, ""), overrides=JSON_OPTIONS))


def prepared(schema: Any, pointer: str) -> dict[str, Any]:
    """A schema as llguidance is to read it: undeclared members are left out where silence would admit them, as in
    json_schema.py, and the client's own options for llguidance are ignored.

    Raises SchemaError where json_schema.py knows that the schema is invalid or contradictory; Unsupported for keywords
    that nobody obeys. Pointers begin at `pointer`.
    """
    with contextlib.suppress(Unsupported):  # that is why we are asked
        schema_to_syntax(schema)
    if isinstance(schema, bool):
        return {}  # false is a contradiction
    for place, where in _subschemas(schema, pointer):
        _refuse_unknown(place, where)
    closed = _closed_schema(schema) if _closable(schema) else schema
    return {keyword: value for keyword, value in closed.items() if keyword != "x-guidance"}


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
            yield "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
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


def _subschemas(schema: Any, pointer: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every schema in a schema, itself first, and the pointer to it."""
    if not isinstance(schema, dict):
        return
    yield schema, pointer
    for keyword, value in schema.items():
        place = step(pointer, keyword)
        if keyword in _NAMED and isinstance(value, dict):
            for name, inner in value.items():
                yield from _subschemas(inner, step(place, name))
        elif keyword in _LISTS and isinstance(value, list):
            for i, inner in enumerate(value):
                yield from _subschemas(inner, step(place, i))
        elif keyword in _SCHEMAS:
            yield from _subschemas(value, place)


def _refuse_unknown(schema: dict[str, Any], pointer: str) -> None:
    """llguidance passes over keywords that it does not know, and counts members of the same name as several."""
    for keyword, value in schema.items():
        known = keyword in ANNOTATIONS | COMBINATORS | NOT or keyword in TYPED or keyword.startswith("x-")
        if not known or (keyword == "$id" and pointer) or (keyword.startswith("exclusive") and isinstance(value, bool)):
            raise Unsupported(f"{keyword} is not supported", step(pointer, keyword))
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and least > len(schema.get("required", [])) and least > 1:
        raise Unsupported("minProperties above what is required is not supported here", step(pointer, "minProperties"))


def _closable(schema: Any) -> bool:
    """Whether objects can be closed one by one: no two schemas speak of the same value."""
    for place, _ in _subschemas(schema, ""):
        combined = place.keys() & {"allOf", "anyOf", "oneOf", "$ref", "not", "if", "dependentSchemas"}
        alone = place.keys() <= ANNOTATIONS | combined | {"type"} and len(combined) <= 1
        if "allOf" in combined or not (alone or not combined):
            return False
    return True


def _closed(value: Any, keyword: str) -> Any:
    """The value of a keyword of a schema, its subschemas' undeclared members left out."""
    if keyword in _NAMED and isinstance(value, dict):
        return {name: _closed_schema(inner) for name, inner in value.items()}
    if keyword in _LISTS and isinstance(value, list):
        return [_closed_schema(inner) for inner in value]
    return _closed_schema(value) if keyword in _SCHEMAS else value


def _closed_schema(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    inner = {keyword: _closed(value, keyword) for keyword, value in schema.items()}
    declared = schema.get("properties")
    if isinstance(declared, dict) and "additionalProperties" not in schema and "patternProperties" not in schema:
        required = schema.get("required", [])
        if all(name in declared for name in required):
            inner["additionalProperties"] = False
    return inner
