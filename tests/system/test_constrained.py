"""Grammars with the real model: outputs match, jumps change nothing, errors are the request's, deaths are survived.

Greedy and seeded ids are compared with those of the plainest way: no jumps, one step a window. With --thorough that is
200 outputs of each in twelve ways, for an hour; where there is a GPU, 200 prompts with each of 10 grammars, greedily
and seeded, in each of the twelve ways. `-k jumps_change_nothing` selects it.
"""

import gc
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import jsonschema
import pytest
import torch
from prompts import PROMPTS

from actorserve import Engine, SamplingParams
from actorserve.errors import RequestError
from actorserve.fsm.compiler import compile_pattern
from actorserve.fsm.jump import plan_jump
from actorserve.fsm.token_table import TokenTable
from actorserve.fsm.vocabulary import build_tables
from actorserve.models.tokenizer import load_tokenizer
from actorserve.perf.constrained import CHARACTER
from actorserve.sampler.philox import row_keys
from actorserve.sampler.race import hashes, id_terms, log_times

ON_GPU = torch.cuda.is_available()
BASE = {
    "dtype": "float32" if ON_GPU else "auto", "placement": "inline", "window_ms": 0.0,
    "max_total_tokens": 1 << 18 if ON_GPU else 8192, "cpu_threads": 1, "grammar_seconds": 20.0,
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


@dataclass(frozen=True)
class Case:
    """A request."""

    prompt: str
    grammar: dict[str, Any]
    params: SamplingParams


PROMPT_COUNT = 200
WHOLE = 2 * PROMPT_COUNT * len(GRAMMARS)
AT_ONCE = 256


def cases(count: int) -> list[Case]:
    """The first requests of the matrix: grammar by grammar, greedily, then seeded, and so on, each time with another
    prompt; one in seven is penalised for what it said before. WHOLE of them are each prompt with each grammar in both
    ways."""
    found = []
    for i in range(count):
        number = (i + i // (2 * len(GRAMMARS))) % PROMPT_COUNT
        params = SamplingParams(
            temperature=float(i // len(GRAMMARS) % 2), max_new_tokens=56, seed=i,
            frequency_penalty=0.3 if i % 7 == 5 else 0.0,
        )  # fmt: skip
        prefix = f"{number}. " if number >= len(PROMPTS) else ""
        found.append(Case(prefix + PROMPTS[number % len(PROMPTS)], GRAMMARS[i % len(GRAMMARS)], params))
    return found


def answers(engine: Any, count: int) -> list[Any]:
    """An output per case, all at once, or as many as a batch has room for."""

    def ask(case: Case) -> Any:
        return engine.generate(case.prompt, case.params, **case.grammar)

    with ThreadPoolExecutor(min(count, AT_ONCE)) as pool:
        return list(pool.map(ask, cases(count)))


@pytest.fixture(scope="module")
def plain(smollm: str, thorough: bool) -> list[Any]:
    """Outputs of the plainest way."""
    options = {"num_continuous_decode_steps": 1, "plans_in_flight": 1, "disable_radix_cache": True}
    count = 2 * len(GRAMMARS) if not thorough else WHOLE if ON_GPU else 400
    with Engine.sync(smollm, **BASE, **options, disable_jump_forward=True) as engine:
        outputs = answers(engine, count)
    assert not any(o.jumps for o in outputs)
    for case, o in zip(cases(count), outputs, strict=True):
        if o.finish_reason == "stop":
            assert matches(case.grammar, o.text), o.text
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
    started = time.perf_counter()
    with Engine.sync(smollm, **BASE, **options) as engine:
        outputs = answers(engine, len(plain))
    seen, expected = ([(o.ids, o.text, o.finish_reason) for o in some] for some in (outputs, plain))
    parted = [i for i, (one, other) in enumerate(zip(seen, expected, strict=True)) if one != other]
    forced, tokens = sum(o.forced_tokens for o in outputs), sum(len(o.ids) for o in outputs)
    print(
        f"\nk={k} cache={not cache_off} jumps={not still}: {len(outputs)} outputs, {len(parted)} of them differ; "
        f"{tokens} tokens, {forced} forced in {sum(o.jumps for o in outputs)} jumps; "
        f"{sum(o.cached_tokens for o in outputs)} cached, {time.perf_counter() - started:.1f} s"
    )
    assert not parted or (ON_GPU and are_ties(smollm, plain, outputs, parted))
    for o in outputs:
        assert o.completion_tokens == len(o.ids) and o.forced_tokens <= len(o.ids)
    jumped = any(o.jumps for o in outputs)
    assert jumped if k == 1 and not still else not (jumped and still)  # in windows of 4 beside a free row it may be


NEARLY_EQUAL = 1e-4
"""Differences of float32 logits that come of a GEMM's shape, which on a GPU depends on the batch: 1e-5, as a rule."""
MOST_TIES = 0.005
"""Share of the outputs."""
JUDGED = 50


def are_ties(smollm: str, plain: list[Any], outputs: list[Any], parted: list[int]) -> bool:
    """Whether all that differ do so first at two tokens that were equally good, and are few."""
    tokenizer, worst = load_tokenizer(smollm), 0.0
    with Engine.sync(smollm, **BASE, num_continuous_decode_steps=1) as engine:
        for i in parted[:JUDGED]:
            one, other = plain[i].ids, outputs[i].ids
            at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            assert at is not None, f"output {i}: one is the other's beginning: {one} {other}"
            case = cases(i + 1)[-1]
            before = tokenizer.encode(case.prompt) + one[:at]
            found = abs(lead(engine, case, before, one[:at], (one[at], other[at])))
            print(f"output {i}, token {at}: {one[at]} or {other[at]}, {found:.1e} apart; {case.grammar}")
            worst = max(worst, found)
    print(f"{len(parted)} of {len(plain)} part, at tokens at most {worst:.1e} apart")
    return worst < NEARLY_EQUAL and len(parted) <= MOST_TIES * len(plain)


def lead(engine: Any, case: Case, before: list[int], generated: list[int], two: tuple[int, int]) -> float:
    """By how much the first of two tokens is better than the second behind the tokens `before`, the last of them
    `generated`: by its logit, to which a seeded draw adds its noise (sampler/reference.py)."""
    listed = SamplingParams(temperature=0.0, max_new_tokens=1, logprobs=0, token_ids_logprob=two, ignore_eos=True)
    (told,) = engine.generate(before, listed).logprobs
    scores = torch.tensor([logprob for _, logprob, _ in told.listed], dtype=torch.float64)
    scores -= case.params.frequency_penalty * torch.tensor([generated.count(token) for token in two])
    if not case.params.greedy:
        terms = id_terms(engine.model.vocab_size, torch.device("cpu"))[list(two)]
        keys = row_keys(torch.tensor([case.params.seed]), torch.tensor([len(before)]))
        scores = scores / case.params.temperature - log_times(hashes(terms, keys))[0]
    return float(scores[0] - scores[1])


def test_the_judge_of_ties_knows_what_is_drawn(smollm: str, plain: list[Any]) -> None:
    """Of the tokens of free outputs, those drawn are the best by its scores; so it would see a wrong one."""
    tokenizer = load_tokenizer(smollm)
    free = [i for i, case in enumerate(cases(len(plain))) if not case.grammar][:2]
    with Engine.sync(smollm, **BASE, num_continuous_decode_steps=1) as engine:
        for i in free:
            case, ids = cases(i + 1)[-1], plain[i].ids
            for at in (0, 7, 20):
                before = tokenizer.encode(case.prompt) + ids[:at]
                again = engine.generate(before, temperature=0.0, max_new_tokens=1, logprobs=9, ignore_eos=True)
                others = [token for token, _, _ in again.logprobs[0].top if token != ids[at]]
                assert all(lead(engine, case, before, ids[:at], (ids[at], other)) > 0 for other in others)


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
        assert [one.token for one in output.logprobs] == output.ids


def test_n_choices_share_a_grammar(engine: Any) -> None:
    outputs = engine.generate("A review:\n", temperature=1.0, seed=3, n=4, max_new_tokens=40, json_schema=SCHEMA)
    assert len({o.text for o in outputs}) > 1


def test_a_grammar_that_ends_before_min_new_tokens_fails_alone(engine: Any) -> None:
    with pytest.raises(Exception, match="grammar left no token"):
        engine.generate("x", temperature=0.0, min_new_tokens=50, max_new_tokens=60, choice=["yes", "no"])
    assert engine.generate("x", temperature=0.0, max_new_tokens=9, choice=["yes", "no"]).text in ("yes", "no")


BLANKS = [
    "An empty form, as JSON with much space in it:\n\n\n\n\n\n\n\n\n",
    "{\n\n\n\n    \n\n\n\n    \n\n\n",
    '{"city":                                        \n                                    ',
    "\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t",
]
"""Prompts that a small model continues with blanks."""


def test_blanks_never_go_on_and_on(engine: Any) -> None:
    """Where the spacing is left to the model, too: a place has so many blanks, and the output ends."""

    def ask(case: tuple[int, str, int]) -> Any:
        seed, prompt, most = case
        params = SamplingParams(temperature=float(seed % 2), seed=seed, max_new_tokens=64)
        return engine.generate(prompt, params, json_schema=SCHEMA, json_whitespace={"any": most})

    asked = [(seed, prompt, most) for most in (1, 3) for prompt in BLANKS for seed in (0, 1)]
    with ThreadPoolExecutor(len(asked)) as pool:
        outputs = list(pool.map(ask, asked))
    for (_, _, most), o in zip(asked, outputs, strict=True):
        outside = re.sub(r'"(?:[^"\\]|\\.)*"?', '""', o.text)  # strings may have as many as they like
        assert not re.search(rf"\s{{{most + 1}}}", outside), o.text
        assert o.finish_reason == "length" or matches({"json_schema": SCHEMA}, o.text)


def test_many_new_grammars_do_not_stop_others(engine: Any) -> None:
    """64 that nobody has seen, all at once: a stream beside them goes on while they are compiled."""
    done = threading.Event()
    during = []

    def read() -> None:
        for delta in engine.stream("Once upon a time", temperature=0.0, max_new_tokens=1000, ignore_eos=True):
            during.append(delta.ids)
            if done.is_set():
                return

    def ask(i: int) -> Any:
        return engine.generate("x", temperature=0.0, max_new_tokens=8, regex=f"number {i}: [a-z]{{1,{i + 1}}}")

    with ThreadPoolExecutor(65) as pool:
        stream = pool.submit(read)
        first = ask(64)
        before = len(during)
        outputs = list(pool.map(ask, range(64)))
        after = len(during)
        done.set()
        stream.result()
    assert all(o.text.startswith(f"number {i}: ") for i, o in enumerate(outputs)) and first.text
    assert after - before >= 10


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
