"""Products of one row with a quantized weight whose first steps are on their way before the row is there.

Used by gemm.py on GPUs of sm_90: configurations, and how row_kernel is launched. The row is in bfloat16; weights have
4 bits in groups of 128, or are float8 with a scale for each output. What it has no epilogue for is left to `plain`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import row_kernels as kernels
from .primed_gemm import plain_heads
from .unpack import FLOAT8

if TYPE_CHECKING:
    from .packed_gemm import Packed

HEAD: Final = 128
"""The size of the heads that there is an epilogue for."""
GROUP: Final = 128
"""Inputs of a group of 4-bit values, and of a chunk of their words."""


@dataclass(frozen=True, slots=True)
class OneRow:
    """A configuration of `row_kernel`."""

    outputs: int
    """Rows of the weight of a program: both halves with an activation."""
    depth: int
    """Inputs of a step."""
    buffers: int
    """Steps of the weight for which there are buffers."""
    plain: Any
    """The gemm.Tile for what has no kernel here."""
    split: int = 1
    """Programs that share a tile, if it is not one of those that a program has for itself."""
    programs: int = 0
    """Programs that have as many whole tiles each as there are for all of them; what is left is split. 0: all is."""
    launch: int = 0
    """The step of a program from which on what comes next may be launched."""

    rows = 1

    def fits(self, weight: "Packed") -> bool:
        """Whether it can multiply a weight."""
        outputs, inputs = weight.shape
        four = weight.kind == "int4" and weight.group == GROUP == weight.unit and weight.together == 16
        known = four or (weight.kind == "fp8" and not weight.group)
        even = outputs % self.outputs == 0 and inputs % self.depth == 0 and inputs % kernels.SPAN.value == 0
        even = even and inputs // self.depth >= self.split  # each part has a step, and so arrives
        return known and even and weight.dtype == torch.bfloat16

    def takes(self, rows: int, bias: Tensor | None, act: str, add: Any, heads: Any) -> bool:
        """Whether there is a kernel for a product with this epilogue; see gemm.linear."""
        if heads is None:
            return True
        return self.outputs == HEAD and plain_heads(heads, HEAD)

    def constants(self, outputs: int, inputs: int, gated: bool) -> dict[str, Any]:
        """Those of `row_kernel` that follow from the product."""
        tiles = outputs // self.outputs
        whole = tiles // self.programs if self.programs else 0
        rest = tiles - whole * self.programs
        return {
            "BN": self.outputs // 2 if gated else self.outputs, "BK": self.depth, "STEPS": inputs // self.depth,
            "BUFFERS": self.buffers, "PROGRAMS": self.programs if whole else rest * self.split, "WHOLE": whole,
            "REST": rest, "SPLIT": self.split, "LAUNCH": self.launch,
        }  # fmt: skip


def blocks_of(weight: "Packed", outputs: int, depth: int) -> TensorDescriptor:
    """Describe a weight that is loaded in blocks of `outputs` rows and `depth` inputs."""
    if weight.kind == "fp8":
        block = [outputs, depth]
        return TensorDescriptor.from_tensor(weight.words.view(FLOAT8), block, gl.NVMMASharedLayout(128, 8, rank=2))
    block = [depth // GROUP, outputs // 16, 16, GROUP // 2]
    words = weight.words.view(torch.int8).view(len(weight) // 16, -1, 16, GROUP // 2).transpose(0, 1)
    return TensorDescriptor.from_tensor(words, block, gl.NVMMASharedLayout(64, 8, rank=4))


def meta_of(weight: "Packed", outputs: int, depth: int) -> Tensor | TensorDescriptor:
    """What the kernel takes beside such blocks: of 4 bits, what is loaded with each of them."""
    if weight.kind == "fp8":
        return weight.meta
    return TensorDescriptor.from_tensor(weight.meta, [depth // GROUP, outputs], gl.NVMMASharedLayout(0, 32, rank=2))


def multiply(
    x: Tensor, weight: "Packed", bias: Tensor | None, out: Tensor, choice: OneRow, arrived: Tensor, pdl: bool,
    after: tuple[Any, ...], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    """Launch `row_kernel`; `after`, `epilogue`: linear_kernel's arguments and constants of epilogues."""
    gated = bool(epilogue["ACT"])
    (outputs, inputs), constants = weight.shape, choice.constants(*weight.shape, gated)
    parts = None
    if constants["REST"] and choice.split > 1:
        count = constants["REST"] * choice.split * choice.outputs
        parts = torch.empty(count, dtype=torch.float32, device=x.device)
    squares = epilogue["SQUARES"] and max(32, epilogue["SQUARES"])
    kernels.row_kernel[(constants["PROGRAMS"],)](
        x, blocks_of(weight, constants["BN"], choice.depth), meta_of(weight, constants["BN"], choice.depth), bias, out,
        parts, arrived, outputs // 2 if gated else outputs, inputs, *after[:8], *after[10:],
        FOUR=weight.kind == "int4", BIAS=bias is not None, SQUARES=squares, ACT=epilogue["ACT"], ADD=epilogue["ADD"],
        HEADS=epilogue["HEADS"], PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}), **constants,
    )  # fmt: skip
