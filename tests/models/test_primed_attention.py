"""Decode attention that has its keys before its queries: for which batches, and its results.

On an H100 or H200 for real; without a GPU in the emulator, which also checks how the kernel synchronises.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gluon_emulator import Emulated
from test_gpu_attention import LIMIT, Case, check_rotation, spec_of

from actorserve.models import primed_attention, triton_attention
from actorserve.models.primed_attention import PAGE
from actorserve.models.spec import Rope, Spec
from actorserve.models.triton_attention import Launch, TritonAttention, TritonPlan

HERE = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DTYPE = torch.bfloat16
EDGES = [1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 512, 513, 639, 640, 641, 642, 656, 769, 1280, 1281]
"""Lengths around pages, chunks and as many chunks as there are buffers."""


def takes(spec: Spec, rows: int = 64, dtype: torch.dtype = DTYPE, pdl: bool = True) -> bool:
    case = Case(spec, dtype, [1] * rows, [])
    return primed_attention.takes(case.batch, case.kv, spec, pdl)


def test_which_batches_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, large = spec_of(7, 2, 64), spec_of(7, 4, 128)
    assert takes(spec) == HERE
    assert not takes(spec, dtype=torch.float16)
    monkeypatch.setattr(primed_attention, "can_prime", lambda storage: True)
    assert [rows for rows in (1, 56, 57, 64, 65, 128) if takes(spec, rows)] == [57, 64]
    assert [rows for rows in (64, 96, 112, 128, 144, 256) if takes(large, rows, pdl=False)] == [96, 128, 256]
    assert not takes(spec, 64, pdl=False) and not takes(large, 256)
    others = (spec_of(7, 2, 32), spec_of(9, 2, 64), spec_of(7, 2, 64, 20), spec_of(7, 2, 64, None, 5.0))
    assert not any(takes(other) for other in others)
    case = Case(spec, DTYPE, [1] * 64, [])
    assert not primed_attention.takes(replace(case.batch, decode_rows=None), case.kv, spec, True)
    assert not TritonAttention(Launch(64, 4, 3)).plan(case.batch, case.kv, spec).primed


def newest(arguments: dict[str, Any]) -> torch.Tensor:
    """Where in the cache [slots, 2 * K * D] the predecessor writes, or the kernel itself, bool."""
    lengths, tables = arguments["lengths"].long() - 1, arguments["tables"][arguments["rows"].long()].long()
    slots = tables.gather(1, lengths[:, None] // PAGE)[:, 0] * PAGE + lengths % PAGE
    return torch.isin(torch.arange(len(arguments["cache"])), slots)[:, None]


@pytest.fixture
def primes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel can be launched here, too, and with fewer problems."""
    if torch.cuda.is_available() and not HERE:
        pytest.skip("needs a GPU of sm_90, or none")
    few = {size: replace(way, least=1) for size, way in primed_attention.SHAPES.items()}
    monkeypatch.setattr(primed_attention, "SHAPES", few)
    if not HERE:
        attend = Emulated(primed_attention.attend_kernel, {"q": None, "cache": None, "blocks": newest})
        monkeypatch.setattr(primed_attention, "attend_kernel", attend)
        monkeypatch.setattr(primed_attention, "can_prime", lambda storage: True)
        monkeypatch.setattr(triton_attention, "has_pdl", lambda device: True)


FEW = [(7, 2, 23, 64, 46), (8, 1, 8, 64, 8), (1, 3, 8, 64, 24)]
FEW += [(7, 1, 23, 128, 5), (8, 2, 5, 128, 7), (3, 1, 4, 128, 4)]
MANY = [(7, 2, 64, 64), (7, 2, 57, 64), (8, 1, 128, 64), (1, 4, 30, 64), (3, 3, 40, 64)]
MANY += [(7, 4, 256, 128), (5, 8, 70, 128), (8, 1, 100, 128)]
CASES = [(*case, primed_attention.PROGRAMS) for case in MANY] if HERE else FEW


def plan_of(case: Case) -> TritonPlan:
    """A plan that launches the kernel as heads of this size have it."""
    pdl = primed_attention.SHAPES[case.spec.head_dim].pdl
    plan = TritonAttention().plan(case.batch, case.kv, case.spec)
    assert plan.primed or not pdl
    return replace(plan, pdl=pdl, primed=True)


@pytest.mark.usefixtures("primes")
@pytest.mark.parametrize(("group", "kv_heads", "rows", "head_dim", "programs"), CASES)
def test_its_results(
    group: int, kv_heads: int, rows: int, head_dim: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primed_attention, "PROGRAMS", programs)
    lengths = [*EDGES, *np.random.default_rng(0).integers(1, 5000, 256).tolist()][:rows]
    for chunks in ([], [(20, 40)]) if HERE else ([],):  # chunks are another kernel's
        case = Case(spec_of(group, kv_heads, head_dim), DTYPE, lengths, chunks)
        plan = plan_of(case)
        case.check(SimpleNamespace(plan=lambda batch, kv, spec, plan=plan: plan), LIMIT[DTYPE])


@pytest.mark.usefixtures("primes")
def test_it_rotates_and_writes() -> None:
    """As attention_kernels.decode does."""
    lengths = [1, 16, 17, 64, 65, 200, *([1281, 4000] if HERE else [])]
    check_rotation(replace(spec_of(7, 2, 128), rope=Rope(1e4, 128)), lengths, DTYPE, plan_of)
