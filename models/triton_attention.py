"""Attention on a GPU by our Triton kernels: split-KV decode without host planning, and prefill of ragged chunks.

Used by the decoder. Decode reads lengths and page tables on the device, at a launch grid that depends on the number of
rows alone, so a step can be replayed as a CUDA graph while lengths grow. Invariant: results are TorchAttention's, up to
rounding (tests/models/test_gpu_attention.py).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import triton
from torch import Tensor

from ..sampler.upload import upload
from . import attention_kernels as kernels
from .batch import Batch
from .kv_cache import KVCache
from .spec import Spec

PROGRAMS: Final = 132 * 4
"""Programs that a decode launch aims at: four for each multiprocessor of an H200."""
MOST_SPLITS: Final = 16
FEW: Final = 64
"""Up to this many (row, KV head) pairs latency decides, and 8 warps with 3 stages are best; above 4 and 2.

Measured on an H200, Qwen2-7B shape, 1,024 tokens a row: 7.0 us for 1 row (12.9 with other sizes), 23.5 for 32, 67.5 for
128 (floor 62.4), 134 for 256 (124.9).
"""
QUERIES: Final = 64
"""Queries in one prefill tile."""


class TritonAttention:
    """See attention.AttentionBackend."""

    def __init__(self) -> None:
        self._partial: Tensor | None = None
        self._lse: Tensor | None = None
        self._counters: Tensor | None = None

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> "TritonPlan":
        """Prepare a batch; nothing is launched for decode rows."""
        splits = splits_for(batch.num_decode * spec.kv_heads)
        self._reserve(spec, kv.storage.device)
        assert self._partial is not None and self._lse is not None and self._counters is not None
        workspace = (self._partial, self._lse, self._counters)
        return TritonPlan(batch, kv, spec, splits, workspace, prefill_tiles(batch))

    def _reserve(self, spec: Spec, device: torch.device) -> None:
        """Room for the partial results of PROGRAMS programs, more never split; at a fixed address, for graphs."""
        if self._partial is None:
            spots = PROGRAMS * spec.group
            self._partial = torch.empty(spots, spec.head_dim, dtype=torch.float32, device=device)
            self._lse = torch.empty(spots, dtype=torch.float32, device=device)
            self._counters = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


def splits_for(problems: int) -> int:
    """Return into how many parts each of `problems` (row, KV head) pairs is split."""
    return 1 if not problems else max(1, min(MOST_SPLITS, PROGRAMS // problems))


@dataclass(slots=True)
class Tiles:
    """Prefill tiles of a batch's chunks."""

    meta: Tensor
    """int32 [tiles, 4]: first of the T tokens, queries left in the chunk, first position, first entry of `pages`."""
    pages: Tensor
    """int32: the chunks' page lists, one after another."""


def prefill_tiles(batch: Batch) -> Tiles | None:
    """Cut the chunks into tiles of QUERIES tokens."""
    if not batch.chunks:
        return None
    meta, row, entry = [], batch.num_decode, 0
    for chunk in batch.chunks:
        begin = np.arange(0, chunk.length, QUERIES)
        meta.append(np.stack([row + begin, chunk.length - begin, chunk.start + begin, np.full_like(begin, entry)], 1))
        row += chunk.length
        entry += len(chunk.pages)
    table = upload(np.concatenate(meta).astype(np.int32), batch.ids.device)
    return Tiles(table, torch.cat([chunk.pages for chunk in batch.chunks]))


@dataclass(slots=True)
class TritonPlan:
    """See attention.AttentionPlan."""

    batch: Batch
    kv: KVCache
    spec: Spec
    splits: int
    workspace: tuple[Tensor, Tensor, Tensor]
    tiles: Tiles | None

    def run(self, layer: int, q: Tensor) -> Tensor:
        """See AttentionPlan.run; q [T, H, D] may have any row stride."""
        spec = self.spec
        out = q.new_empty(len(q), spec.heads * spec.head_dim)
        cache, window = self.kv.rows[layer], spec.window(layer)
        shared = {
            "K": spec.kv_heads, "G": spec.group, "D": spec.head_dim,
            "DP": max(16, triton.next_power_of_2(spec.head_dim)), "PAGE": self.kv.page_size,
            "WINDOW": window is not None, "SOFTCAP": spec.attn_softcap is not None,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        numbers = (spec.attention_scale, spec.attn_softcap or 1.0, window or 0, q.stride(0))
        batch = self.batch
        if batch.num_decode:
            partial, lse, counters = self.workspace
            few = batch.num_decode * spec.kv_heads <= FEW
            kernels.decode[(spec.kv_heads, self.splits, batch.num_decode)](
                q, cache, batch.decode_tables, q if batch.decode_rows is None else batch.decode_rows,
                batch.decode_lengths, out, partial, lse, counters, *numbers, batch.decode_tables.stride(0),
                HAS_ROWS=batch.decode_rows is not None, GP=max(16, triton.next_power_of_2(spec.group)), BLOCK=64,
                SPLITS=self.splits, STAGES=3 if few else 2, num_warps=8 if few else 4, **shared,
            )  # fmt: skip
        if self.tiles is not None:
            large = q.dtype != torch.float32 and spec.head_dim <= 128
            kernels.prefill[(len(self.tiles.meta), spec.heads)](
                q, cache, self.tiles.pages, self.tiles.meta, out, *numbers, M=QUERIES, BLOCK=64 if large else 32,
                STAGES=2, num_warps=4, **shared,
            )  # fmt: skip
        return out
