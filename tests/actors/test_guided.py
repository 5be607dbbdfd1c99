"""Rows that need a mask for each token: the schedule with a fake matcher, the pool of real ones, a tiny engine."""

import gc
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import trio
from simulated_executor import VOCAB, expected
from simulated_grammars import grammar_of
from test_executor import AheadStepper
from test_schedule import Engine as Simulation
from test_schedule import prompt_of
from word_model import word_model

from actorserve import Engine, SamplingParams
from actorserve.actors import executor
from actorserve.actors.actor import Context, connect
from actorserve.actors.constraint import Grammar, Guided
from actorserve.actors.courtesy import NICE
from actorserve.actors.desk import Desk
from actorserve.actors.fsm_worker import Compiler, Failed, Guidance, Job, MadeText, Setup, framed, serve
from actorserve.actors.guided import GuidedRequests
from actorserve.actors.match_crew import DEADLINE
from actorserve.actors.match_pool import Job as PoolJob
from actorserve.actors.match_pool import MatchPool, Place
from actorserve.actors.messages import (
    Compile,
    ExecutorReady,
    FsmInbox,
    GrammarSpec,
    Masks,
    Match,
    MatchFailed,
    PeerDown,
    PeerUp,
    SchedulerInbox,
    Submit,
    TextInbox,
    Translated,
    Unmatch,
)
from actorserve.actors.request import Request, Stage
from actorserve.actors.scheduler import Scheduler
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import RequestError
from actorserve.fsm import guidance, json_schema
from actorserve.fsm.matcher import Matcher, Matchers

# ------------------------------------------------------------------ the schedule


def mask_of(grammar: Grammar, request: Request) -> np.ndarray:
    """int32 [words]: what the grammar allows after the request's tokens."""
    state = 0
    for token in request.tokens[request.prompt_length :]:
        state = grammar.step(state, token)
    allowed = grammar.transitions[state, grammar.token_class] >= 0
    if grammar.forced(state) >= 0:
        allowed = np.arange(VOCAB) == grammar.forced(state)
    return np.packbits(np.resize(np.concatenate([allowed, np.zeros(56, bool)]), 256), bitorder="little").view(np.int32)


