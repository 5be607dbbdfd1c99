"""Attention on a GPU by our Triton kernels: split-KV decode without host planning, and prefill of ragged chunks.

Used by the decoder. Decode reads lengths and page tables on the device, at a launch grid that depends on the number of
rows alone, so a step can be replayed as a CUDA graph while lengths grow; how it is launched is a small table.
Invariant: results are TorchAttention's, up to rounding (tests/models/test_gpu_attention.py).
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
import triton
from torch import Tensor

from ..sampler.upload import upload
from . import attention_kernels as kernels
from . import primed_attention
from .batch import TILE_QUERIES, Batch, Tiles, tile_table
from .kv_cache import KVCache, saturation
from .spec import Spec
from .triton_ops import Unrotated, has_pdl, pdl_rows

MOST_SPLITS: Final = 64
"""No table entry may split a row into more parts."""
MOST_PROGRAMS: Final = 132 * 8
"""No table entry may ask for more programs: there is room for the partial results of as many."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How decode is launched."""

    block: int
    """Keys of a step of the loop."""
    warps: int
    stages: int
    programs: int = 132 * 4
    """Programs that a launch aims at: some for each of the 132 multiprocessors of an H100 or H200."""
    most: int = 16
    """Most parts of a row."""
    ahead: int = 0
    """With PDL: blocks of older keys and values that are loaded, into registers, before the predecessor ends."""


Launches = tuple[tuple[int, Launch], ...]
"""(most problems, launch) in rising order; a problem is a (row, KV head) pair. The last is for all above, too."""

DECODE: Final[dict[int, Launches]] = {
    64: (
        (4, Launch(64, 8, 3, ahead=1)),
        (32, Launch(64, 4, 2, 132 * 2, 8, 2)),
        (128, Launch(64, 4, 3, ahead=1)),
        (256, Launch(128, 8, 2)),
    ),
    128: (
        (8, Launch(128, 8, 2, ahead=1)),
        (16, Launch(64, 8, 3, ahead=1)),
        (64, Launch(64, 8, 3)),
        (384, Launch(64, 4, 2)),
        (512, Launch(64, 2, 3)),
        (768, Launch(32, 1, 3)),
        (1024, Launch(64, 2, 3)),
    ),
    256: ((64, Launch(64, 8, 3)), (128, Launch(64, 4, 2))),
}
"""By head_dim; that of 128 for others below, of 256 above. perf/attention.py finds and prints it.

In whole steps of Qwen2-7B on an H200 128 keys, loaded ahead, make one row's .991 as long as 64 that are not (of float8
weights .978, of 4 bits .94), 64 loaded ahead four rows' .993 and 16 rows' 1.026. Two warps instead of four take 20 us
less at 128 rows (512 problems), 90 less at 256, 10 more at 96 and 140 more at 192.

Measured on an H200, Qwen2-7B shape, 1,024 tokens a row: 7.0 us for 1 row (12.9 with other sizes), 23.5 for 32, 67.5 for
128 (floor 62.4), 134 for 256 (124.9). On an H100, Qwen2-0.5B shape, 64 rows: 17.7 us (with blocks of 64 19.96; floor
11.2).
"""


def launch_for(head_dim: int, problems: int, itemsize: int = 2) -> Launch:
    """Return how `problems` (row, KV head) pairs are launched. itemsize: of keys, as they are multiplied.

    Large ones have no room ahead, and registers spill with fewer than four warps.
    """
    launches = DECODE.get(head_dim, DECODE[128 if head_dim < 128 else 256])
    if itemsize > 2:
        launches = tuple((most, replace(one, warps=max(4, one.warps))) for most, one in launches if not one.ahead)
    return next((launch for most, launch in launches if problems <= most), launches[-1][1])


def splits_for(problems: int, launch: Launch) -> int:
    """Return into how many parts each problem is split: a power of two, as the kernel's merge needs."""
    wanted = min(launch.most, launch.programs // max(1, problems))
    return 1 << max(0, wanted.bit_length() - 1)


class TritonAttention:
    """See attention.AttentionBackend. With `launch` decode is launched so whatever the batch (measurements).

    `dense`: the model's weights are not quantized. Where they are, it is not launched ahead at more than a few rows,
    but rotates: at 64 rows of Qwen2-7B with 4 bits a step takes 4.18 ms for 4.23.
    """

    def __init__(self, launch: Launch | None = None, dense: bool = True) -> None:
        self._launch, self._dense = launch, dense
        self._partial: Tensor | None = None
        self._lse: Tensor | None = None
        self._counters: Tensor | None = None

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> "TritonPlan":
        """Prepare a batch; nothing is launched for decode rows."""
        itemsize = max(kv.storage.dtype.itemsize, kv.read_dtype.itemsize)
        launch = self._launch or launch_for(spec.head_dim, batch.num_decode * spec.kv_heads, itemsize)
        self._reserve(spec, kv.storage.device)
        assert self._partial is not None and self._lse is not None and self._counters is not None
        workspace = (self._partial, self._lse, self._counters)
        pdl = has_pdl(kv.storage.device) and batch.num_decode <= pdl_rows(spec, self._dense)
        primed = self._launch is None and primed_attention.takes(batch, kv, spec, pdl)
        return TritonPlan(batch, kv, spec, launch, workspace, prefill_tiles(batch), pdl, primed)

    def _reserve(self, spec: Spec, device: torch.device) -> None:
        """Room for the partial results of MOST_PROGRAMS, more never split; at a fixed address, for graphs."""
        if self._partial is None:
            spots = MOST_PROGRAMS * spec.group
            self._partial = torch.empty(spots, spec.head_dim, dtype=torch.float32, device=device)
            self._lse = torch.empty(spots, dtype=torch.float32, device=device)
            self._counters = torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device)


