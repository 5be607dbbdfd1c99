"""Quantized weights on a GPU: words for our GEMM of few rows; many rows by whatever is fast there.

Used by gemm.py, where a `Packed` stands in the place of a dense weight, and triton_ops.py, which packs. Few rows: the
weight stays quantized up to the tensor cores, inputs have 16 bits (packed_kernels.py). Many rows: whole numbers are
unpacked into a buffer that all maps share, and multiplied by cuBLAS; float8 is multiplied as it is, with inputs
quantized to float8, by the library's GEMM for scales of rows, or by ours for blocks of 128.
Invariant: a call does no host synchronisation and launches what depends on shapes only, so it can be captured.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .float8_kernels import blockwise_kernel, float8_kernel, norm_quantise_kernel, quantise_rows_kernel
from .packed_kernels import packed_kernel, unpack_kernel
from .unpack import FLOAT8, Part

Kind = Literal["int4", "int8", "fp8"]
CHUNK: Final = 32
"""Words that lie together, as in packed_kernels.py, if nothing else is said; of float8 always."""
TOGETHER: Final = 16
"""Outputs of whole numbers whose chunks lie together; of float8 each lies by itself, as libraries want it."""
FEW_FLOAT8_ROWS: Final = 16
"""Inputs of so few rows have 16 bits: to quantize them is another kernel, and takes longer than to widen the weight."""
PACKED_ONLY: Final = ("KIND", "CHUNK", "ROWS", "BF16", "ASM", "AHEAD", "SLICES")
"""Constants of packed_kernel that float8_kernel has not."""
TINY: Final = 1e-24
"""Scales below are nothing, in a model whose numbers have 16 bits."""
HALF_ONE: Final = 0x3C00
"""1.0 in float16."""
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

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes of a product with them."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        return self.values.device


@dataclass(slots=True)
class Packed:
    """A quantized weight [outputs, inputs], as packed_kernels.py reads it."""

    kind: Kind
    words: Tensor
    """int16 [outputs, width]"""
    meta: Tensor
    """[groups, outputs]: scales float32; int4: int32, a float16 scale and above it a zero point's bits (meta_of)."""
    inputs: int
    group: int
    """Inputs of a group; 0: there is one."""
    dtype: torch.dtype
    """Of inputs: bfloat16 or float16."""
    quantises: bool
    """Many rows are quantized to float8."""
    input_scale: Tensor | None
    scratch: Scratch
    chunk: int = CHUNK
    """Words of a chunk."""
    together: int = 1
    """Outputs whose chunks lie together: words are [outputs / together, chunks, together, chunk]."""

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
        return self.chunk * (4 if self.kind == "int4" else 2)

    def fits(self, depth: int, slices: int = 1) -> bool:
        """Whether the kernel can take steps of `depth` words: they are in one group, or one chunk; in slices, even."""
        step = depth // self.chunk * self.unit
        whole = self.chunk == CHUNK and self.even(depth)
        return depth % self.chunk == 0 and (
            whole if slices > 1 else not self.group or self.group % step == 0 or depth == self.chunk
        )

    def even(self, depth: int) -> bool:
        """Whether steps of `depth` words are all of the weight, and words all of the inputs."""
        return self.words.shape[1] % depth == 0 and self.inputs % self.unit == 0

    def constants(self, depth: int) -> dict[str, Any]:
        """What packed_kernel must know of the weight, in steps of `depth` words."""
        return {
            "KIND": self.kind, "GROUP": self.group, "CHUNK": self.chunk, "ROWS": self.together,
            "BF16": self.dtype == torch.bfloat16,
            "ASM": self.words.device.type == "cuda", "BK": depth, "EVEN": self.even(depth),
        }  # fmt: skip

    def launch(self, grid: tuple[int, int], before: tuple[Any, ...], after: tuple[Any, ...], **options: Any) -> None:
        """Run packed_kernel. `before`, `after`: its arguments around the weight's own; see gemm.linear."""
        x, bias, out, parts, arrived, rows, n, early = before
        if isinstance(x, Float8Rows):
            width, depth = x.shape[1], 2 * options["BK"]
            own = {name: value for name, value in options.items() if name not in PACKED_ONLY}
            own |= {"GROUP": self.group, "BK": depth, "EVEN": width % depth == 0}
            float8_kernel[grid](
                x.values, x.scales, self.words.view(FLOAT8), self.meta, bias, out, parts, arrived, rows, n, width,
                early, *after, **own,
            )  # fmt: skip
            return
        packed_kernel[grid](
            x, self.words, self.meta, bias, out, parts, arrived, rows, n, self.inputs, self.words.shape[1], early,
            *after, **options,
        )  # fmt: skip

    # ------------------------------------------------------------------ many rows

    def takes_float8(self, rows: int) -> bool:
        """Whether it is multiplied with float8 inputs at this many rows."""
        return self.quantises and rows > FEW_FLOAT8_ROWS

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
        constants = self.constants(self.chunk)
        unpack_kernel[(triton.cdiv(outputs, 64), width // self.chunk)](
            self.words, self.meta, out, outputs, self.inputs, width,
            **{name: constants[name] for name in ("KIND", "GROUP", "CHUNK", "ROWS", "BF16")}, BN=64, num_warps=4,
        )  # fmt: skip
        return out

    def quantised(self, x: Tensor, act: str = "", pdl: bool = False) -> Float8Rows:
        """Inputs x [T, inputs] as float8; with `act`, act(first half) * second half of x [T, 2 * inputs]."""
        return quantise_rows(x.contiguous(), 2 * self.words.shape[1], self.group, self.input_scale, act, pdl)

    def normed(
        self, delta: Tensor, residual: Tensor, scale: float, gain: Tensor, eps: float, pdl: bool
    ) -> tuple[Float8Rows, Tensor]:
        """(the norm of r with weight `gain` as float8, r) with r = residual + scale * delta; all [T, inputs]."""
        rows, inputs = residual.shape
        delta, residual, width = delta.contiguous(), residual.contiguous(), 2 * self.words.shape[1]
        made, new = float8_rows(rows, width, self.group, residual.device), torch.empty_like(residual)
        block = max(64, triton.next_power_of_2(width))
        if rows:
            norm_quantise_kernel[(rows,)](
                delta, residual, gain, new, made.values, made.scales, self.input_scale, inputs, width, scale, eps,
                GROUP=self.group, BLOCK=block, STATIC=self.input_scale is not None, PDL=pdl,
                num_warps=max(1, min(16, block // 512)), **({"launch_pdl": True} if pdl else {}),
            )  # fmt: skip
        return made, new

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
        inside = bias if bias is not None and bias.dtype == torch.bfloat16 else None  # rounded once
        y = torch._scaled_mm(
            values, weight.t(), scale_a=scales[:, None], scale_b=self.meta, bias=inside, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
        if bias is not None and inside is None:
            y = y + bias
        return y.to(dtype)


def float8_rows(rows: int, width: int, group: int, device: torch.device) -> Float8Rows:
    """Room for `rows` rows of `width` values."""
    values = torch.empty(rows, width, dtype=FLOAT8, device=device)
    scales = torch.empty((rows, width // group) if group else (rows,), dtype=torch.float32, device=device)
    return Float8Rows(values, scales)


def quantise_rows(
    x: Tensor, width: int, group: int, static: Tensor | None, act: str = "", pdl: bool = False
) -> Float8Rows:
    """x [T, k], contiguous, as float8 [T, width]; scales are [T], or with `group` [T, width / group].

    static: the scale that is used, float32 []. With `act` x is [T, 2 * k]; see Packed.quantised.
    """
    rows, inputs = len(x), x.shape[1] // (2 if act else 1)
    made = float8_rows(rows, width, group, x.device)
    block = 2048 if group else max(64, triton.next_power_of_2(width))
    quantise_rows_kernel[(rows, triton.cdiv(width, block))](
        x, made.values, made.scales, static, inputs, width, GROUP=group, BLOCK=block,
        STATIC=static is not None, ACT=act, PDL=pdl, num_warps=max(1, min(16, block // 512)),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return made


# ------------------------------------------------------------------ packing


def pack_part(
    part: Part, dtype: torch.dtype, scratch: Scratch, quantises: bool, chunk: int = CHUNK, together: int = TOGETHER
) -> Packed | None:
    """A Part whose inputs are in order as a Packed, for inputs of `dtype`; None if the kernels do not take it.

    quantises: many rows of inputs for float8 weights are quantized, too.
    """
    outputs, inputs = part.shape
    kind: Kind = "fp8" if part.zeros is None else "int4" if part.bits == 4 else "int8"
    group = 0 if part.group >= inputs else part.group
    chunk = chunk if kind != "fp8" and inputs % (chunk * 16 // part.bits) == 0 and not group % chunk else CHUNK
    if dtype not in (torch.bfloat16, torch.float16) or outputs % 16 or not _takes(kind, group, part):
        return None
    quantises = quantises and kind == "fp8" and dtype == torch.bfloat16 and group in (0, FLOAT8_BLOCK)
    if not quantises:
        scratch.reserve(outputs * inputs)
    if group:
        part = without_dead_groups(part)
    words = words_of(part.codes, part.bits, group, chunk)
    together = 1 if kind == "fp8" else together
    if together > 1:
        words = words.view(-1, together, words.shape[1] // chunk, chunk).transpose(1, 2).contiguous().view(words.shape)
    return Packed(
        kind, words, meta_of(part, kind, group, dtype, chunk), inputs, group, dtype,
        quantises, part.input_scale, scratch, chunk, together,
    )  # fmt: skip


def _takes(kind: Kind, group: int, part: Part) -> bool:
    unit = CHUNK * 16 // part.bits
    if group and group % unit and unit % group:
        return False
    if group and group < CHUNK:
        return False
    scales = part.scales.float()
    if kind == "int4":
        rounded = scales.half().float()
        return bool(((rounded - scales).abs() <= 2**-10 * scales.abs()).all())
    return kind == "fp8" or (part.zeros is not None and bool((part.zeros == 128).all()))


def without_dead_groups(part: Part) -> Part:
    """The same weight without scales of nothing, which the kernel would divide by."""
    dead = part.scales.float().abs() < TINY
    if not dead.any():
        return part
    index = torch.arange(part.codes.shape[1], device=dead.device) // part.group
    of_inputs = dead.index_select(1, index)
    codes = part.codes.view(torch.uint8)
    nothing = codes.new_zeros(()) if part.zeros is None else part.zeros.index_select(1, index)
    codes = torch.where(of_inputs, nothing, codes).view(part.codes.dtype)
    return replace(part, codes=codes, scales=part.scales.masked_fill(dead, 1.0))


def words_of(codes: Tensor, bits: int, group: int, chunk: int = CHUNK) -> Tensor:
    """Codes uint8 or float8 [outputs, inputs] as words int16 [outputs, width]; see packed_kernels.py."""
    each = 16 // bits
    unit = max(chunk * each, group if codes.dtype == FLOAT8 else 0)  # whole groups for blockwise_kernel
    codes = codes.contiguous().view(torch.uint8)
    codes = F.pad(codes, (0, -codes.shape[1] % unit))
    values = codes.view(len(codes), -1, each, chunk)
    if bits == 4:
        values = torch.stack((values[:, :, 0] | values[:, :, 1] << 4, values[:, :, 2] | values[:, :, 3] << 4), 2)
    return values.transpose(2, 3).contiguous().view(torch.int16).view(len(codes), -1)


def meta_of(part: Part, kind: Kind, group: int, dtype: torch.dtype, chunk: int = CHUNK) -> Tensor:
    """What the kernels read beside the words, [groups, outputs]; scales of 1 for groups of the last chunk's padding.

    A zero point of 4 bits is what the kernels subtract from 2 ** 7 + value, in float16 from 2 ** 10 + value.
    """
    meta, one = part.scales.float(), 1.0
    if kind == "int4":
        assert part.zeros is not None
        scales = part.scales.half().contiguous().view(torch.int16).int() & 0xFFFF
        zeros = (part.zeros.float() + (128 if dtype == torch.bfloat16 else 1024)).to(dtype).view(torch.int16)
        meta, one = scales | zeros.int() << 16, HALF_ONE
    unit = chunk * (4 if kind == "int4" else 2)
    each = unit // group if group and group < unit else 1
    return F.pad(meta, (0, -meta.shape[1] % each), value=one).t().contiguous()
