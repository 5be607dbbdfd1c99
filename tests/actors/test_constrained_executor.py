"""Grammars through the whole engine with a tiny model: jumps on executors that wait for steps and that run ahead."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import trio
from simulated_executor import EOS, VOCAB
from simulated_grammars import grammar_of
from test_executor import AheadStepper
from word_model import word_model

from actorserve import Engine, SamplingParams
from actorserve.actors import executor
from actorserve.actors.actor import Context
from actorserve.actors.compile_pool import Worker
from actorserve.actors.fsm import Fsm
from actorserve.actors.messages import NOTHING, GrammarSpec, LoadGrammar, PeerDown, SamplerInbox, SlotParams
from actorserve.actors.sampler import Sampler
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import RequestError

PATTERN = r'\{"Hello there": "[a-z ]{1,12}", "The quick brown fox": (true|false), "today": [0-9]{1,3}\}'
SCHEMA = {
    "type": "object",
    "properties": {"user": {"enum": ["system", "assistant"]}, "imagine": {"type": "integer", "maximum": 99}},
    "required": ["user", "imagine"],
}
GRAMMARS: list[dict[str, Any]] = [
    {"regex": PATTERN}, {}, {"json_schema": SCHEMA}, {"choice": ["Hello there, how are you", "I am fine"]},
]  # fmt: skip

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "placement": "inline", "max_total_tokens": 2048, "max_running_requests": 6,
    "window_ms": 0.0, "cpu_threads": 1, "chunked_prefill_size": 48, "grammar_seconds": 20.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the vocabulary of a byte-level tokenizer; id 2 ends outputs in both."""
    return word_model(tmp_path_factory.mktemp("words"))


def engine(folder: str, **options: object) -> Any:
    return Engine.sync(folder, **SETTINGS | options)


TEMPERATURES = (0.0, 0.9)
LOOKING: list[dict[str, Any]] = [
    {"logprobs": 2}, {"logprobs": 0, "frequency_penalty": 0.7}, {"repetition_penalty": 1.5, "presence_penalty": 0.4}
]  # fmt: skip
"""Parameters that look at each token."""


def looked_at(running: Any, temperature: float) -> list[Any]:
    def ask(i: int) -> Any:
        params = SamplingParams(temperature=temperature, seed=i, max_new_tokens=60, **LOOKING[i % 3])
        return running.generate(tiny.prompt(5 + 9 * i, seed=i), params, **GRAMMARS[i % len(GRAMMARS)])

    with ThreadPoolExecutor(9) as pool:
        return list(pool.map(ask, range(9)))


def answers(running: Any, temperature: float) -> list[tuple[list[int], str, str, int]]:
    def ask(i: int) -> tuple[list[int], str, str, int]:
        params = SamplingParams(temperature=temperature, seed=i, max_new_tokens=10 + 14 * (i % 6))
        o = running.generate(tiny.prompt(5 + 9 * i, seed=i), params, **GRAMMARS[i % len(GRAMMARS)])
        return o.ids, o.text, o.finish_reason, o.jumps

    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(ask, range(12)))


class Plainest(NamedTuple):
    """What the plainest way says, by TEMPERATURES: no jumps, one step a window, one window in flight."""

    ids: list[list[list[int]]]
    looked_at: list[list[Any]]


@pytest.fixture(scope="module")
def plainest(folder: str) -> Plainest:
    options = {"num_continuous_decode_steps": 1, "plans_in_flight": 1, "disable_jump_forward": True}
    with engine(folder, **options) as e:
        found = [answers(e, temperature) for temperature in TEMPERATURES]
        looked = [looked_at(e, temperature) for temperature in TEMPERATURES]
    for i, (_, text, reason, jumps) in chain(*map(enumerate, found)):
        assert not jumps
        if reason == "stop" and not i % 4:
            assert re.fullmatch(PATTERN, text)
    return Plainest([[ids for ids, *_ in outputs] for outputs in found], looked)


