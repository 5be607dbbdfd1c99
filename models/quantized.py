"""Linear maps on a CPU whose weights stay the quantized blocks that a GGUF file holds.

Used by weights.py. Decoding one stream is bound by reading the weights: 4 or 8 bits each instead of 16 or 32. The
kernel (block_kernels.c) computes in float32 with the blocks' exact values: nothing is quantized again, and no
activation is. Rows up to any number go through it, so no second copy of a weight is kept.
Invariant: a QuantizedLinear is `dequantise(blocks) @ x` up to the rounding of float32 sums, and a row's result is the
same bit for bit in every batch.
Measured and not taken: torch's `_weight_int4pack_mm_for_cpu`. It rounds activations, scales and results to bfloat16;
in float32 it is 15 times slower than a dense product.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cpu_kernels import Map, kernels, threads

GROUP: Final = 32
"""Values of a row that share a scale."""
KINDS: Final = {18: 0, 20: 1, 34: 2}
"""Bytes of a block -> the kernel's number for Q4_0, Q4_1, Q8_0."""
Q4_0, Q4_1, Q8_0 = KINDS.values()
NAMES: Final = {Q4_0: "Q4_0", Q4_1: "Q4_1", Q8_0: "Q8_0"}
"""gguf's."""

Bytes = npt.NDArray[np.uint8]


def kind_of(blocks: Tensor, inputs: int) -> int | None:
    """The kernel's number for rows of blocks, uint8 [outputs, bytes], of `inputs` values; None if it has none."""
    return KINDS.get(blocks.shape[1] * GROUP // inputs) if inputs % GROUP == 0 else None


def dequantise(blocks: Tensor, inputs: int) -> Tensor:
    """The values float32 [outputs, inputs] of blocks uint8 [outputs, bytes] of one of KINDS."""
    from gguf import GGMLQuantizationType, dequantize

    kind = kind_of(blocks, inputs)
    assert kind is not None
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[NAMES[kind]]))


def pack(blocks: Tensor, inputs: int, lanes: int) -> Tensor:
    """Reorder blocks uint8 [outputs, bytes] for the kernel: uint8 [outputs / lanes, groups, lanes * block bytes].

    A unit is `lanes` outputs of one group, value by value; of 4-bit values, neighbours 2j and 2j + 1 share a byte.
    """
    kind, units, groups = kind_of(blocks, inputs), len(blocks) // lanes, inputs // GROUP
    # By numpy, which is several times faster than torch at small work on bytes.
    grouped = blocks.numpy().reshape(len(blocks), groups, -1)
    scales, values = np.split(grouped, [4 if kind == Q4_1 else 2], -1)
    if kind != Q8_0:
        q = np.concatenate((values & 15, values >> 4), -1)
        values = q[..., 0::2] | (q[..., 1::2] << 4)

    def interleaved(part: npt.NDArray[Any]) -> Bytes:
        turned = part.reshape(units, lanes, groups, -1).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(turned).view(np.uint8).reshape(units, groups, -1)

    scales = np.ascontiguousarray(scales).view(np.int16)
    return torch.from_numpy(np.concatenate((interleaved(scales), interleaved(values)), -1))


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
        if x.dtype != torch.float32 or x.shape[1] != self.inputs:
            raise ValueError(f"a map of {self.inputs} float32 inputs got {x.dtype} [..., {x.shape[1]}]")
        rows = len(x)
        y = x.new_empty(rows, self.outputs)
        if rows:
            x = x.contiguous()
            self.linear(self.map, x.data_ptr(), rows, y.data_ptr(), threads())
        return y
