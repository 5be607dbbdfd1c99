"""Attention on a GPU by FlashInfer's kernels: paged prefill (fa3 on Hopper, fa2 elsewhere) and paged decode.

Used by the decoder; flashinfer is imported only here. `FlashInferPrefill` leaves decode to another backend, because
FlashInfer plans it on the host, for lengths that are true for one step only: `FlashInferAttention` therefore asks the
runner for exact lengths (`needs_host_lengths`), and its steps neither run ahead nor in CUDA graphs.
It computes in the dtype of the cache, 16 bits; queries of another, float32, are rounded to it.
The cache is handed over as it is: keys and values as strided views of [pages, page_size, 2, K, D].
Source: Ye et al., "FlashInfer: efficient and customizable attention engine for LLM inference serving", 2025.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from ..errors import StartupError
from .attention import AttentionBackend, AttentionPlan
from .batch import Batch
from .kv_cache import KVCache
from .spec import Spec

WORKSPACE_BYTES: Final = 256 << 20


def load_flashinfer() -> Any:
    """Import flashinfer. Raises StartupError if it is not installed."""
    try:
        import flashinfer
    except ImportError:
        raise StartupError(
            "--attention-backend flashinfer: it is not installed; pip install 'actorserve[gpu]', or take triton"
        ) from None
    return flashinfer


def supports(spec: Spec, dtype: torch.dtype, kv: torch.dtype) -> bool:
    """Whether FlashInfer has kernels for a model's prefill: caches of 16 bits, common head_dims.

    Of a model in 16 bits its own: another's would cost precision that the model has.
    """
    of_model = kv == dtype or dtype == torch.float32
    return of_model and kv in (torch.bfloat16, torch.float16) and spec.head_dim in (64, 128, 256)


def indptr(counts: list[int]) -> Tensor:
    """Return int32 [n + 1] on the host: where each of the parts begins, and the end."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


class FlashInferPrefill:
    """Chunks through FlashInfer, decode rows through `decode`."""

    def __init__(self, decode: AttentionBackend, device: torch.device) -> None:
        self.decode = decode
        self.flashinfer = load_flashinfer()
        self.kind = "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2"
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrappers: dict[int | None, Any] = {}
        """By window: each distinct one is planned for itself."""

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> AttentionPlan:
        """See AttentionBackend."""
        if not batch.chunks:
            return self.decode.plan(batch, kv, spec)
        rows = self.decode.plan(replace(batch, chunks=[]), kv, spec) if batch.num_decode else None
        pages = torch.cat([chunk.pages for chunk in batch.chunks])
        planned = {window: self._plan(batch, pages, kv, spec, window) for window in set(spec.windows or (None,))}
        return MixedPlan(rows, planned, batch.num_decode, kv, spec)

    def _plan(self, batch: Batch, pages: Tensor, kv: KVCache, spec: Spec, window: int | None) -> Any:
        if window not in self.wrappers:
            # Each wrapper keeps its plan in the workspace, so those that are used side by side have their own.
            space = self.workspace if not self.wrappers else torch.empty_like(self.workspace)
            make = self.flashinfer.BatchPrefillWithPagedKVCacheWrapper
            self.wrappers[window] = make(space, "NHD", backend=self.kind)
        wrapper = self.wrappers[window]
        chunks = batch.chunks
        last = [(c.start + c.length - 1) % kv.page_size + 1 for c in chunks]
        wrapper.plan(
            indptr([c.length for c in chunks]), indptr([len(c.pages) for c in chunks]), pages,
            torch.tensor(last, dtype=torch.int32), spec.heads, spec.kv_heads, spec.head_dim, kv.page_size,
            causal=True, sm_scale=spec.attention_scale, window_left=-1 if window is None else window - 1,
            logits_soft_cap=spec.attn_softcap or 0.0, q_data_type=kv.storage.dtype, kv_data_type=kv.storage.dtype,
        )  # fmt: skip
        return wrapper


def paged_views(kv: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    """Return one layer's keys and values, [pages, page_size, K, D] each, as views."""
    rows = kv.rows[layer]
    pages = rows.view(-1, kv.page_size, *rows.shape[1:])
    return pages[:, :, 0], pages[:, :, 1]


def attend(wrapper: Any, q: Tensor, kv: KVCache, layer: int) -> Tensor:
    """What a planned wrapper makes of queries [T, H, D]: [T, H * D] in their dtype."""
    out: Tensor = wrapper.run(q.to(kv.storage.dtype).contiguous(), paged_views(kv, layer))
    return out.to(q.dtype).flatten(1)


@dataclass(slots=True)
class MixedPlan:
    """Decode rows by another backend's plan, chunks by FlashInfer's."""

    rotates: ClassVar = False
    rows: AttentionPlan | None
    planned: dict[int | None, Any]
    num_decode: int
    kv: KVCache
    spec: Spec

    def run(self, layer: int, q: Tensor) -> Tensor:
        """See AttentionPlan."""
        wrapper = self.planned[self.spec.window(layer)]
        out = attend(wrapper, q[self.num_decode :], self.kv, layer)
        if self.rows is None:
            return out
        return torch.cat([self.rows.run(layer, q[: self.num_decode]), out])


class FlashInferDecode:
    """Decode rows through FlashInfer, with tensor cores: exact lengths come from the host."""

    def __init__(self, device: torch.device) -> None:
        flashinfer = load_flashinfer()
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        make = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        self.wrapper = make(workspace, "NHD", use_tensor_cores=True)

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> AttentionPlan:
        """See AttentionBackend. Raises StartupError for a model with several windows."""
        if len(set(spec.windows)) > 1:
            raise StartupError("--attention-backend flashinfer: layers with different windows; take auto or triton")
        assert batch.decode_lengths_host is not None
        lengths = batch.decode_lengths_host
        counts = -(-lengths // kv.page_size)
        tables = batch.decode_tables
        if batch.decode_rows is not None:
            tables = tables.index_select(0, batch.decode_rows)
        pages = torch.cat([table[:n] for table, n in zip(tables, counts.tolist(), strict=True)])
        last = torch.from_numpy(((lengths - 1) % kv.page_size + 1).astype(np.int32))
        window = spec.window(0)
        self.wrapper.plan(
            indptr(counts.tolist()), pages, last, spec.heads, spec.kv_heads, spec.head_dim, kv.page_size,
            sm_scale=spec.attention_scale, window_left=-1 if window is None else window - 1,
            logits_soft_cap=spec.attn_softcap or 0.0, q_data_type=kv.storage.dtype, kv_data_type=kv.storage.dtype,
        )  # fmt: skip
        return DecodePlan(self.wrapper, kv)


@dataclass(slots=True)
class DecodePlan:
    """FlashInfer's decode of one batch."""

    rotates: ClassVar = False
    wrapper: Any
    kv: KVCache

    def run(self, layer: int, q: Tensor) -> Tensor:
        """See AttentionPlan."""
        return attend(self.wrapper, q, self.kv, layer)


class FlashInferAttention(FlashInferPrefill):
    """FlashInfer for everything: the reference for our decode kernel."""

    needs_host_lengths = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(FlashInferDecode(device), device)
