"""Tool calls, choices, limits, and the size of what schemas become."""

import itertools
import json
import re
from typing import Any

import pytest
from syntax_walk import as_pattern

from actorserve.errors import RequestError
from actorserve.fsm.json_schema import (
    MAX_BYTES,
    SchemaError,
    Unsupported,
    choices,
    function_call_syntax,
    schema_to_syntax,
)
from actorserve.fsm.schema_reader import MAX_DEPTH
from actorserve.fsm.spelling import COMPACT, DEFAULT, indented
from actorserve.fsm.syntax import Chars, Choice, Concat, Node, Repeat, Text

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"name": 'say "time"', "parameters": {"type": "object", "properties": {}}}


def size(node: Node) -> int:
    """Nodes, shared ones counted wherever they occur."""
    match node:
        case Concat(parts) | Choice(parts):
            return 1 + sum(map(size, parts))
        case Repeat(body):
            return 1 + size(body)
        case Text() | Chars():
            return 1


def nested(schema: Any, depth: int) -> Any:
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


# ------------------------------------------------------------------ tools and choices


def test_function_calls_are_of_one_tool_with_its_own_arguments() -> None:
    found = re.compile(as_pattern(function_call_syntax([WEATHER, CLOCK]))).fullmatch
    assert found('{"name": "get_weather", "arguments": {"city": "Köln"}}')
    assert found(json.dumps({"name": 'say "time"', "arguments": {}}))
    for wrong in (
        '{"name": "get_weather", "arguments": {}}',
        '{"name": "say \\"time\\"", "arguments": {"city": "x"}}',
        '{"name": "other", "arguments": {}}',
        '{"arguments": {}, "name": "say \\"time\\""}',
        '{"name":"get_weather","arguments":{"city":"x"}}',
    ):
        assert not found(wrong)


def test_function_calls_follow_the_whitespace() -> None:
    call = {"name": "get_weather", "arguments": {"city": "x"}}
    compact = re.compile(as_pattern(function_call_syntax([WEATHER], COMPACT))).fullmatch
    assert compact(json.dumps(call, separators=(",", ":")))
    assert re.fullmatch(as_pattern(function_call_syntax([WEATHER], indented(2))), json.dumps(call, indent=2))


def test_arguments_are_objects_even_where_no_type_is_given() -> None:
    untyped = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}
    found = re.compile(as_pattern(function_call_syntax([untyped, {"name": "g"}]))).fullmatch
    assert found('{"name": "f", "arguments": {"a": 1}}') and found('{"name": "g", "arguments": {}}')
    assert not found('{"name": "f", "arguments": 1}')


@pytest.mark.parametrize(
    ("tools", "pointer", "kind"),
    [
        ([], "", SchemaError),
        ([WEATHER, {"parameters": {}}], "/1/name", SchemaError),
        ([{"name": "\ud800"}], "/0/name", SchemaError),
        ([{"name": "f", "parameters": {"type": "strin"}}], "/0/parameters/type", SchemaError),
        ([{"name": "f", "parameters": {"type": "string"}}], "/0/parameters", SchemaError),
        ([WEATHER, {"name": "f", "parameters": {}}], "/1/parameters", Unsupported),
        (
            [{"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}],
            "/0/parameters/properties/a/not",
            Unsupported,
        ),
        ([{"name": "f", "parameters": {"$ref": "#/$defs/x"}}], "/0/parameters/$ref", SchemaError),
    ],
)
def test_errors_of_tools_point_into_their_array(tools: list[Any], pointer: str, kind: type) -> None:
    with pytest.raises(SchemaError) as caught:
        function_call_syntax(tools)
    assert (caught.value.pointer, type(caught.value)) == (pointer, kind)


def test_references_of_a_tool_are_its_own() -> None:
    def tool(name: str, kind: str) -> Any:
        properties = {"x": {"$ref": "#/$defs/t"}}
        return {"name": name, "parameters": {"properties": properties, "$defs": {"t": {"type": kind}}}}

    found = re.compile(as_pattern(function_call_syntax([tool("f", "integer"), tool("g", "boolean")]))).fullmatch
    assert found('{"name": "f", "arguments": {"x": 1}}') and found('{"name": "g", "arguments": {"x": true}}')
    assert not found('{"name": "f", "arguments": {"x": true}}')


def test_choices_are_raw_texts() -> None:
    found = re.compile(as_pattern(choices(["yes", "no", "yes", "a.b\n"]))).fullmatch
    assert found("yes") and found("no") and found("a.b\n")
    assert not found("yesno") and not found("axb\n") and not found("")
    assert choices([""]) == Text("")
    for wrong, pointer in (([], ""), (["a", "\udc00"], "/1"), ([3], "/0")):
        with pytest.raises(SchemaError) as caught:
            choices(wrong)  # type: ignore[arg-type]
        assert caught.value.pointer == pointer


# ------------------------------------------------------------------ errors and limits


def test_errors_name_the_place_and_are_the_requests_fault() -> None:
    with pytest.raises(RequestError, match=r"not is not supported \(at /properties/a~1b/not of the schema\)") as caught:
        schema_to_syntax({"type": "object", "properties": {"a/b": {"not": {}}}})
    assert caught.value.status == 400 and caught.value.code == "unsupported_json_schema"
    with pytest.raises(SchemaError, match="at the root of the schema"):
        schema_to_syntax(False)


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"const": float("nan")}, ""),
        ({"type": "number", "minimum": float("inf")}, ""),
        ({"const": b"x"}, ""),
        ({"properties": {3: {}}}, "/properties"),
        ({"enum": ["a", "\ud800"]}, "/enum/1"),
        ({"type": "object", "properties": {"\udfff": True}}, "/properties"),
        (None, ""),
        ("string", ""),
        ([], ""),
        ({"enum": ["x" * MAX_BYTES]}, ""),
        ({"description": "é" * (MAX_BYTES // 2)}, ""),
    ],
)
def test_what_is_no_schema_document(schema: Any, pointer: str) -> None:
    with pytest.raises(SchemaError) as caught:
        schema_to_syntax(schema)
    assert (caught.value.pointer, type(caught.value)) == (pointer, SchemaError)


def test_depth() -> None:
    assert re.fullmatch(as_pattern(schema_to_syntax(nested({"const": 1}, 8))), "[[[[[[[[1]]]]]]]]")
    with pytest.raises(Unsupported, match="too large"):  # each array writes its items twice: x(, x)*
        schema_to_syntax(nested({"type": "null"}, MAX_DEPTH - 1))
    schema: Any = {"type": "null"}
    for _ in range(MAX_DEPTH // 2 - 1):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    assert size(schema_to_syntax(schema)) == 1
    for depth in (MAX_DEPTH + 1, 1000, 100_000):
        with pytest.raises(SchemaError, match="deep"):
            schema_to_syntax(nested({"type": "null"}, depth))


def test_references_do_not_dig_deeper() -> None:
    chain = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1000)}
    with pytest.raises(Unsupported, match="deep"):
        schema_to_syntax({"$ref": "#/$defs/d0", "$defs": {**chain, "d1000": {"type": "null"}}})


