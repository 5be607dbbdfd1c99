"""The pieces of a layer as small functions and the linear map as an object: what a GPU backend replaces by kernels.

Used by the decoder, which holds no arithmetic of its own. Boundaries are those of the fused kernels to come
(add+RMSNorm, rope+KV write, act*up); every function is free of host synchronisation.
Legend: T tokens, H query heads, K KV heads, D head_dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rotate_
from .spec import Spec

LinearMap = Callable[[Tensor], Tensor]
"""[T, in] -> [T, out]. `Linear`, `PackedLinear`, and later quantised and tensor parallel ones."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Linear:
    """y = x @ weight.T + bias with weight [out, in] as checkpoints store it."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """The same map with the weight in oneDNN's blocked layout, for the CPU.

    F.linear repacks the weight for the matrix instructions in every call; packing once makes the GEMMs of a decode
    step 1.4 to 2 times faster in bfloat16 and float32 alike (perf/cpu.py).
    """

    __slots__ = ("bias", "weight")

    def __init__(self, linear: Linear) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight, None)
        self.bias = linear.bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedLinear` takes this weight: on the CPU, with oneDNN, in a dtype that it multiplies fast."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, accumulated in float32; weight [x.shape[-1]]."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(
    delta: Tensor, residual: Tensor, residual_scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(r), r) with r = residual + residual_scale * delta; all [T, hidden]. `residual` may be reused."""
    residual = torch.add(residual, delta, alpha=residual_scale)
    return rms_norm(residual, weight, eps), residual


def qk_norm_(qkv: Tensor, weight: Tensor, eps: float) -> None:
    """Normalise each query and key head in place: qkv [T, H + 2K, D], weight [H + K, D]."""
    qk = qkv[:, : weight.shape[0]]
    torch.mul(F.rms_norm(qk, (qk.shape[-1],), None, eps), weight, out=qk)


def rope_and_write(
    qkv: Tensor, table: tuple[Tensor, Tensor] | None, spec: Spec, kv_slots: Tensor, kv_rows: Tensor
) -> Tensor:
    """Rotate queries and keys in place, write keys and values to their slots, return the queries.

    qkv [T, H + 2K, D]; table: `rotation_table` of the tokens, None without rope; kv_slots int64 [T];
    kv_rows [slots, 2, K, D] is one layer of the cache. Returns a view [T, H, D] of qkv.
    """
    if table is not None and spec.rope is not None:
        rotated = qkv[:, : spec.heads + spec.kv_heads, : spec.rope.dim]
        rotate_(rotated, table[0], table[1], spec.rope.interleaved)
    new_rows = qkv[:, spec.heads :].view(-1, 2, spec.kv_heads, spec.head_dim)
    kv_rows.index_copy_(0, kv_slots, new_rows)
    return qkv[:, : spec.heads]


def act_mul(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up of gate_up [T, 2 * inter]; returns [T, inter]."""
    gate, up = gate_up.chunk(2, -1)
    return activation(gate) * up
