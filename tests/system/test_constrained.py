"""Grammars with the real model: outputs match, jumps change nothing, errors are the request's, deaths are survived.

Greedy and seeded ids are compared with those of the plainest way: no jumps, one step a window. With --thorough that is
200 outputs of each in twelve ways, for an hour; `-k jumps_change_nothing` selects it.
"""

import gc
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import jsonschema
import pytest
from prompts import PROMPTS

from actorserve import Engine, SamplingParams
from actorserve.errors import RequestError
from actorserve.fsm.compiler import compile_pattern
from actorserve.fsm.jump import plan_jump
from actorserve.fsm.token_table import TokenTable
from actorserve.fsm.vocabulary import build_tables
from actorserve.models.tokenizer import load_tokenizer
from actorserve.perf.constrained import CHARACTER

BASE = {
    "dtype": "float32", "placement": "inline", "max_total_tokens": 8192, "window_ms": 0.0, "cpu_threads": 1,
    "grammar_seconds": 20.0,
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999},
        "capital": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"enum": ["Rhine", "Elbe", "Danube"]}, "maxItems": 3},
    },
    "required": ["city", "population", "capital", "rivers"],
}
CHOICES = ["a positive review", "a negative review", "no review at all"]
GRAMMARS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"regex": r"The answer is (yes|no), because [a-z ]{5,30}\."},
    {"regex": r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"},
    {"choice": CHOICES},
    {"regex": r"<answer>[a-zA-Z ]{3,20}</answer>\n<confidence>(low|medium|high)</confidence>\n"},
    {"regex": r'\{"tool": "(search|weather)", "arguments": \{"query": "[^"\\\x00-\x1f]{1,24}"\}\}'},
    {},
    {"json_schema": {"type": "array", "items": SCHEMA, "minItems": 1, "maxItems": 2}, "json_whitespace": "compact"},
    {"regex": r"(東京|大阪|京都)は[ぁ-んー]{2,8}です。(はい|いいえ)"},
    {"json_schema": {"enum": [f"the value of number {i}" for i in range(100)]}},
]
"""One is free: it shares batches with the others."""


@pytest.fixture(autouse=True)
def no_engines_pile_up() -> Iterator[None]:
    """An engine of the past is a cycle of some GB."""
    yield
    gc.collect()


def matches(grammar: dict[str, Any], text: str) -> bool:
    """Whether a text is what the grammar asks for."""
    if "json_schema" in grammar:
        jsonschema.validate(json.loads(text), grammar["json_schema"])
        return True
    if "choice" in grammar:
        return text in grammar["choice"]
    return re.fullmatch(grammar.get("regex", "(?s).*"), text) is not None


