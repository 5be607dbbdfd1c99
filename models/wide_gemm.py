"""Gate and up of 4 bits at up to 64 rows, by a kernel that reads x once a multiprocessor.

Used by gemm.py on GPUs of sm_90, for bfloat16 and groups of 128: configurations, and how wide_kernel is launched. What
it has no epilogue for is left to `plain`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import wide_kernels as kernels

if TYPE_CHECKING:
    from .packed_gemm import Packed

BLOCK: Final = kernels.BLOCK.value
PAIRS: Final = kernels.PAIRS.value
STEP: Final = kernels.STEP.value
WORDS: Final = kernels.WORDS.value
MOST_BLOCKS: Final = 5
"""Of a program: as many as there are warps for."""


@dataclass(frozen=True, slots=True)
class Wide:
    """A configuration of `wide_kernel`."""

    rows: int
    """Rows of x, padded."""
    programs: int
    """Which share the blocks of 64 outputs, MOST_BLOCKS each at most."""
    stages: int
    """Steps for which there are buffers."""
    plain: Any
    """The gemm.Tile for what has no kernel here."""

    outputs = BLOCK

    def fits(self, weight: "Packed") -> bool:
        """Whether it can multiply a weight."""
        outputs, inputs = weight.shape
        known = weight.kind == "int4" and weight.group == STEP == weight.unit and weight.together == 16
        even = outputs % BLOCK == 0 and inputs % STEP == 0 and inputs // STEP >= self.stages
        enough = self.programs <= outputs // BLOCK <= self.programs * MOST_BLOCKS
        return known and even and enough and weight.dtype == torch.bfloat16

    def constants(self, outputs: int, inputs: int) -> dict[str, int]:
        """Those of `wide_kernel` that follow from a weight's shape."""
        blocks = triton.cdiv(outputs // BLOCK, self.programs)
        return {"BM": self.rows, "BLOCKS": blocks, "STAGES": self.stages, "PROGRAMS": self.programs}

    def takes(self, rows: int, bias: Tensor | None, act: str, add: Any, heads: Any) -> bool:
        """Whether there is a kernel for a product with this epilogue; see gemm.linear."""
        return bool(act) and bias is None and rows <= self.rows


def x_blocks_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe x [T, k], of which a step's inputs are loaded in halves: lines of 128 bytes."""
    view = x.view(len(x), -1, STEP // 2).transpose(0, 1)
    return TensorDescriptor.from_tensor(view, [2, rows, STEP // 2], gl.NVMMASharedLayout(128, 16, rank=3))


def word_blocks_of(weight: "Packed") -> TensorDescriptor:
    """Describe the words of a weight [2 n, k], of which a block has as many gates as ups, 8 of each in turn.

    Its dimensions: 16 outputs that lie together; 8 of them in a chunk; gates or ups; two outputs; their words.
    """
    outputs, width = len(weight) // 2, weight.words.shape[1]
    sizes = outputs // 16, width // WORDS * 2, 2, 4, 2 * WORDS
    view = weight.words.as_strided(sizes, (16 * width, 8 * WORDS, outputs * width, 2 * WORDS, 1))
    block = [PAIRS // 16, 2, 2, 4, 2 * WORDS]
    return TensorDescriptor.from_tensor(view, block, gl.NVMMASharedLayout(128, 16, rank=5))


def meta_blocks_of(weight: "Packed") -> TensorDescriptor:
    """Describe what the groups of a block's gates and ups have."""
    view = weight.meta.view(len(weight.meta), 2, -1)
    return TensorDescriptor.from_tensor(view, [1, 2, PAIRS], gl.NVMMASharedLayout(0, 32, rank=3))


def multiply(
    x: Tensor, weight: "Packed", bias: None, out: Tensor, wide: Wide, arrived: Tensor, pdl: bool,
    after: tuple[Any, ...], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    """Launch `wide_kernel`; `after`, `epilogue`: linear_kernel's arguments and constants of epilogues."""
    outputs, inputs = weight.shape
    squares = epilogue["SQUARES"] and max(32, epilogue["SQUARES"])
    kernels.wide_kernel[(wide.programs,)](
        x_blocks_of(x, wide.rows), word_blocks_of(weight), meta_blocks_of(weight), out, len(x), outputs // 2, inputs,
        *after[:3], SQUARES=squares, ACT=epilogue["ACT"], PDL=pdl, num_warps=4, **wide.constants(outputs, inputs),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
