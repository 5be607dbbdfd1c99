"""Linear maps with bfloat16 weights of hidden states in float32, on a GPU: three products by its matrix units.

Used by TritonOps for checkpoints in bfloat16 that are served in float32: weights stay what they are, half the memory
and half of what a decode step reads, and products need no float32 units, which are an eighth as fast on an H100. An
input is the sum of three bfloat16 numbers, so that each product is exact, and sums are float32's. Our C kernels do the
same with AMX (matrix_kernels.c). Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence
datatype for higher-precision computations", 2019.
"""

from typing import Final

import torch
import triton
from torch import Tensor

from .layer_kernels import join_kernel, split_kernel
from .tuned_gemm import by_torch

PARTS: Final = 3
"""bfloat16 numbers of 8 bits that a float32 number, of 24, is the sum of."""
STACKED_ROWS: Final = 128
"""Up to so many rows the parts are multiplied at once, so that the weight is read once; more take less memory."""
BLOCK: Final = 1024


def split(x: Tensor) -> Tensor:
    """The bfloat16 numbers [3, T, in] whose sum is x float32 [T, in], the largest first."""
    x = x.contiguous()
    parts = torch.empty(PARTS, *x.shape, dtype=torch.bfloat16, device=x.device)
    if x.numel():
        split_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, parts.view(torch.int16), x.numel(), BLOCK=BLOCK, PARTS=PARTS)
    return parts


def join(sums: Tensor, bias: Tensor | None) -> Tensor:
    """sums float32 [3, T, out], the largest first, and bias [out], added up: [T, out]."""
    out = torch.empty_like(sums[0])
    if out.numel():
        count, width = out.numel(), out.shape[-1]
        join_kernel[(triton.cdiv(count, BLOCK),)](
            sums, bias, out, count, width, BIAS=bias is not None, BLOCK=BLOCK, PARTS=PARTS
        )
    return out


def added(sums: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """sums, which may be overwritten, + x @ weight.T in float32; x and weight bfloat16."""
    if not x.is_cuda:  # where torch has no product with another dtype
        product = x.float() @ weight.float().t()
        return product if sums is None else product.add_(sums)
    if sums is None:
        return by_torch(x, weight, None, torch.float32)
    return torch.addmm(sums, x, weight.t(), out_dtype=torch.float32, out=sums)


class SplitLinear:
    """x float32 [T, in] -> [T, out], with weight bfloat16 [out, in] and bias float32 [out]."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        parts = split(x)
        if len(x) <= STACKED_ROWS:
            sums = added(None, parts.flatten(0, 1), self.weight)
            return join(sums.view(PARTS, len(x), len(self.weight)), self.bias)
        total = None
        for part in reversed(parts.unbind()):  # the smallest first
            total = added(total, part, self.weight)
        assert total is not None
        return total if self.bias is None else total.add_(self.bias)
