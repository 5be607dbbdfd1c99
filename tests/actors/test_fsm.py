"""The fsm actor with real compiler processes: answers, single flight, deadlines, deaths, discards."""

import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import tiny_tokenizers
import torch
import trio

from actorserve.actors import fsm as module
from actorserve.actors.actor import Context, connect
from actorserve.actors.constraint import Constraint, Grammar
from actorserve.actors.fsm import Cache, Fsm
from actorserve.actors.fsm_worker import Failed, Made
from actorserve.actors.grammar_fields import grammar_spec
from actorserve.actors.grammar_store import IDLE_MOST, GrammarStore
from actorserve.actors.messages import (
    Compile,
    Compiled,
    CompileFailed,
    Discard,
    DropGrammar,
    FsmInbox,
    GrammarSpec,
    PeerDown,
    SchedulerInbox,
)
from actorserve.config import EngineConfig, ModelInfo, Thoughts
from actorserve.errors import RequestError
from actorserve.models.tokenizer import load_tokenizer
from actorserve.perf.blowup import LARGE, WRONG
from actorserve.sampler.grammar import Grammars

Placement = Literal["inline", "process"]
Backend = Literal["auto", "fsm"]
SLOW = r"(\w{1,40} ?){0,300}x"
"""Takes a second, until its states are too many."""


def regex(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text)


class Bench:
    """An fsm actor in this loop, and the scheduler's end of its lanes."""

    def __init__(self, folder: str, seconds: float, placement: Placement, backend: Backend) -> None:
        config = EngineConfig(placement=placement, grammar_seconds=seconds, grammar_backend=backend)
        model = ModelInfo(name="m", path=folder, model_type="", vocab_size=100_000, context_length=64, eos_ids=(0,))
        self.context = Context("fsm", config, model, FsmInbox, sends_to=["sched"])
        self.sched = Context("sched", config, model, SchedulerInbox, sends_to=["fsm"])
        connect(self.context, self.sched)
        connect(self.sched, self.context)
        self.fsm = Fsm(self.context)
        self.context.host({}, None)

    def send(self, message: Compile | Discard) -> None:
        self.sched.ref("fsm").post(message)

    async def answer(self) -> Any:
        """The next Compiled or CompileFailed."""
        with trio.fail_after(60):
            while True:
                while (item := self.sched.inbox.poll()) is not None:
                    if isinstance(item[0], Compiled | CompileFailed):
                        return item[0]
                await self.sched.inbox.wait()

    async def pid(self, number: int) -> int:
        """Of a compiler that is at work."""
        with trio.fail_after(60):
            while not self.fsm._busy[number] or (pid := self.fsm.workers[number].pid) is None:  # noqa: ASYNC110
                await trio.sleep(0.005)
        return pid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def bench(
    folder: str, seconds: float = 20.0, placement: Placement = "inline", backend: Backend = "fsm"
) -> AsyncIterator[Bench]:
    b = Bench(folder, seconds, placement, backend)
    async with trio.open_nursery() as nursery:
        b.context.host({}, nursery)
        await b.fsm.start()
        nursery.start_soon(b.fsm.run)
        yield b
        nursery.cancel_scope.cancel()
    assert all(worker.pid is None for worker in b.fsm.workers)


def run(main: Callable[[], Any]) -> None:
    trio.run(main)


def test_matchers_are_made_before_somebody_waits_for_one(folder: str) -> None:
    """Where the actor has a process of its own; a program's own loop has them at need."""

    async def main() -> None:
        async with bench(folder, placement="process", backend="auto") as b:
            with trio.fail_after(60):
                while b.fsm.matches._matchers is None:  # noqa: ASYNC110
                    await trio.sleep(0.005)
        async with bench(folder, placement="process") as b:
            b.send(Compile(1, regex("a")))
            assert isinstance(await b.answer(), Compiled)
            assert b.fsm.matches._matchers is None, "its grammars are all tables"

    run(main)