def answers(engine: Any, count: int) -> list[Any]:
    """An output per (prompt, grammar), all at once: each grammar greedily, then seeded, and so on; one in eight is
    penalised for what it said before."""

    def ask(i: int) -> Any:
        penalty = 0.3 if i % 8 == 5 else 0.0
        temperature = float(i // len(GRAMMARS) % 2)
        params = SamplingParams(temperature=temperature, max_new_tokens=56, seed=i, frequency_penalty=penalty)
        number = f"{i}. " if i >= len(PROMPTS) else ""
        return engine.generate(number + PROMPTS[i % len(PROMPTS)], params, **GRAMMARS[i % len(GRAMMARS)])

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


@pytest.fixture(scope="module")
def plain(smollm: str, thorough: bool) -> list[Any]:
    """Outputs of the plainest way."""
    options = {"num_continuous_decode_steps": 1, "plans_in_flight": 1, "disable_radix_cache": True}
    with Engine.sync(smollm, **BASE, **options, disable_jump_forward=True) as engine:
        outputs = answers(engine, 400 if thorough else 2 * len(GRAMMARS))
    assert not any(o.jumps for o in outputs)
    for i, o in enumerate(outputs):
        if o.finish_reason == "stop":
            assert matches(GRAMMARS[i % len(GRAMMARS)], o.text), o.text
    return outputs


WAYS = list(product((1, 4, 8), (False, True), (False, True)))
"""(k, without the cache, without jumps)"""
SAMPLE = [(1, False, False), (4, True, False)]
"""Each takes ten seconds."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", WAYS if metafunc.config.getoption("thorough") else SAMPLE)


@pytest.mark.timeout(3600)
def test_jumps_change_nothing(smollm: str, plain: list[Any], way: tuple[int, bool, bool]) -> None:
    k, cache_off, still = way
    options = {"num_continuous_decode_steps": k, "disable_radix_cache": cache_off, "disable_jump_forward": still}
    with Engine.sync(smollm, **BASE, **options) as engine:
        outputs = answers(engine, len(plain))
    assert [(o.ids, o.text, o.finish_reason) for o in outputs] == [(o.ids, o.text, o.finish_reason) for o in plain]
    for o in outputs:
        assert o.completion_tokens == len(o.ids) and o.forced_tokens <= len(o.ids)
    jumped = any(o.jumps for o in outputs)
    assert jumped if k == 1 and not still else not (jumped and still)  # in windows of 4 beside a free row it may be


def test_retraction_in_the_middle_of_runs(smollm: str, plain: list[Any]) -> None:
    expected = [o.ids for o in plain[:12]]  # few fit at a time: it is slow
    options = {"max_total_tokens": 256, "schedule_conservativeness": 0.0, "num_continuous_decode_steps": 4}
    with Engine.sync(smollm, **{**BASE, **options}) as engine:
        for _ in range(10):  # requests that come in slowly on a busy machine need no retraction
            assert [o.ids for o in answers(engine, len(expected))] == expected
            if engine.stats().retractions > 0:
                return
    pytest.fail("no retraction")


@pytest.fixture(scope="module")
def engine(smollm: str) -> Iterator[Any]:
    options = {"num_continuous_decode_steps": 1}
    with Engine.sync(smollm, **{**BASE, **options}) as e:
        yield e


def choices(table: TokenTable, ids: list[int]) -> int:
    """At how many of these tokens the model had a choice: no engine can take fewer forwards."""
    state, at, count = 0, 0, 0
    while at < len(ids):
        jump = plan_jump(table, state, 1000)
        at, state = at + len(jump.tokens), jump.state
        if at < len(ids):
            at, state, count = at + 1, table.step(state, ids[at]), count + 1
    return count


def test_forwards_of_the_papers_pattern(engine: Any, smollm: str) -> None:
    """A forward for each token that the model chooses, the prefill's included, and no other: none for the end.

    For the paper's sample, 105 tokens, that is 32: the prefill and 31 (tests/fsm/test_real_tokenizer.py).
    """
    tokenizer = load_tokenizer(smollm)
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    spell = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    table = compile_pattern(CHARACTER, build_tables(tokens, tokenizer.eos_ids), spell)
    before = settled(engine)
    for seed in range(2):
        output = engine.generate("A wizard:\n", temperature=0.8, seed=seed, max_new_tokens=300, regex=CHARACTER)
        assert output.finish_reason == "stop" and re.fullmatch(CHARACTER, output.text)
        assert len(output.ids) - output.forced_tokens == choices(table, output.ids)
        after = settled(engine)
        forwards = after.steps - before.steps
        assert forwards == choices(table, output.ids) - 1 and output.jumps < forwards
        before = after


def test_a_programs_text_behind_a_constrained_output_needs_no_forward_of_its_own(engine: Any) -> None:
    """Forced tokens at an output's end, the program's text, and what is forced at the next one's start: one prefill."""
    before = settled(engine)
    begin = "A wizard:"
    first = engine.generate(begin, temperature=0, regex=r" (Harry|Hermione|Ron) \(a wizard who is ")
    text = begin + first.text + "said to be "
    second = engine.generate(text, temperature=0, regex=r"about [0-9]{2} years old\)")
    after = settled(engine)
    assert (first.finish_reason, second.finish_reason, first.valid, second.valid) == ("stop", "stop", True, True)
    drawn = [len(output.ids) - output.forced_tokens - 1 for output in (first, second)]  # the end is not drawn
    assert after.steps - before.steps == sum(drawn) and first.forced_tokens > 4 < second.forced_tokens
    assert after.jumps - before.jumps == 3, "two ends, and one start"


def settled(engine: Any) -> Any:
    """The scheduler's counters, once they have come: a few times a second."""
    while True:
        stats = engine.stats()
        time.sleep(0.6)
        if engine.stats() == stats and not stats.running:
            return stats


def test_what_is_seen_of_a_run_that_is_cut(engine: Any) -> None:
    whole = engine.generate("A wizard:\n", temperature=0.0, max_new_tokens=300, regex=CHARACTER)
    for most in (1, 5, 9, 23, 40):
        cut = engine.generate("A wizard:\n", temperature=0.0, max_new_tokens=most, regex=CHARACTER)
        assert cut.ids == whole.ids[:most] and cut.finish_reason == "length" and cut.completion_tokens == most
    stopped = engine.generate("A wizard:\n", temperature=0.0, max_new_tokens=300, regex=CHARACTER, stop=["ood stat"])
    assert stopped.finish_reason == "stop" and stopped.matched == "ood stat"
    assert stopped.text == whole.text[: whole.text.index("ood stat")]
    token = whole.ids[30]
    ended = engine.generate("A wizard:\n", temperature=0.0, max_new_tokens=300, regex=CHARACTER, stop_token_ids=[token])
    assert ended.ids == whole.ids[: whole.ids.index(token) + 1] and ended.matched == token


@pytest.mark.parametrize("options", [{"logprobs": 2}, {"frequency_penalty": 0.3}], ids=["logprobs", "penalty"])
def test_requests_that_look_at_each_token_jump_too(engine: Any, options: dict[str, Any]) -> None:
    output = engine.generate("A wizard:\n", temperature=0.0, max_new_tokens=300, regex=CHARACTER, **options)
    assert re.fullmatch(CHARACTER, output.text) and output.jumps > 5
    if "logprobs" in options:
        assert len(output.logprobs) in (len(output.ids), len(output.ids) - 1)


def test_n_choices_share_a_grammar(engine: Any) -> None:
    outputs = engine.generate("A review:\n", temperature=1.0, seed=3, n=4, max_new_tokens=40, json_schema=SCHEMA)
    assert len({o.text for o in outputs}) > 1


def test_a_grammar_that_ends_before_min_new_tokens_fails_alone(engine: Any) -> None:
    with pytest.raises(Exception, match="grammar left no token"):
        engine.generate("x", temperature=0.0, min_new_tokens=50, max_new_tokens=60, choice=["yes", "no"])
    assert engine.generate("x", temperature=0.0, max_new_tokens=9, choice=["yes", "no"]).text in ("yes", "no")


BAD = [
    ({"regex": "a(?=b)"}, "regex", "position 1"),
    ({"regex": r"(a)\1"}, "regex", "position 3"),
    ({"regex": "(a"}, "regex", "position"),
    ({"regex": r"[^\s\S]"}, "regex", "nothing can match"),
    ({"regex": "\U00050000"}, "regex", "cannot spell"),
    ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "json_schema", "at "),
    ({"json_schema": {"type": "object", "properties": {"a": {"not": {}}}}}, "json_schema", "/properties/a/not"),
    ({"json_schema": "{"}, "json_schema", "not JSON"),
    ({"choice": []}, "choice", "empty"),
    ({"regex": "a", "choice": ["a"]}, "choice", "exclude each other"),
]


@pytest.mark.parametrize(("fields", "param", "text"), BAD, ids=lambda value: str(value)[:40])
def test_bad_grammars_are_refused(engine: Any, fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate("x", max_new_tokens=5, **fields)
    assert caught.value.param == param and text in caught.value.message
