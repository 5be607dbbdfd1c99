"""GEMMs of a small model's decode step that have their weight in shared memory before x is there.

Used by gemm.py on GPUs of sm_90, for bfloat16: configurations, and how the kernels are launched. A `Primed` knows for
which epilogues there is a kernel of its kind, and names the tile for everything else, other GPUs among it.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import primed_kernels as kernels

HEAD: Final = 64
"""Outputs of a program of `whole_kernel`, and the size of the heads that it knows."""
MOST_ROWS: Final = 64
"""Rows of x of the programs of the other kernels, which read all of it."""
MOST_PARTS: Final = 64
"""Sums of squares of a row that `whole_kernel` and `gated_kernel` read."""


@dataclass(frozen=True, slots=True)
class Primed:
    """A configuration; the numbers are elements. Without `weights` it is of `whole_kernel`, with `split` above 1 of
    `split_kernel`, else of `gated_kernel`; products without the epilogue of that kernel are left to `plain`."""

    rows: int
    """Rows of x of a program, padded."""
    outputs: int
    """Rows of the weight of a program: both halves with an activation."""
    depth: int
    """Columns of a step."""
    plain: Any
    """The gemm.Tile for what has no kernel here."""
    weights: int = 0
    """Steps of the weight for which there are buffers; 0: for all of them, and for all of x."""
    inputs: int = 0
    """Steps of x for which there are buffers."""
    split: int = 1
    """Programs that share a tile, a power of two."""

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a weight [outputs, inputs] is divided without a rest."""
        return outputs % self.outputs == 0 and inputs % self.depth == 0

    def takes(self, rows: int, bias: Tensor | None, act: str, add: Any, heads: Any) -> bool:
        """Whether there is a kernel for a product with this epilogue; see gemm.linear."""
        if self.weights == 0:
            return add is not None or (heads is not None and plain_heads(heads, HEAD))
        return add is not None if self.split > 1 else bool(act)


def on_sm90(device: torch.device) -> bool:
    """Whether Gluon's kernels run there: sm_90 alone has the instructions and the shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def plain_heads(heads: Any, size: int) -> bool:
    """Whether heads are of `size` numbers and all rotated, and kept as they are."""
    rotated = heads.table is not None and not heads.interleaved and heads.qk_norm is None
    return rotated and heads.head_dim == size and heads.kv_rows.dtype == torch.bfloat16


def can_prime(weight: Tensor) -> bool:
    """Whether there are kernels for this weight."""
    return weight.dtype == torch.bfloat16 and on_sm90(weight.device)


def blocks_of(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe a tensor that is loaded in blocks."""
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, primed: Primed, arrived: Tensor, pdl: bool,
    after: tuple[Any, ...], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    """Launch what `primed` stands for; `after`, `epilogue`: linear_kernel's arguments and constants of epilogues."""
    squares = epilogue["SQUARES"] and max(32, epilogue["SQUARES"])
    constants = {"BK": primed.depth, "STEPS": x.shape[1] // primed.depth, "PDL": pdl, "num_warps": 4}
    if pdl:
        constants["launch_pdl"] = True
    if primed.weights == 0:
        _whole(x, weight, bias, out, primed, after, constants | {"SQUARES": squares, "ADD": epilogue["ADD"]})
        return
    constants |= {"BM": MOST_ROWS, "WEIGHTS": primed.weights, "INPUTS": primed.inputs}
    x_blocks = blocks_of(x, [MOST_ROWS, primed.depth])
    if primed.split > 1:
        _split(x, x_blocks, weight, out, primed, arrived, after, constants)
        return
    width = primed.outputs // 2
    kernels.gated_kernel[(len(weight) // primed.outputs,)](
        x_blocks, blocks_of(weight, [width, primed.depth]), out, len(x), len(weight) // 2, *after[:3], BN=width,
        SQUARES=squares, ACT=epilogue["ACT"], **constants,
    )  # fmt: skip


def _whole(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, primed: Primed, after: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:  # fmt: skip
    outputs, inputs = weight.shape
    if constants["ADD"]:
        w_blocks = blocks_of(weight, [HEAD, primed.depth])
    else:  # firsts and seconds of pairs: [heads, groups of 8 pairs, halves, pairs, inputs]
        pairs = weight.view(outputs // HEAD, 2, HEAD // 16, 8, inputs).transpose(1, 2)
        w_blocks = blocks_of(pairs, [1, HEAD // 16, 2, 8, primed.depth])
    kernels.whole_kernel[(outputs // HEAD * triton.cdiv(len(x), primed.rows),)](
        blocks_of(x, [primed.rows, primed.depth]), w_blocks, bias, out, len(x), outputs, *after[:8], *after[10:],
        BM=primed.rows, BIAS=bias is not None, **constants,
    )  # fmt: skip


def _split(
    x: Tensor, x_blocks: TensorDescriptor, weight: Tensor, out: Tensor, primed: Primed, arrived: Tensor,
    after: tuple[Any, ...], constants: dict[str, Any],
) -> None:  # fmt: skip
    programs = len(weight) // primed.outputs * primed.split
    parts = torch.empty(programs * MOST_ROWS * primed.outputs, dtype=torch.float32, device=x.device)
    kernels.split_kernel[(programs,)](
        x_blocks, blocks_of(weight, [primed.outputs, primed.depth]), out, parts, arrived, len(x), len(weight),
        *after[3:8], BN=primed.outputs, SPLIT=primed.split, **constants,
    )  # fmt: skip
