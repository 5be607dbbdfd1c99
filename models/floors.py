"""Physical floors of serving a decoder on one GPU: the time that its memory and its arithmetic cannot beat.

decode floor  = sum over a step's matmuls and its attention of max(bytes / bandwidth, FLOPs / peak), as they run one
                after another; each weight is read once a step, each visible token's K and V once; of the experts
                those that a batch visits, on average, when each token chooses evenly and by itself
prefill floor = FLOPs / peak; the head works on the last token only and is left out
Used by plan.py and perf/. Pure arithmetic over a Spec. Units: seconds, bytes, tokens.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

from .spec import Moe, Spec

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What one GPU can do."""

    bandwidth: float
    """Device memory, bytes/s."""
    peak: float
    """Dense 16-bit matrix multiplication with float32 accumulation, FLOP/s."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that plans are made for."""

    memory: int
    """Bytes that CUDA reports as total."""
    limits: Limits | None
    measured: bool = False
    """The limits were measured; otherwise they are the data sheet's, which nothing reaches."""


def _gpu(gib: float, terabytes: float, teraflops: float, measured: bool = False) -> Gpu:
    return Gpu(int(gib * GIB), Limits(terabytes * 1e12, teraflops * 1e12), measured)


GPUS: Final[dict[str, Gpu]] = {
    "h200": _gpu(139.8, 4.3, 790, measured=True),  # a device copy, cuBLAS on random data
    "h100": _gpu(79.1, 3.02, 780, measured=True),
    "a100-80g": _gpu(79.1, 2.04, 312),
    "a100-40g": _gpu(39.4, 1.555, 312),
    "l40s": _gpu(44.4, 0.864, 362),
    "rtx4090": _gpu(23.5, 1.008, 165),
    "rtx3090": _gpu(23.6, 0.936, 71),
    "a10g": _gpu(22.0, 0.6, 70),
    "l4": _gpu(22.0, 0.3, 121),
    "b200": _gpu(178.3, 8.0, 2250),
}


def matmuls(spec: Spec) -> list[tuple[int, int]]:
    """(weights of a token, times a step) of each matmul: attention's, up (with gate), down, head. Embedding rows are
    not read whole; of the experts there are those of one token."""
    return [(weights, times) for weights, times, _ in _matmuls(spec)]


def _matmuls(spec: Spec) -> list[tuple[int, int, bool]]:
    """`matmuls`, and whether the weights are those of experts that a token chooses."""
    sparse = sum(spec.sparse(layer) for layer in range(spec.layers))
    found = [(weights, spec.layers, False) for weights in _attention(spec)]
    found += [(weights, spec.layers - sparse, False) for weights in _mlp(spec, spec.inter)]
    if spec.moe is not None:
        common = (spec.hidden * spec.moe.experts, *_mlp(spec, spec.moe.shared_inter))
        found += [(weights, sparse, False) for weights in common]
        found += [(weights, sparse, True) for weights in _mlp(spec, spec.moe.top_k * spec.moe.inter)]
    return [entry for entry in found if entry[0] and entry[1]] + [(spec.hidden * spec.vocab, 1, False)]


def visited(moe: Moe, batch: int) -> float:
    """How many experts `batch` tokens visit on average, of which each chooses `top_k` evenly and by itself."""
    return moe.experts * (1 - (1 - moe.top_k / moe.experts) ** batch)


def _attention(spec: Spec) -> list[int]:
    """Weights of the projections: qkv, o; of latent attention all that its absorbed form multiplies."""
    mla, h = spec.mla, spec.hidden
    if mla is None:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        return [h * (q + 2 * kv), q * h]
    q = spec.heads * (mla.nope + mla.rope)
    down = (q if mla.q_rank is None else mla.q_rank) + mla.kv_rank + mla.rope
    up = 0 if mla.q_rank is None else mla.q_rank * q
    return [h * down, up, spec.heads * mla.nope * mla.kv_rank, spec.heads * mla.v * mla.kv_rank, spec.heads * mla.v * h]


def _mlp(spec: Spec, inter: int) -> list[int]:
    return [(2 if spec.gated else 1) * spec.hidden * inter, inter * spec.hidden]


def matmul_seconds(
    spec: Spec, batch: int, limits: Limits, weight_bytes: float = 2.0, quantized: float | None = None
) -> float:
    """Floor of a step's matmuls for `batch` rows. `quantized`: bytes of a weight of all but the head."""
    of_layers, head = _matmuls(spec)[:-1], _matmuls(spec)[-1]
    sizes = [(*entry, quantized or weight_bytes) for entry in of_layers] + [(*head, weight_bytes)]
    read = 1.0 if spec.moe is None else visited(spec.moe, batch) / spec.moe.top_k
    return sum(
        times * max(weights * (read if chosen else 1) * size / limits.bandwidth, 2 * batch * weights / limits.peak)
        for weights, times, chosen, size in sizes
    )


def windows(spec: Spec) -> Counter[int | None]:
    """How many layers have each window."""
    return Counter(spec.windows or (None,) * spec.layers)


def visible_tokens(spec: Spec, context: int) -> int:
    """Tokens that the last of `context` tokens attends to, summed over the layers."""
    return sum(
        layers * (context if window is None else min(context, window)) for window, layers in windows(spec).items()
    )


def attention_seconds(spec: Spec, visible: int, limits: Limits, kv_bytes: float = 2.0) -> float:
    """Floor of a decode step's attention: `visible_tokens` summed over the batch's rows."""
    read = visible * spec.kv_parts * spec.kv_heads * spec.head_dim * kv_bytes
    return max(read / limits.bandwidth, visible * _pair_flops(spec) / limits.peak)


def decode_seconds(
    spec: Spec,
    batch: int,
    context: int,
    limits: Limits,
    weight_bytes: float = 2.0,
    kv_bytes: float = 2.0,
    quantized: float | None = None,
) -> float:
    """Floor of one decode step of `batch` sequences with `context` tokens each; `quantized`: see matmul_seconds."""
    attention = attention_seconds(spec, batch * visible_tokens(spec, context), limits, kv_bytes)
    return matmul_seconds(spec, batch, limits, weight_bytes, quantized) + attention


def prefill_flops(spec: Spec, tokens: int, cached: int = 0) -> float:
    """FLOPs of a prompt of `tokens`, of which the first `cached` have their KV already."""
    body = sum(weights * times for weights, times in matmuls(spec)[:-1])
    pairs = sum(layers * (_pairs(tokens, w) - _pairs(cached, w)) for w, layers in windows(spec).items())
    return 2 * (tokens - cached) * body + pairs * _pair_flops(spec)


def _pair_flops(spec: Spec) -> int:
    """FLOPs of attention for a query and a key: the score, and the value's share."""
    return 2 * spec.heads * (spec.head_dim + spec.value_dim)


def prefill_seconds(spec: Spec, tokens: int, limits: Limits, cached: int = 0) -> float:
    """Floor of one prompt's prefill."""
    return prefill_flops(spec, tokens, cached) / limits.peak


def _pairs(tokens: int, window: int | None) -> float:
    """Query-key pairs of causal attention; a token and itself count half, as in the usual n * n / 2."""
    if window is None or window >= tokens:
        return tokens * tokens / 2
    return window * tokens - window * window / 2
