"""The product of gate and up with its activation, at more rows than streams are for, by a kernel of ours.

Used by gemm.py on GPUs of sm_90, for bfloat16, where PANELS there says so. It is launched with PDL and loads the first
steps of its weight while its predecessor ends, which a kernel of the library cannot.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from . import panel_kernels as kernels
from .primed_gemm import blocks_of

ROWS: Final = 128
"""Rows of x of a program, padded."""
DEPTH: Final = 64
"""Columns of a step."""
WARPS: Final = 8


@dataclass(frozen=True, slots=True)
class Panel:
    """A configuration of `panel_kernel`."""

    outputs: int
    """Of a program: the sum of two powers of two, the smaller one 8 or more."""
    stages: int
    """Steps for which there are buffers, 2 or more."""

    @property
    def widths(self) -> tuple[int, int]:
        """The two powers of two."""
        first = 1 << (self.outputs.bit_length() - 1)
        return first, self.outputs - first


def gated(x: Tensor, weight: Tensor, act: str, panel: Panel) -> Tensor:
    """act(first half) * second half of x [T, k] @ weight [2 n, k].T; returns [T, n]."""
    rows, inputs = x.shape
    outputs = len(weight) // 2
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    halves, (main, rest) = weight.view(2, outputs, inputs), panel.widths
    kernels.panel_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(outputs, panel.outputs),)](
        blocks_of(x, [ROWS, DEPTH]), blocks_of(halves, [2, main, DEPTH]), blocks_of(halves, [2, rest, DEPTH]), out,
        rows, outputs, inputs // DEPTH, BM=ROWS, BN=main, RN=rest, BK=DEPTH, STAGES=panel.stages, ACT=act,
        num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
    return out
