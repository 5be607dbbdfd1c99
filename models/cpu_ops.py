"""Ops on a CPU by our C kernels (cpu_layers.c): one pass where plain torch makes several, and no waiting for threads.

Used by weights.py for models in float32, whatever their weights; a step at batch 1 would else be half such small
operations. All but weights is float32 on the CPU; shapes that the kernels do not take go to TorchOps. Invariant:
results are those of TorchOps up to float32's rounding, and a row's do not depend on the batch that it is in.
"""

from typing import Any

import torch
from torch import Tensor

from .cpu_kernels import CACHED, Rotation, kernels, threads
from .layers import LinearMap, TorchOps
from .part_maps import map_of
from .quantized import DenseLinear, linear_of, takes_dense
from .spec import Rope, Spec
from .unpack import Part


class CpuOps(TorchOps):
    """See the module's text. With `rounds` weights and inputs of dense maps are rounded to bfloat16.

    Raises StartupError where there are no kernels.
    """

    def __init__(self, rounds: bool = False) -> None:
        super().__init__()
        self.rounds = rounds
        self.kernels = kernels()

    def rotation(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See Ops."""
        if rope.interleaved or positions.dim() != 1 or positions.dtype != torch.int64 or not positions.is_contiguous():
            return super().rotation(positions, frequencies, rope, dtype)
        cos, sin = torch.empty(2, len(positions), 1, rope.dim).unbind(0)
        factor = rope.scaling.attention_factor if rope.scaling else 1.0
        self.kernels.rotation_table(
            positions.data_ptr(), len(positions), frequencies.data_ptr(), rope.dim // 2, factor, cos.data_ptr(),
            sin.data_ptr(),
        )  # fmt: skip
        return cos, sin

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        if x.shape[-1] % self.kernels.lanes:
            return super().rms_norm(x, weight, eps)
        x = x.clone()
        self.kernels.rms_norm(x.data_ptr(), None, weight.data_ptr(), *x.shape, 0.0, eps, threads())
        return x

    def add_rms_norm(
        self, delta: Tensor, residual: Tensor, residual_scale: float, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See Ops. Both results take the place of the arguments."""
        if delta.shape[-1] % self.kernels.lanes:
            return super().add_rms_norm(delta, residual, residual_scale, weight, eps)
        self.kernels.rms_norm(
            delta.data_ptr(), residual.data_ptr(), weight.data_ptr(), *delta.shape, residual_scale, eps, threads()
        )
        return delta, residual

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
        if not rotates(spec) or kv_rows.dtype not in CACHED:
            return super().qk_norm_rope_and_write(qkv, qk_norm, eps, table, spec, kv_slots, kv_rows)
        arguments = rotation_of(qkv, qk_norm, table, spec, kv_slots)
        arguments.cache, arguments.kind = kv_rows.data_ptr(), CACHED[kv_rows.dtype]
        self.kernels.rotate_and_write(arguments, threads())
        return qkv[:, : spec.heads]

    def act_mul(self, gate_up: Tensor, act: str) -> Tensor:
        """See Ops."""
        rows, inter = len(gate_up), gate_up.shape[1] // 2
        if act != "silu" or inter % self.kernels.lanes:
            return super().act_mul(gate_up, act)
        y = gate_up.new_empty(rows, inter)
        self.kernels.silu_mul(gate_up.data_ptr(), y.data_ptr(), rows, inter, threads())
        return y

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """See Ops."""
        if takes_dense(weight):
            return DenseLinear(weight, bias, self.rounds)
        return super().linear(weight.float(), bias)

    def quantized(self, parts: list[Part], bias: Tensor | None, dtype: torch.dtype) -> LinearMap:
        """See Ops; by our C kernels where they take the weights."""
        return map_of(parts, bias, linear_of, lambda weight, own: self.linear(weight.to(dtype), own))


def rotates(spec: Spec) -> bool:
    """Whether the kernel rotates such heads: whole vectors, halves apart."""
    lanes, rope = kernels().lanes, spec.rope
    return spec.head_dim % lanes == 0 and (rope is None or (not rope.interleaved and rope.dim // 2 % lanes == 0))


def rotation_of(qkv: Tensor, qk_norm: Tensor | None, table: Any, spec: Spec, kv_slots: Tensor) -> Rotation:
    """The kernel's arguments but for the cache. qkv [T, H + 2K, D], table as CpuOps.rotation's."""
    return Rotation(
        qkv=qkv.data_ptr(), tokens=len(qkv), heads=spec.heads, kv_heads=spec.kv_heads, dim=spec.head_dim,
        qk_norm=None if qk_norm is None else qk_norm.data_ptr(), eps=spec.qk_norm.eps if spec.qk_norm else 0.0,
        rotated=spec.rope.dim if spec.rope else 0,
        cos=None if table is None else table[0].data_ptr(), sin=None if table is None else table[1].data_ptr(),
        slots=kv_slots.data_ptr(),
    )  # fmt: skip
