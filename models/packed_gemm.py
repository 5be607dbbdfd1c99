"""Quantized weights on a GPU: words for our GEMM of few rows; many rows by whatever is fast there.

Used by gemm.py, where a `Packed` stands in the place of a dense weight, and triton_ops.py, which packs. Few rows: the
weight stays quantized up to the tensor cores, inputs have 16 bits (packed_kernels.py). Many rows: whole numbers are
unpacked into a buffer that all maps share, and multiplied by cuBLAS; float8 is multiplied as it is, with inputs
quantized to float8, by the library's GEMM for scales of rows, or by ours for blocks of 128.
Invariant: a call does no host synchronisation and launches what depends on shapes only, so it can be captured.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .packed_kernels import blockwise_kernel, packed_kernel, quantise_rows_kernel, unpack_kernel
from .unpack import FLOAT8, Part

Kind = Literal["int4", "int8", "fp8"]
CHUNK: Final = 32
"""Words that lie together, as in packed_kernels.py."""
FLOAT8_BLOCK: Final = 128
"""Inputs of a group for which float8 inputs have scales of their own."""


class Scratch:
    """The buffer into which weights are unpacked, one after another: as large as the largest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.bfloat16, device=device)

    def reserve(self, count: int) -> None:
        """Have room for so many 16-bit values. Not while anything runs."""
        if count > len(self.buffer):
            self.buffer = torch.empty(count, dtype=torch.bfloat16, device=self.device)

    def view(self, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """The buffer as a weight."""
        return self.buffer[: outputs * inputs].view(dtype).view(outputs, inputs)


@dataclass(slots=True)
class Float8Rows:
    """Inputs of a `Packed` that are quantized already."""

    values: Tensor
    """float8 [T, width], in the order of the weight's bytes."""
    scales: Tensor
    """float32 [T], or for each group [T, groups]."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(slots=True)
class Packed:
    """A quantized weight [outputs, inputs], as packed_kernels.py reads it."""

    kind: Kind
    words: Tensor
    """int16 [outputs, width]"""
    meta: Tensor
    """[groups, outputs]: scales float32; int4: int32, a float16 scale and above it the zero point."""
    inputs: int
    group: int
    """Inputs of a group; 0: there is one."""
    dtype: torch.dtype
    """Of inputs: bfloat16 or float16."""
    quantises: bool
    """Many rows are quantized to float8."""
    input_scale: Tensor | None
    scratch: Scratch

    def __len__(self) -> int:
        return len(self.words)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.words), self.inputs

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.meta.nbytes

    @property
    def unit(self) -> int:
        """Inputs of a chunk of words."""
        return CHUNK * (4 if self.kind == "int4" else 2)

    def fits(self, depth: int) -> bool:
        """Whether the kernel can take steps of `depth` words: they are in one group, or one chunk."""
        step = depth // CHUNK * self.unit
        return depth % CHUNK == 0 and (not self.group or self.group % step == 0 or depth == CHUNK)

    def constants(self, depth: int) -> dict[str, Any]:
        """What packed_kernel must know of the weight, in steps of `depth` words."""
        width = self.words.shape[1]
        return {
            "KIND": self.kind, "GROUP": self.group, "BF16": self.dtype == torch.bfloat16,
            "ASM": self.words.device.type == "cuda", "BK": depth,
            "EVEN": width % depth == 0 and self.inputs % self.unit == 0,
        }  # fmt: skip

    def launch(self, grid: tuple[int, int], before: tuple[Any, ...], after: tuple[Any, ...], **options: Any) -> None:
        """Run packed_kernel. `before`, `after`: its arguments around the weight's own; see gemm.linear."""
        x, bias, out, parts, arrived, rows, n, early = before
        packed_kernel[grid](
            x, self.words, self.meta, bias, out, parts, arrived, rows, n, self.inputs, self.words.shape[1], early,
            *after, **options,
        )  # fmt: skip

    # ------------------------------------------------------------------ many rows

    def multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [rows, inputs] @ weight.T + bias in `dtype`."""
        if not len(x):
            return x.new_empty(0, len(self), dtype=dtype)
        if self.quantises:
            return self.multiply_float8(self.quantised(x), bias, dtype)
        weight = self.unpacked()
        if dtype == x.dtype:
            return F.linear(x, weight, bias)
        y = torch.mm(x, weight.t(), out_dtype=dtype)
        return y if bias is None else y + bias

    def unpacked(self) -> Tensor:
        """The weight [outputs, inputs] of 16 bits, in the buffer that all share."""
        outputs, width = self.words.shape
        out = self.scratch.view(outputs, self.inputs, self.dtype)
        constants = self.constants(CHUNK)
        unpack_kernel[(triton.cdiv(outputs, 64), width // CHUNK)](
            self.words, self.meta, out, outputs, self.inputs, width,
            **{name: constants[name] for name in ("KIND", "GROUP", "BF16")}, BN=64, num_warps=4,
        )  # fmt: skip
        return out

    def quantised(self, x: Tensor, act: str = "") -> Float8Rows:
        """Inputs x [T, inputs] as float8; with `act`, act(first half) * second half of x [T, 2 * inputs]."""
        return quantise_rows(x.contiguous(), 2 * self.words.shape[1], self.group, self.input_scale, act)

    def multiply_float8(self, x: Float8Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x @ weight.T + bias in `dtype`, where `quantises`."""
        values, scales, weight = x.values, x.scales, self.words.view(FLOAT8)
        rows, outputs = len(x), len(self)
        if self.group:
            out = torch.empty(rows, outputs, dtype=dtype, device=values.device)
            block = 64 if rows <= 64 else 128
            blockwise_kernel[(triton.cdiv(rows, block) * triton.cdiv(outputs, 128),)](
                values, weight, scales, self.meta, bias, out, rows, outputs, weight.shape[1],
                BM=block, BN=128, BIAS=bias is not None, STAGES=4, num_warps=8 if block == 128 else 4, num_stages=4,
            )  # fmt: skip
            return out
        y = torch._scaled_mm(
            values, weight.t(), scale_a=scales[:, None], scale_b=self.meta, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
        if bias is not None:
            y = y + bias
        return y.to(dtype)


def quantise_rows(x: Tensor, width: int, group: int, static: Tensor | None, act: str = "") -> Float8Rows:
    """x [T, k], contiguous, as float8 [T, width]; scales are [T], or with `group` [T, width / group].

    static: the scale that is used, float32 []. With `act` x is [T, 2 * k]; see Packed.quantised.
    """
    rows, inputs = len(x), x.shape[1] // (2 if act else 1)
    values = torch.empty(rows, width, dtype=FLOAT8, device=x.device)
    scales = torch.empty((rows, width // group) if group else (rows,), dtype=torch.float32, device=x.device)
    block = 2048 if group else max(64, triton.next_power_of_2(width))
    quantise_rows_kernel[(rows, triton.cdiv(width, block))](
        x, values, scales, static, inputs, width, GROUP=group, BLOCK=block,
        STATIC=static is not None, ACT=act, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return Float8Rows(values, scales)


# ------------------------------------------------------------------ packing


def pack_part(part: Part, dtype: torch.dtype, scratch: Scratch, quantises: bool) -> Packed | None:
    """A Part whose inputs are in order as a Packed, for inputs of `dtype`; None if the kernels do not take it.

    quantises: many rows of inputs for float8 weights are quantized, too.
    """
    outputs, inputs = part.shape
    kind: Kind = "fp8" if part.zeros is None else "int4" if part.bits == 4 else "int8"
    group = 0 if part.group >= inputs else part.group
    if dtype not in (torch.bfloat16, torch.float16) or outputs % 16 or not _takes(kind, group, part):
        return None
    quantises = quantises and kind == "fp8" and dtype == torch.bfloat16 and group in (0, FLOAT8_BLOCK)
    if not quantises:
        scratch.reserve(outputs * inputs)
    return Packed(
        kind, words_of(part.codes, part.bits, group), meta_of(part, kind, group), inputs, group, dtype, quantises,
        part.input_scale, scratch,
    )  # fmt: skip


def _takes(kind: Kind, group: int, part: Part) -> bool:
    unit = CHUNK * (4 if kind == "int4" else 2)
    if group and group % unit and unit % group:
        return False
    if group and group < CHUNK:
        return False
    scales = part.scales.float()
    if kind == "int4":
        rounded = scales.half().float()
        return bool(((rounded - scales).abs() <= 2**-10 * scales.abs()).all())
    return kind == "fp8" or (part.zeros is not None and bool((part.zeros == 128).all()))


def words_of(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes uint8 or float8 [outputs, inputs] as words int16 [outputs, width]; see packed_kernels.py."""
    each = 16 // bits
    unit = max(CHUNK * each, group if codes.dtype == FLOAT8 else 0)  # whole groups for blockwise_kernel
    codes = codes.contiguous().view(torch.uint8)
    codes = F.pad(codes, (0, -codes.shape[1] % unit))
    values = codes.view(len(codes), -1, each, CHUNK)
    if bits == 4:
        values = torch.stack((values[:, :, 0] | values[:, :, 1] << 4, values[:, :, 2] | values[:, :, 3] << 4), 2)
    return values.transpose(2, 3).contiguous().view(torch.int16).view(len(codes), -1)


def meta_of(part: Part, kind: Kind, group: int) -> Tensor:
    """What the kernels read beside the words, [groups, outputs]; zeros for groups of the last chunk's padding."""
    if kind != "int4":
        meta = part.scales.float()
    else:
        assert part.zeros is not None
        scales = part.scales.half().contiguous().view(torch.int16).int() & 0xFFFF
        meta = scales | part.zeros.int() << 16
    unit = CHUNK * (4 if kind == "int4" else 2)
    each = unit // group if group and group < unit else 1
    return F.pad(meta, (0, -meta.shape[1] % each)).t().contiguous()
