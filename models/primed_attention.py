"""Decode attention whose keys and values come into shared memory before they are asked for.

Used by triton_attention.py on GPUs of sm_90. One program has a multiprocessor and all keys of a problem, a (row, KV
head) pair: nothing is split and merged. For small heads and about as many problems as there are multiprocessors it is
launched with PDL: it starts while kernels before it run, and fills its buffers from pages that earlier steps have
written. For large heads and many problems programs stay, and draw one problem after another: loads go on meanwhile.
Invariant: what is launched depends on the number of rows alone, so it can be captured.
"""

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from .batch import Batch
from .kv_cache import KVCache
from .primed_attention_kernels import attend_kernel
from .primed_gemm import blocks_of, can_prime
from .spec import Spec

PAGE: Final = 16
WIDTH: Final = 64
"""Numbers of a head, or of half of one."""
GROUP: Final = 8
"""Query heads of a KV head, at most."""
PROGRAMS: Final = 132
"""As many as an H100 or H200 has multiprocessors."""
FULL: Final = 0.9
"""Of the programs, those that at least have a problem in the last turn as in those before."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How heads of some size are attended to."""

    least: int
    most: int
    """Problems."""
    chunk: int
    """Keys of a buffer."""
    buffers: int
    """Of keys, and as many of values."""
    pdl: bool
    """Launched ahead."""


SHAPES: Final = {64: Shape(113, 128, 128, 5, True), 128: Shape(384, 1 << 20, 128, 3, False)}
"""By head_dim.

64: whole steps of Qwen2-0.5B at 64 rows and 1,024 tokens, H200, take 917 us; with 6 buffers 928, with 3 of 256 keys
924, with 10 of 64 keys 983, with the other kernel 941. With 64 problems each takes as long, and the other kernel less
(909 us a step for 857). That was before a warp of its own asked for keys: now 830.
128: what counts is energy, for at 256 rows a GPU is at its limit of power. Qwen2-7B's 28 heads, 1,280 tokens a row:
163.8 us and 103 mJ; the other kernel 164.8 us and 115 mJ, with two stages for three 172 us. Rows of 260 to 2,300
tokens: 174.6 for 190.8 us; 192 rows 127 for 155. Whole steps at 256 rows: 10.84 ms for 11.05. Six buffers of 64 keys
take 2 % longer.
"""


def takes(batch: Batch, kv: KVCache, spec: Spec, pdl: bool) -> bool:
    """Whether `attend` is for the decode rows of this batch, launched ahead or not."""
    shape = SHAPES.get(spec.head_dim)
    problems = batch.num_decode * spec.kv_heads
    if shape is None or pdl != shape.pdl or not shape.least <= problems <= shape.most:
        return False
    if problems > PROGRAMS and problems < FULL * PROGRAMS * -(-problems // PROGRAMS):
        return False
    plain = not spec.windows and spec.attn_softcap is None and batch.decode_rows is not None
    return plain and spec.group <= GROUP and kv.page_size == PAGE and can_prime(kv.storage)


def attend(
    q: Tensor, cache: Tensor, batch: Batch, out: Tensor, spec: Spec, pdl: bool, turns: Tensor | None,
    slots: Tensor | None, counter: Tensor,
) -> None:  # fmt: skip
    """Attention of the decode rows of q [T, H, D], bfloat16, over a layer's cache [slots, 2, K, D]; see `takes`.

    With turns float32 [T, 2, D / 2] and slots [T] q [T, H + 2K, D] is rotated first, and keys and values written there.
    counter: int32, zero.
    """
    tables, shape, problems = batch.decode_tables, SHAPES[spec.head_dim], batch.num_decode * spec.kv_heads
    programs = min(problems, PROGRAMS)
    attend_kernel[(programs,)](
        q, cache, blocks_of(cache.view(len(cache), -1), [PAGE, WIDTH]), tables, batch.decode_rows,
        batch.decode_lengths, out, turns, slots, counter, problems, programs, spec.attention_scale, q.stride(0),
        tables.stride(0), K=spec.kv_heads, G=spec.group, GP=GROUP, PARTS=spec.head_dim // WIDTH, PAGE=PAGE,
        CHUNK=shape.chunk, BUFFERS=shape.buffers, LOOP=problems > programs, PDL=pdl, ROTATE=turns is not None,
        num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
