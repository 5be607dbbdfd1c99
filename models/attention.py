"""Paged attention behind a two-step interface: `plan` once per forward, `run` once per layer.

Used by the decoder. The plan holds everything that depends on the batch alone (gather indices, masks), so a layer
pays for its reads and its arithmetic only. `TorchAttention` here is plain torch, made fast for CPUs; it is also the
reference for the GPU backends that share the interface.
Invariant: a token attends to its own sequence's slots only; no value outside them enters, not even masked.
A latent cache has one row a token: keys are their own values, and what is beyond value_dim of the result is dropped.
Legend: T tokens, H query heads, K KV heads, G = H / K, D head_dim, N decode rows of a group, L keys, S chunk length,
P rows that a token is cached as (2: key and value).
"""

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StartupError
from .batch import Batch, Chunk
from .kv_cache import KVCache
from .layers import Queries
from .spec import Spec

MATMUL_TOKENS = 4096
"""From this many keys (rows x padded length) on two batched matmuls over keys gathered by head beat the flash kernel.

Below, the flash kernel on keys gathered by token does: that read is sequential, by head it is not (2.5x slower cold).
"""
SPLIT_TOKENS = 1024
"""A further group of decode rows costs as much per layer as gathering about this many padding tokens."""


class AttentionPlan(Protocol):
    """Attention of one batch."""

    @property
    def rotates(self) -> bool:
        """Whether it takes heads as the QKV product leaves them, too (Ops.heads)."""

    def run(self, layer: int, q: Queries) -> Tensor:
        """Attend with queries [T, H, D] to the cache, which holds the new tokens already; of q's dtype,
        [T, H * value_dim]. Where it `rotates`, what Ops.heads leaves of them is rotated and written first."""


class AttentionBackend(Protocol):
    """Makes plans; stateless between forwards as far as the caller can tell."""

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> AttentionPlan: ...


class TorchAttention:
    """The plain torch backend."""

    def plan(self, batch: Batch, kv: KVCache, spec: Spec) -> "TorchPlan":
        parts = {window: _parts(batch, kv, spec, window) for window in set(spec.windows or (None,))}
        return TorchPlan(parts, kv, spec)


class Part(Protocol):
    """A stretch of the batch that is computed together."""

    @property
    def rows(self) -> Tensor | slice:
        """Which of the T tokens: int64 [N], or a slice."""

    def run(self, cache: Tensor, q: Tensor, spec: Spec) -> Tensor:
        """Attend with queries [N, H, D] to one layer's cache [slots, P, K, D]; [N, H * value_dim]."""


@dataclass(slots=True)
class FlashDecode:
    """Decode rows through the flash kernel. The G query heads of a KV head are the rows of its query matrix."""

    rows: Tensor | slice
    slots: Tensor
    """int64 [N, L]"""
    mask: Tensor | None
    """[N, 1, 1, L] added to the scores, 0 or -inf; None where all rows have L tokens."""

    def run(self, cache: Tensor, q: Tensor, spec: Spec) -> Tensor:
        count, width = self.slots.shape
        shape = (count, width, spec.kv_parts, spec.kv_heads, spec.head_dim)
        keys, values = halves(gather(cache, self.slots.view(-1), q.dtype).view(shape).permute(2, 0, 3, 1, 4))
        queries = q.view(count, spec.kv_heads, spec.group, spec.head_dim)
        attended = F.scaled_dot_product_attention(queries, keys, values, self.mask, scale=spec.attention_scale)
        return attended[..., : spec.value_dim].reshape(count, -1)


@dataclass(slots=True)
class MatmulDecode:
    """Decode rows through two matmuls: many keys, or a softcap."""

    rows: Tensor | slice
    head_rows: Tensor
    """int64 [P * N * K * L] rows of the cache as [slots * P * K, D], ordered (key or value, row, KV head, token)."""
    mask: Tensor | None
    """[N * K, 1, L] added to the scores."""

    def run(self, cache: Tensor, q: Tensor, spec: Spec) -> Tensor:
        problems = len(q) * spec.kv_heads
        gathered = gather(cache.view(-1, spec.head_dim), self.head_rows, q.dtype)
        keys, values = halves(gathered.view(spec.kv_parts, problems, -1, spec.head_dim))
        queries = q.reshape(problems, spec.group, spec.head_dim)
        return softmax_attention(queries, keys, values[..., : spec.value_dim], self.mask, spec).view(len(q), -1)


