"""The embedded API, on asyncio, uvloop and trio: with a fake text actor in a thread, and as real processes."""

import json
import os
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import anyio
import numpy as np
import pytest
from msgspec.structs import replace
from processes import is_alive

import actorserve
from actorserve.actors import embedded_host, embedded_root
from actorserve.actors.actor import Actor
from actorserve.actors.messages import Cancel, Chunk, Chunks, Generate, PeerUp, Refused, Stats, TextInbox, TextPrompt
from actorserve.actors.topology import ActorSpec, LaneSpec, NodeSpec, Topology
from actorserve.config import ModelInfo, Pooling
from actorserve.errors import EngineDown, Overloaded, RequestError, StartupError

pytestmark = pytest.mark.anyio
BACKENDS = [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
MODEL = ModelInfo(name="fake", path="/fake", model_type="llama", vocab_size=100, context_length=64, eos_ids=(2,))
STATS = Stats(0, 1, 10, 4, 5, 1, 100, 60, 40, 33, 0, 5, 6, 1500.0, True)
WORDS = ["one", " two", " three"]
EMBEDDING = Pooling(kind="last", task="embed", width=3)


class FakeText(Actor):
    """Says WORDS to everybody, but "silence" to those who ask for it; raises for "die"."""

    inbox_type = TextInbox
    got: list[object] = []  # noqa: RUF012
    start_error: Exception | None = None

    async def start(self):
        if self.start_error is not None:
            raise self.start_error

    def receive(self, message, source):
        type(self).got.append(message)
        match message:
            case PeerUp():
                self.context.ref("client").post(STATS)
            case Generate(prompt=TextPrompt("die")):
                raise RuntimeError("died as told")
            case Generate(prompt=TextPrompt("refuse")):
                self.context.ref("client").post(Refused(message.rid, message.n, 400, "too_long", "too long", "prompt"))
            case Generate(prompt=TextPrompt("silence")):
                self.say(message, WORDS[:1])
            case Generate():
                self.say(message, WORDS)

    def say(self, message, words):
        for i, word in enumerate(words):
            finish = "stop" if i == len(WORDS) - 1 else None
            rids = range(message.rid, message.rid + message.n)
            chunks = [Chunk(rid, word, [i], [], finish, 2 if finish else None, 7, i + 1, 3) for rid in rids]
            self.context.ref("client").post(Chunks(chunks))


@pytest.fixture(params=BACKENDS, ids=["asyncio", "uvloop", "trio"])
def anyio_backend(request):
    return request.param


@pytest.fixture
def text(monkeypatch):
    """Engines made now have FakeText for text actor and nothing behind it."""
    module = types.ModuleType("actorserve_fake_text")
    module.FakeText = FakeText
    monkeypatch.setitem(sys.modules, module.__name__, module)
    node = NodeSpec("engine", (ActorSpec("text", "actorserve_fake_text:FakeText"),), kind="inline")
    lanes = (LaneSpec("client", "text"), LaneSpec("text", "client"))
    monkeypatch.setattr(embedded_root, "engine_topology", lambda config, fronts: Topology((node, *fronts), lanes))
    monkeypatch.setattr(embedded_root, "resolve_model", lambda config, progress: MODEL)
    monkeypatch.setattr(FakeText, "got", [])
    return FakeText


@pytest.fixture
def make(text):
    return partial(actorserve.Engine, placement="inline")


async def arrived(kind: type) -> object:
    """The first message of a kind that the fake got, once it got it (in its own thread)."""
    while not (found := [m for m in FakeText.got if isinstance(m, kind)]):  # noqa: ASYNC110
        await anyio.sleep(0.001)
    return found[0]


async def test_generate(make):
    async with make() as engine:
        output = await engine.generate("Hi", max_new_tokens=5, stop="END")
        assert (output.text, output.ids, output.finish_reason, output.matched) == (
            "one two three",
            [0, 1, 2],
            "stop",
            2,
        )
        assert (output.prompt_tokens, output.completion_tokens, output.cached_tokens, output.index) == (7, 3, 3, 0)
        generate = await arrived(Generate)
        assert (generate.params.max_new_tokens, generate.params.stop) == (5, ("END",))
        assert engine.model == MODEL


async def test_lists_and_choices(make):
    async with make() as engine:
        assert [o.index for o in await engine.generate(["a", "b"], n=2)] == [0, 1, 2, 3]
        assert len(await engine.generate("a", n=3)) == 3
        assert len(await engine.generate(["a"])) == 1
        assert (await engine.generate([1, 2])).text == "one two three"
        assert len(await engine.generate([[1], [2, 3]])) == 2


async def test_vectors(make, monkeypatch):
    """Of one prompt or a list, by a model of the kind; others refuse."""
    vector = np.array([3.0, 0.0, 4.0], dtype=np.float32)
    answer = partial(Chunk, text="", ids=[], logprobs=[], finish="stop", matched=None, prompt_tokens=7)
    monkeypatch.setattr(
        FakeText,
        "say",
        lambda self, m, words: self.context.ref("client").post(
            Chunks([answer(rid=m.rid, completion_tokens=0, cached_tokens=3, vector=vector.tobytes())])
        ),
    )
    async with make() as engine:
        with pytest.raises(RequestError, match="--is-embedding"):
            await engine.embed("Hi")
    monkeypatch.setattr(embedded_root, "resolve_model", lambda config, progress: replace(MODEL, pooling=EMBEDDING))
    async with make() as engine:
        one = await engine.embed("Hi", truncate_prompt_tokens=-1)
        assert one.vector.dtype == np.float32 and np.allclose(one.vector, vector / 5)
        assert (one.index, one.prompt_tokens, one.cached_tokens) == (0, 7, 3)
        generate = await arrived(Generate)
        assert generate.pooled and generate.prompt == TextPrompt("Hi", 64)
        cut = await engine.embed(["a", "b"], dimensions=2, normalize=False)
        assert [e.index for e in cut] == [0, 1] and cut[1].vector.tolist() == [3.0, 0.0]
        assert len(await engine.embed([[1, 2], [3]])) == 2 and (await engine.embed([1, 2])).index == 0
        for wrong, match in (({"dimensions": 4}, "dimensions"), ({"truncate_prompt_tokens": 65}, "truncate")):
            with pytest.raises(RequestError, match=match):
                await engine.embed("Hi", **wrong)
        with pytest.raises(RequestError, match="no tokens"):
            await engine.embed([])
        with pytest.raises(RequestError, match="no text"):
            await engine.generate("Hi")
        with pytest.raises(RequestError, match="use embed"):
            await engine.classify("Hi")


async def test_stream_and_chat(make):
    async with make() as engine:
        deltas = [delta async for delta in engine.stream("Hi", n=2)]
        for index in (0, 1):
            assert "".join(d.text for d in deltas if d.index == index) == "one two three"
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop", "stop"]
        talk = [{"role": "user", "content": "Hi"}]
        answer = await engine.chat(talk, temperature=0, chat_template_kwargs={"thinking": True})
        assert answer.text == "one two three"
        generate = FakeText.got[-1]
        assert (generate.params.max_new_tokens, generate.params.temperature) == (None, 0)
        assert json.loads(generate.prompt.payload) == {"messages": talk, "chat_template_kwargs": {"thinking": True}}
        assert "".join([d.text async for d in engine.chat_stream(talk)]) == "one two three"


async def test_many_at_once(make):
    outputs = []
    async with make() as engine, anyio.create_task_group() as group:

        async def ask():
            outputs.append(await engine.generate("a"))

        for _ in range(50):
            group.start_soon(ask)
    assert [o.text for o in outputs] == ["one two three"] * 50


async def test_wrong_requests(make):
    async with make(max_queued_requests=4) as engine:
        for call, param in (
            (partial(engine.generate, "a", temperature="hot"), "temperature"),
            (partial(engine.generate, "a", temprature=1), "temprature"),
            (partial(engine.generate, "a", top_p=2), "top_p"),
            (partial(engine.generate, "a", n=0), "n"),
            (partial(engine.generate, [100]), "prompt"),
            (partial(engine.generate, []), "prompt"),
            (partial(engine.generate, ["a", [1]]), "prompt"),
            (partial(engine.generate, "refuse"), "prompt"),
            (partial(engine.chat, [{"role": "robot", "content": "x"}]), "messages"),
            (partial(engine.chat, []), "messages"),
        ):
            with pytest.raises(RequestError) as caught:
                await call()
            assert caught.value.param == param, call
        silent = [engine.stream("silence", n=2) for _ in range(2)]
        with pytest.raises(Overloaded):
            await engine.generate("a")
        for deltas in silent:
            await deltas.aclose()
        assert (await engine.generate("a")).text


async def test_closed_and_dropped_streams_are_cancelled(make):
    async with make() as engine:
        async with engine.stream("silence") as deltas:
            assert (await anext(deltas)).text == "one"
        assert (await arrived(Cancel)).rid == (await arrived(Generate)).rid
        FakeText.got.clear()
        async for delta in engine.stream("silence"):
            assert delta.text == "one"
            break
        await engine.generate("a")  # its output makes the client look after the dropped one
        assert (await arrived(Cancel)).rid == (await arrived(Generate)).rid


async def test_cancelled_call_is_cancelled_in_the_engine(make):
    async with make() as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(engine.generate, "silence")
            await arrived(Generate)
            group.cancel_scope.cancel()
        assert (await arrived(Cancel)).n == 1


async def test_stats(make):
    async with make() as engine:
        assert await engine.stats() == STATS


async def test_what_kills_an_actor_is_given_up_and_the_others_go_on(make):
    async with make(log_level="error") as engine:
        with pytest.raises(EngineDown) as caught:
            await engine.generate("die")
        assert caught.value.code == "text_crashed"
        assert (await engine.generate("a")).text == "one two three"


async def test_leaving_fails_what_runs(make):
    caught = []

    async def ask(engine):
        try:
            await engine.generate("silence")
        except EngineDown as error:
            caught.append(error)

    async with anyio.create_task_group() as group, make() as engine:
        group.start_soon(ask, engine)
        await arrived(Generate)
    assert len(caught) == 1
    with pytest.raises(EngineDown):
        await engine.generate("a")


async def test_the_programs_own_exception_passes(make):
    with pytest.raises(KeyError, match="mine"):
        async with make():
            raise KeyError("mine")
    with anyio.move_on_after(60) as scope:
        async with make():
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_start_errors(make, monkeypatch):
    for settings in ({"prot": 1}, {"port": "x"}, {"dtype": "int3"}):
        with pytest.raises(StartupError):
            make(**settings)
    monkeypatch.setattr(FakeText, "start_error", StartupError("no weights here"))
    with pytest.raises(StartupError, match="no weights here"):
        async with make(log_level="error"):
            pytest.fail("entered")

    def resolve(config, progress):
        raise StartupError("no such model")

    monkeypatch.setattr(embedded_root, "resolve_model", resolve)
    with pytest.raises(StartupError, match="no such model"):
        async with make():
            pytest.fail("entered")


async def test_progress(make, monkeypatch):
    def resolve(config, progress):
        progress("download", 1, 4)
        return MODEL

    monkeypatch.setattr(embedded_root, "resolve_model", resolve)
    seen = []
    async with make(on_progress=lambda *step: seen.append(step)):
        assert seen[0] == ("download", 0.25)


def test_sync(text):
    with actorserve.Engine.sync(placement="inline") as engine:
        assert engine.generate("a").text == "one two three"
        assert len(engine.generate(["a", "b"])) == 2
        assert next(engine.stream("a")).text.startswith("one")
        assert engine.chat([{"role": "user", "content": "x"}]).finish_reason == "stop"
        assert "".join(d.text for d in engine.chat_stream([{"role": "user", "content": "x"}])) == "one two three"
        assert engine.stats() == STATS
        with pytest.raises(RequestError):
            engine.generate("a", top_p=7)
        for _ in engine.stream("silence"):
            break
    with pytest.raises(EngineDown):
        engine.generate("a")
    with pytest.raises(ZeroDivisionError), actorserve.Engine.sync(placement="inline"):
        1 / 0  # noqa: B018


def test_sync_streams_that_outlive_the_engine(text):
    with actorserve.Engine.sync(placement="inline") as engine:
        begun, other = engine.stream("silence"), engine.stream("silence")
        assert next(begun).text == next(other).text == "one"
    with pytest.raises(EngineDown):
        next(begun)
    other.close()


def test_an_interrupted_sync_call_is_cancelled(text):
    """Ctrl-C while it waits, where the program goes on, as in a notebook."""

    async def cancelled() -> object:
        with anyio.fail_after(20):
            return await arrived(Cancel)

    with actorserve.Engine.sync(placement="inline") as engine:
        portal = engine._portal
        start = portal.start_task_soon

        def interrupt(timeout=None):
            anyio.run(arrived, Generate)
            raise KeyboardInterrupt

        def interrupted(function, *args):
            del portal.start_task_soon  # the next ones are as ever
            future = start(function, *args)
            future.result = interrupt
            return future

        portal.start_task_soon = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.generate("silence")
        assert anyio.run(cancelled).rid == anyio.run(arrived, Generate).rid


# ------------------------------------------------------------------ real processes, a dummy model


@pytest.fixture(scope="module")
def dummy(tmp_path_factory) -> dict[str, object]:
    """Settings of a real engine with random weights and no tokenizer."""
    folder = tmp_path_factory.mktemp("dummy")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return {
        "model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu",
        "max_total_tokens": 4096, "cpu_threads": 1,
    }  # fmt: skip


def children(pid: int) -> set[int]:
    """The pids of all descendants."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


async def check_answer(engine):
    output = await engine.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True, temperature=0)
    assert (len(output.ids), output.finish_reason, output.prompt_tokens) == (4, "length", 3)


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=False)
async def test_processes(dummy, anyio_backend):
    """On trio; asyncio is the host in test_a_root_that_does_not_leave_is_killed."""
    before = children(os.getpid())
    async with actorserve.Engine(**dummy) as engine:
        processes = children(os.getpid()) - before
        assert len(processes) == 4  # the root; executor, scheduler, text
        await check_answer(engine)
    assert not any(map(is_alive, processes))


HOST = """
import sys, anyio, actorserve, json
async def main():
    async with actorserve.Engine(**json.loads(sys.argv[1])) as engine:
        await engine.generate([5, 6], max_new_tokens=1)
        print("up", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


def test_nothing_outlives_a_killed_host(dummy):
    host = subprocess.Popen([sys.executable, "-c", HOST, json.dumps(dummy)], stdout=subprocess.PIPE, text=True)
    with host:
        assert host.stdout is not None
        assert host.stdout.readline() == "up\n"
        processes = children(host.pid)
        assert len(processes) == 4
        os.kill(host.pid, signal.SIGKILL)
    while any(map(is_alive, processes)):  # pytest's timeout is the limit
        os.sched_yield()


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=False)
async def test_processes_cannot_start(tmp_path, anyio_backend):
    with pytest.raises(StartupError, match=r"config\.json|missing"):
        async with actorserve.Engine(model=str(tmp_path / "missing")):
            pytest.fail("entered")


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=False)
async def test_a_root_that_does_not_leave_is_killed(dummy, monkeypatch, anyio_backend):
    monkeypatch.setattr(embedded_host, "CLOSE_SECONDS", 0.1)
    before = children(os.getpid())
    async with actorserve.Engine(**dummy) as engine:
        processes = [pid for pid in children(os.getpid()) if pid not in before]
        await check_answer(engine)
        os.kill(engine._root.pid, signal.SIGSTOP)
    assert not is_alive(engine._root.pid)
    while any(map(is_alive, processes)):  # noqa: ASYNC110
        await anyio.sleep(0.01)
