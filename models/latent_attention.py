"""Attention over a cache of latents on a GPU (MLA, see mla.py): one Triton kernel, for decode rows and chunks.

Used by the decoder where TritonAttention is for heads. A decode row is a tile of one query, cut on the device, so that
a step can be replayed as a CUDA graph; few rows split their keys, and torch merges the parts.
Invariant: results are TorchAttention's, up to rounding (tests/models/test_latent_attention.py).
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import triton
from torch import Tensor

from ..errors import StartupError
from .batch import TILE_QUERIES, Batch
from .kv_cache import KVCache
from .latent_kernels import latent
from .spec import Spec
from .triton_attention import prefill_tiles

HEADS: Final = 16
"""Query heads of a program: with one query a matrix of as many rows as the tensor cores need."""
PREFILL_QUERIES: Final = 4
"""Queries of a program in 16 bits; in float32 they do not fit into shared memory."""
PROGRAMS: Final = 132 * 2
"""Programs that a decode launch aims at: two for each multiprocessor of an H100 or H200."""
MOST_SPLITS: Final = 32


def splits_for(rows: int, heads: int) -> int:
    """Return into how many parts the keys of each decode row are split: a power of two."""
    wanted = min(MOST_SPLITS, PROGRAMS // max(1, rows * -(-heads // HEADS)))
    return 1 << max(0, wanted.bit_length() - 1)


class LatentAttention:
    """See attention.AttentionBackend."""

    def __init__(self, spec: Spec) -> None:
        if spec.attn_softcap is not None or spec.windows:
            raise StartupError("latent attention with a soft cap or windows is not implemented on a GPU")

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> "LatentPlan":
        """Cut the batch into tiles, on the device for decode rows."""
        rows = batch.num_decode
        decode = None
        if rows:
            index = torch.arange(rows, dtype=torch.int32, device=batch.decode_lengths.device)
            table = index if batch.decode_rows is None else batch.decode_rows.to(torch.int32)
            last, width = batch.decode_lengths - 1, batch.decode_tables.stride(0)
            decode = torch.stack([index, torch.ones_like(index), last, table * width], 1)
        tiles = prefill_tiles(batch)
        chunks = None if tiles is None else (tiles.meta, tiles.pages)
        return LatentPlan(kv, spec, decode, batch.decode_tables, chunks, splits_for(rows, spec.heads))


@dataclass(slots=True)
class LatentPlan:
    """See attention.AttentionPlan."""

    rotates: ClassVar = False
    kv: KVCache
    spec: Spec
    decode: Tensor | None
    """int32 [decode rows, 4]: a Tiles.meta whose pages are `tables`."""
    tables: Tensor
    chunks: tuple[Tensor, Tensor] | None
    """Tiles.meta and pages of the prefill chunks."""
    splits: int

    def run(self, layer: int, q: Tensor) -> Tensor:
        """See AttentionPlan.run."""
        q = q.contiguous()
        out = q.new_empty(len(q), self.spec.heads, self.spec.value_dim)
        if self.chunks is not None:
            meta, pages = self.chunks
            queries = PREFILL_QUERIES if q.dtype.itemsize == 2 else 1
            self._launch(layer, q, meta, pages, out, None, TILE_QUERIES, queries, 1)
        if self.decode is not None:
            self._decode(layer, q, self.decode, out)
        return out.flatten(1)

    def _decode(self, layer: int, q: Tensor, meta: Tensor, out: Tensor) -> None:
        if self.splits == 1:
            self._launch(layer, q, meta, self.tables, out, None, 1, 1, 1)
            return
        shape = (len(meta), self.spec.heads, self.splits)
        parts = torch.empty(*shape, self.spec.value_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        self._launch(layer, q, meta, self.tables, parts, lse, 1, 1, self.splits)
        weights = torch.softmax(lse * 0.6931471805599453, -1)
        out[: len(meta)] = torch.matmul(weights[:, :, None], parts)[:, :, 0]

    def _launch(
        self, layer: int, q: Tensor, meta: Tensor, pages: Tensor, out: Tensor, lse: Tensor | None, most: int,
        queries: int, splits: int,
    ) -> None:  # fmt: skip
        """Run the kernel over tiles of up to `most` queries."""
        spec = self.spec
        rope = spec.head_dim - spec.value_dim
        wide = q.dtype == torch.float32
        latent[(len(meta) * (most // queries), triton.cdiv(spec.heads, HEADS), splits)](
            q, self.kv.rows[layer], pages, meta, out, lse, spec.attention_scale, spec.heads,
            D=spec.value_dim, DP=max(16, triton.next_power_of_2(spec.value_dim)), E=rope,
            EP=max(16, triton.next_power_of_2(rope)), PAGE=self.kv.page_size, M=most, QUERIES=queries, HEADS=HEADS,
            BLOCK=16 if wide else 32, SPLITS=splits, PRECISION="ieee" if wide else "tf32", STAGES=2,
            num_warps=4 if queries == 1 else 8,
        )  # fmt: skip
