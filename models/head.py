"""The language model head: normed hidden states to float32 logits, precise where it decides.

A 16-bit GEMM rounds its result to 16 bits: logits around 25 come in steps of 1/8, so that the two best are often
equal, or in the wrong order, and a chat answers differently with its prompt cached than without. So logits are
float32: the GPU's GEMM writes float32; the CPU has no such kernel, so there the GEMM's largest logits are computed
again in float32, from the same weights.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Linear, LinearMap

STEPS: Final = 4
"""Logits within this many 16-bit steps of their row's largest are computed again."""
MOST: Final = 256
"""Rows' worth of candidates, at most: more means a flat row, where the order of equals decides nothing."""


class Head:
    """weight [vocab, hidden] as loaded, None if it is a CPU kernel's (and hidden states float32); `product` the GEMM to
    use: packed on a CPU, with float32 results on a GPU."""

    def __init__(self, linear: LinearMap, product: LinearMap | None = None) -> None:
        self.weight = linear.weight if isinstance(linear, Linear) else None
        self.product = product or linear

    def __call__(self, x: Tensor) -> Tensor:
        """Normed hidden states [R, hidden] -> logits float32 [R, vocab]."""
        if x.dtype == torch.float32:
            return self.product(x)
        if x.device.type == "cpu":
            return self._refined(x)
        return self.product(x)

    def _refined(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        rounded = self.product(x)
        logits = rounded.float()
        largest = logits.amax(-1, keepdim=True)
        margin = STEPS * largest.abs() * torch.finfo(x.dtype).eps
        rows, ids = (logits >= largest - margin).nonzero(as_tuple=True)
        if len(ids) <= MOST * len(x):
            weights, hidden = self.weight.index_select(0, ids).float(), x.index_select(0, rows).float()
            logits[rows, ids] = torch.linalg.vecdot(weights, hidden)
        return logits


def plain_head(x: Tensor, weight: Tensor) -> Tensor:
    """Reference: the product in float32 throughout."""
    return F.linear(x.float(), weight.float())