def test_logprobs_and_penalties_see_the_tokens_of_jumps(
    folder: str, plainest: Plainest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with drawing each token, when steps are waited for and when they run ahead."""
    for ahead in (False, True):
        if ahead:
            monkeypatch.setattr(executor, "Stepper", AheadStepper)
        with engine(folder, num_continuous_decode_steps=1 + ahead) as e:
            found = [looked_at(e, temperature) for temperature in TEMPERATURES]
        for one, other in zip(chain(*found), chain(*plainest.looked_at), strict=True):
            assert one.ids == other.ids
            assert [p.token for p in one.logprobs or ()] == [p.token for p in other.logprobs or ()]
            for p, q in zip(one.logprobs or (), other.logprobs or (), strict=True):
                assert abs(p.logprob - q.logprob) < 1e-3
                assert [t for t, *_ in p.top] == [t for t, *_ in q.top]
                assert all(abs(a[1] - b[1]) < 1e-3 for a, b in zip(p.top, q.top, strict=True))
        for outputs in found:
            assert all(one.jumps for i, one in enumerate(outputs) if i % len(GRAMMARS) in (0, 2))
            assert sum(len(one.logprobs or ()) for one in outputs) > 100


WAYS = list(product((1, 4), (1, 2), (False, True)))
"""(k, windows in flight, whether steps run ahead)"""
SAMPLE = [(1, 1, True), (1, 2, False), (4, 1, False), (4, 2, True)]
"""Every pair of values is among them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", WAYS if metafunc.config.getoption("thorough") else SAMPLE)


def test_jumps_change_nothing(
    folder: str, plainest: Plainest, way: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    k, in_flight, ahead = way
    if ahead:
        monkeypatch.setattr(executor, "Stepper", AheadStepper)
    with engine(folder, num_continuous_decode_steps=k, plans_in_flight=in_flight) as e:
        for _ in range(2):  # with slots, pages and grammars used before, and prefixes cached
            for temperature, expected in zip(TEMPERATURES, plainest.ids, strict=True):
                found = answers(e, temperature)
                assert [ids for ids, *_ in found] == expected
                assert any(jumps for *_, jumps in found)


def test_aborts_and_retractions_while_steps_run_ahead(
    folder: str, plainest: Plainest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "Stepper", AheadStepper)
    with engine(folder, num_continuous_decode_steps=4, max_total_tokens=240, schedule_conservativeness=0.0) as e:
        for i in range(8):
            stream = iter(e.stream(tiny.prompt(9, seed=i), SamplingParams(seed=i), **GRAMMARS[i % 4]))
            if i % 3:
                next(stream, None)
            stream.close()
        for temperature, expected in zip(TEMPERATURES, plainest.ids, strict=True):
            assert [ids for ids, *_ in answers(e, temperature)] == expected


def test_many_grammars_come_and_go(folder: str) -> None:
    forced = jumps = 0
    with engine(folder, max_running_requests=2) as e:
        for i in range(12):
            o = e.generate(tiny.prompt(9), SamplingParams(max_new_tokens=60), regex=f"start{i % 10}( end){{1,3}}")
            assert re.fullmatch(f"start{i % 10}( end){{1,3}}", o.text)
            forced, jumps = forced + o.forced_tokens, jumps + o.jumps
        with pytest.raises(RequestError, match="position 1"):
            e.generate(tiny.prompt(9), regex="a(?=b)")
        while (stats := e.stats()).grammars_failed == 0:
            time.sleep(0.05)
        assert (stats.grammars_compiled, stats.grammar_hits, stats.grammar_waiting) == (10, 2, 0)
        assert (stats.forced_tokens, stats.jumps) == (forced, jumps) and jumps >= 12
        assert 0 < stats.grammar_seconds < 600


@pytest.fixture(scope="module")
def running(folder: str) -> Iterator[Any]:
    with engine(folder, num_continuous_decode_steps=1) as e:
        yield e


def test_valid_says_whether_the_text_matches(running: Any) -> None:
    """Cut by a limit after each token, by a stop string, by a stop token, and not at all."""
    pattern = "Hello( [a-z]{1,3}){0,4}( there)?"

    def ask(**options: Any) -> Any:
        params = SamplingParams(temperature=1.0, seed=3, **options)
        o = running.generate(tiny.prompt(9), params, regex=pattern)
        assert o.valid == bool(re.fullmatch(pattern, o.text)), o
        return o

    whole = ask(max_new_tokens=60)
    assert whole.valid and whole.finish_reason == "stop" and len(whole.ids) > 6
    cuts = [ask(max_new_tokens=n).valid for n in range(len(whole.ids))]
    assert cuts[-1] and not cuts[0] and False in cuts[1:] and True in cuts[1:-1]
    letter = whole.text[7]
    stops = [ask(max_new_tokens=60, stop=(text,)) for text in (whole.text[5:7], letter, "llo", "ello" + letter)]
    assert [o.finish_reason for o in stops] == ["stop"] * 4 and {o.valid for o in stops} == {True, False}
    shown = ask(max_new_tokens=60, stop=(letter,), no_stop_trim=True)
    assert shown.matched == letter
    for token in whole.ids[:-1]:
        assert ask(max_new_tokens=60, stop_token_ids=(token,)).matched == token
    assert running.generate(tiny.prompt(9), SamplingParams(max_new_tokens=3)).valid is None


def test_whitespace_is_the_requests(running: Any) -> None:
    ways: list[tuple[Any, dict[str, Any]]] = [
        (None, {}), ("spaced", {}), ("compact", {"separators": (",", ":")}), ({"indent": 2}, {"indent": 2})
    ]  # fmt: skip
    for policy, spelling in ways:
        params = SamplingParams(max_new_tokens=200, temperature=1.0, seed=5)
        o = running.generate(tiny.prompt(9), params, json_schema=SCHEMA, json_whitespace=policy)
        assert o.finish_reason == "stop" and o.text == json.dumps(json.loads(o.text), **spelling)
    o = running.generate(tiny.prompt(9), params, json_schema=SCHEMA, json_whitespace={"any": 2})
    assert set(json.loads(o.text)) == {"user", "imagine"} and not re.search(r"\s{5}", o.text)
    assert re.search(r'\s[:,}]|[{:,]\s\s|[{,:]"', o.text), "not what the other policies write"


def test_without_a_tokenizer_there_are_no_grammars(folder: str) -> None:
    with engine(folder, skip_tokenizer_init=True) as e, pytest.raises(Exception, match="without a tokenizer"):
        e.generate(tiny.prompt(9), regex="a")


def test_a_request_that_leaves_while_its_grammar_compiles(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compilation is called off; one of others goes on beside it."""
    discarded: list[int] = []
    discard, made = Fsm._discard, Fsm._made

    def noted(self: Fsm, scheduler: str, handle: int) -> None:
        discarded.append(handle)
        discard(self, scheduler, handle)

    async def slow(self: Fsm, worker: Worker, spec: GrammarSpec) -> Any:
        if spec.text == "slow":
            await trio.sleep_forever()
        return await made(self, worker, spec)

    monkeypatch.setattr(Fsm, "_discard", noted)
    monkeypatch.setattr(Fsm, "_made", slow)

    async def main() -> None:
        async with Engine(folder, **SETTINGS) as e:
            stream = e.stream(tiny.prompt(9), SamplingParams(), regex="slow")
            while (await e.stats()).waiting != 1:  # noqa: ASYNC110
                await trio.sleep(0.01)
            other = await e.generate(tiny.prompt(9), SamplingParams(max_new_tokens=4), choice=["Hello"])
            assert other.text == "Hello" and not discarded
            await stream.aclose()
            while not discarded or (await e.stats()).waiting:  # noqa: ASYNC110
                await trio.sleep(0.01)

    trio.run(main)


def test_the_steps_of_a_dead_schedulers_window_keep_its_grammars() -> None:
    """The sampler hears of the death between two steps, and the executor only when the window is over: until the next
    scheduler's first window rows are drawn by what they had."""
    model = ModelInfo(name="m", path="", model_type="llama", vocab_size=VOCAB, context_length=64, eos_ids=(EOS,))
    sampler = Sampler(Context("sampler.0", EngineConfig(), model, SamplerInbox))
    sampler.prepare(2, VOCAB, model.eos_ids, torch.device("cpu"))
    grammar = grammar_of(0)

    def begin(window: int) -> None:
        arrays = (memoryview(a.tobytes()) for a in (grammar.token_class, grammar.transitions, grammar.canonical))
        sampler.receive(LoadGrammar(window, 7, *arrays), "sched")
        sampler.receive(SlotParams(window, 0, SamplingParams(seed=1), NOTHING, NOTHING, 4, 0, 7, 0), "sched")
        sampler.sync(window, 2)

    def draw(position: int) -> int:
        slots, at = torch.tensor([0]), torch.tensor([position])
        drawn = sampler.draw(torch.zeros(1, VOCAB), slots, at, sampler.mode(np.array([0])), np.array([0]))
        assert drawn.finish.item() == 0
        return int(drawn.ids.item())

    begin(0)
    first = draw(4)
    state = grammar.step(0, first)
    sampler.receive(PeerDown("sched", 1, "killed"), "supervisor")
    for position in (5, 6):
        state = grammar.step(state, draw(position))
        assert state >= 0
    sampler.receive(PeerDown("sched", 2, "killed"), "supervisor")
    begin(0)
    assert draw(4) == first and sampler.grammars == {7}
    sampler.context.close()