def prefill_tiles(batch: Batch) -> Tiles | None:
    """The tiles of a batch's chunks: those it comes with, or cut here."""
    if not batch.chunks:
        return batch.tiles
    entries = np.cumsum([0, *(len(chunk.pages) for chunk in batch.chunks)]).tolist()
    chunks = [(chunk.length, chunk.start, entry) for chunk, entry in zip(batch.chunks, entries, strict=False)]
    table = upload(tile_table(chunks, batch.num_decode), batch.ids.device)
    return Tiles(table, torch.cat([chunk.pages for chunk in batch.chunks]))


@dataclass(slots=True)
class TritonPlan:
    """See attention.AttentionPlan."""

    batch: Batch
    kv: KVCache
    spec: Spec
    launch: Launch
    workspace: tuple[Tensor, Tensor, Tensor]
    tiles: Tiles | None
    pdl: bool
    """Decode is launched before its predecessor ends."""
    primed: bool
    """It is that of primed_attention.py."""

    @property
    def rotates(self) -> bool:
        """See AttentionPlan: in batches of decode rows alone, and with a cache that need not saturate.

        Not with PDL, where a kernel of its own for that costs nothing: at 48 rows of Qwen2-7B steps are .5 % longer.
        """
        return self.tiles is None and not self.pdl and saturation(self.kv.storage.dtype) is None

    def run(self, layer: int, q: Tensor | Unrotated) -> Tensor:
        """See AttentionPlan.run; q [T, H, D] may have any row stride."""
        spec, turns, slots = self.spec, None, None
        if isinstance(q, Unrotated):
            turns, slots, q = q.table, q.kv_slots, q.heads
        out = q.new_empty(len(q), spec.heads * spec.head_dim)
        cache, window = self.kv.rows[layer], spec.window(layer)
        shared = {
            "K": spec.kv_heads, "G": spec.group, "D": spec.head_dim,
            "DP": max(16, triton.next_power_of_2(spec.head_dim)), "PAGE": self.kv.page_size,
            "WINDOW": window is not None, "SOFTCAP": spec.attn_softcap is not None,
            # Of float32: three products of a number's halves, by tensor cores, which are as exact but for the last bit.
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        numbers = (spec.attention_scale, spec.attn_softcap or 1.0, window or 0, q.stride(0))
        batch = self.batch
        if self.primed and q.dtype == cache.dtype:
            primed_attention.attend(q, cache, batch, out, spec, self.pdl, turns, slots, self.workspace[2])
        elif batch.num_decode:
            partial, lse, counters = self.workspace
            launch, splits = self.launch, splits_for(batch.num_decode * spec.kv_heads, self.launch)
            kernels.decode[(spec.kv_heads, splits, batch.num_decode)](
                q, cache, batch.decode_tables, q if batch.decode_rows is None else batch.decode_rows,
                batch.decode_lengths, out, partial, lse, counters, turns, slots, *numbers,
                batch.decode_tables.stride(0),
                HAS_ROWS=batch.decode_rows is not None, GP=max(16, triton.next_power_of_2(spec.group)),
                BLOCK=launch.block, SPLITS=splits, STAGES=launch.stages, AHEAD=launch.ahead,
                PDL=self.pdl, ROTATE=turns is not None, num_warps=launch.warps,
                **({"launch_pdl": True} if self.pdl else {}), **shared,
            )  # fmt: skip
        if self.tiles is not None:
            wide = q.dtype == torch.float32
            kernels.prefill[(len(self.tiles.meta), spec.heads)](
                q, cache, self.tiles.pages, self.tiles.meta, out, *numbers, M=TILE_QUERIES,
                BLOCK=32 if wide or spec.head_dim > 128 else 64, STAGES=2, num_warps=8 if wide else 4, **shared,
            )  # fmt: skip
        return out
