"""TritonOps: the Ops of a decoder on a GPU, one fused kernel each or in the epilogue of a GEMM; GEMMs from gemm.py.

Used by the decoder through the protocol in layers.py, whose TorchOps is the reference. Where our GEMM multiplies, a
layer of a decode step is five kernels: QKV with rotation and KV write, attention, output and down projection each with
the residual and half of the norm, gate-up with the activation. Elsewhere cuBLAS and a kernel for what follows, but for
rotation and KV write, which attention does where it can (`Unrotated`).
From 65 to 128 rows gate-up and the activation are one kernel (panel_gemm.py), and the norm before it lets it start.
In small decode steps a kernel is launched before its predecessor ends (PDL). Tried and not kept: while a small kernel
runs, asking the L2 for the start of the weight that the next GEMM reads made every step slower: at few rows with PDL,
line by line, and at 128 and 256 without, in bulk (docs/performance.md).
Invariant: no host synchronisation; what is launched depends on shapes, dtypes and the Spec only.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .gemm import GEMMS, PANELS, Choices, Heads, TritonLinear, arrivals, stream_rows
from .kv_cache import saturation
from .layer_kernels import act_mul_kernel, norm_kernel, rope_kernel, rotation_kernel
from .layers import Hidden, LinearMap
from .moe import route
from .moe_gemm import choose_experts, run_experts, takes
from .packed_gemm import Scratch, pack_part
from .packed_tiles import choices_for
from .part_maps import map_of
from .spec import Rope, Spec
from .split_linear import SplitLinear
from .tuned_gemm import TunedGemms
from .unpack import Part

PDL_ROWS: Final = 16
"""Up to here kernels are launched with PDL where a token has PDL_HIDDEN numbers; more rows where it has fewer.

Measured on an H200, a step of Qwen2-7B without attention: 3.96 ms without and 3.86 ms with it at 1 row, 4.20 and 4.22
at 32; at 128 and 256 rows it costs 1 to 3 %. Prefetching beside it: 3.89 (4 MiB) to 4.06 ms (16 MiB) at 1 row.
Where gate-up is a stream it pays with more rows: whole steps 4.86 and 4.74 ms at 32, 5.45 and 5.40 at 64.
"""
PDL_HIDDEN: Final = 3584
FEW_ROWS: Final = 128
"""Up to here a program of the activation has two warps: a step of Qwen2-7B at 128 rows takes 13 to 30 us less."""
MOST_READERS: Final = 2048
"""Up to so many programs a GEMM divides by the root mean squares itself: each of them reads the rows' sums of squares.

Above, which is the head of a large vocabulary, a kernel for the norm is faster: 13 us a step of Qwen2-0.5B at 64 rows.
"""


def has_pdl(device: torch.device) -> bool:
    """Whether the device overlaps kernels so; Triton's interpreter does not."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8 (and Triton's interpreter, slowly)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_rows(spec: Spec, dense: bool = True, wide: int = 0) -> int:
    """Up to how many rows kernels are launched with PDL; `dense`: weights are not quantized; `wide`: else, up to how
    many gate-up is a Wide."""
    rows = PDL_ROWS * PDL_HIDDEN // spec.hidden
    return max(rows, stream_rows(2 * spec.inter, spec.hidden) if dense else wide)


@dataclass(slots=True)
class Unrotated:
    """Heads as the QKV product leaves them, for an attention that rotates them and writes keys and values itself."""

    heads: Tensor
    """[T, H + 2K, D]"""
    table: Tensor
    """See TritonOps.rotation."""
    kv_slots: Tensor
    """[T]"""

    def __len__(self) -> int:
        return len(self.heads)


