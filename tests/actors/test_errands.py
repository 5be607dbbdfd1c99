"""What executors do beside windows: other weights, profiles. The protocol alone, then with real tiny models."""

import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import trio

from actorserve import Engine, SamplingParams
from actorserve.actors.actor import Context, connect
from actorserve.actors.errands import OURS, Errands
from actorserve.actors.executor import Executor
from actorserve.actors.messages import (
    Carried,
    Done,
    ExecutorInbox,
    Instruct,
    Order,
    PeerDown,
    Refused,
    SchedulerInbox,
)
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import ActorserveError, RequestError

# ------------------------------------------------------------------ the protocol


@pytest.fixture
def said() -> list[object]:
    return []


@pytest.fixture
def errands(said: list[object]) -> Errands:
    return Errands(said.append, said.append)


def test_an_update_goes_in_two_parts(errands: Errands, said: list[object]) -> None:
    errands.order(Order(1, "update_weights", "/a"))
    assert said == [Instruct(1, "load_weights", "/a")] and not errands.holds
    errands.order(Order(2, "update_weights", "/b"))
    assert isinstance(said.pop(), Refused)
    errands.carried(Carried(1, "load_weights"))
    assert errands.holds and errands.weights == ""
    errands.swap()
    assert said[1:] == [Instruct(1, "swap_weights")]
    errands.carried(Carried(1, "swap_weights"))
    assert said[2:] == [Done(1)] and not errands.holds and errands.weights == "/a"


def test_an_order_that_comes_again_is_answered_once(errands: Errands, said: list[object]) -> None:
    """As a text actor's successor sends it."""
    for _ in range(2):
        errands.order(Order(1, "update_weights", "/a"))
        errands.order(Order(2, "start_profile", "{}"))
    assert said == [Instruct(1, "load_weights", "/a"), Instruct(2, "start_profile", "{}")]
    errands.carried(Carried(1, "load_weights"))
    errands.order(Order(1, "update_weights", "/a"))
    errands.swap()
    errands.carried(Carried(1, "swap_weights"))
    errands.carried(Carried(2, "start_profile"))
    assert said[2:] == [Instruct(1, "swap_weights"), Done(1), Done(2)]


def test_weights_that_cannot_be_loaded_change_nothing(errands: Errands, said: list[object]) -> None:
    errands.order(Order(1, "update_weights", "/a"))
    assert errands.carried(Carried(1, "load_weights", "broken", 400, "startup_failed", "model_path")) is None
    assert said[1:] == [Refused(1, 1, 400, "startup_failed", "broken", "model_path")]
    assert errands.weights == "" and errands.update is None


def test_an_executor_that_dies_meanwhile(errands: Errands, said: list[object]) -> None:
    errands.order(Order(1, "update_weights", "/a"))
    errands.order(Order(2, "start_profile", "{}"))
    errands.executor_lost()
    refused = [m for m in said if isinstance(m, Refused)]
    assert sorted(m.rid for m in refused) == [1, 2] and {m.status for m in refused} == {503}
    assert not errands.restore(""), "the next one has what it needs"


def test_the_next_executor_gets_the_weights_that_were_in_use(errands: Errands, said: list[object]) -> None:
    errands.order(Order(1, "update_weights", "/a"))
    errands.carried(Carried(1, "load_weights"))
    errands.swap()
    errands.executor_lost()
    assert Done(1) in said
    assert errands.restore("") and errands.holds
    assert said[-1] == Instruct(OURS, "load_weights", "/a")
    assert errands.carried(Carried(OURS, "load_weights")) is None
    errands.swap()
    assert errands.carried(Carried(OURS, "swap_weights")) is None and not errands.holds
    errands.executor_lost()
    assert errands.restore("")
    assert errands.carried(Carried(OURS, "load_weights", "gone", 400)) == "gone"


def test_a_scheduler_learns_from_the_executor_what_is_in_use(errands: Errands) -> None:
    assert not errands.restore("/a") and errands.weights == "/a"


# ------------------------------------------------------------------ real executors

PROMPT = tiny.prompt(40, seed=1)
GREEDY = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)


