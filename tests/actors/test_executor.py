"""The executor with steps that run ahead, as on a GPU, but on the CPU: nothing that a client sees may change.

`AheadStepper` computes at launch and hands the results over later, from the waiter's thread. The host does not learn
which rows finished until then, so rows that are done go on in the batch: the slot arrays must keep them quiet.
"""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from actorserve import Engine, SamplingParams
from actorserve.actors import executor
from actorserve.models.runner import StepLogits
from actorserve.models.stepper import Step, Stepper
from actorserve.sampler.reference import Sampled

EOS = 2


class Late:
    """In place of a CUDA event."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def synchronize(self) -> None:
        time.sleep(self.seconds)


class AheadStepper(Stepper):
    """Never looks at results before they are published."""

    seconds = 0.002

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.exact = False
        self.most_ahead = 0

    def _forward(self, decoding, chunks) -> StepLogits:  # type: ignore[no-untyped-def]
        if chunks:
            return self.runner.mixed(decoding, chunks, False)
        return self.runner.decode(self.runner.upload_rows(decoding), None)

    def _collect(self, slots, out: torch.Tensor | None, sampled: Sampled | None, scores: Sampled | None = None) -> Step:  # type: ignore[no-untyped-def]
        step = Step(slots, out, sampled, Late(self.seconds), scores)  # type: ignore[arg-type]
        assert self._on_launch is not None
        self._on_launch(step)
        return step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("llama"))


def engine(folder: str, **options: object) -> object:
    settings = {
        "skip_tokenizer_init": True, "dtype": "float32", "placement": "inline", "max_total_tokens": 2048,
        "max_running_requests": 6, "window_ms": 0.0, "cpu_threads": 1, "chunked_prefill_size": 48,
    }  # fmt: skip
    return Engine.sync(folder, **settings | options)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "Stepper", AheadStepper)


PROMPTS = [tiny.prompt(5 + 9 * i, seed=i) for i in range(14)]
PARAMS = [
    SamplingParams(temperature=0.9, seed=i, max_new_tokens=3 + 15 * (i % 5), stop_token_ids=(7 * i, 7 * i + 1))
    for i in range(14)
]


def answers(running: object) -> list[tuple]:
    with ThreadPoolExecutor(14) as pool:
        jobs = [pool.submit(running.generate, p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]  # type: ignore[attr-defined]
        return [(o.ids, o.finish_reason) for o in (job.result() for job in jobs)]


@pytest.fixture(scope="module")
def plain(folder: str) -> list[tuple]:
    with engine(folder, num_continuous_decode_steps=1, plans_in_flight=1) as e:
        return answers(e)


@pytest.mark.parametrize(("k", "in_flight"), [(1, 2), (4, 1), (16, 2)])
def test_running_ahead_changes_nothing(folder: str, plain: list, ahead: None, k: int, in_flight: int) -> None:
    with engine(folder, num_continuous_decode_steps=k, plans_in_flight=in_flight) as e:
        assert answers(e) == plain
        assert answers(e) == plain  # with slots and pages used before, and prefixes cached


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_have_the_threads_asked_for(folder: str, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """The number is each thread's own in torch, and weights are loaded in another thread."""
    seen = set()

    class Watched(Stepper):
        def launch(self, *args: object) -> Step:
            seen.add(torch.get_num_threads())
            return super().launch(*args)  # type: ignore[arg-type]

    start = executor.Executor.start

    async def late_start(self: executor.Executor) -> None:
        torch.get_num_threads()  # what begins to use torch in a thread gives it its number
        await start(self)

    monkeypatch.setattr(executor, "Stepper", Watched)
    monkeypatch.setattr(executor.Executor, "start", late_start)
    with engine(folder, cpu_threads=threads) as running:
        running.generate(PROMPTS[0], PARAMS[0])
    assert seen == {threads}


def test_rows_may_stay_until_they_are_released(
    folder: str, plain: list, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with tensor parallel ranks, which learn at different times who is done."""
    monkeypatch.setattr(executor.Executor, "leaves_at_once", False)
    with engine(folder, num_continuous_decode_steps=4, plans_in_flight=2) as running:
        assert answers(running) == plain


def test_retraction_while_steps_run_ahead(folder: str, plain: list, ahead: None) -> None:
    with engine(folder, max_total_tokens=320, schedule_conservativeness=0.0, num_continuous_decode_steps=4) as e:
        for _ in range(20):  # requests that come in slowly on a busy machine need no retraction
            assert answers(e) == plain
            if e.stats().retractions > 0:
                return
        pytest.fail("no retraction")


def test_aborts_while_steps_run_ahead(folder: str, plain: list, ahead: None) -> None:
    chance = random.Random(0)
    with engine(folder, num_continuous_decode_steps=8) as e:
        for prompt, params in zip(PROMPTS, PARAMS, strict=True):
            stream: Iterator = iter(e.stream(prompt, params))
            for _ in range(chance.randrange(3)):
                next(stream, None)
            stream.close()
        assert answers(e) == plain


def test_compilers_are_children_of_the_executor() -> None:
    """In a process that has no others: this one may have servers of other tests."""
    code = """
import subprocess
from actorserve.actors.executor import has_children
assert not has_children()
with subprocess.Popen(["sleep", "60"]) as compiler:
    assert has_children()
    compiler.kill()
assert not has_children()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_start_with_compilers_says_so(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    plain = executor.Executor._prepare

    def slow(self: executor.Executor) -> None:
        self.context.reporter = lambda stage, _: told.append(stage)
        for _ in range(6000):
            if not told:
                time.sleep(0.01)
        plain(self)

    monkeypatch.setattr(executor, "COMPILER_SECONDS", 0.01)
    monkeypatch.setattr(executor, "has_children", lambda: True)
    monkeypatch.setattr(executor.Executor, "_prepare", slow)
    with engine(folder):
        assert "compiling kernels (once)" in told


def test_a_device_error_ends_the_executor_not_the_request(
    folder: str, plain: list, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inline, the failed actor takes the engine's loop with it; a new one goes on where the outputs were."""
    left = [20]

    def fail(self: Late) -> None:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Late, "synchronize", fail)
    with engine(folder) as e:
        assert answers(e) == plain
    assert left[0] < 0
