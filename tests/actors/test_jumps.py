"""Jumping over forced tokens against a simulated executor: the same tokens, fewer forwards, whole pages."""

import numpy as np
import pytest
from simulated_executor import EOS, SimulatedExecutor
from simulated_grammars import grammar_of
from test_schedule import Engine, prompt_of

from actorserve.actors.constraint import Constraint, Grammar
from actorserve.actors.request import Stage
from actorserve.actors.token_messages import forced_tokens_of
from actorserve.sampler.params import SamplingParams


def line(length: int) -> Grammar:
    """A choice, `length` forced tokens 100, 101, ..., a choice, and so on."""
    states = length + 1
    token_class = np.full(200, 2, np.uint16)
    token_class[0] = 1
    transitions = np.full((states, 3), -1, np.int16)
    transitions[:, 2] = (np.arange(states) + 1) % states
    canonical = np.concatenate([[-1], np.arange(length) + 100]).astype(np.int32)
    return Grammar(0, token_class, transitions, canonical)


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("plans", [1, 2, 3])
@pytest.mark.parametrize("still", [False, True])
def test_the_same_tokens_with_jumps_and_without(k: int, plans: int, still: bool) -> None:
    e = Engine(num_continuous_decode_steps=k, plans_in_flight=plans, disable_jump_forward=still)
    for i in range(16):
        e.add(prompt_of(i, 5 + 3 * i), max_new=1 + 4 * i, grammar=grammar_of(i % 4) if i % 3 else None)
    e.drain()  # compares each with `expected`, which knows no jumps
    assert (e.schedule.counters.jumps > 0) == (not still)


def test_a_jump_saves_forwards() -> None:
    forwards = {}
    for still in (False, True):
        e = Engine(num_continuous_decode_steps=1, disable_jump_forward=still)
        e.add(prompt_of(1, 20), max_new=100, grammar=line(9))
        e.drain()
        forwards[still] = e.executor.forwards
    assert forwards == {False: 11, True: 100}


def test_a_chunk_is_the_last_token_and_the_forced_ones() -> None:
    e = Engine(num_continuous_decode_steps=1)
    r = e.add(prompt_of(1, 20), max_new=100, grammar=line(5))
    assert e.plan() and not e.plan(), "nothing is planned behind a choice"
    assert e.report()
    window = e.schedule.plan()
    assert window is not None
    (jump,) = window.jumps
    assert (jump.start, jump.tokens, jump.state) == (20, (r.tokens[-1], 100, 101, 102, 103, 104), 0)
    assert len(r.tokens) == 21, "they are the request's when they are computed"
    e.executor.run(window)
    e.report()
    assert r.tokens[21:26].tolist() == [100, 101, 102, 103, 104] and len(r.tokens) == 27
    assert [(item.request, item.tokens) for item in e.schedule.landed] == [(r, [100, 101, 102, 103, 104])]


def test_forced_tokens_under_way_do_not_hide_a_jump() -> None:
    """Beside a free row, the second window draws a forced token; the third is planned before that is reported."""
    e = Engine(num_continuous_decode_steps=1, chunk=512)
    e.add(prompt_of(2, 20), max_new=100)
    e.add(prompt_of(1, 20), max_new=150, grammar=line(100))
    assert e.plan() and e.plan() and e.report()
    window = e.schedule.plan()
    assert window is not None and len(window.jumps[0].tokens) == 65 and window.jumps[0].tokens[0] == 100
    e.executor.run(window)
    e.drain()


def test_what_is_forced_at_the_start_is_computed_with_the_prompt() -> None:
    e = Engine(num_continuous_decode_steps=1)
    r = e.add(prompt_of(1, 20), max_new=100, grammar=line(9))
    assert r.constraint is not None
    r.constraint.state = 1
    window = e.schedule.plan()
    assert window is not None
    (chunk,) = window.chunks
    assert (chunk.start, chunk.end, chunk.draws) == (0, 29, True) and r.prompt_length == 20
    assert e.schedule.counters.forced_tokens == 0, "nobody is told before it is computed"
    e.executor.run(window)
    e.report()
    assert r.tokens[20:29].tolist() == list(range(100, 109)) and len(r.tokens) == 30
    assert [(item.request, item.tokens) for item in e.schedule.landed] == [(r, list(range(100, 109)))]
    assert e.executor.forwards == 1 and e.schedule.counters.forced_tokens == 9
    e.live.clear()  # `expected` begins at state 0


