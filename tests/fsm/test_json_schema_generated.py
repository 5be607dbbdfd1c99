"""Generated schemas against the `jsonschema` package, both ways: a value is among the texts exactly if it validates."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
from examples import examples
from hypothesis import event, given, settings
from hypothesis import strategies as st
from syntax_walk import walk

from actorserve.fsm.json_schema import SchemaError, Unsupported, schema_to_syntax
from actorserve.fsm.lengths import matches

NAMES = ["a", "ab", "b", 'q"', "é"]
TEXTS = ["", "a", "ab", "ba", "aab", "b1", "\n", '"', "é😀", "2024-02-29", "abcabc"]
PATTERNS = ["^a", "b$", "ab", "^[ab]*$", "^a|1$", "^.{2,3}$", "^\\S+$", '^[^a"]*$', "^(ab|a)b?$", "^a+$"]
WHOLE = [-1000, -12, -2, -1, 0, 1, 2, 5, 9, 10, 11, 99, 100, 101, 1005]
DECIMAL = [*WHOLE, -12.5, -0.25, 0.1, 0.5, 0.75, 1.25, 9.99, 99.5]
SCALARS: list[Any] = [None, True, False, *DECIMAL, *TEXTS]

Schema = dict[str, Any]


def keywords(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Schema]:
    return st.fixed_dictionaries({}, optional=optional)


def typed(name: str, rest: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return rest.map(lambda schema: {"type": name, **schema})


def bounds(values: list[Any]) -> st.SearchStrategy[Schema]:
    some = st.sampled_from(values)
    return keywords(minimum=some, maximum=some, exclusiveMinimum=some, exclusiveMaximum=some)


count = st.integers(0, 3)
lengths = keywords(minLength=count, maxLength=count)
counts = keywords(minItems=count, maxItems=count)
multiples = keywords(multipleOf=st.sampled_from([1, 2, 5, 10, 50]), minimum=st.sampled_from(WHOLE))
constants = [*SCALARS, [], {}, [1, "a"], {"a": 1}]
enums = st.lists(st.sampled_from(SCALARS), min_size=1, max_size=4)
scalar_schemas = st.one_of(
    st.sampled_from(
        [{"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}, {"type": ["integer", "null"]}]
    ),
    typed("integer", st.one_of(bounds(WHOLE), bounds(DECIMAL), multiples)),
    typed("number", bounds(DECIMAL)),
    typed("string", lengths),
    typed("string", keywords(pattern=st.sampled_from(PATTERNS), minLength=count, maxLength=st.integers(1, 6))),
    keywords(enum=enums, type=st.sampled_from(["string", "number"])),
    st.builds(lambda value: {"const": value}, st.sampled_from(constants)),
)


def arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    prefixes = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        st.builds(lambda items, rest: {"type": "array", "items": items, **rest}, inner, counts),
        st.builds(
            lambda prefix, items, rest: {"type": "array", "prefixItems": prefix, "items": items, **rest},
            *(prefixes, st.one_of(st.just(False), inner), counts),
        ),
    )


def objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    required = st.lists(st.sampled_from(NAMES), unique=True, max_size=3).map(lambda names: {"required": names})
    return st.builds(
        lambda *parts: {"type": "object"} | {k: v for part in parts for k, v in part.items()},
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4).map(lambda properties: {"properties": properties}),
        st.one_of(st.just(False), inner).map(lambda others: {"additionalProperties": others}),
        st.one_of(st.just({}), required),
        st.one_of(st.just({}), keywords(minProperties=count, maxProperties=count)),
    )


def containers(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    pair = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(
        arrays(inner),
        objects(inner),
        objects(inner),
        st.builds(lambda word, branches: {word: branches}, st.sampled_from(["anyOf", "allOf", "oneOf"]), pair),
        st.builds(lambda schema, branches: {**schema, "anyOf": branches}, inner, pair),
    )


schemas = st.recursive(scalar_schemas, containers, max_leaves=8)


def in_python(schema: Any) -> Any:
    """The schema with `$` of its patterns as in ECMA-262: not before a last newline."""
    if isinstance(schema, dict):
        return {k: v.replace("$", r"\Z") if k == "pattern" else in_python(v) for k, v in schema.items()}
    return [in_python(item) for item in schema] if isinstance(schema, list) else schema


def validator(schema: Schema) -> Any:
    return jsonschema.Draft202012Validator(in_python(schema)).is_valid


def orders(value: Any) -> Iterator[Any]:
    """The value with its members in every order: each alternative of a schema has an order of its own."""
    if isinstance(value, dict):
        for pairs in itertools.permutations(value.items()):
            for items in itertools.product(*(orders(item) for _, item in pairs)):
                yield dict(zip((key for key, _ in pairs), items, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.product(*map(orders, value)))
    else:
        yield value


def plain(value: Any) -> Any:
    """Numbers that any number of the schema can spell: short, and integers where they are whole."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    value = round(value, 2) if abs(value) < 10**6 else 101
    return int(value) if value == int(value) else value


def changed(value: Any, draw: random.Random) -> Any:
    """The value with a change somewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.4:
            return {k: v for k, v in value.items() if k != key}
        return {k: changed(v, draw) if k == key else v for k, v in value.items()}
    if isinstance(value, dict) and len(value) < 4:
        return {**value, draw.choice(["zz", *NAMES]): draw.choice(SCALARS)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        i, new = draw.randrange(len(value)), list(value)
        new[i : i + 1] = draw.choice([[], [changed(value[i], draw)], [value[i], value[i]]])
        return new
    if isinstance(value, list) and len(value) < 4:
        return [*value, draw.choice(SCALARS)]
    if isinstance(value, str) and draw.random() < 0.7:
        return draw.choice([value + "a", value[1:], "b" + value, value + '"'])
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.7:
        return value + draw.choice([-1, 1, 10])
    return draw.choice([*SCALARS, [], {}, [1, "a"], {"a": 1}])


@settings(max_examples=examples(250, 100), deadline=None)
@given(schemas, st.randoms(use_true_random=False))
def test_texts_are_the_valid_values(schema: Schema, draw: random.Random) -> None:
    valid = validator(schema)
    try:
        node = schema_to_syntax(schema)
    except Unsupported:
        event("refused")
        return
    except SchemaError as error:
        event("no value")
        assert error.reason == "no value satisfies this"
        assert not any(map(valid, [*SCALARS, [], {}, [1], {"a": 1}]))
        return
    for _ in range(8):
        value = json.loads(walk(node, draw))
        assert valid(value)
        for _ in range(4):
            value = changed(plain(value), draw)
            texts = (json.dumps(order, ensure_ascii=False) for order in itertools.islice(orders(value), 200))
            assert valid(value) == any(matches(node, text) for text in texts), value