class GuidedSimulation(Simulation):
    """Masks come some plans late, in any order."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chance = random.Random(0)
        self.grammars: dict[int, Grammar] = {}

    def guide(self, prompt: list[int], max_new: int, seed: int) -> Request:
        r = self.add(prompt, max_new)
        r.guided = Guided("")
        self.grammars[r.rid] = grammar_of(seed)
        return r

    def plan(self) -> bool:
        for rid, grammar in self.grammars.items():
            r = self.requests[rid]
            if r.stage is not Stage.ENDED and r.waits_for_mask and self.chance.random() < 0.5:
                assert r.guided is not None
                r.guided.mask = mask_of(grammar, r)
                self.schedule.mask_came(r)
        return super().plan()

    def report(self) -> bool:
        if not self.executor.out:
            return False
        self.schedule.report(*self.executor.out.popleft())
        for rid in [rid for rid in self.live if self.requests[rid].stage is Stage.ENDED]:
            r = self.requests[rid]
            self.live.discard(rid)
            prompt, most = r.tokens[: r.prompt_length].tolist(), r.limit - r.prompt_length
            own = None if r.constraint is None else r.constraint.grammar
            assert r.tokens.tolist() == expected(prompt, most, self.grammars.get(rid, own))
        return True

    def drain(self) -> None:
        for _ in range(5000):
            planned, reported = self.plan(), self.report()
            self.schedule.check()
            if not (planned or reported or self.live):
                break
        assert not self.live, "requests are stuck"
        assert self.schedule.pages_running == 0


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("plans", [1, 2, 3])
@pytest.mark.parametrize("pages", [20, 64])
def test_every_row_gets_its_tokens_beside_guided_ones(k: int, plans: int, pages: int) -> None:
    e = GuidedSimulation(
        pages=pages, num_continuous_decode_steps=k, plans_in_flight=plans, schedule_conservativeness=0.0
    )
    for i in range(12):
        if i % 3:
            e.guide(prompt_of(i, 5 + 3 * i), 1 + 5 * i, i % 4)
        else:
            e.add(prompt_of(i, 5 + 3 * i), max_new=1 + 5 * i, grammar=grammar_of(i % 4) if i % 2 else None)
    e.drain()
    assert pages > 20 or e.schedule.counters.retractions


def test_others_do_not_wait_for_a_mask() -> None:
    e = GuidedSimulation(plans_in_flight=2)
    waiting = e.guide(prompt_of(1, 20), 30, 1)
    e.chance.random = lambda: 1.0  # type: ignore[method-assign]
    free = e.add(prompt_of(2, 20), max_new=30)
    while free.rid in e.live:
        assert e.plan() or e.report()
    assert waiting.stage is Stage.WAITING and not waiting.generated
    assert not e.plan(), "nothing to do without the mask"
    e.chance = random.Random(0)
    e.drain()


def test_death_and_retraction_while_a_draw_is_under_way() -> None:
    for what in ("retract", "die", "abort"):
        e = GuidedSimulation()
        r = e.guide(prompt_of(1, 20), 40, 2)
        while r.generated < 3:
            e.plan()
            e.report()
        while not e.plan():
            pass
        e.interrupt(what, r)
        e.drain()
        assert r.stage is Stage.ENDED


def test_what_the_fsm_actor_is_told() -> None:
    e = GuidedSimulation()
    r = e.guide(prompt_of(1, 20), 40, 1)
    r.guided = Guided("text")
    followed = GuidedRequests()
    followed.add(r)

    def came(length: int) -> bool:
        arrays = (np.array([r.rid]), np.array([length], np.int32), np.full(7, -1, np.int32))
        return bool(followed.came(Masks(*(memoryview(a.tobytes()) for a in arrays))))

    def sent() -> list[tuple[int, list[int], str]]:
        return [
            (m.start, memoryview(m.ids).cast("i").tolist(), m.grammar) for m in followed.due() if isinstance(m, Match)
        ]

    assert sent() == [(0, [], "text")] and not sent()
    assert not came(1) and came(0) and not sent()
    r.append(5)
    assert r.waits_for_mask and not came(0) and sent() == [(0, [5], "text")]
    assert came(1)
    r.append(6)
    assert sent() == [(1, [6], "")]
    followed.lost()
    assert sent() == [(0, [5, 6], "text")], "it is told everything again"
    e.schedule.abort(r.rid)
    assert followed.due() == [Unmatch(r.rid)] and not followed.due()


def test_an_fsm_actor_that_comes_up_is_told_what_went_lost_while_it_was_down() -> None:
    config = EngineConfig(placement="inline")
    model = ModelInfo(name="m", path="", model_type="", vocab_size=200, context_length=64, eos_ids=(0,))
    context = Context("sched", config, model, SchedulerInbox, sends_to=["text", "fsm", "exec.0", "sampler.0"])
    fsm = Context("fsm", config, model, FsmInbox, sends_to=["sched"])
    connect(context, fsm)
    for name in ("text", "exec.0", "sampler.0"):
        connect(context, Context(name, config, model, TextInbox, sends_to=[]))
    scheduler = Scheduler(context)
    ids = memoryview(np.arange(5, dtype=np.int32).tobytes())
    grammar = GrammarSpec("ebnf", NESTED)

    def told(*news: Any) -> list[Match | Compile]:
        """What the fsm actor gets when the scheduler gets these messages."""
        for message in news:
            scheduler.receive(message, "")
        scheduler.flush()
        got = []
        while (item := fsm.inbox.poll()) is not None:
            got.append(item[0])
        return [m for m in got if isinstance(m, Match | Compile)]

    params = SamplingParams(seed=1, max_new_tokens=9)
    submit = Submit(7, ids, params, grammar=grammar)
    (compile_it,) = told(ExecutorReady(64, 4, 4, "cpu"), submit)
    assert isinstance(compile_it, Compile)
    (first,) = told(Translated(compile_it.handle, "text"))
    assert isinstance(first, Match) and (first.rid, first.start, first.grammar) == (7, 0, "text")
    told(PeerDown("fsm", 1, "killed"))  # what is sent from here on reaches nobody
    assert told(PeerUp("fsm", 2)) == [first]


# ------------------------------------------------------------------ matchers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the vocabulary of a byte-level tokenizer; id 2 ends outputs in both."""
    return word_model(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def compiler(folder: str) -> Compiler:
    return Compiler(Setup(folder, (2,), 416, 20.0, "auto"))


def text_of(compiler: Compiler, kind: Any, text: str) -> str:
    made = compiler.compile(GrammarSpec(kind, text))
    assert isinstance(made, MadeText), made
    return made.grammar


NESTED = 'root ::= "[" root* "]"'


def test_a_matcher_that_would_come_too_late_is_refused(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a grammar is made in the compiler, the request's own after it, as slowly."""
    spec = GrammarSpec("ebnf", NESTED)
    assert isinstance(compiler.compile(spec), MadeText)
    monkeypatch.setattr("actorserve.actors.fsm_worker.GRACE", -compiler.seconds)
    answer = compiler.compile(spec)
    assert isinstance(answer, Failed) and answer.code == "grammar_too_large" and answer.late


def test_a_tree_is_made_once_for_both_backends(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is too large for tables, which takes longest."""
    made: list[str] = []
    for module, name in ((json_schema, "schema_to_syntax"), (guidance, "schema_to_syntax"), (json_schema, "choices")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, original=original, name=name: (made.append(name), original(*given))[1]
        )
    texts = [f"{i * 7919:06}{i * i * 104729:012}" for i in range(6000)]
    for kind, value in (("json_schema", {"enum": texts}), ("choice", texts)):
        assert text_of(compiler, kind, json.dumps(value))
    assert made == ["schema_to_syntax", "choices"]


def test_what_is_forced_is_not_looked_at_to_its_end(compiler: Compiler) -> None:
    """Here that would be 150 million characters."""
    pair = {"type": "array", "minItems": 2, "items": False}
    definitions = {f"n{i}": {**pair, "prefixItems": 2 * [{"$ref": f"#/$defs/n{i + 1}"}]} for i in range(25)}
    schema = {"$ref": "#/$defs/n0", "$defs": {**definitions, "n25": {"type": "null"}}}
    text = text_of(compiler, "json_schema", json.dumps(schema))
    grammar = msgspec.json.decode(text, type=Guidance)
    assert compiler.matchers is not None
    matcher = compiler.matchers.new(grammar.grammar)
    assert isinstance(matcher, Matcher)
    matcher.fill(np.zeros(compiler.matchers.words, np.int32))
    assert 0 < len(matcher._matcher.compute_ff_bytes()) < 400_000


def test_compilers_do_not_look_for_cycles_while_they_work() -> None:
    """But before they wait for the next grammar."""
    ours, theirs = socket.socketpair()
    seen: list[bool] = []

    class Stub:
        def compile(self, spec: GrammarSpec) -> Failed:
            seen.append(gc.isenabled())
            loop: list[Any] = []
            loop.append(loop)
            return Failed("", spec.text)

    with ours, theirs:
        for text in "ab":
            ours.sendall(framed(Job(GrammarSpec("regex", text))))
        ours.shutdown(socket.SHUT_WR)
        gc.callbacks.append(counted := lambda phase, info: seen.append(phase == "stop" and info["generation"] == 2))
        try:
            serve(theirs, Stub(), 1.0)  # type: ignore[arg-type]
        finally:
            gc.callbacks.remove(counted)
            gc.enable()
    assert seen == 2 * [False, False, True]


def test_a_matcher_that_takes_long_keeps_no_other_from_being_made(
    folder: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = text_of(compiler, "ebnf", 'root ::= "a" | "b" root "c"'), text_of(compiler, "ebnf", NESTED)
    begun, release = threading.Event(), threading.Event()
    new = Matchers.new

    def waiting(self: Matchers, grammar: str, thoughts: None) -> Any:
        if grammar in json.loads(slow):
            begun.set()
            assert release.wait(60)
        return new(self, grammar, thoughts)

    monkeypatch.setattr(Matchers, "new", waiting)
    pool = MatchPool(Setup(folder, (2,), 416, 20.0, "auto"), lambda scheduler, m: None, Desk())
    jobs = [PoolJob("sched", rid, Place(grammar), []) for rid, grammar in enumerate((slow, quick, slow))]
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(pool._work, jobs[0])
        assert begun.wait(60)
        threads.submit(pool._work, jobs[1]).result(60)
        third = threads.submit(pool._work, jobs[2])
        assert jobs[1].mask is not None and jobs[0].mask is None
        release.set()
        first.result(60)
        third.result(60)
    assert jobs[0].mask is not None and jobs[2].mask is not None


def test_masks_of_the_pool(folder: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow mask comes later than those that were asked for with it; an illegal token ends its request alone."""
    sent: list[Masks | MatchFailed] = []
    release = threading.Event()
    fill = Matcher.fill

    nested, letters = text_of(compiler, "ebnf", NESTED), text_of(compiler, "ebnf", 'root ::= "a" | "b" root "c"')
    byte = {compiler.tokenizer.token_bytes(i): i for i in range(400)}

    def slow(self: Matcher, mask: np.ndarray) -> None:
        fill(self, mask)
        if np.unpackbits(mask.view(np.uint8), bitorder="little")[byte[b"a"]]:
            assert release.wait(60)

    def match(rid: int, start: int, text: str, grammar: str) -> Match:
        ids = np.array([byte[c.encode()] for c in text], np.int32)
        return Match(rid, start, memoryview(ids.tobytes()), grammar if not start else "")

    async def answers(count: int) -> list[Masks | MatchFailed]:
        with trio.fail_after(60):
            while sum(len(m.lengths) // 4 if isinstance(m, Masks) else 1 for m in sent) < count:  # noqa: ASYNC110
                await trio.sleep(0.002)
        found = list(sent)
        sent.clear()
        return found

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            pool = MatchPool(Setup(folder, (2,), 416, 20.0, "auto"), lambda scheduler, m: sent.append(m), Desk())
            pool.start(nursery)
            pool.follow(match(1, 0, "[[]", nested), "sched")
            (first,) = await answers(1)
            assert isinstance(first, Masks) and memoryview(first.lengths).cast("i").tolist() == [3]
            bits = np.unpackbits(np.frombuffer(first.bitmask, np.uint8), bitorder="little")
            assert bits[byte[b"["]] and bits[byte[b"]"]] and not bits[2] and not bits[byte[b"a"]]
            pool.follow(match(1, 3, "]", nested), "sched")
            (closed,) = await answers(1)
            assert isinstance(closed, Masks)
            assert np.flatnonzero(
                np.unpackbits(np.frombuffer(closed.bitmask, np.uint8), bitorder="little")
            ).tolist() == [2]
            monkeypatch.setattr(Matcher, "fill", slow)
            pool.follow(match(2, 0, "b", letters), "sched")
            pool.follow(match(3, 0, "[", nested), "sched")
            pool.follow(match(4, 0, "a", nested), "sched")
            early = await answers(2)
            (failed,) = [m for m in early if isinstance(m, MatchFailed)]
            assert failed.rid == 4 and failed.status == 400
            assert [memoryview(m.rids).cast("q").tolist() for m in early if isinstance(m, Masks)] == [[3]]
            pool.forget("sched", 3)
            release.set()
            (late,) = await answers(1)
            assert isinstance(late, Masks) and memoryview(late.rids).cast("q").tolist() == [2]
            pool.follow(match(3, 1, "]", nested), "sched")  # forgotten: not answered
            pool.follow(match(2, 1, "bac", letters), "sched")
            (last,) = await answers(1)
            assert isinstance(last, Masks) and memoryview(last.lengths).cast("i").tolist() == [4]
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_what_may_take_long_lets_others_go_first(
    folder: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request's first mask, and what follows one that took long."""
    nested = text_of(compiler, "ebnf", NESTED)
    opened = [i for i in range(400) if compiler.tokenizer.token_bytes(i) == b"["][:1]
    ids = memoryview(np.array(opened, np.int32).tobytes())
    own, nice, sent = os.getpriority(os.PRIO_PROCESS, 0), [], []
    fill = Matcher.fill

    def noted(self: Matcher, mask: np.ndarray) -> None:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - own)
        if len(nice) == 2:
            time.sleep(2 * DEADLINE)
        fill(self, mask)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            pool = MatchPool(Setup(folder, (2,), 416, 20.0, "auto"), lambda scheduler, m: sent.append(m), Desk())
            pool.start(nursery)
            for start in range(3):
                pool.follow(Match(1, start, ids, "" if start else nested), "sched")
                with trio.fail_after(60):
                    while len(sent) <= start:  # noqa: ASYNC110
                        await trio.sleep(0.001)
                if not start:
                    pool._places["sched", 1].slow = False  # the library's first fill may have taken long
            nursery.cancel_scope.cancel()

    monkeypatch.setattr(Matcher, "fill", noted)
    trio.run(main)
    polite = min(NICE, 19 - own)
    assert nice == [polite, 0, polite]


def test_the_pool_keeps_schedulers_apart(folder: str, compiler: Compiler) -> None:
    """Request 1 went from one replica to another, whose question comes before the first one's farewell."""
    sent: list[tuple[str, Masks]] = []
    nested = text_of(compiler, "ebnf", NESTED)
    opened = [i for i in range(400) if compiler.tokenizer.token_bytes(i) == b"["][:1]

    def match(start: int, count: int) -> Match:
        return Match(1, start, memoryview(np.array(opened * count, np.int32).tobytes()), "" if start else nested)

    async def known() -> list[tuple[str, list[int]]]:
        """Who is told that how many tokens are consumed; a moment later than the last question."""
        with trio.fail_after(60):
            while not sent:  # noqa: ASYNC110
                await trio.sleep(0.002)
        await trio.sleep(0.05)
        told = [(scheduler, memoryview(m.lengths).cast("i").tolist()) for scheduler, m in sent]
        sent.clear()
        return sorted(told)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            pool = MatchPool(
                Setup(folder, (2,), 416, 20.0, "auto"),
                lambda scheduler, m: sent.append((scheduler, m)) if isinstance(m, Masks) else None,
                Desk(),
            )
            pool.start(nursery)
            pool.follow(match(0, 1), "sched.0")
            assert await known() == [("sched.0", [1])]
            pool.follow(match(0, 3), "sched.1")
            pool.forget("sched.0", 1)
            assert await known() == [("sched.1", [3])]
            pool.follow(match(0, 2), "sched.0")
            pool.forget_all("sched.0")
            pool.follow(match(3, 1), "sched.1")
            assert await known() == [("sched.1", [4])]
            nursery.cancel_scope.cancel()

    trio.run(main)


# ------------------------------------------------------------------ the whole engine, with a tiny model

TREE = {
    "type": "object",
    "properties": {"user": {"type": "boolean"}, "imagine": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
    "required": ["user", "imagine"],
}
GRAMMARS: list[dict[str, Any]] = [
    {"ebnf": 'root ::= "<" ("Hello" | root) ">"'}, {}, {"json_schema": TREE}, {"choice": ["Hello there", "I am fine"]},
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "placement": "inline", "max_total_tokens": 2048, "max_running_requests": 6,
    "window_ms": 0.0, "cpu_threads": 1, "chunked_prefill_size": 48, "grammar_seconds": 20.0,
}  # fmt: skip


def engine(folder: str, **options: object) -> Any:
    return Engine.sync(folder, **SETTINGS | options)


def answers(running: Any) -> list[list[int]]:
    def ask(i: int) -> list[int]:
        params = SamplingParams(temperature=0.9, seed=i, max_new_tokens=8 + 6 * (i % 4))
        found: list[int] = running.generate(tiny.prompt(5 + 9 * i, seed=i), params, **GRAMMARS[i % len(GRAMMARS)]).ids
        return found

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, range(8)))


@pytest.fixture(scope="module")
def alone(folder: str) -> list[list[int]]:
    """Each request by itself, without anything in flight beside it."""
    with engine(folder, num_continuous_decode_steps=1, plans_in_flight=1, max_running_requests=1) as e:
        return answers(e)


@pytest.mark.parametrize(("k", "in_flight", "ahead"), [(1, 2, False), (4, 2, True), (4, 1, False), (1, 3, True)])
def test_a_mixed_batch_draws_what_each_would_alone(
    folder: str, alone: Any, k: int, in_flight: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ahead:
        monkeypatch.setattr(executor, "Stepper", AheadStepper)
    with engine(folder, num_continuous_decode_steps=k, plans_in_flight=in_flight) as e:
        for _ in range(2):
            assert answers(e) == alone


def test_retractions_and_clients_that_leave(folder: str, alone: Any) -> None:
    with engine(folder, max_total_tokens=176, schedule_conservativeness=0.0) as e:
        for i in range(4):
            stream = iter(e.stream(tiny.prompt(9, seed=i), SamplingParams(seed=i), **GRAMMARS[i % 4]))
            if i % 2:
                next(stream, None)
            stream.close()
        assert answers(e) == alone


@pytest.fixture(scope="module")
def running(folder: str) -> Iterator[Any]:
    with engine(folder) as e:
        yield e


def test_choices_stops_and_ends(running: Any) -> None:
    ebnf = 'root ::= "a" root "a" | "b"'
    outputs = running.generate(tiny.prompt(9), SamplingParams(seed=1, max_new_tokens=60), n=3, ebnf=ebnf)
    assert all(o.valid is (True if o.finish_reason == "stop" else None) for o in outputs), "a limit leaves it unknown"
    assert any(o.valid for o in outputs)
    for o in outputs:
        assert re.fullmatch("a*(ba*)?", o.text)
        assert o.finish_reason == "length" or o.text.count("a") == 2 * o.text.index("b")
    options = SamplingParams(temperature=0.0, ignore_eos=True, max_new_tokens=9)
    o = running.generate(tiny.prompt(9), options, ebnf='root ::= "<" x ">"\nx ::= "b" | "<" x ">"', logit_bias={})
    assert o.finish_reason in ("stop", "length")
    lark = running.generate(tiny.prompt(9), options, ebnf='start: "Hello" " there"')
    assert (lark.text, lark.finish_reason) == ("Hello there", "stop"), "ignore_eos does not keep a grammar from ending"
    with pytest.raises(Exception, match="grammar left no token"):
        running.generate(tiny.prompt(9), SamplingParams(min_new_tokens=30, max_new_tokens=40), ebnf='start: "Hello"')


BAD = [
    ({"ebnf": "root ::= ("}, "ebnf", "position 10"),
    ({"ebnf": "root ::= nobody"}, "ebnf", "nobody"),
    ({"ebnf": "start: ("}, "ebnf", "Expected token"),
    ({"ebnf": "start: start"}, "ebnf", "nothing can match"),
    ({"ebnf": "start: " + "(" * 100_000}, "ebnf", "nested"),
    ({"ebnf": "root ::= " + "(" * 100_000}, "ebnf", "nested"),
    ({"structural_tag": {"triggers": ["<"]}}, "structural_tag", "/structures"),
    ({"structural_tag": "{"}, "structural_tag", "not JSON"),
    ({"structural_tag": {"structures": [{"begin": "x", "schema": {}, "end": ""}], "triggers": ["<"]}}, "structural_tag",
     "/structures/0/begin"),
    ({"structural_tag": {"structures": [{"begin": "<", "schema": False, "end": ""}], "triggers": ["<"]}},
     "structural_tag", "no value satisfies"),
    ({"structural_tag": {"structures": [{"begin": "<", "schema": {"not": {}}, "end": ""}], "triggers": ["<"]}},
     "structural_tag", "at /structures/0/schema/not"),
    ({"json_schema": {"properties": {"a": {"not": {}}}}}, "json_schema", "/properties/a/not"),
    ({"json_schema": {"additionalProperties": {"maxLenght": 1}}}, "json_schema", "/additionalProperties/maxLenght"),
    ({"json_schema": {"items": {"$ref": "#/nowhere"}}}, "json_schema", "leads nowhere"),
    ({"regex": "a", "ebnf": "root ::= a"}, "ebnf", "exclude each other"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "text"), BAD, ids=lambda value: str(value)[:40])
def test_bad_grammars_are_refused(running: Any, fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        running.generate(tiny.prompt(5), max_new_tokens=5, **fields)
    assert caught.value.param == param and text in caught.value.message and caught.value.status == 400


@pytest.mark.parametrize("backend", ["fsm", "llguidance"])
def test_one_backend_alone(folder: str, backend: str) -> None:
    with engine(folder, grammar_backend=backend) as e:
        params = SamplingParams(temperature=0.0, max_new_tokens=20)
        assert e.generate(tiny.prompt(9), params, choice=["Hello there", "I am fine"]).text in (
            "Hello there",
            "I am fine",
        )
        if backend == "fsm":
            with pytest.raises(RequestError, match="calls itself"):
                e.generate(tiny.prompt(9), params, ebnf=NESTED)
            with pytest.raises(RequestError, match="grammar-backend"):
                e.generate(tiny.prompt(9), params, ebnf='start: "a"')
