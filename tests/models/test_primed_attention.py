"""Decode attention that has its keys before its queries: for which batches, and its results.

On an H100 or H200 for real; without a GPU in the emulator, which also checks how the kernel synchronises.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gluon_emulator import Emulated
from test_gpu_attention import LIMIT, Case, spec_of

from actorserve.models import primed_attention, triton_attention
from actorserve.models.primed_attention import PAGE
from actorserve.models.spec import Spec
from actorserve.models.triton_attention import Launch, TritonAttention

HERE = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DTYPE = torch.bfloat16
EDGES = [1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 512, 513, 639, 640, 641, 642, 656, 769, 1280, 1281]
"""Lengths around pages, chunks and as many chunks as there are buffers."""


def takes(spec: Spec, rows: int = 64, dtype: torch.dtype = DTYPE) -> bool:
    case = Case(spec, dtype, [1] * rows, [])
    return primed_attention.takes(case.batch, case.kv, spec)


def test_which_batches_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(7, 2, 64)
    assert takes(spec) == HERE
    assert not takes(spec, dtype=torch.float16)
    monkeypatch.setattr(primed_attention, "can_prime", lambda storage: True)
    assert [rows for rows in (1, 56, 57, 64, 65, 128) if takes(spec, rows)] == [57, 64]
    others = (spec_of(7, 2, 128), spec_of(9, 2, 64), spec_of(7, 2, 64, 20), spec_of(7, 2, 64, None, 5.0))
    assert not any(takes(other) for other in others)
    case = Case(spec, DTYPE, [1] * 64, [])
    assert not primed_attention.takes(replace(case.batch, decode_rows=None), case.kv, spec)
    assert not TritonAttention(Launch(64, 4, 3)).plan(case.batch, case.kv, spec).primed


def newest(arguments: dict[str, Any]) -> torch.Tensor:
    """Where in the cache [slots, 2 * K * D] the predecessor writes, bool."""
    lengths, tables = arguments["lengths"].long() - 1, arguments["tables"][arguments["rows"].long()].long()
    slots = tables.gather(1, lengths[:, None] // PAGE)[:, 0] * PAGE + lengths % PAGE
    return torch.isin(torch.arange(len(arguments["cache"])), slots)[:, None]


@pytest.fixture
def primes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel can be launched here, too, and with fewer problems."""
    if torch.cuda.is_available() and not HERE:
        pytest.skip("needs a GPU of sm_90, or none")
    if not HERE:
        attend = Emulated(primed_attention.attend_kernel, {"q": None, "cache": None, "blocks": newest})
        monkeypatch.setattr(primed_attention, "attend_kernel", attend)
        monkeypatch.setattr(primed_attention, "PROBLEMS", (1, 128))
        monkeypatch.setattr(primed_attention, "can_prime", lambda storage: True)
        monkeypatch.setattr(triton_attention, "has_pdl", lambda device: True)


SHAPES = [(7, 2, 64), (7, 2, 57), (8, 1, 128), (1, 4, 30), (3, 3, 40)] if HERE else [(7, 2, 23), (8, 1, 8), (1, 3, 8)]


@pytest.mark.usefixtures("primes")
@pytest.mark.parametrize(("group", "kv_heads", "rows"), SHAPES)
def test_its_results(group: int, kv_heads: int, rows: int) -> None:
    lengths = [*EDGES, *np.random.default_rng(0).integers(1, 5000, 128).tolist()][:rows]
    for chunks in ([], [(20, 40)]) if HERE else ([],):  # chunks are another kernel's
        case = Case(spec_of(group, kv_heads, 64), DTYPE, lengths, chunks)
        assert TritonAttention().plan(case.batch, case.kv, case.spec).primed
        case.check(TritonAttention(), LIMIT[DTYPE])
