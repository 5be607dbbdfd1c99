"""TritonOps: the Ops of a decoder on a GPU, one fused kernel each, GEMMs from gemm.py.

Used by the decoder through the protocol in layers.py, whose TorchOps is the reference. In the smallest decode steps a
kernel is launched before its predecessor ends (PDL). Tried and not kept: while such a small kernel runs, asking the L2
for the start of the weight that the next GEMM reads made every step slower, whatever the amount (perf/layer.py).
Invariant: no host synchronisation; what is launched depends on shapes, dtypes and the Spec only.
"""

from typing import Any, Final

import torch
import triton
from torch import Tensor

from .gemm import GEMMS, Choices, TritonLinear, arrivals
from .layer_kernels import act_mul_kernel, norm_kernel, rope_kernel, rotation_kernel
from .layers import LinearMap
from .spec import Rope, Spec

PDL_ROWS: Final = 16
"""Up to here kernels are launched with PDL, from sm_90 on.

Measured on an H200, a step of Qwen2-7B without attention: 3.96 ms without and 3.86 ms with it at 1 row, 4.20 and 4.22
at 32; at 128 and 256 rows it costs 1 to 3 %. Prefetching beside it: 3.89 (4 MiB) to 4.06 ms (16 MiB) at 1 row.
"""


class TritonOps:
    """See Ops. `pdl_rows` and `gemms` are for measurements; kernels in Triton's interpreter have no PDL."""

    def __init__(
        self,
        device: torch.device,
        pdl_rows: int = PDL_ROWS,
        gemms: dict[tuple[int, int], Choices] = GEMMS,
    ) -> None:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.pdl_rows = pdl_rows if hopper else 0
        self.gemms = gemms
        self.arrived = arrivals(device)

    # ------------------------------------------------------------------ the kernels between GEMMs

    def rotation(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
        """See Ops; float32 [T, 2, dim / 2]: cosines and sines, whatever `dtype`."""
        half = len(frequencies)
        table = torch.empty(len(positions), 2, half, dtype=torch.float32, device=positions.device)
        count, block = len(positions) * half, 256
        factor = rope.scaling.attention_factor if rope.scaling else 1.0
        if count:
            rotation_kernel[(triton.cdiv(count, block),)](
                positions, frequencies, table, count, half, factor, BLOCK=block, num_warps=4
            )
        return table

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return self._norm(None, x.contiguous(), 1.0, weight, eps)[0]

    def add_rms_norm(
        self, delta: Tensor, residual: Tensor, residual_scale: float, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See Ops."""
        return self._norm(delta.contiguous(), residual.contiguous(), residual_scale, weight, eps)

    def _norm(
        self, delta: Tensor | None, residual: Tensor, scale: float, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, width = residual.shape
        out = torch.empty_like(residual)
        new_residual = residual if delta is None else torch.empty_like(residual)
        warps = 4 if width <= 2048 else 8 if width <= 8192 else 16
        if rows:
            norm_kernel[(rows,)](
                delta, residual, weight, out, new_residual, width, scale, eps, ADD=delta is not None,
                BLOCK=max(32 * warps, triton.next_power_of_2(width)), **self._launch(rows, warps),
            )  # fmt: skip
        return out, new_residual

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
        """See Ops; the queries are a view of qkv, which they are rotated in."""
        rows, (heads, kv_heads, head_dim) = len(qkv), (spec.heads, spec.kv_heads, spec.head_dim)
        rope = spec.rope if table is not None else None
        dim = rope.dim if rope else head_dim
        skip_queries = rope is None and qk_norm is None
        each = 4 if rows <= 256 else 16
        blocks = triton.cdiv(2 * kv_heads + (0 if skip_queries else heads), each)
        saturates = kv_rows.dtype == torch.float8_e4m3fn
        if rows:
            rope_kernel[(rows * blocks,)](
                qkv, qk_norm, table, kv_slots, kv_rows, qkv.stride(0), kv_rows.stride(0), heads, kv_heads, eps,
                D=head_dim, DIM=dim, HALF=max(8, triton.next_power_of_2(dim // 2)),
                REST=max(8, triton.next_power_of_2(head_dim - dim)) if dim < head_dim else 0,
                HEADS=each, BLOCKS=blocks, SKIP_QUERIES=skip_queries,
                INTERLEAVED=bool(rope and rope.interleaved), NORM=qk_norm is not None, ROTATE=rope is not None,
                KV_LIMIT=int(torch.finfo(kv_rows.dtype).max) if saturates else 0,
                **self._launch(rows, each // 4),
            )  # fmt: skip
        return qkv[:, :heads]

    def act_mul(self, gate_up: Tensor, act: str) -> Tensor:
        """See Ops."""
        gate_up = gate_up.contiguous()
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
        block, warps = 1024, 4
        if rows:
            act_mul_kernel[(rows * triton.cdiv(width, block),)](
                gate_up, out, width, ACT=act, BLOCK=block, **self._launch(rows, warps)
            )
        return out

    def _launch(self, rows: int, warps: int) -> dict[str, Any]:
        """Return a kernel's options in a forward over `rows` tokens."""
        pdl = rows <= self.pdl_rows
        return {"PDL": pdl, "num_warps": warps, **({"launch_pdl": True} if pdl else {})}

    # ------------------------------------------------------------------ GEMMs

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """See Ops."""
        return TritonLinear(weight, bias, self.arrived, self.pdl_rows, gemms=self.gemms)

    def head(self, weight: Tensor) -> LinearMap:
        """Return the map x -> x @ weight.T with float32 results, of weight [vocab, hidden]."""
        return TritonLinear(weight, None, self.arrived, self.pdl_rows, torch.float32, self.gemms)
