"""Attention on a CPU by our C kernel (cpu_attention.c), which reads the pages in place, for decode rows and chunks.

Used by weights.py for models in float32, quantized or not; numbers of pages of 16 bits become float32 in registers.
Nothing is gathered or masked: a plan is three numbers a token. Layers or caches that the kernel does not take go to
TorchAttention, a batch at a time. Invariant: a token's result is the same bit for bit in every batch, and however its
prompt is cut into chunks.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .attention import AttentionBackend, AttentionPlan, TorchAttention
from .batch import Batch
from .cpu_kernels import CACHED, Attention, kernels, threads
from .kv_cache import KVCache
from .spec import Spec


@dataclass(slots=True)
class Visible:
    """What T tokens see in layers with one window."""

    first: Tensor
    """int64 [T]: the first token that each sees."""
    keys: int
    """Sum over the tokens: the amount of work."""


class CpuAttention:
    """The backend; `other` takes what the kernel does not. Raises StartupError where there are no kernels."""

    def __init__(self, other: AttentionBackend | None = None) -> None:
        self.other = other or TorchAttention()
        self.kernels = kernels()

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> AttentionPlan:
        if batch.tiles is not None or not self.takes(kv, spec):
            return self.other.plan(batch, kv, spec)
        return CpuPlan(batch, kv, spec)

    def takes(self, kv: KVCache, spec: Spec) -> bool:
        """Whether the kernel does: float32 queries, a key and a value of whole vectors, causal, plain softmax."""
        if kv.read_dtype != torch.float32 or kv.storage.dtype not in CACHED:
            return False
        whole = spec.mla is None and spec.head_dim % (2 * self.kernels.lanes) == 0
        return whole and spec.causal and spec.attn_softcap is None


class CpuPlan:
    """A batch's tokens: where their pages are, and what they see."""

    rotates: ClassVar = False

    def __init__(self, batch: Batch, kv: KVCache, spec: Spec) -> None:
        self.batch, self.cache, self.spec, self.page_size = batch, kv.rows, spec, kv.page_size
        self.kind = CACHED[kv.storage.dtype]
        self.attend = kernels().attend
        places = np.empty((2, batch.num_decode + sum(chunk.length for chunk in batch.chunks)), np.int64)
        self.pages, self.ends = torch.from_numpy(places).unbind(0)
        tables, at = batch.decode_tables, batch.num_decode
        rows = np.arange(at) if batch.decode_rows is None else batch.decode_rows.numpy()
        places[0, :at] = tables.data_ptr() + rows.astype(np.int64) * (tables.stride(0) * tables.element_size())
        places[1, :at] = batch.decode_lengths.numpy()
        for chunk in batch.chunks:
            places[0, at : at + chunk.length] = chunk.pages.data_ptr()
            places[1, at : at + chunk.length] = np.arange(chunk.start + 1, chunk.start + chunk.length + 1)
            at += chunk.length
        self.visible = {window: visible(places[1], window) for window in set(spec.windows or (None,))}

    def run(self, layer: int, q: Tensor) -> Tensor:
        visible = self.visible[self.spec.window(layer)]
        if q.stride()[1:] != (self.spec.head_dim, 1):
            q = q.contiguous()
        out = q.new_empty(len(q), self.spec.heads * self.spec.head_dim)
        arguments = self.arguments(q, out)
        arguments.cache, arguments.keys = self.cache[layer].data_ptr(), visible.keys
        arguments.first = visible.first.data_ptr()
        self.attend(arguments, threads())
        return out

    def arguments(self, q: Tensor, out: Tensor) -> Attention:
        """The kernel's arguments but for what is a layer's. q [T, H, D] with whole rows, out [T, H * D]."""
        spec = self.spec
        return Attention(
            q=q.data_ptr(), stride=q.stride(0), kind=self.kind, out=out.data_ptr(), pages=self.pages.data_ptr(),
            end=self.ends.data_ptr(), tokens=len(q), heads=spec.heads, kv_heads=spec.kv_heads, dim=spec.head_dim,
            page_size=self.page_size, scale=spec.attention_scale,
        )  # fmt: skip


def visible(ends: np.ndarray, window: int | None) -> Visible:
    """What tokens see that are the last of so many, ends int64 [T]."""
    first = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    return Visible(torch.from_numpy(first), int(ends.sum() - first.sum()))
