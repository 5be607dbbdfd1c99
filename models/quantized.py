"""Linear maps on a CPU whose weights stay quantized: the blocks of a GGUF file, or those made of other checkpoints.

Used by weights.py and cpu_ops.py; dense weights, of 16 or 32 bits, run on the same kernel (DenseLinear).
Decoding one stream is bound by reading the weights: 4 or 8 bits each instead of 16
or 32. Many rows are bound by arithmetic: the kernel (block_kernels.c) multiplies the blocks' own integers with numbers
that are integers of 15 bits and a sign, 32 of which share a scale, as the weights do. Rows up to any number go through
it, so no second copy of a weight is kept.
Invariant: a QuantizedLinear is `dequantise(blocks) @ x` within 2^-16 of the largest of 32 inputs, 2e-5 of the result in
the mean (bfloat16 rounds a hundred times as far), and a row's result is the same bit for bit in every batch, on CPUs
of all kinds.
Measured and not taken: torch's `_weight_int4pack_mm_for_cpu`. It rounds activations, scales and results to bfloat16;
in float32 it is 15 times slower than a dense product.
"""

import contextlib
import mmap
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cpu_kernels import Map, kernels, scratch, threads
from .gguf_blocks import values_of, widened
from .unpack import Part

GROUP: Final = 32
"""Values of a row that share a scale."""
KINDS: Final = {18: 0, 20: 1, 34: 2, 19: 3, 22: 4, 40: 5}
"""Bytes of a block -> the kernel's number for Q4_0, Q4_1, Q8_0, and Q4_Z: as Q4_0, with a zero point of a byte after
the scale. What AWQ and GPTQ store is exact in it; Q4_1's minimum would have to be rounded. Then what GGUF's K-quants
become (gguf_blocks.py): Q4_K and K8."""
Q4_0, Q4_1, Q8_0, Q4_Z, Q4_K, K8 = KINDS.values()
DENSE: Final = {torch.float32: 6, torch.float16: 7, torch.bfloat16: 8}
"""The kernel's numbers for weights that are not quantized: F32, F16, BF16."""
ROUNDED: Final = 9
"""For bfloat16 weights whose inputs are rounded to it."""
NAMES: Final = {Q4_0: "Q4_0", Q4_1: "Q4_1", Q8_0: "Q8_0"}
"""gguf's."""
PAGE: Final = 1 << 21
"""Bytes of a huge page."""
LINE: Final = 64
"""Bytes of a line of a cache."""
HEADS: Final = {
    Q4_0: (2,), Q4_1: (2, 2), Q8_0: (2,), Q4_Z: (2, 1), Q4_K: (2, 2, 1, 1), K8: (2, 2, 1, 1, 1, 1),
}  # fmt: skip
"""Bytes of what is before a block's values: a float16 scale, then a float16 minimum or the zero point; of K-quants
two float16 numbers, and bytes that they are multiplied by."""

Bytes = npt.NDArray[np.uint8]


def kind_of(blocks: Tensor, inputs: int) -> int | None:
    """The kernel's number for rows of blocks, uint8 [outputs, bytes], of `inputs` values; None if it has none."""
    return KINDS.get(blocks.shape[1] * GROUP // inputs) if inputs % GROUP == 0 else None


def dequantise(blocks: Tensor, inputs: int) -> Tensor:
    """The values float32 [outputs, inputs] of blocks uint8 [outputs, bytes] of one of GGUF's KINDS, or a K-quant's."""
    from gguf import GGMLQuantizationType, dequantize

    kind = kind_of(blocks, inputs)
    assert kind is not None
    if kind in (Q4_K, K8):
        return torch.from_numpy(values_of(blocks.numpy(), inputs))
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[NAMES[kind]]))


def of_one_kind(parts: list[Tensor], inputs: int) -> list[Tensor]:
    """Blocks of a map's parts as blocks of one kind, if they can be: Q4_K and K8."""
    kinds = {kind_of(part, inputs) for part in parts}
    return [torch.from_numpy(widened(part.numpy(), inputs)) for part in parts] if kinds == {Q4_K, K8} else parts


def pack(blocks: Tensor, inputs: int, lanes: int) -> Tensor:
    """Reorder blocks uint8 [outputs, bytes] for the kernel: uint8 [outputs / lanes, groups, lanes * block bytes].

    A unit is `lanes` outputs of one group, four values of each at a time; of 4-bit values, the next four share their
    bytes. Values of 8 bits are 128 more than GGUF's.
    """
    kind, units, groups = kind_of(blocks, inputs), len(blocks) // lanes, inputs // GROUP
    # By numpy, which is several times faster than torch at small work on bytes.
    grouped = blocks.numpy().reshape(len(blocks), groups, -1)
    assert kind is not None
    *heads, values = np.split(grouped, np.cumsum(HEADS[kind]), -1)
    if kind == Q8_0:
        values = values ^ 128
    elif kind != K8:
        q = np.concatenate((values & 15, values >> 4), -1).reshape(len(blocks), groups, -1, 8)
        values = (q[..., :4] | (q[..., 4:] << 4)).reshape(len(blocks), groups, -1)

    def interleaved(part: npt.NDArray[Any]) -> Bytes:
        turned = part.reshape(units, lanes, groups, -1).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(turned).view(np.uint8).reshape(units, groups, -1)

    heads = [np.ascontiguousarray(part).view(np.int16) if part.shape[-1] == 2 else part for part in heads]
    fours = np.ascontiguousarray(values).view(np.int32)
    parts = [interleaved(part) for part in (*heads, fours)]
    return torch.from_numpy(np.concatenate(parts, -1))


