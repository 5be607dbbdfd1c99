"""Schemas to syntax on samples by hand: what validates is among the texts, what does not is not, what cannot be is
refused with a pointer. The reference is the `jsonschema` package with formats asserted."""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from syntax_walk import as_pattern, walk

from actorserve.fsm.json_schema import SchemaError, Unsupported, schema_to_syntax
from actorserve.fsm.spelling import COMPACT, DEFAULT, Whitespace, any_whitespace, indented
from actorserve.fsm.syntax import Node

FOLDER = Path(__file__).parent.parent / "data" / "json_schemas"
Case = dict[str, Any]


def cases(*files: str) -> list[Any]:
    found = [(name, case) for name in files for case in json.loads((FOLDER / f"{name}.json").read_text())]
    return [pytest.param(case, id=f"{name}: {case['name']}") for name, case in found]


SAMPLES = cases("scalars", "enums", "strings", "arrays", "objects", "combinators", "tools")


def validator(case: Case) -> Any:
    """What jsonschema says; `reference` is the schema in words that Python's `re` understands, where it must differ."""
    schema = case.get("reference", case["schema"])
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def spelled(value: Any, whitespace: Whitespace = DEFAULT) -> str:
    """The one spelling of a value, but for policies of several spellings."""
    separators = None if whitespace.indent is not None else (whitespace.comma, whitespace.colon)
    return json.dumps(value, ensure_ascii=False, separators=separators, indent=whitespace.indent)


def matcher(node: Node) -> Any:
    return re.compile(as_pattern(node)).fullmatch


@pytest.mark.parametrize("case", SAMPLES)
def test_samples(case: Case) -> None:
    matches, valid = matcher(schema_to_syntax(case["schema"])), validator(case).is_valid
    for value in case["valid"]:
        assert valid(value), f"the sample is wrong: {value!r}"
        assert matches(spelled(value)), value
    for value in case["invalid"]:
        assert not valid(value), f"the sample is wrong: {value!r}"
        assert not matches(spelled(value)), value
    for value in case.get("outside", []):  # valid, but not in our spelling; json_schema.py says which these are
        assert valid(value), f"the sample is wrong: {value!r}"
        assert not matches(spelled(value)), value


@pytest.mark.parametrize("case", SAMPLES)
def test_random_texts_validate(case: Case) -> None:
    draw = random.Random(case["name"])
    for whitespace in (DEFAULT, COMPACT, indented(2), any_whitespace(3)):
        node = schema_to_syntax(case["schema"], whitespace)
        valid = validator(case).is_valid
        for _ in range(60 if whitespace == DEFAULT else 10):
            text = walk(node, draw)
            text.encode()
            value = json.loads(text)
            assert valid(value), text
            if whitespace == DEFAULT and "{" not in text and not re.search("[0-9]", text):
                assert spelled(value) == text


@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("whitespace", [COMPACT, indented(2), indented(0)], ids=repr)
def test_whitespace_is_that_of_json_dumps(case: Case, whitespace: Whitespace) -> None:
    matches = matcher(schema_to_syntax(case["schema"], whitespace))
    for value in case["valid"]:
        assert matches(spelled(value, whitespace)), value


@pytest.mark.parametrize("case", SAMPLES)
def test_any_whitespace(case: Case) -> None:
    """It takes what the fixed policies write, and blanks everywhere, but no longer runs than it says."""
    matches = matcher(schema_to_syntax(case["schema"], any_whitespace(9)))
    for value in case["valid"]:
        for whitespace in (DEFAULT, COMPACT, indented(1)):
            assert matches(spelled(value, whitespace)), value
    for value in case["invalid"]:
        assert not matches(spelled(value)), value


@pytest.mark.parametrize("case", cases("refused"))
def test_refused(case: Case) -> None:
    with pytest.raises(Unsupported) as caught:
        schema_to_syntax(case["schema"])
    assert caught.value.pointer == case["pointer"]
    assert caught.value.status == 400


@pytest.mark.parametrize("case", cases("wrong"))
def test_wrong(case: Case) -> None:
    with pytest.raises(SchemaError) as caught:
        schema_to_syntax(case["schema"])
    assert not isinstance(caught.value, Unsupported)
    assert caught.value.pointer == case["pointer"]


@cache
def sample_values() -> list[Any]:
    """All values of all samples: mostly wrong for any one schema."""
    known = {spelled(value): value for param in SAMPLES for value in param.values[0]["valid"]}
    return list(known.values())


@pytest.mark.parametrize("case", SAMPLES)
def test_values_of_all_samples(case: Case) -> None:
    """No value is among the texts that does not validate."""
    matches, valid = matcher(schema_to_syntax(case["schema"])), validator(case).is_valid
    for value in sample_values():
        assert valid(value) or not matches(spelled(value)), value
