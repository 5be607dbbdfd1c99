"""Decode attention whose keys and values come into shared memory before the queries are there.

Used by triton_attention.py for small heads and about as many problems, (row, KV head) pairs, as a GPU of sm_90 has
multiprocessors. One program has a multiprocessor and all keys of a problem: nothing is split and merged. With PDL it
starts while kernels before it run, and fills its buffers from pages that earlier steps have written.
Invariant: what is launched depends on the number of rows alone, so it can be captured.
"""

from typing import Final

from torch import Tensor

from .batch import Batch
from .kv_cache import KVCache
from .primed_attention_kernels import attend_kernel
from .primed_gemm import blocks_of, can_prime
from .spec import Spec

CHUNK: Final = 128
"""Keys of a buffer."""
BUFFERS: Final = 5
"""Buffers of keys, and as many of values: 160 KiB.

Whole steps of Qwen2-0.5B at 64 rows and 1,024 tokens, H200: 917 us; with 6 928, with 3 of 256 keys 924, with 10 of 64
keys 983, with the other kernel 941.
"""
PROBLEMS: Final = (113, 128)
"""Least and most of them: with 64 each takes as long, and the other kernel less (909 us a step for 857)."""
PAGE: Final = 16
HEAD_DIM: Final = 64
GROUP: Final = 8
"""Query heads of a KV head, at most."""


def takes(batch: Batch, kv: KVCache, spec: Spec) -> bool:
    """Whether `attend` is for the decode rows of this batch."""
    least, most = PROBLEMS
    shape = spec.head_dim == HEAD_DIM and spec.group <= GROUP and kv.page_size == PAGE
    plain = not spec.windows and spec.attn_softcap is None and batch.decode_rows is not None
    return plain and shape and least <= batch.num_decode * spec.kv_heads <= most and can_prime(kv.storage)


def attend(q: Tensor, cache: Tensor, batch: Batch, out: Tensor, spec: Spec, pdl: bool) -> None:
    """Attention of the decode rows of q [T, H, D], bfloat16, over a layer's cache [slots, 2, K, D]; see `takes`."""
    tables = batch.decode_tables
    attend_kernel[(spec.kv_heads, batch.num_decode)](
        q, cache, blocks_of(cache.view(len(cache), -1), [PAGE, HEAD_DIM]), tables, batch.decode_rows,
        batch.decode_lengths, out, spec.attention_scale, q.stride(0), tables.stride(0), K=spec.kv_heads, G=spec.group,
        GP=GROUP, D=HEAD_DIM, PAGE=PAGE, CHUNK=CHUNK, BUFFERS=BUFFERS, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