@pytest.mark.parametrize("final", [1, 2])
def test_whether_forced_tokens_match_does_not_depend_on_the_one_drawn_behind_them(final: int) -> None:
    """In one step's results: 100 is forced and ends in state 1, a choice leads to state 2; one of the two is final."""
    token_class = np.full(200, 2, np.uint16)
    token_class[0] = 1
    transitions = np.array([[-1, -1, 1], [-1, -1, 2], [-1, -1, 1]], np.int16)
    transitions[final, 1] = final
    e = Engine()
    r = e.add(prompt_of(1, 20), grammar=Grammar(0, token_class, transitions, np.array([100, -1, -1], np.int32)))
    assert e.plan() and e.report() and r.tokens[20] == 100 and r.tokens[21] != EOS
    forced = forced_tokens_of(e.schedule.landed, None)
    assert list(forced.complete.cast("i")) == ([0] if final == 1 else [])
    assert e.schedule.complete == ([0] if final == 2 else [])


@pytest.mark.parametrize("what", ["retract", "die"])
def test_a_prefill_with_forced_tokens_that_is_lost_is_told_once(what: str) -> None:
    """Its first chunk has run when it goes back to the queue; the forced tokens come with the last one."""
    e = Engine(num_continuous_decode_steps=1, chunk=16)
    r = e.add(prompt_of(1, 40), max_new=100, grammar=line(9))
    assert r.constraint is not None
    r.constraint.state = 1
    told: list[int] = []
    assert e.plan() and e.report()
    if what == "retract":
        e.schedule.retract(r)
    else:
        e.executor = SimulatedExecutor(64)
        e.schedule.executor_lost()
    while not told:
        e.plan()
        e.report()
        told += [token for item in e.schedule.landed for token in item.tokens]
        e.schedule.check()
    assert told == list(range(100, 109)) == r.tokens[40:49].tolist() and r.generated == 10
    e.live.clear()


def test_in_a_mixed_batch_nobody_waits() -> None:
    e = Engine(num_continuous_decode_steps=4, plans_in_flight=2)
    e.add(prompt_of(1, 20), max_new=60)
    e.add(prompt_of(2, 20), max_new=100, grammar=line(30))
    e.add(prompt_of(3, 20), max_new=100, grammar=line(3))
    while e.live:
        while e.plan():
            assert len(e.schedule.in_flight) <= 2
        if len(e.live) == 3:
            assert len(e.schedule.in_flight) == 2, "a window waits on the executor"
        e.report()
    assert e.schedule.counters.jumps > 0


@pytest.mark.parametrize("params", [SamplingParams(logprobs=0), SamplingParams(frequency_penalty=0.5)])
def test_requests_with_logprobs_or_penalties_jump_too(params: SamplingParams) -> None:
    e = Engine()
    e.add(prompt_of(1, 20), max_new=50, grammar=line(9), params=params)
    e.drain()
    assert e.schedule.counters.jumps == 5


def test_the_logits_of_a_windows_jumps_are_bounded() -> None:
    """Many rows with logprobs come to a long run at once: some jump later, or in pieces."""
    e = Engine(pages=256, slots=8, chunk=1024, num_continuous_decode_steps=1)
    for i in range(8):
        e.add(prompt_of(i, 20), max_new=150, grammar=line(100), params=SamplingParams(logprobs=0))
    most = 0
    while e.live:
        window = e.schedule.plan()
        if window is not None:
            most = max(most, sum(len(jump.tokens) for jump in window.jumps))
            e.executor.run(window)
        e.report()
    assert 100 < most <= 128


def test_a_request_with_logprobs_draws_its_first_token() -> None:
    """Its prefill has no logits but of the last token."""
    e = Engine(num_continuous_decode_steps=1)
    r = e.add(prompt_of(1, 20), max_new=50, grammar=line(9), params=SamplingParams(logprobs=0))
    assert r.constraint is not None
    r.constraint.state = 1
    assert e.plan() and e.report() and r.generated == 1 and not e.schedule.landed
    assert e.plan() and e.report() and e.schedule.landed[0].tokens == list(range(101, 109))
    assert e.schedule.landed[0].scored == 0
    e.live.clear()  # `expected` begins at state 0


@pytest.mark.parametrize("most", range(1, 14))
def test_a_limit_inside_a_run(most: int) -> None:
    e = Engine(num_continuous_decode_steps=4)
    r = e.add(prompt_of(1, 20), max_new=most, grammar=line(9))
    e.drain()
    assert len(r.tokens) == 20 + most