@dataclass(slots=True)
class PrefillChunk:
    """One prefill chunk of S tokens. KV heads are the kernel's batch, so that a group's keys are not copied."""

    rows: slice
    slots: Tensor
    """int64 [L]"""
    mask: Tensor | None
    """[S, L] added to the scores; None: causal from the first token on, without a window."""

    def run(self, cache: Tensor, q: Tensor, spec: Spec) -> Tensor:
        keys, values = halves(gather(cache, self.slots, q.dtype).permute(1, 2, 0, 3)[:, :, None])
        queries = q.view(-1, spec.kv_heads, spec.group, spec.head_dim).permute(1, 2, 0, 3)
        if spec.attn_softcap is not None:
            attended = softmax_attention(queries, keys, values, self.mask, spec)
        else:
            attended = F.scaled_dot_product_attention(
                queries,
                keys.expand(-1, spec.group, -1, -1),
                values.expand(-1, spec.group, -1, -1),
                self.mask,
                is_causal=self.mask is None,
                scale=spec.attention_scale,
            )
        return attended[..., : spec.value_dim].permute(2, 0, 1, 3).reshape(len(q), -1)


@dataclass(slots=True)
class WholePrompts:
    """N prompts of S tokens at most, whose tokens all see each other. Padding is each prompt's first token."""

    rows: Tensor | slice
    padded: Tensor
    """int64 [N * S], which of the rows"""
    slots: Tensor
    """int64 [N * S]"""
    mask: Tensor | None
    """[N, 1, 1, S] added to the scores; None where all have S tokens."""
    places: Tensor | None
    """int64 [rows], where in N * S each row is; None: in this order."""
    count: int

    def run(self, cache: Tensor, q: Tensor, spec: Spec) -> Tensor:
        shape = (self.count, -1, spec.kv_parts, spec.kv_heads, spec.head_dim)
        keys, values = halves(gather(cache, self.slots, q.dtype).view(shape).permute(2, 0, 3, 1, 4))
        # Without an order among the keys a KV head's query heads are just more queries.
        by_head = q.index_select(0, self.padded).view(self.count, -1, spec.kv_heads, spec.group, spec.head_dim)
        queries = by_head.permute(0, 2, 3, 1, 4).flatten(2, 3)
        if spec.attn_softcap is not None:
            attended = softmax_attention(queries, keys, values, self.mask, spec)
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, self.mask, scale=spec.attention_scale)
        split = attended.view(self.count, spec.kv_heads, spec.group, -1, spec.head_dim)
        attended = split.permute(0, 3, 1, 2, 4).reshape(len(self.padded), -1)
        return attended if self.places is None else attended.index_select(0, self.places)


class TorchPlan:
    """The parts of a batch, per distinct window."""

    rotates: ClassVar = False

    def __init__(self, parts: dict[int | None, list[Part]], kv: KVCache, spec: Spec) -> None:
        self.parts = parts
        self.cache = kv.rows
        self.spec = spec

    def run(self, layer: int, q: Tensor) -> Tensor:
        parts, cache = self.parts[self.spec.window(layer)], self.cache[layer]
        if len(parts) == 1:  # a single part is the whole batch in its order
            return parts[0].run(cache, q, self.spec)
        out = q.new_empty(q.shape[0], self.spec.heads * self.spec.value_dim)
        for part in parts:
            out[part.rows] = part.run(cache, q[part.rows], self.spec)
        return out


def halves(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of gathered cache rows [P, ...]: the same where there is one row."""
    return gathered[0], gathered[-1]


def gather(cache: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of the cache in the queries' dtype; index_select does not know float8, so it moves bytes."""
    if cache.dtype == dtype:
        return cache.index_select(0, index)
    return cache.view(torch.uint8).index_select(0, index).view(cache.dtype).to(dtype)


def softmax_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: Spec) -> Tensor:
    """Attention as two matmuls: q [..., M, D], keys and values [..., L, D], mask broadcasting to [..., M, L]."""
    if spec.attn_softcap is None and q.ndim == 3 and mask is not None:
        scores = torch.baddbmm(mask, q, keys.transpose(-1, -2), alpha=spec.attention_scale)
    else:
        scores = torch.matmul(q, keys.transpose(-1, -2)).mul_(spec.attention_scale)
        if spec.attn_softcap is not None:
            scores = scores.div_(spec.attn_softcap).tanh_().mul_(spec.attn_softcap)
        if mask is not None:
            scores = scores.add_(mask)
    return torch.matmul(scores.softmax(-1), values)