def test_a_pattern_comes_back_as_tables(folder: str) -> None:
    async def main() -> None:
        async with bench(folder) as b:
            b.send(Compile(7, regex("[0-9]{2}")))
            m = await b.answer()
            assert isinstance(m, Compiled) and m.handle == 7
            assert len(m.transitions) // 2 % (len(m.canonical) // 4) == 0
            for spec, wanted in (
                (regex("(?=a)"), "position 0"),
                (
                    GrammarSpec("json_schema", '{"type": "object", "properties": {"a": {"not": {}}}}'),
                    "/properties/a/not",
                ),
                (GrammarSpec("choice", "[]"), "nothing to choose"),
            ):
                b.send(Compile(8, spec))
                failed = await b.answer()
                assert isinstance(failed, CompileFailed) and (failed.handle, failed.status) == (8, 400)
                assert re.search(wanted, failed.message) and failed.message.startswith(spec.kind)

    run(main)


def test_a_pattern_after_thoughts(folder: str) -> None:
    """Text and a closing tag come before it, and it is compiled apart from the same pattern alone."""

    async def main() -> None:
        async with bench(folder) as b:
            tokenizer = load_tokenizer(folder)
            close, text = 1, tokenizer.encode("never", add_special_tokens=False)
            spec = msgspec.structs.replace(regex("[0-9]{2}"), thoughts=Thoughts((), (close,), opened=True))
            for handle, asked in ((1, regex("[0-9]{2}")), (2, spec)):
                b.send(Compile(handle, asked))
                m = await b.answer()
                assert isinstance(m, Compiled)
                states = len(m.canonical) // 4
                grammar = Grammar(
                    handle, np.frombuffer(m.token_class, np.uint16),
                    np.frombuffer(m.transitions, np.int16).reshape(states, -1), np.frombuffer(m.canonical, np.int32),
                )  # fmt: skip
                state = 0
                for token in [*text, close, *tokenizer.encode("42", add_special_tokens=False)]:
                    state = grammar.step(state, token)
                assert grammar.final(state) is (handle == 2)

    run(main)


def test_equal_grammars_compile_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    made = Fsm._made

    async def counted(self: Fsm, worker: Any, spec: GrammarSpec) -> Any:
        compiled.append(spec.text)
        return await made(self, worker, spec)

    monkeypatch.setattr(Fsm, "_made", counted)

    async def main() -> None:
        async with bench(folder) as b:
            for handle in range(64):
                b.send(Compile(handle, regex("ab*c" if handle % 2 else "[a-f]+")))
            assert sorted([(await b.answer()).handle for _ in range(64)]) == list(range(64))
            b.send(Compile(64, regex("ab*c")))
            assert (await b.answer()).handle == 64
        assert sorted(compiled) == ["[a-f]+", "ab*c"]

    run(main)


