"""While FlashInfer's kernels are compiled, Triton's serve; where they cannot be, Triton's stay."""

import logging
import os
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from actorserve.models.flashinfer_build import NICE, TritonMeanwhile, missing_kernels
from actorserve.models.spec import Spec

BF16 = torch.bfloat16
NOTHING: Any = None
PROMPTS: Any = SimpleNamespace(chunks=[1])
STEPS: Any = SimpleNamespace(chunks=[])


class Backend:
    """Says which one has planned."""

    def __init__(self, name: str, decode: "Backend | None" = None) -> None:
        self.name, self.decode = name, decode

    def plan(self, *_: object) -> Any:
        return self.name


class Kernels:
    """A JitSpec whose build ends when it may, by an error if one is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.may_end = threading.Event()
        self.builds: list[tuple[int, int]] = []
        """(niceness of the thread, of a process it starts)"""

    def build(self, verbose: bool) -> None:
        assert not verbose
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        code = "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"
        self.builds.append((own, int(subprocess.check_output([sys.executable, "-c", code]))))
        assert self.may_end.wait(60)
        if self.error is not None:
            raise self.error


def meanwhile(*missing: Kernels) -> TritonMeanwhile:
    flashinfer: Any = Backend("flashinfer", decode=Backend("triton"))
    return TritonMeanwhile(flashinfer, list(missing))


def test_triton_serves_until_all_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """They are compiled once, one after another, with less priority than those who wait for answers."""
    caplog.set_level(logging.INFO, "actorserve.attention")
    first, second = Kernels(), Kernels()
    backend, before = meanwhile(first, second), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert backend.plan(STEPS, NOTHING, NOTHING) == "triton" and not first.builds and backend._thread is None
    assert [backend.plan(PROMPTS, NOTHING, NOTHING) for _ in range(3)] == ["triton"] * 3
    first.may_end.set()
    assert backend.plan(PROMPTS, NOTHING, NOTHING) == "triton"
    second.may_end.set()
    backend.start().join()
    assert backend.plan(PROMPTS, NOTHING, NOTHING) == "flashinfer"
    lower = min(before + NICE, 19)
    assert first.builds == second.builds == [(lower, lower)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


@pytest.mark.parametrize(
    "error", [RuntimeError("Ninja build failed.\n" + "nvcc: no " * 999), OSError("no ninja"), KeyError()]
)
def test_what_cannot_be_compiled(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    """Triton's stay, and one line of bearable length says so."""
    first, second = Kernels(error), Kernels()
    first.may_end.set()
    backend = meanwhile(first, second)
    backend.start().join()
    assert [backend.plan(PROMPTS, NOTHING, NOTHING) for _ in range(3)] == ["triton"] * 3
    [record] = caplog.records
    text = record.getMessage()
    assert record.levelname == "WARNING" and "\n" not in text and len(text) < 500
    assert (str(error).split("\n")[0] or "KeyError()") in text
    assert len(first.builds) == 1 and not second.builds


def spec_of(windows: tuple[int | None, ...] = (), cap: float | None = None) -> Spec:
    return Spec(
        vocab=10, hidden=8, layers=max(1, len(windows)), heads=4, kv_heads=2, head_dim=64, inter=4, windows=windows,
        attn_softcap=cap,
    )  # fmt: skip


def flashinfer_with(monkeypatch: pytest.MonkeyPatch, **names: object) -> None:
    package, jit = ModuleType("flashinfer"), ModuleType("flashinfer.jit")
    vars(jit).update(names)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.jit", jit)


@pytest.mark.parametrize(
    ("windows", "cap", "asked"),
    [
        ((), None, [(False, False)]), ((None, None), 3.0, [(False, True)]), ((7, 7), None, [(True, False)]),
        ((7, None, 9), 3.0, [(False, True), (True, True)]),
    ],
)  # fmt: skip
def test_one_kind_of_kernel_for_each_kind_of_layer(
    monkeypatch: pytest.MonkeyPatch, windows: tuple[int | None, ...], cap: float | None, asked: list[tuple[bool, bool]]
) -> None:
    found: list[tuple[object, ...]] = []

    def gen(*arguments: object) -> SimpleNamespace:
        found.append(arguments)
        return SimpleNamespace(is_compiled=False)

    flashinfer_with(monkeypatch, gen_batch_prefill_module=gen)
    assert len(missing_kernels(spec_of(windows, cap), BF16, "fa3")) == len(asked)
    assert found == [("fa3", BF16, BF16, BF16, torch.int32, 64, 64, 0, *flags, False) for flags in asked]


def test_what_is_compiled_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_with(monkeypatch, gen_batch_prefill_module=lambda *_: SimpleNamespace(is_compiled=True))
    assert missing_kernels(spec_of(), BF16, "fa2") == []


@pytest.mark.parametrize("gen", [None, lambda kind: None, lambda *_: object()])
def test_a_flashinfer_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, gen: object) -> None:
    """It is used as it is, and compiles when it must."""
    flashinfer_with(monkeypatch, **({} if gen is None else {"gen_batch_prefill_module": gen}))
    assert missing_kernels(spec_of(), BF16, "fa2") == []
