"""Normalisations in torch: RMS and LayerNorm with their weights, and those of query and key heads.

Used by layers.py and the decoder. A weight that has an offset added (Gemma's 1 + w) is kept in float32, since in 16
bits the sum would lose most of w; so weights may be wider than what they are applied to.
Legend: T tokens, H query heads, K KV heads, D head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import Norm, Spec


@dataclass(slots=True)
class NormWeights:
    """The weights of a Norm over `hidden`."""

    weight: Tensor
    """[hidden], its offset added."""
    bias: Tensor | None = None
    """[hidden]"""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, accumulated in float32; weight [x.shape[-1]]."""
    if weight.dtype != x.dtype:
        return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps).to(x.dtype)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm(x: Tensor, weights: NormWeights, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), weights.weight, weights.bias, eps)


def qk_norm_(qkv: Tensor, weight: Tensor, eps: float) -> None:
    """RMS-normalise each query and key head in place: qkv [T, H + 2K, D], weight [H + K, D]."""
    qk = qkv[:, : weight.shape[0]]
    torch.mul(F.rms_norm(qk, (qk.shape[-1],), None, eps), weight, out=qk)


def is_head_rms(spec: Spec) -> bool:
    """Whether `qk_norm_`, and so every fused kernel, is what the model's heads need; else `plain_qk_norm_` is."""
    return spec.qk_norm is not None and spec.qk_norm.kind == "rms" and spec.qk_norm_shape != "all"


def plain_qk_norm_(qkv: Tensor, weight: Tensor, spec: Spec) -> None:
    """Normalise queries and keys in place as `spec` says, whatever it is: qkv [T, H + 2K, D], weight [H + K, D]."""
    assert spec.qk_norm is not None
    for part, gain in (
        (qkv[:, : spec.heads], weight[: spec.heads]),
        (qkv[:, spec.heads : len(weight)], weight[spec.heads :]),
    ):
        rows = part.flatten(1) if spec.qk_norm_shape == "all" else part
        part.copy_((_unit(rows, spec.qk_norm) * gain.view(rows.shape[1:])).view(part.shape))


def _unit(x: Tensor, norm: Norm) -> Tensor:
    """x normalised over its last dimension, without weights."""
    shape = (x.shape[-1],)
    return (
        F.layer_norm(x, shape, None, None, norm.eps) if norm.kind == "layer" else F.rms_norm(x, shape, None, norm.eps)
    )
