"""Calls that must come: every text of the language is read as calls by the family's parser, however it is cut."""

import json
from random import Random
from typing import Any

import jsonschema
import pytest
from chat_texts import cuts, cuttings, run, trials
from hypothesis import given
from hypothesis import strategies as st
from syntax_walk import walk
from tool_calls import calls_of, content_of, parser

from actorserve.fsm.shapes import SchemaError
from actorserve.models.call_grammar import FORMS, Calls, Function, calls_syntax, certain_family
from actorserve.models.parsers import names

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 0}},
    "required": ["city"],
}
FUNCTIONS = [Function("get_weather", CITY), Function("ns.stop"), Function("list-all", {"type": "object"})]
SCHEMAS: dict[str, Any] = {f.name: f.parameters or {"maxProperties": 0} for f in FUNCTIONS}
each_form = pytest.mark.parametrize(
    "name", ["hermes", "llama3", "mistral", "deepseekv3", "deepseekv31", "command-r", "json"]
)


@each_form
@trials(25)
@given(seed=st.integers(0, 1 << 30), many=st.booleans(), places=cuts)
def test_every_text_of_the_language_is_calls(name: str, seed: int, many: bool, places: list[int]) -> None:
    text = walk(calls_syntax(Calls(name, FUNCTIONS[:2], many)), Random(seed), spread=2)
    for chunks in cuttings(text, places):
        events = run(parser(name, SCHEMAS), chunks)
        calls = calls_of(events)
        assert calls and content_of(events) == "" and (many or len(calls) == 1)
        for function, arguments, complete in calls:
            assert complete
            jsonschema.validate(json.loads(arguments), SCHEMAS[function])


@each_form
def test_many_calls_are_many(name: str) -> None:
    syntax = calls_syntax(Calls(name, [Function("a"), Function("b")], many=True))
    texts = [walk(syntax, Random(seed), spread=2) for seed in range(30)]
    assert {len(calls_of(run(parser(name), [text]))) for text in texts} == {1, 2, 3}


def test_every_parser_has_a_form_of_its_own_or_json() -> None:
    for name in names().tools:
        assert certain_family(name) in FORMS
    assert certain_family("pythonic") == certain_family("qwen3_coder") == "json"
    assert certain_family("hermes") == "hermes"


@pytest.mark.parametrize("name", ["hermes", "deepseekv31"])
def test_an_impossible_schema_is_found_where_it_stands(name: str) -> None:
    bad = Function("f", {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]})
    with pytest.raises(SchemaError) as caught:
        calls_syntax(Calls(name, [FUNCTIONS[0], bad], many=False))
    assert caught.value.pointer.startswith("/1/parameters")
