"""The pieces of a layer: the Ops that a decoder runs on, here in plain torch, and the linear map as an object.

Used by the decoder, which holds no arithmetic of its own. `TorchOps` is what CPUs run in 16 bits and the reference of
the GPU's `TritonOps` (triton_ops.py), whose fused kernels have the same boundaries (add+RMSNorm, RoPE+KV write,
act*up), or do that work at the end of the GEMM before it. Every operation is free of host synchronisation.
Legend: T tokens, H query heads, K KV heads, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import saturation
from .norms import qk_norm_, rms_norm
from .part_maps import map_of
from .rope import rotate_, rotation_table
from .spec import Rope, Spec
from .unpack import Part

LinearMap = Callable[[Tensor], Tensor]
"""[T, in] -> [T, out]. `Linear`, `PackedLinear`, and each device's own, of dense and quantized weights."""

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


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU: it wants AVX512 or AMX; elsewhere torch does, slowly."""
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedLinear` takes this weight: on the CPU, with oneDNN, in a dtype that it multiplies fast."""
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bfloat16()))
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


Hidden = Any
"""Normed hidden states [T, hidden]: a Tensor, or what Ops.add_norm made of them for the linear map that comes next."""


Queries = Any
"""Queries [T, H, D]: a Tensor, or what Ops.heads leaves to an attention plan that `rotates`."""