def test_weights_for_a_scheduler_that_died_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are there, or still loaded: the next one asks again, maybe for others."""
    config = EngineConfig()
    model = ModelInfo(name="m", path="", model_type="llama", vocab_size=9, context_length=64, eos_ids=(0,))
    context = Context("exec.0", config, model, ExecutorInbox, sends_to=["sched"])
    sched = Context("sched", config, model, SchedulerInbox)
    connect(context, sched)
    executor, go = Executor(context), threading.Event()

    def load(self: Executor, folder: str) -> tuple[str, object]:
        assert folder != "/slow" or go.wait(30)
        return folder, None

    async def carried() -> int:
        while True:
            item = sched.inbox.poll()
            if item is None:
                await sched.inbox.wait()
            elif isinstance(item[0], Carried):
                return item[0].rid

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            context.host({}, nursery)
            for rid, folder in enumerate(("/slow", "/quick")):
                executor.receive(Instruct(rid, "load_weights", folder), "sched")
            assert await carried() == 1 and executor.loaded == ("/quick", None)
            executor.receive(PeerDown("sched", 1, "killed"), "supervisor")
            assert executor.loaded is None
            executor.receive(Instruct(2, "load_weights", "/other"), "sched")
            assert await carried() == 2
            go.set()
        assert executor.loaded == ("/other", None) and sched.inbox.poll() is None

    monkeypatch.setattr(Executor, "_load_beside", load)
    trio.run(main)
    for one in (context, sched):
        one.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {name: tiny.build("llama", seed=seed) for name, seed in (("one", 0), ("two", 1))}
    made["wide"] = tiny.build("llama", intermediate_size=96)
    return {name: tiny.save(model, tmp_path_factory.mktemp(name)) for name, model in made.items()}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "made"


def engine(folder: str, **options: object) -> Engine:
    settings = {
        "skip_tokenizer_init": True, "dtype": "float32", "placement": "inline", "max_total_tokens": 2048,
        "max_running_requests": 4, "cpu_threads": 1, "chunked_prefill_size": 48,
    }  # fmt: skip
    return Engine.sync(folder, **settings | options)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def running(folders: dict[str, str], traces: Path) -> Iterator[Engine]:
    with engine(folders["one"], profile_dir=str(traces)) as e:  # type: ignore[attr-defined]
        yield e


def order(running: object, action: str, detail: str = "") -> str:
    inner = running._engine  # type: ignore[attr-defined]

    async def ask() -> str:
        return await inner._client.questions.order(action, detail)  # type: ignore[no-any-return]

    return running._running.call(ask)  # type: ignore[attr-defined,no-any-return]


def answer(running: object) -> list[int]:
    return running.generate(PROMPT, GREEDY).ids  # type: ignore[attr-defined,no-any-return]


def test_other_weights_while_a_request_runs(running: Engine, folders: dict[str, str]) -> None:
    old = answer(running)
    with engine(folders["two"]) as other:  # type: ignore[attr-defined]
        new = answer(other)
    assert new != old and answer(running) == old
    long = SamplingParams(temperature=0, max_new_tokens=400, ignore_eos=True)
    out: list[object] = []
    asking = threading.Thread(target=lambda: out.append(running.generate(PROMPT, long)))
    asking.start()
    order(running, "update_weights", folders["two"])
    asking.join()
    (one,) = out
    assert one.finish_reason == "length" and len(one.ids) == 400  # type: ignore[attr-defined]
    assert answer(running) == new, "nothing of the old weights' KV is used again"
    assert running.stats().weights == folders["two"]  # type: ignore[attr-defined]
    order(running, "update_weights", folders["one"])
    assert answer(running) == old


def test_weights_of_another_shape_are_refused(running: Engine, folders: dict[str, str], tmp_path: Path) -> None:
    old = answer(running)
    for wrong in (folders["wide"], str(tmp_path)):
        with pytest.raises(RequestError) as caught:
            order(running, "update_weights", wrong)
        assert caught.value.param == "model_path"
    assert answer(running) == old


def test_an_update_can_end_what_runs(running: Engine, folders: dict[str, str]) -> None:
    deltas = running.stream(PROMPT, SamplingParams(temperature=0, max_new_tokens=1500, ignore_eos=True))
    first = next(deltas)  # type: ignore[call-overload]
    order(running, "update_weights_abort", folders["one"])
    *_, last = deltas  # type: ignore[misc]
    assert first.finish_reason is None and last.finish_reason == "abort"


def test_profiles(running: Engine, traces: Path) -> None:
    with pytest.raises(RequestError, match="no profile"):
        order(running, "stop_profile")
    order(running, "start_profile")
    with pytest.raises(ActorserveError) as caught:
        order(running, "start_profile")
    assert caught.value.status == 409
    answer(running)
    name = order(running, "stop_profile")
    assert [file.name for file in traces.iterdir()] == [name]
    events = json.loads(gzip.decompress((traces / name).read_bytes()))["traceEvents"]
    assert any("mm" in str(event.get("name")) or "linear" in str(event.get("name")) for event in events)
    order(running, "start_profile", json.dumps({"num_steps": 3}))
    answer(running)
    with pytest.raises(RequestError, match="no profile"):
        order(running, "stop_profile")  # it ended by itself