def test_what_takes_too_long_is_refused_and_others_go_on(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actorserve.actors.compile_pool.GRACE", -0.3)  # killed before it gives up by itself

    async def main() -> None:
        async with bench(folder, seconds=0.6) as b:
            b.send(Compile(1, regex("a")))
            assert isinstance(await b.answer(), Compiled)
            b.send(Compile(2, regex(SLOW)))
            pid = await b.pid(0)
            failed = await b.answer()
            assert (failed.handle, failed.status, failed.code) == (2, 400, "grammar_too_large")
            b.send(Compile(3, regex("b")))
            assert isinstance(await b.answer(), Compiled)
            assert b.fsm.workers[0].pid != pid

    run(main)


def test_a_compiler_that_gets_no_core_is_waited_for(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than one that computes, and not for ever."""

    async def main() -> None:
        async with bench(folder, seconds=1.0) as b:
            b.send(Compile(1, regex("a")))
            assert isinstance(await b.answer(), Compiled)
            for handle, stopped in ((2, 2.0), (3, 60.0)):
                b.send(Compile(handle, regex(SLOW)))
                pid = await b.pid(0)
                os.kill(pid, signal.SIGSTOP)
                with trio.move_on_after(stopped):
                    assert (await b.answer()).handle == handle == 3
                    assert b.fsm.workers[0].pid != pid
                if handle == 2:
                    assert b.fsm.workers[0].pid == pid
                    os.kill(pid, signal.SIGCONT)
                    answer = await b.answer()
                    assert answer.handle == 2 and answer.code == "grammar_too_large"

    run(main)


def test_compilers_are_forks_of_a_process_with_one_thread(folder: str) -> None:
    """It lives on when they are killed, and is started again when it is killed itself."""

    async def main() -> None:
        async with bench(folder, seconds=50.0) as b:
            b.send(Compile(1, regex("a")))
            assert isinstance(await b.answer(), Compiled)
            process = b.fsm.mother._process
            assert process is not None
            assert len(os.listdir(f"/proc/{process.pid}/task")) == 1
            b.send(Compile(2, regex(SLOW)))
            os.kill(await b.pid(0), signal.SIGKILL)
            b.send(Compile(3, regex("b")))
            assert {type(await b.answer()) for _ in range(2)} <= {Compiled, CompileFailed}
            assert b.fsm.mother._process is process and process.poll() is None
            process.kill()
            process.wait()
            b.send(Compile(4, regex("c")))
            answer = await b.answer()
            assert isinstance(answer, Compiled) and answer.handle == 4
            assert b.fsm.mother._process is not process

    run(main)


def test_a_killed_compiler_is_tried_again_once(folder: str) -> None:
    async def main() -> None:
        async with bench(folder, seconds=50.0) as b:  # SLOW must not reach its deadline
            for kills in (1, 2):
                b.send(Compile(kills, regex(SLOW + "y" * kills)))
                for _ in range(kills):
                    pid = await b.pid(0)
                    os.kill(pid, signal.SIGKILL)
                    with trio.fail_after(60):
                        while b.fsm.workers[0].pid == pid:  # noqa: ASYNC110
                            await trio.sleep(0.005)
                m = await b.answer()
                if kills == 2:
                    assert isinstance(m, CompileFailed) and (m.status, m.code) == (503, "compiler_crashed")
                else:
                    assert isinstance(m, Compiled) or m.status == 400
            b.send(Compile(9, regex("a")))
            assert isinstance(await b.answer(), Compiled)

    run(main)


def test_a_discarded_grammar_is_not_compiled(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKERS", 1)

    async def main() -> None:
        async with bench(folder, seconds=1.0) as b:
            b.send(Compile(1, regex(SLOW)))
            await b.pid(0)
            b.send(Compile(2, regex("[a-c]")))
            b.send(Compile(3, regex("[a-d]")))
            b.send(Compile(4, regex("[a-d]")))
            b.send(Discard(2))
            b.send(Discard(3))
            assert (await b.answer()).handle == 1
            assert (await b.answer()).handle == 4
            assert not b.fsm.works
            b.context.inbox.put_system(PeerDown("sched", 1, "test"))
            b.send(Compile(5, regex("[a-c]")))
            assert (await b.answer()).handle == 5

    run(main)


def test_each_scheduler_gets_its_own_answers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They number their grammars alike; one of three dies while its compilation is waited for."""
    monkeypatch.setattr(module, "WORKERS", 1)

    async def main() -> None:
        async with bench(folder, seconds=1.0) as b:
            others = [
                Context(name, b.context.config, b.context.model, SchedulerInbox, sends_to=["fsm"])
                for name in ("sched.1", "sched.2")
            ]
            for other in others:
                connect(b.context, other)
                connect(other, b.context)
            b.send(Compile(1, regex(SLOW)))
            await b.pid(0)
            for scheduler in (b.sched, *others):
                scheduler.ref("fsm").post(Compile(2, regex("[a-c]")))
            others[1].ref("fsm").post(Compile(3, regex("[a-d]")))
            b.send(Compile(4, regex("[a-e]")))
            b.send(Discard(2))
            with trio.fail_after(60):
                while len(b.fsm.works) < 4 or len(b.fsm.works[regex("[a-c]")].handles) > 2:  # noqa: ASYNC110
                    await trio.sleep(0.005)
            b.context.inbox.put_system(PeerDown("sched.2", 1, "test"))
            assert (await b.answer()).handle == 1
            assert (await b.answer()).handle == 4
            with trio.fail_after(60):
                while b.fsm.works:  # noqa: ASYNC110
                    await trio.sleep(0.005)
            answered = [
                [m.handle for m, _ in iter(other.inbox.poll, None) if isinstance(m, Compiled)] for other in others
            ]
            assert answered == [[2], []]
            assert b.fsm.cache.get(regex("[a-d]")) is None
            for other in others:
                other.close()

    run(main)


TOO_LARGE = ("grammar_too_large", "grammar_too_large")
REFUSED: dict[str, tuple[str, str]] = {
    "(a|b)*a(a|b){30}": TOO_LARGE, "((a{1,100}){1,100}){1,100}": TOO_LARGE, "([a-z]{1,10} ?){0,40}x": TOO_LARGE,
    ".{1,100000}": TOO_LARGE, "enum of 1 MB": TOO_LARGE, "choice of 1 MB": TOO_LARGE,
    "rules that double": TOO_LARGE, r"(\w{1,40} ?){0,300}x": TOO_LARGE,
    "1,000 arrays deep": ("invalid_json_schema", "nested too deeply"),
    "1,000 groups deep": ("invalid_grammar", "position 100"),
    "oneOf in oneOf": ("unsupported_json_schema", "at "), "recursive $ref": ("unsupported_json_schema", "at /items"),
    "references that double": ("unsupported_json_schema", "too large"),
    "the empty language": ("invalid_grammar", "nothing can match"),
    "look-ahead": ("invalid_grammar", "position 1"), "back-reference": ("invalid_grammar", "position 3"),
    "an open group": ("invalid_grammar", "position 0"), "no choices": ("invalid_value", "choice is empty"),
    "minimum above maximum": ("invalid_json_schema", "at /properties/n"),
    "not": ("unsupported_json_schema", "at /properties/a/not"), "no JSON": ("invalid_json_schema", "not JSON"),
}  # fmt: skip
"""What is said of the grammars of perf.blowup: the code, and a part of the text where it is not the same.

This tokenizer has a token for each byte, so two of them compile."""


def test_hostile_grammars_are_refused_by_name(folder: str) -> None:
    """Each gets one answer: the code, the field and the place, and the compiler is there for the next."""
    grammars = LARGE | WRONG

    async def said(b: Bench, number: int, fields: dict[str, Any]) -> tuple[str, str]:
        try:
            spec = grammar_spec(fields)
        except RequestError as error:
            return error.code, error.message
        assert spec is not None
        b.send(Compile(number, spec))
        answer = await b.answer()
        return ("compiled", "") if isinstance(answer, Compiled) else (answer.code, answer.message)

    async def main() -> None:
        async with bench(folder, seconds=1.0) as b:
            for number, (name, fields) in enumerate(grammars.items()):
                code, text = await said(b, number, fields)
                wanted, part = REFUSED.get(name, ("compiled", ""))
                if code == "compiled" and wanted == "grammar_too_large":
                    continue  # the machine was quick enough
                assert code == wanted, (name, text)
                assert wanted == part or part in text, (name, text)
                assert code == "compiled" or next(iter(fields)) in text

    run(main)


def test_the_cache_is_bounded() -> None:
    cache = Cache(10_000)
    for i in range(10):
        cache.put(regex(str(i)), Made(b"x" * 1000, b"", b""))
        assert cache.get(regex("0")) is not None or i > 4
    assert cache.size <= 10_000 and cache.get(regex("9")) is not None and cache.get(regex("1")) is None
    cache.put(regex("bad"), Failed("code", "text"))
    assert cache.get(regex("bad")) == Failed("code", "text")


class FakeRequest:
    def __init__(self, rid: int, constraint: Constraint | None = None) -> None:
        self.rid, self.constraint = rid, constraint
        self.tokens: list[int] = []
        self.prompt_length = 0


def compiled(handle: int, size: int = 10) -> Compiled:
    arrays = bytes(2 * size), bytes(2 * size * 3), bytes(4 * size)
    return Compiled(handle, *map(memoryview, arrays), 0.5)


def test_requests_wait_for_their_grammar() -> None:
    store, requests = GrammarStore(), [FakeRequest(i) for i in range(4)]
    entry = store.ask(regex("a"), requests[0])
    assert entry is not None and store.ask(regex("a"), requests[1]) is None and store.waiting == 2
    other = store.ask(regex("b"), requests[2])
    assert other is not None and store.abandon(2) == (True, other.handle) and store.abandon(2) == (False, None)
    assert store.compiled(compiled(other.handle)) == [], "nobody waits any more"
    assert store.compiled(compiled(entry.handle)) == requests[:2] and store.waiting == 0
    assert store.ask(regex("a"), requests[3]) is None and requests[3].constraint is not None
    failing = store.ask(regex("c"), requests[0])
    assert failing is not None and store.kind(failing.handle) == "regex"
    failure = CompileFailed(failing.handle, 400, "code", "text", 0.25)
    assert store.failed(failure) == [requests[0]] and store.failed(failure) == []
    counted = store.counters
    assert (counted.hits, counted.compiled, counted.failed, counted.seconds) == (1, 2, 2, 1.5)


def test_samplers_have_what_runs_and_little_more() -> None:
    store, slots = GrammarStore(), 3
    loaded: set[int] = set()
    running: list[FakeRequest] = []
    for i in range(12):
        request = FakeRequest(i)
        entry = store.ask(regex(str(i % 9)), request)
        if entry is not None:
            store.compiled(compiled(entry.handle))
        running = [*running[-2:], request]
        for message in store.load(i, [request], running, slots):
            if type(message).__name__ == "DropGrammar":
                loaded.remove(message.handle)
            else:
                assert message.handle not in loaded
                loaded.add(message.handle)
        assert loaded == set(store.loaded) and len(loaded) <= 2 * slots
        assert {r.constraint.grammar.handle for r in running if r.constraint} <= loaded


def test_thousands_of_grammars_leave_little_behind(thorough: bool) -> None:
    """No two alike: what the scheduler and the sampler keep is bounded, and what a slot follows is never dropped."""
    store, slots, size = GrammarStore(), 8, 64
    sampler = Grammars(slots, size, torch.device("cpu"))
    running: list[FakeRequest] = []
    for i in range(10_000 if thorough else 1_000):
        request = FakeRequest(i)
        entry = store.ask(regex(str(i)), request)
        assert entry is not None and store.compiled(compiled(entry.handle, size)) == [request]
        store.trim(running)
        running = [*running[-slots + 1 :], request]
        for m in store.load(i, [request], running, slots):
            if isinstance(m, DropGrammar):
                sampler.drop(m.handle)
            else:
                classes, moves, canonical = (
                    np.frombuffer(part, dtype)
                    for part, dtype in ((m.token_class, "u2"), (m.transitions, "i2"), (m.canonical, "i4"))
                )
                sampler.load(m.handle, classes, moves.reshape(size, -1), canonical)
        for r in running:
            assert r.constraint is not None
            handle, slot = r.constraint.grammar.handle, r.rid % slots
            if r is request:
                sampler.bind(slot, handle, 0)
            assert sampler._by_number[int(sampler.host_bound[slot])] is sampler._loaded[handle]
        assert len(sampler._loaded) == len(store.loaded) <= 2 * slots
        assert len(store._entries) == len(store._by_handle) <= IDLE_MOST + slots
