"""Logprobs of prompts in the scheduler: each wanted one is told once, in order and right, and computed only if need be.

The simulated executor makes a logprob of what its KV pages hold, so a wrong page or a wrong row shows.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_executor import logprob_of, most_likely
from test_jumps import line
from test_schedule import Engine, prompt_of

from actorserve.actors.messages import PromptLogprobs, Scores
from actorserve.actors.prompt_scores import prompt_scores
from actorserve.actors.request import Request
from actorserve.actors.score_rows import columns_of, computed_logprobs, known_logprobs, scored_fields
from actorserve.sampler.params import SamplingParams


class Telling(Engine):
    """Keeps what the scheduler actor would tell of each request's prompt, in the order in which it would."""

    def __init__(self, **config: object) -> None:
        super().__init__(**config)  # type: ignore[arg-type]
        self.told: dict[int, list[tuple[int, float, list[tuple[int, float]]]]] = {}
        self.computed = 0

    def ask(self, prompt: list[int], start: int = 0, top: int = 0, named: bool = False, **more: object) -> Request:
        """A request that wants logprobs of its prompt from `start` on, the `top` most likely tokens' and a named one's
        too."""
        params = SamplingParams(logprobs=top, logprob_start_len=start, token_ids_logprob=(5,) if named else ())
        request = self.add(prompt, params=params, **more)  # type: ignore[arg-type]
        request.scores = prompt_scores(params, len(prompt))
        self.told[request.rid] = []
        return request

    def tell(self, m: PromptLogprobs) -> None:
        ids, logprobs = np.frombuffer(m.ids, np.int32).tolist(), np.frombuffer(m.logprobs, np.float32).tolist()
        tops = np.frombuffer(m.top_ids, np.int32).reshape(len(ids), m.top_n).tolist()
        values = np.frombuffer(m.top_logprobs, np.float32).reshape(len(ids), m.top_n).tolist()
        wanted = self.requests[m.rid].params.logprobs
        top = [list(zip(a, b, strict=True))[:wanted] for a, b in zip(tops, values, strict=True)]
        self.told[m.rid] += zip(ids, logprobs, top, strict=True)

    def plan(self) -> bool:
        window = self.schedule.plan()
        if window is not None:
            for seat in window.admits:
                for message in known_logprobs(seat.request):
                    self.tell(message)
            self.executor.run(window)
        return window is not None

    def report(self) -> bool:
        if not self.executor.out:
            return False
        scores = self.executor.out[0][-1]
        super().report()
        for item in self.schedule.scored:
            self.tell(computed_logprobs(item, as_message(scores)))
            self.computed += item.count
        return True

    def check(self, request: Request) -> None:
        start, prompt = request.params.logprob_start_len, request.tokens[: request.prompt_length].tolist()
        top = request.params.logprobs or 0
        places = range(start + 1, len(prompt))
        right = [(prompt[i], logprob_of(prompt[:i], prompt[i]), most_likely(prompt[:i], top)) for i in places]
        assert self.told[request.rid] == right


def as_message(columns: np.ndarray) -> Scores:
    """The inverse of columns_of."""
    own, top, ids = columns[:, 0], columns[:, 1::2], np.nan_to_num(columns[:, 2::2], nan=-1).astype(np.int32)
    logprobs, top_ids, top_logprobs = (memoryview(part.tobytes()) for part in (own, ids, top))
    made = Scores(logprobs, top.shape[1], top_ids, top_logprobs)
    assert np.array_equal(np.nan_to_num(columns_of(made), nan=-1), np.nan_to_num(columns, nan=-1))
    return made


def run(e: Telling, *requests: Request) -> int:
    """How many logprobs were computed for these, which are checked."""
    before = e.computed
    e.drain()
    for request in requests:
        e.check(request)
    return e.computed - before


@pytest.mark.parametrize("chunk", [16, 24, 64, 0])
def test_computed_once_and_served_from_the_cache(chunk: int) -> None:
    e = Telling(chunk=chunk)
    prompt = prompt_of(1, 75)
    assert run(e, e.ask(prompt)) == 74
    assert run(e, e.ask(prompt)) == 0
    assert run(e, e.ask(prompt[:40]), e.ask(prompt[:39], start=20)) == 0
    assert run(e, e.ask(prompt + prompt_of(2, 10))) == 10


def test_what_the_cache_has_without_them_is_computed_again() -> None:
    """From the first unknown one on: then the tree knows them too, and pages add up (drain checks)."""
    e = Telling()
    prompt = prompt_of(1, 60)
    e.add(prompt)
    e.drain()
    late = e.ask(prompt, start=50)
    window = e.schedule.plan()
    assert window is not None and window.admits[0].cached == 50
    e.executor.run(window)
    assert run(e, late) == 9
    assert run(e, e.ask(prompt)) == 59, "the tree has those from 51 on, but a run of rows has no holes"
    assert run(e, e.ask(prompt)) == 0