def _parts(batch: Batch, kv: KVCache, spec: Spec, window: int | None) -> list[Part]:
    """The groups of a batch for layers with this window, in token order where it matters."""
    if not spec.causal:
        return _whole_prompts(batch, kv)
    parts: list[Part] = []
    if batch.num_decode:
        parts += _decode_groups(batch, kv, spec, window)
    first = batch.num_decode
    for chunk in batch.chunks:
        parts.append(_chunk_group(chunk, first, kv, spec, window))
        first += chunk.length
    return parts


def _decode_groups(batch: Batch, kv: KVCache, spec: Spec, window: int | None) -> list[Part]:
    """Group the decode rows by length.

    On a CPU the lengths can be read without waiting for anything. On a GPU that would stall the launches and break
    graph capture: there all rows are padded to the host's upper bound.
    """
    longest = batch.max_decode_length
    if batch.decode_lengths.device.type != "cpu":
        every = slice(0, batch.num_decode)
        width = longest if window is None else min(longest, window)
        return [_decode_group(batch, every, width, True, kv, spec, window)]
    lengths: list[int] = batch.decode_lengths.tolist()
    if window is not None:
        lengths = [min(length, window) for length in lengths]
    parts: list[Part] = []
    groups = group_by_length(lengths)
    for rows in groups:
        select: Tensor | slice = slice(0, len(lengths)) if len(groups) == 1 else torch.tensor(rows)
        width = max(lengths[row] for row in rows)
        ragged = min(lengths[row] for row in rows) < width
        parts.append(_decode_group(batch, select, width, ragged, kv, spec, window))
    return parts


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Split rows into groups to be padded together, as soon as a split saves SPLIT_TOKENS of padding.

    One group keeps the rows' order, several are in order of falling length.
    """
    if (max(lengths) - min(lengths)) * len(lengths) <= SPLIT_TOKENS:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups: list[list[int]] = []
    first = 0
    for at, row in enumerate(order):
        if (lengths[order[first]] - lengths[row]) * (len(order) - at) > SPLIT_TOKENS:
            groups.append(order[first:at])
            first = at
    groups.append(order[first:])
    return groups if len(groups) > 1 else [list(range(len(lengths)))]


def _decode_group(
    batch: Batch, rows: Tensor | slice, width: int, ragged: bool, kv: KVCache, spec: Spec, window: int | None
) -> Part:
    """Gather indices of `rows` padded to `width` keys, which are the last ones of each row.

    Padding reads the row's own first visible token once more: what an unused slot holds may be NaN, which a mask
    does not stop (0 * NaN).
    """
    lengths = batch.decode_lengths[rows].long()[:, None]
    tables = batch.decode_tables
    tables = tables[rows] if batch.decode_rows is None else tables.index_select(0, batch.decode_rows[rows])
    columns = torch.arange(width, device=tables.device)
    first = 0 if window is None else (lengths - window).clamp_(min=0)
    positions = first + columns[None]
    mask = None
    if ragged:
        beyond = positions >= lengths
        positions = torch.where(beyond, first, positions)
        dtype = kv.read_dtype
        mask = torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, float("-inf"))
        mask = mask[:, None, None]
    pages = tables.gather(1, (positions // kv.page_size).expand(len(tables), -1))
    slots = pages.long() * kv.page_size + positions % kv.page_size
    if slots.numel() < MATMUL_TOKENS and spec.attn_softcap is None:
        return FlashDecode(rows, slots, mask)
    per_head = None if mask is None else mask.expand(-1, spec.kv_heads, -1, -1).flatten(0, 1)
    return MatmulDecode(rows, _head_rows(slots, spec), per_head)


def _chunk_group(chunk: Chunk, first: int, kv: KVCache, spec: Spec, window: int | None) -> PrefillChunk:
    """Gather indices and mask of a chunk whose tokens start at row `first` of the batch."""
    begin = 0 if window is None else max(0, chunk.start - window + 1)
    end = chunk.start + chunk.length
    keys = torch.arange(begin, end, device=chunk.pages.device)
    slots = chunk.pages[keys // kv.page_size].long() * kv.page_size + keys % kv.page_size
    mask = None
    if chunk.start > 0 or spec.attn_softcap is not None or (window is not None and window < end):
        distance = torch.arange(chunk.start, end, device=keys.device)[:, None] - keys
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=kv.read_dtype, device=keys.device)
        mask.masked_fill_(hidden, float("-inf"))
    return PrefillChunk(slice(first, first + chunk.length), slots, mask)


def _whole_prompts(batch: Batch, kv: KVCache) -> list[Part]:
    """Group prompts by length. Each call of the kernel costs more than some padding."""
    if not batch.chunks:
        return []
    assert not batch.num_decode and all(c.start == 0 for c in batch.chunks), "who sees all tokens has them at once"
    device, lengths = batch.ids.device, [c.length for c in batch.chunks]
    firsts = np.cumsum([0, *lengths[:-1]])
    groups = group_by_length(lengths)
    parts: list[Part] = []
    for group in groups:
        count, width = len(group), max(lengths[i] for i in group)
        own, column = np.array([lengths[i] for i in group])[:, None], np.arange(width)
        real = column < own
        tokens = torch.from_numpy((firsts[group][:, None] + np.where(real, column, 0)).ravel()).to(device)
        mask = places = None
        rows: Tensor | slice = slice(0, len(batch.ids))
        padded = tokens
        if not real.all():
            beyond = torch.from_numpy(~real).to(device)[:, None, None]
            mask = torch.zeros(beyond.shape, dtype=kv.read_dtype, device=device).masked_fill_(beyond, float("-inf"))
            places = torch.from_numpy(np.flatnonzero(real)).to(device)
        if len(groups) > 1:
            rows = tokens if places is None else tokens.index_select(0, places)
            starts = np.concatenate([[0], np.cumsum(own[:-1, 0])])[:, None]
            padded = torch.from_numpy((starts + np.where(real, column, 0)).ravel()).to(device)
        slots = batch.kv_slots.long().index_select(0, tokens)
        parts.append(WholePrompts(rows, padded, slots, mask, places, count))
    return parts


def _head_rows(slots: Tensor, spec: Spec) -> Tensor:
    """`MatmulDecode.head_rows` of slots [N, L]."""
    rows = spec.kv_parts * spec.kv_heads
    heads = torch.arange(rows, device=slots.device).view(spec.kv_parts, 1, spec.kv_heads, 1)
    return (slots[None, :, None] * rows + heads).flatten()


def make_backend(
    name: str, device: torch.device, spec: Spec, dtype: torch.dtype, kv: torch.dtype, dense: bool = True
) -> AttentionBackend:
    """Resolve `EngineConfig.attention_backend` for a model of `dtype` with a cache of dtype `kv`.

    `dense`: its weights are not quantized.

    auto: torch on a CPU. On a GPU our Triton decode, which CUDA graphs can replay and which was as fast as FlashInfer's
    (72.8 against 73.6 us a layer: 128 rows, 1,024 tokens, Qwen2-7B on an H200), and FlashInfer's prefill where it can
    be imported and has the kernels, once they are compiled, else Triton's.

    Raises:
        StartupError: the backend is not there, or not for this device or dtype.
    """
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return TorchAttention()
    if device.type != "cuda":
        raise StartupError(f"--attention-backend {name} needs a GPU")
    if not spec.causal:
        if name != "auto":
            raise StartupError(f"--attention-backend {name}: not for models that look ahead; take auto")
        return TorchAttention()
    if spec.mla is not None:
        from .latent_attention import LatentAttention

        if name == "flashinfer":
            raise StartupError("--attention-backend flashinfer: not for latent attention; take auto or triton")
        return LatentAttention(spec)
    from .triton_attention import TritonAttention

    if name == "triton" or (name == "auto" and importlib.util.find_spec("flashinfer") is None):
        return TritonAttention(dense=dense)
    from .flashinfer_attention import FlashInferAttention, FlashInferPrefill, supports

    if not supports(spec, dtype, kv):
        if name == "flashinfer":
            more = ", or add --kv-cache-dtype float16" if dtype == kv == torch.float32 else ""
            raise StartupError(
                f"--attention-backend flashinfer has no kernels for this dtype or head size; take triton{more}"
            )
        return TritonAttention(dense=dense)
    if name == "flashinfer":
        return FlashInferAttention(device)
    from .flashinfer_build import TritonMeanwhile, missing_kernels

    prefill = FlashInferPrefill(TritonAttention(dense=dense), device)
    missing = missing_kernels(spec, kv, prefill.kind)
    return TritonMeanwhile(prefill, missing) if missing else prefill