@pytest.mark.parametrize("stop", [100, 101, 104, 108])
def test_a_stop_token_inside_a_run(stop: int) -> None:
    e = Engine(num_continuous_decode_steps=4)
    r = e.add(prompt_of(1, 20), max_new=60, grammar=line(9), params=SamplingParams(stop_token_ids=(stop,)))
    e.drain()
    assert r.tokens[-1] == stop


def test_retraction_and_death_in_the_middle_of_a_run() -> None:
    for what in ("retract", "die", "abort"):
        e = Engine(num_continuous_decode_steps=1)
        r = e.add(prompt_of(1, 20), max_new=60, grammar=line(20))
        assert e.plan() and e.report() and e.plan()
        e.interrupt(what, r)
        if what == "die":
            assert len(r.tokens) == 21
        e.drain()
        assert r.stage is Stage.ENDED


def test_long_runs_come_in_pieces_and_need_few_pages() -> None:
    e = Engine(pages=14, slots=2, chunk=64, num_continuous_decode_steps=4)
    for i in range(4):
        e.add(prompt_of(i, 30), max_new=150, grammar=line(140))
    e.drain()
    assert e.schedule.counters.jumps >= 4


def test_a_dead_state_is_no_jump() -> None:
    grammar = line(3)
    constraint = Constraint(grammar, -1)
    assert constraint.foresee(1, ()) is None and constraint.run(-1, 10, ()) == ([], -1)
    assert grammar.step(0, 10_000) == -1 and grammar.step(-1, 5) == -1


def ended(length: int, enders: int = 1) -> Grammar:
    """A choice, `length` forced tokens 100, 101, ..., and the end."""
    states = length + 2
    token_class = np.full(200, 2, np.uint16)
    token_class[:enders] = 1
    transitions = np.full((states, 3), -1, np.int16)
    transitions[:-1, 2] = np.arange(1, states)
    transitions[-1, 1] = states - 1
    canonical = np.concatenate([[-1], np.arange(length) + 100, [-1]]).astype(np.int32)
    return Grammar(0, token_class, transitions, canonical)


@pytest.mark.parametrize("length", [0, 1, 5, 100])
def test_an_end_that_is_forced_needs_no_forward(length: int) -> None:
    e = Engine(num_continuous_decode_steps=1, plans_in_flight=1)
    r = e.add(prompt_of(1, 20), max_new=200, grammar=ended(length))
    assert e.plan() and e.report()
    assert r.stage is Stage.ENDED and not e.live, "with the choice all is said"
    (closed,) = e.schedule.closed
    assert (closed.forced, closed.end) == (list(range(100, 100 + length)), 0) and r.tokens[-1] == 0
    assert e.executor.forwards == 1 and e.schedule.counters.generated_tokens == length + 2
    assert e.schedule.tree.match_length(r.ids()) == 20, "the prompt's tokens have KV, and the choice's does not"
    e.drain()


@pytest.mark.parametrize(
    "changed",
    [
        {"disable_jump_forward": True},
        {"params": SamplingParams(logprobs=0)},
        {"params": SamplingParams(min_new_tokens=9)},
        {"params": SamplingParams(stop_token_ids=(102,))},
        {"max_new": 6},
        {"enders": 2},
    ],
)
def test_ends_that_are_drawn(changed: dict[str, object]) -> None:
    settings = {name: changed[name] for name in changed if name.startswith("disable")}
    options = {name: changed[name] for name in changed if name in ("params", "max_new")}
    e = Engine(num_continuous_decode_steps=1, plans_in_flight=1, **settings)
    grammar = ended(5, enders=int(str(changed.get("enders", 1))))
    r = e.add(prompt_of(1, 20), **{"max_new": 50, "grammar": grammar, **options})  # type: ignore[arg-type]
    assert e.plan() and e.report()
    assert r.stage is Stage.DECODE and not e.schedule.closed


def test_the_next_prompt_computes_what_was_forced_with_its_own() -> None:
    """A program's constrained gen, its text behind it, and the next gen: two forwards to the third's first token."""
    e = Engine(num_continuous_decode_steps=1)
    first = e.add(prompt_of(1, 20), max_new=50, grammar=ended(5))
    e.drain()
    forwards = e.executor.forwards
    e.add([*first.tokens[:-1].tolist(), *prompt_of(2, 7)], max_new=1, grammar=ended(5))
    e.plan()
    (chunk,) = e.schedule.in_flight[0].chunks
    assert (chunk.start, chunk.end) == (20, 20 + 6 + 7) and e.executor.forwards == forwards + 1
    e.drain()