def test_the_most_likely_tokens_are_kept_too() -> None:
    e = Telling()
    prompt = prompt_of(1, 60)
    assert run(e, e.ask(prompt)) == 59
    assert [run(e, e.ask(prompt, 10, top)) for top in (2, 2, 1, 0, 3, 2, 3)] == [49, 0, 0, 0, 49, 0, 0]
    assert run(e, e.ask(prompt, 0)) == 0


def test_those_of_named_tokens_are_computed_whatever_is_cached() -> None:
    e = Telling()
    prompt = prompt_of(1, 60)
    assert [run(e, e.ask(prompt, 10, named=True)) for _ in range(2)] == [49, 49]
    assert run(e, e.ask(prompt, 10)) == 0, "the tokens' own are beside the pages now"


def test_a_prompt_of_one_wanted_token_computes_nothing() -> None:
    e = Telling()
    assert run(e, e.ask(prompt_of(1, 20), start=19)) == 0


def test_requests_at_once_wait_for_the_one_that_computes_them() -> None:
    """Not for one that has nothing for them, and not those that must compute their own."""
    e = Telling(chunk=512)
    prompt = prompt_of(1, 70)
    assert run(e, *[e.ask(prompt + prompt_of(i, 6)) for i in range(2, 6)]) == 75 + 3 * 12, "whole pages come early"
    e = Telling(chunk=32, slots=4)
    first, second = e.add(prompt, max_new=2), e.ask(prompt)
    window = e.schedule.plan()
    assert window is not None and [seat.request for seat in window.admits] == [first]
    e.executor.run(window)
    window = e.schedule.plan()
    assert window is not None and window.chunks[0].request is first
    e.executor.run(window)
    assert run(e, second) == 69


@pytest.mark.parametrize("what", ["retract", "die"])
def test_interrupted(what: str) -> None:
    """Those that were told are not computed again."""
    e = Telling(chunk=16, slots=2)
    request = e.ask(prompt_of(1, 70))
    for _ in range(2):
        e.plan()
    e.report()
    assert len(e.told[request.rid]) == 16
    e.interrupt(what, request)
    assert run(e, request) >= 69 - 32 and e.computed <= 69


def test_of_a_prompt_that_is_asked_again_under_its_id() -> None:
    """As a text actor's successor does: what windows in flight bring is the request's before, and nobody's."""
    e = Telling(chunk=16)
    prompt = prompt_of(1, 40)
    e.ask(prompt)
    assert e.plan()
    e.schedule.abort_all()
    e.requests.clear()
    again = e.ask(prompt)
    assert again.rid == 1
    run(e, again)


def test_beside_jumps() -> None:
    """In a step's scores the rows of jumps come behind those of prompts."""
    e = Telling(chunk=32, num_continuous_decode_steps=1)
    jumping = e.add(prompt_of(3, 20), 80, grammar=line(9), params=SamplingParams(logprobs=0))
    asking = e.ask(prompt_of(5, 300), max_new=1)
    rows_of: dict[int, int] = {}
    landed = set()
    while e.live:
        window = e.schedule.plan()
        if window is not None:
            fields = scored_fields(window)
            counts = np.frombuffer(fields.get("chunk_scored", b""), np.int32)
            assert counts.sum() == len(np.frombuffer(fields.get("score_ids", b""), np.int32))
            rows_of[window.number] = int(counts[: len(window.chunks)].sum())
            e.executor.run(window)
        if e.executor.out:
            number = e.executor.out[0][0]
            e.report()
            for item in e.schedule.landed:
                assert item.request is jumping and item.scored == rows_of[number]
                landed.add(rows_of[number] > 0)
    e.check(asking)
    assert True in landed


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_anything_at_once(data: st.DataObject) -> None:
    chunk, k = data.draw(st.sampled_from([16, 40])), data.draw(st.sampled_from([1, 4]))
    e = Telling(chunk=chunk, pages=data.draw(st.sampled_from([16, 40])), slots=3, num_continuous_decode_steps=k)
    asked = []
    for _ in range(data.draw(st.integers(2, 10))):
        stem = prompt_of(data.draw(st.integers(0, 1)), 60)[: data.draw(st.integers(1, 60))]
        prompt = stem + prompt_of(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 20)))
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, len(prompt) - 1))
            top, named = data.draw(st.sampled_from([0, 0, 1, 2])), data.draw(st.sampled_from([False, False, True]))
            asked.append(e.ask(prompt, start, top, named, max_new=data.draw(st.integers(0, 6))))
        else:
            e.add(prompt, max_new=data.draw(st.integers(1, 20)))
        for _ in range(data.draw(st.integers(0, 4))):
            data.draw(st.sampled_from([e.plan, e.report]))()
        running = e.schedule.slots.running()
        if running and data.draw(st.integers(0, 5)) == 0:
            e.interrupt("retract", data.draw(st.sampled_from(running)))
    run(e, *asked)
