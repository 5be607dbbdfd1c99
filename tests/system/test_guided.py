"""Grammars that no table can have, with the real model: outputs match; rows beside them draw what they draw alone."""

import ast
import gc
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from actorserve import Engine, SamplingParams

BASE = {
    "placement": "inline", "max_total_tokens": 4096, "window_ms": 0.0, "cpu_threads": 1,
    "grammar_seconds": 20.0,
}  # fmt: skip
TREE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
    },
    "required": ["name", "children"],
}
ARITHMETIC = """
root ::= term (("+" | "-") term){0,3}
term ::= num | "(" root ")"
num  ::= [1-9] [0-9]{0,2}
"""
TAG = {
    "structures": [
        {
            "begin": "<function=get_weather>",
            "schema": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
            "end": "</function>",
        },
        {"begin": "<function=stop>", "schema": {"type": "object", "properties": {}}, "end": "</function>"},
    ],
    "triggers": ["<function="],
}
CALL = r'<function=(get_weather>\{"city": "(Rome|Oslo)"\}|stop>\{\})</function>'
GRAMMARS: list[dict[str, Any]] = [
    {"json_schema": {"type": "object"}},
    {"json_schema": TREE},
    {},
    {"ebnf": ARITHMETIC},
    {"regex": r"The answer is (yes|no), because [a-z ]{5,30}\."},
    {"structural_tag": TAG},
]
"""Four that need a mask for each token, a free one, and one with tables."""
PROMPTS = [
    "A person as JSON: ", "The tree as JSON: ", "The capital of France", "3 + 4 written as a sum: ", "Is it? ",
    "Call <function=get_weather> now: <function",
]  # fmt: skip


def answers(engine: Any) -> list[Any]:
    """An output per grammar, all at once, greedy and seeded."""

    def ask(i: int) -> Any:
        params = SamplingParams(temperature=float(i % 2), seed=i, max_new_tokens=20)
        return engine.generate(PROMPTS[i], params, **GRAMMARS[i])

    with ThreadPoolExecutor(len(GRAMMARS)) as pool:
        return list(pool.map(ask, range(len(GRAMMARS))))


@pytest.fixture(scope="module")
def outputs(smollm: str) -> Iterator[list[Any]]:
    """Of mixed batches in windows of several steps, two in flight."""
    with Engine.sync(smollm, **BASE, num_continuous_decode_steps=4) as engine:
        yield answers(engine)
    gc.collect()


def test_each_draws_what_it_draws_alone(smollm: str, outputs: list[Any]) -> None:
    options = {"num_continuous_decode_steps": 1, "plans_in_flight": 1, "max_running_requests": 1}
    with Engine.sync(smollm, **BASE, **options) as engine:
        alone = answers(engine)
    gc.collect()
    assert [(o.ids, o.text, o.finish_reason) for o in outputs] == [(o.ids, o.text, o.finish_reason) for o in alone]


def test_outputs_are_what_was_asked_for(outputs: list[Any]) -> None:
    ended = 0
    for grammar, o in zip(GRAMMARS, outputs, strict=True):
        if "structural_tag" in grammar:
            calls = re.findall("<function=", o.text)
            assert len(re.findall(CALL, o.text)) >= len(calls) - (o.finish_reason == "length"), o.text
        if o.finish_reason != "stop":
            continue
        ended += "json_schema" in grammar or "ebnf" in grammar
        if "json_schema" in grammar:
            jsonschema.validate(json.loads(o.text), grammar["json_schema"])
        if "ebnf" in grammar:
            ast.parse(o.text, mode="eval")
    assert ended >= 2