class TritonOps:
    """See Ops. `pdl_rows`: see above; `gemms`, `fuse` (work in the GEMMs' epilogues) and `defer` are for measurements.
    `hidden`: dtype of hidden states.

    `defer`: dtypes in which a norm may be cut in two. The half-normed numbers have the range of the residual times the
    norm's weight, which float16 need not hold.
    """

    def __init__(
        self,
        device: torch.device,
        pdl_rows: int = PDL_ROWS,
        gemms: dict[tuple[int, int], Choices] = GEMMS,
        fuse: bool = True,
        defer: tuple[torch.dtype, ...] = (torch.bfloat16,),
        tuned: TunedGemms | None = None,
        hidden: torch.dtype = torch.bfloat16,
    ) -> None:
        self.hidden = hidden
        self.pdl_rows = pdl_rows if has_pdl(device) else 0
        self.gemms = gemms
        self.fuse = fuse
        self.defer = defer
        self.arrived = arrivals(device)
        self.tuned = tuned
        self.scratch = Scratch(device)

    # ------------------------------------------------------------------ the kernels between GEMMs

    def rotation(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
        """See Ops; float32 [T, 2, dim / 2]: cosines and sines, whatever `dtype`."""
        half = len(frequencies)
        tokens, axes = positions.shape[-1], positions.dim() == 2
        first, second, _ = rope.sections if axes and rope.sections is not None else (0, 0, 0)
        table = torch.empty(tokens, 2, half, dtype=torch.float32, device=positions.device)
        count, block = tokens * half, 256
        factor = rope.scaling.attention_factor if rope.scaling else 1.0
        if count:
            rotation_kernel[(triton.cdiv(count, block),)](
                positions, frequencies, table, count, half, factor, first, first + second,
                BLOCK=block, AXES=axes, num_warps=4,
            )  # fmt: skip
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
        self, delta: Tensor | None, residual: Tensor, scale: float, weight: Tensor, eps: float, parts: int = 1,
        pdl: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`add_rms_norm`, or `rms_norm` without delta; with several parts that is float32 [parts, T, hidden].

        `pdl`: however many rows there are.
        """
        rows, width = residual.shape
        out = torch.empty_like(residual)
        new_residual = residual if delta is None else torch.empty_like(residual)
        warps = 4 if width <= 2048 else 8 if width <= 8192 else 16
        if rows:
            norm_kernel[(rows,)](
                delta, residual, weight, out, new_residual, rows * width, width, scale, eps, ADD=delta is not None,
                PARTS=parts, BLOCK=max(32 * warps, triton.next_power_of_2(width)), **self._launch(rows, warps, pdl),
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
        if rows:
            rope_kernel[(rows * blocks,)](
                qkv, qk_norm, table, kv_slots, kv_rows, qkv.stride(0), kv_rows.stride(0), heads, kv_heads, eps,
                D=head_dim, DIM=dim, HALF=max(8, triton.next_power_of_2(dim // 2)),
                REST=max(8, triton.next_power_of_2(head_dim - dim)) if dim < head_dim else 0,
                HEADS=each, BLOCKS=blocks, SKIP_QUERIES=skip_queries,
                INTERLEAVED=bool(rope and rope.interleaved), NORM=qk_norm is not None, ROTATE=rope is not None,
                KV_LIMIT=int(saturation(kv_rows.dtype) or 0),
                **self._launch(rows, each // 4),
            )  # fmt: skip
        return qkv[:, :heads]

    def act_mul(self, gate_up: Tensor, act: str) -> Tensor:
        """See Ops."""
        gate_up = gate_up.contiguous()
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
        block, warps = 1024, 2 if rows <= FEW_ROWS else 4
        if rows:
            act_mul_kernel[(rows * triton.cdiv(width, block),)](
                gate_up, out, width, ACT=act, BLOCK=block, **self._launch(rows, warps)
            )
        return out

    def tune_ahead(self) -> bool:
        """See Ops."""
        return self.tuned is not None and self.tuned.tune_ahead()

    def _launch(self, rows: int, warps: int, pdl: bool = False) -> dict[str, Any]:
        """Return a kernel's options in a forward over `rows` tokens; `pdl`: see `_norm`."""
        pdl = rows <= self.pdl_rows or (pdl and self.pdl_rows > 0)
        return {"PDL": pdl, "num_warps": warps, **({"launch_pdl": True} if pdl else {})}

    # ------------------------------------------------------------------ GEMMs, and what follows each

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
    ) -> Tensor | Unrotated:
        """See Ops."""
        ours = self._fusing(qkv, len(x))
        rope = spec.rope if table is not None else None
        if ours is not None and (rope is None or rope.dim == spec.head_dim):
            interleaved = bool(rope and rope.interleaved)
            epilogue = Heads(
                spec.heads, spec.kv_heads, spec.head_dim, interleaved, qk_norm, eps, table, kv_slots, kv_rows
            )
            tile = ours.tile(len(x))
            if tile is not None and epilogue.fits(tile, ours.weight):
                return ours.heads(x, epilogue)
        heads = qkv(x).view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        if rotates and rope is not None and qk_norm is None and not rope.interleaved and rope.dim == spec.head_dim:
            return Unrotated(heads, table, kv_slots)
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
        ours, rows = self._fusing(linear, len(x)), len(x)
        wanted = into.float8_rows(rows) if self.fuse and isinstance(into, TritonLinear) else None
        if wanted is not None:
            return wanted.normed(linear(x), residual, residual_scale, weight, eps, rows <= self.pdl_rows)
        if ours is not None and x.dtype in self.defer and self._divides(into, rows):
            return ours.add(x, residual, residual_scale, weight, eps)
        parts = linear.parts(rows) if self.fuse and isinstance(linear, TritonLinear) else 1
        if parts > 1:
            assert isinstance(linear, TritonLinear)
            delta = linear.in_parts(x, parts)
        else:
            delta = linear(x).contiguous()
        pdl = self._by_panels(into, rows) is not None  # which then loads its weight meanwhile
        return self._norm(delta, residual.contiguous(), residual_scale, weight, eps, parts, pdl)

    def gated(self, gate_up: LinearMap, x: Hidden, act: str, into: LinearMap | None = None) -> Hidden:
        """See Ops."""
        ours = self._fusing(gate_up, len(x)) or self._by_panels(gate_up, len(x))
        if ours is not None:
            return ours.gated(x, act)
        wanted = into.float8_rows(len(x)) if self.fuse and isinstance(into, TritonLinear) else None
        return self.act_mul(gate_up(x), act) if wanted is None else wanted.quantised(gate_up(x), act)

    def _divides(self, into: LinearMap | None, rows: int) -> bool:
        """Whether the next GEMM is ours, and takes what a norm has left to do."""
        following = self._fusing(into, rows)
        return following is not None and following.programs(rows) <= MOST_READERS

    def _fusing(self, linear: LinearMap | None, rows: int) -> TritonLinear | None:
        """`linear`, if it is a GEMM of ours at this many rows."""
        if self.fuse and isinstance(linear, TritonLinear) and linear.tile(rows) is not None:
            return linear
        return None

    def _by_panels(self, linear: LinearMap | None, rows: int) -> TritonLinear | None:
        """`linear`, if its `gated` multiplies this many rows by panels."""
        if self.fuse and isinstance(linear, TritonLinear) and linear.panel(rows) is not None:
            return linear
        return None

    def experts(
        self, x: Tensor, router: Tensor, score_bias: Tensor | None, gate_up: Tensor, down: Tensor, spec: Spec,
        shared: Tensor | None, gate: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """See Ops."""
        assert spec.moe is not None
        if not takes(len(x), spec.moe, x.dtype):
            return None
        x = x.contiguous()
        if spec.moe.groups == 1:
            weights, ids = choose_experts(x, router, score_bias, spec.moe)
        else:
            weights, ids = route(F.linear(x.float(), router), score_bias, spec.moe)
        return run_experts(x, weights, ids, gate_up, down, spec.act, spec.moe, shared, gate)

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """See Ops."""
        if self._splits(weight):
            return SplitLinear(weight, bias)
        panels = PANELS if self.gemms else {}
        return TritonLinear(
            weight, bias, self.arrived, self.pdl_rows, gemms=self.gemms, tuned=self.tuned, panels=panels
        )

    def _splits(self, weight: Tensor) -> bool:
        """Whether it has 16 bits beneath hidden states in float32."""
        return self.hidden == torch.float32 and weight.dtype == torch.bfloat16

    def quantized(self, parts: list[Part], bias: Tensor | None, dtype: torch.dtype) -> LinearMap:
        """See Ops."""

        def packed(part: Part, own: Tensor | None) -> LinearMap | None:
            weight = pack_part(part, dtype, self.scratch, has_float8(self.arrived.device))
            if weight is None:
                return None
            return TritonLinear(weight, own, self.arrived, self.pdl_rows, choices=choices_for(weight))

        return map_of(parts, bias, packed, lambda weight, own: self.linear(weight.to(dtype), own))

    def head(self, weight: Tensor) -> LinearMap:
        """Return the map x -> x @ weight.T with float32 results, of weight [vocab, hidden]."""
        if self._splits(weight):
            return SplitLinear(weight, None)
        return TritonLinear(weight, None, self.arrived, self.pdl_rows, torch.float32, self.gemms, self.tuned)