class Ops(Protocol):
    """What a forward is made of, besides attention: GEMMs with what follows each, and these parts by themselves."""

    def rotation(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> Any:
        """Return what `rope_and_write` needs to rotate tokens at positions [T], or [3, T]: made once a forward."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm of x [T, hidden]."""

    def add_rms_norm(
        self, delta: Tensor, residual: Tensor, residual_scale: float, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return (rms_norm(r), r) with r = residual + residual_scale * delta; all [T, hidden]."""

    def qk_norm_rope_and_write(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        eps: float,
        table: Any,
        spec: Spec,
        kv_slots: Tensor,
        kv_rows: Tensor,
    ) -> Tensor:
        """Normalise (if qk_norm) and rotate (if table) heads, write keys and values, return the queries [T, H, D].

        qkv [T, H + 2K, D]; qk_norm [H + K, D]; kv_slots [T]; kv_rows [slots, 2, K, D], one layer of the cache.
        """

    def act_mul(self, gate_up: Tensor, act: str) -> Tensor:
        """activation(gate) * up of gate_up [T, 2 * inter]; returns [T, inter]."""

    def heads(
        self,
        qkv: LinearMap,
        x: Hidden,
        qk_norm: Tensor | None,
        eps: float,
        table: Any,
        spec: Spec,
        kv_slots: Tensor,
        kv_rows: Tensor,
        rotates: bool = False,
    ) -> Queries:
        """`qk_norm_rope_and_write` of qkv(x). With `rotates` it may leave that work to the attention that follows."""

    def add_norm(
        self,
        linear: LinearMap,
        x: Tensor,
        residual: Tensor,
        residual_scale: float,
        weight: Tensor,
        eps: float,
        into: LinearMap | None,
    ) -> tuple[Hidden, Tensor]:
        """`add_rms_norm` of linear(x); the first result is for `into`, or `gated` or `heads` with it, and no other.
        Without `into` it is a Tensor."""

    def gated(self, gate_up: LinearMap, x: Hidden, act: str, into: LinearMap | None = None) -> Hidden:
        """`act_mul` of gate_up(x), for `into` and no other, or `add_norm` with it. Without `into` it is a Tensor."""

    def experts(
        self, x: Tensor, router: Tensor, score_bias: Tensor | None, gate_up: Tensor, down: Tensor, spec: Spec,
        shared: Tensor | None, gate: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """What moe.Experts makes of x [T, hidden], with weights as there, by kernels of the device; None: it has none
        for so many tokens. shared [T, hidden], of the expert that all visit, is added, times sigmoid(gate [T, 1])."""

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """Return the map x -> x @ weight.T + bias, as fast as the device multiplies."""

    def quantized(self, parts: list[Part], bias: Tensor | None, dtype: torch.dtype) -> LinearMap:
        """Return the map of quantized weights under one another, for hidden states of `dtype`."""

    def head(self, weight: Tensor) -> LinearMap:
        """Return the product of the language model head: float32 [T, vocab] on a GPU; see head.py for a CPU's."""

    def tune_ahead(self) -> bool:
        """Measure one more product that a prefill has; False when all were."""


def add_rms_norm(
    delta: Tensor, residual: Tensor, residual_scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(r), r) with r = residual + residual_scale * delta; all [T, hidden]. `residual` may be reused."""
    residual = torch.add(residual, delta, alpha=residual_scale)
    return rms_norm(residual, weight, eps), residual


def write_rows(rows: Tensor, kv_slots: Tensor, kv_rows: Tensor) -> None:
    """Write rows [T, ...] to the slots [T] of one layer of the cache, kv_rows [slots, ...]; float8 saturates."""
    limit = saturation(kv_rows.dtype)
    if limit is not None:  # index_copy_ does not know the dtype, so bytes are copied
        rounded = rows.clamp(-limit, limit).to(kv_rows.dtype)
        kv_rows.view(torch.uint8).index_copy_(0, kv_slots.long(), rounded.view(torch.uint8))
    else:
        kv_rows.index_copy_(0, kv_slots.long(), rows.to(kv_rows.dtype))


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
    write_rows(qkv[:, spec.heads :].view(-1, 2, spec.kv_heads, spec.head_dim), kv_slots, kv_rows)
    return qkv[:, : spec.heads]


def act_mul(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up of gate_up [T, 2 * inter]; returns [T, inter]."""
    gate, up = gate_up.chunk(2, -1)
    return activation(gate) * up


@dataclass(slots=True)
class DenseMlp:
    """An MLP of two linear maps with the activation between them. `Experts` (moe.py) is its sparse counterpart."""

    gate_up: LinearMap
    """hidden -> 2 * inter: gate, up; or, not gated, hidden -> inter: up."""
    down: LinearMap

    @property
    def takes(self) -> LinearMap:
        """What the normed hidden states go into (see Ops.add_norm)."""
        return self.gate_up

    def inner(self, ops: Ops, x: Hidden, spec: Spec) -> Hidden:
        """Normed hidden states [T, hidden] -> what `down`, or Ops.add_norm with it, makes the result of, [T, inter]."""
        if spec.gated:
            return ops.gated(self.gate_up, x, spec.act, self.down)
        return ACTIVATIONS[spec.act](self.gate_up(x))


def for_any_rows(function: Callable[..., Any], *places: int) -> Callable[..., Any]:
    """torch.compile it, once for all numbers of tokens (and once for one).

    `places`: of arguments, tensors or pairs of them, whose first dimension that number is. A model's own dimensions are
    constants: with symbols for them, too, compiling takes minutes and makes slower kernels.
    """
    compiled = torch.compile(function)

    def call(*arguments: Any) -> Any:
        for place in places:
            given = arguments[place]
            for tensor in given if isinstance(given, tuple) else (given,):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*arguments)

    return call


class TorchOps:
    """Ops in plain torch. With `compiled`, functions are fused by torch.compile (--enable-torch-compile)."""

    def __init__(self, compiled: bool = False) -> None:
        wrap = for_any_rows if compiled else lambda function, *_: function
        self._rotation, self._act_mul = wrap(rotation_table, 0), wrap(act_mul, 0)
        self._rms_norm, self._add_rms_norm = wrap(rms_norm, 0), wrap(add_rms_norm, 0, 1)
        self._qk_norm, self._rope_and_write = wrap(qk_norm_, 0), wrap(rope_and_write, 0, 1, 3)

    def rotation(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See Ops."""
        table: tuple[Tensor, Tensor] = self._rotation(positions, frequencies, rope, dtype)
        return table

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        y: Tensor = self._rms_norm(x, weight, eps)
        return y

    def add_rms_norm(
        self, delta: Tensor, residual: Tensor, residual_scale: float, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See Ops."""
        pair: tuple[Tensor, Tensor] = self._add_rms_norm(delta, residual, residual_scale, weight, eps)
        return pair

    def qk_norm_rope_and_write(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        eps: float,
        table: Any,
        spec: Spec,
        kv_slots: Tensor,
        kv_rows: Tensor,
    ) -> Tensor:
        """See Ops."""
        if qk_norm is not None:
            self._qk_norm(qkv, qk_norm, eps)
        queries: Tensor = self._rope_and_write(qkv, table, spec, kv_slots, kv_rows)
        return queries

    def act_mul(self, gate_up: Tensor, act: str) -> Tensor:
        """See Ops."""
        y: Tensor = self._act_mul(gate_up, ACTIVATIONS[act])
        return y

    def heads(
        self,
        qkv: LinearMap,
        x: Hidden,
        qk_norm: Tensor | None,
        eps: float,
        table: Any,
        spec: Spec,
        kv_slots: Tensor,
        kv_rows: Tensor,
        rotates: bool = False,
    ) -> Tensor:
        """See Ops."""
        heads = qkv(x).view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        return self.qk_norm_rope_and_write(heads, qk_norm, eps, table, spec, kv_slots, kv_rows)

    def add_norm(
        self,
        linear: LinearMap,
        x: Tensor,
        residual: Tensor,
        residual_scale: float,
        weight: Tensor,
        eps: float,
        into: LinearMap | None,
    ) -> tuple[Hidden, Tensor]:
        """See Ops."""
        return self.add_rms_norm(linear(x), residual, residual_scale, weight, eps)

    def gated(self, gate_up: LinearMap, x: Hidden, act: str, into: LinearMap | None = None) -> Hidden:
        """See Ops."""
        return self.act_mul(gate_up(x), act)

    def experts(
        self, x: Tensor, router: Tensor, score_bias: Tensor | None, gate_up: Tensor, down: Tensor, spec: Spec,
        shared: Tensor | None, gate: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """See Ops."""
        return None

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """See Ops."""
        plain = Linear(weight, bias)
        return PackedLinear(plain) if can_pack(weight) else plain

    def quantized(self, parts: list[Part], bias: Tensor | None, dtype: torch.dtype) -> LinearMap:
        """See Ops; dense."""
        return map_of(parts, bias, lambda part, own: None, lambda weight, own: self.linear(weight.to(dtype), own))

    def head(self, weight: Tensor) -> LinearMap:
        """See Ops."""
        if weight.device.type == "cpu" or weight.dtype == torch.float32:
            return self.linear(weight, None)
        return lambda x: torch.mm(x, weight.t(), out_dtype=torch.float32)

    def tune_ahead(self) -> bool:
        """See Ops."""
        return False