def blocks_of(part: Part) -> Tensor | None:
    """The weight of a Part as blocks, bit for bit; None if they cannot hold it."""
    outputs, inputs = part.shape
    scales = part.scales.half()
    whole = inputs % GROUP == 0 and (part.group % GROUP == 0 or part.group == inputs)
    if part.zeros is None or not whole or not torch.equal(scales.float(), part.scales.float()):
        return None
    middle = bool((part.zeros == 1 << (part.bits - 1)).all())
    if part.bits == 8 and not middle:
        return None
    index = np.arange(inputs // GROUP) * GROUP // part.group
    heads = [scales.numpy()[:, index, None].view(np.uint8)]
    if not middle:
        heads.append(part.zeros.numpy()[:, index, None])
    codes = np.ascontiguousarray(part.codes.numpy()).reshape(outputs, len(index), GROUP)
    low, high = np.split(codes, 2, -1)
    values = codes ^ 128 if part.bits == 8 else low | (high << 4)  # 8 bits: less 128, in two's complement
    return torch.from_numpy(np.concatenate([*heads, values], -1).reshape(outputs, -1))


def linear_of(part: Part, bias: Tensor | None) -> "QuantizedLinear | None":
    """The map of a Part; None if the kernel does not take it."""
    blocks = blocks_of(part)
    return QuantizedLinear(blocks, part.shape[1], bias) if blocks is not None and takes(blocks, part.shape[1]) else None


def takes(blocks: Tensor, inputs: int) -> bool:
    """Whether the kernel multiplies with these blocks."""
    return kind_of(blocks, inputs) is not None and len(blocks) % kernels().lanes == 0


class QuantizedLinear:
    """x float32 [T, inputs] -> float32 [T, outputs] with blocks uint8 [outputs, bytes] that the kernel `takes`."""

    __slots__ = ("bias", "inputs", "kind", "linear", "map", "outputs", "weight")

    def __init__(self, blocks: Tensor, inputs: int, bias: Tensor | None) -> None:
        kind = kind_of(blocks, inputs)
        assert kind is not None
        self.linear, self.kind, self.bias = kernels().linear, kind, bias
        self.outputs, self.inputs = len(blocks), inputs
        self.weight = pack(blocks, inputs, kernels().lanes)
        self.map = Map(kind, self.weight.data_ptr(), None if bias is None else bias.data_ptr(), self.outputs, inputs)

    def __call__(self, x: Tensor) -> Tensor:
        return product(self, x)


class DenseLinear:
    """The same with a weight [outputs, inputs] that the kernel takes (`takes_dense`). One of 16 bits stays so, and the
    result is that of the same numbers in float32, bit for bit; of bfloat16 where AMX multiplies, added up in another
    order. With `rounds` weight and inputs are rounded to bfloat16, and their products added up in float32."""

    __slots__ = ("bias", "inputs", "linear", "map", "outputs", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, rounds: bool = False) -> None:
        self.linear, self.bias, lanes = kernels().linear, bias, kernels().lanes
        self.outputs, self.inputs = weight.shape
        if rounds:
            weight = weight.bfloat16()
        kind = ROUNDED if rounds else DENSE[weight.dtype]
        self.map = Map(kind, None, None if bias is None else bias.data_ptr(), *weight.shape)
        if weight.dtype == torch.bfloat16:  # neighbours 2j and 2j + 1 share 32 bits
            weight = weight.view(torch.int32)
        self.weight = weight.view(-1, lanes, weight.shape[1]).transpose(1, 2).contiguous()
        self.map.weight = self.weight.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        return product(self, x)


KernelLinear = QuantizedLinear | DenseLinear


def takes_dense(weight: Tensor) -> bool:
    """Whether the kernel multiplies with this weight."""
    whole = weight.shape[0] % kernels().lanes == 0 and weight.shape[1] % GROUP == 0
    return whole and weight.dtype in DENSE and weight.device.type == "cpu"


def product(linear: KernelLinear, x: Tensor) -> Tensor:
    """What a map makes of x float32 [T, inputs]. Raises ValueError for another x."""
    if x.dtype != torch.float32 or x.shape[1] != linear.inputs:
        raise ValueError(f"a map of {linear.inputs} float32 inputs got {x.dtype} [..., {x.shape[1]}]")
    rows = len(x)
    y = x.new_empty(rows, linear.outputs)
    if rows:
        x = x.contiguous()
        packed = scratch(*x.shape)
        linear.linear(linear.map, x.data_ptr(), rows, packed.data_ptr(), y.data_ptr(), None, threads())
    return y


def lay_together(linears: Iterable[Any]) -> None:
    """Move the weights of the kernel's maps among `linears`, given in the order of their use, into huge pages.

    A step reads all of them: across pages of 4 KiB a CPU neither loads ahead nor finds all addresses in its TLB. Where
    the kernel has no huge pages it is memory like any other.
    """
    maps = [linear for linear in linears if isinstance(linear, KernelLinear)]
    sizes = [-(-linear.weight.nbytes // LINE) * LINE for linear in maps]
    if not maps:
        return
    memory = mmap.mmap(-1, sum(sizes) + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    at = -whole.data_ptr() % PAGE
    for linear, size in zip(maps, sizes, strict=True):
        place = whole[at : at + linear.weight.nbytes].view(linear.weight.dtype).view(linear.weight.shape)
        linear.weight = place.copy_(linear.weight)
        linear.map.weight = place.data_ptr()
        at += size