def test_references_that_double_are_refused_not_written_out() -> None:
    pairs = {
        f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2, "items": False, "minItems": 2}
        for i in range(30)
    }
    with pytest.raises(Unsupported, match="too large"):
        schema_to_syntax({"$ref": "#/$defs/d0", "$defs": {**pairs, "d30": {"type": "null"}}})


def test_combinators_that_multiply_are_refused() -> None:
    either = {"anyOf": [{"type": "string", "minLength": i} for i in range(20)]}
    with pytest.raises(Unsupported, match="too many"):
        schema_to_syntax({"allOf": [either] * 20})


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "string", "pattern": "a" * 70_000}, "/pattern"),
        ({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1100)}}, ""),
        (
            {
                "properties": {f"{i}" * 3000: {"type": "null"} for i in range(9)},
                "additionalProperties": {"type": "null"},
            },
            "/additionalProperties",
        ),
        ({"enum": list(range(9000)), "anyOf": [{"type": "integer", "minimum": i} for i in range(900)]}, "/enum"),
        (
            {"oneOf": [{"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]} for i in range(999)]},
            None,
        ),
    ],
    ids=["pattern", "optional", "names", "constants", "oneOf"],
)
def test_large_schemas_are_refused(schema: Any, pointer: str | None) -> None:
    with pytest.raises(Unsupported) as caught:
        schema_to_syntax({"type": "object", **schema} if "properties" in schema else schema)
    assert pointer in (None, caught.value.pointer)


def test_nested_one_of_is_answered() -> None:
    schema: Any = {"type": "integer"}
    for i in range(20):
        schema = {"oneOf": [schema, {"const": f"s{i}"}]}
    assert re.fullmatch(as_pattern(schema_to_syntax(schema)), '"s7"')


def test_a_large_enum() -> None:
    values = [f"value {i} of many" for i in range(40_000)]
    node = schema_to_syntax({"type": "string", "maxLength": 50, "enum": values})
    assert isinstance(node, Choice) and len(node.options) == len(values)


def test_every_subset_of_optional_members_at_small_size() -> None:
    def schema(count: int) -> Any:
        properties = {f"k{i}": {"const": i} for i in range(count)}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    found = re.compile(as_pattern(schema_to_syntax(schema(7)))).fullmatch
    for keys in itertools.chain.from_iterable(itertools.combinations(range(7), n) for n in range(8)):
        assert found(json.dumps({f"k{i}": i for i in keys}))
    for wrong in ('{, "k0": 0}', '{"k0": 0, }', '{"k0": 0,, "k1": 1}', '{"k0": 0"k1": 1}', '{"k1": 1, "k0": 0}'):
        assert not found(wrong)
    assert size(schema_to_syntax(schema(256))) < 256 * 8 * 4  # n log n
    one_required = {**schema(256), "required": ["k100"]}
    assert size(schema_to_syntax(one_required)) < 256 * 4


def test_ranges_are_not_enumerated() -> None:
    wide = {"type": "integer", "minimum": -(10**18), "maximum": 9 * 10**17}
    assert size(schema_to_syntax(wide)) < 500
    assert size(schema_to_syntax({"type": "number", "minimum": -1.5, "maximum": 1000.25})) < 3000
    assert size(schema_to_syntax({"type": "string", "maxLength": 100_000})) < 20


def test_whitespace_is_the_default_of_json_dumps() -> None:
    schema = {"const": {"a": [1, 2], "b": {}}}
    assert schema_to_syntax(schema) == schema_to_syntax(schema, DEFAULT) == Text('{"a": [1, 2], "b": {}}')
