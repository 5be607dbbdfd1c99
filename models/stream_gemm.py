"""GEMMs of a decode step whose programs stay: as many as are resident at once, each with an equal share of the weight.

Used by gemm.py. Tiles of a weight seldom divide by the number of multiprocessors. As in the hybrid form of Stream-K
(Osama et al., 2023) each program first takes as many whole tiles as all can have, and those that are left are split
along K, so that all are busy to the end. How a `Stream` cuts a product follows from the sizes.
Tried on an H200 at 128 rows and not kept, for cuBLAS was as fast or faster (down with the norm 46 us, ours 46; gate and
up with the activation 77, ours 85 to 92, of which parts cost 13, x nothing): split tiles first, tiles of 288 outputs,
one for each multiprocessor, steps in an order of each program's own, loads of the next tile before a tile's end.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .stream_kernels import stream_kernel

MOST_PARTS: Final = 16
"""Most programs that share a tile."""
AHEAD: Final = 2
"""With PDL: steps of the weight that the L2 is asked for before the predecessor ends.

A step of Qwen2-7B at 1 row takes 4.080 ms without, 4.043 with 2 and 4.107 with 4 (H200); at 32 rows 4.772, 4.737 and,
with 8, 4.835.
"""


@dataclass(frozen=True, slots=True)
class Stream:
    """A configuration of `stream_kernel`; the numbers are elements."""

    rows: int
    """Rows of x of a program, padded: 16 or more."""
    outputs: int
    """Rows of the weight of a program."""
    depth: int
    """Columns of a pipeline stage."""
    programs: int
    """As many as an H100 or H200 has multiprocessors, or as are resident there at once."""
    warps: int = 4
    stages: int = 4
    swap: bool = False
    """The weight is the left operand of the tensor cores."""

    def tiles(self, outputs: int, rows: int) -> int:
        """Tiles of a product."""
        count: int = triton.cdiv(outputs, self.outputs) * triton.cdiv(rows, self.rows)
        return count

    def left(self, outputs: int, rows: int) -> int:
        """Tiles that are left when all programs have had as many."""
        return self.tiles(outputs, rows) % self.programs

    def split(self, outputs: int, inputs: int, rows: int) -> int:
        """Programs that share one of these, none of them idle."""
        left, steps = self.left(outputs, rows), triton.cdiv(inputs, self.depth)
        most = min(steps, MOST_PARTS, self.programs // left) if left else 1
        return next(s for s in range(most, 0, -1) if triton.cdiv(steps, triton.cdiv(steps, s)) == s)

    def constants(self, outputs: int, inputs: int, rows: int, gated: bool) -> dict[str, Any]:
        """Those of `stream_kernel` that follow from the product."""
        split = self.split(outputs, inputs, rows)
        rest = self.left(outputs, rows) > 0 and split > 1
        return {
            "BM": self.rows, "BN": self.outputs // 2 if gated else self.outputs, "BK": self.depth, "SPLIT": split,
            "SLICE": triton.next_power_of_2(triton.cdiv(self.rows, split)), "REST": rest, "SWAP": self.swap,
            "WHOLE": self.tiles(outputs, rows) >= self.programs or not rest, "AHEAD": AHEAD,
        }  # fmt: skip


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, stream: Stream, arrived: Tensor, pdl: bool,
    after: tuple[Any, ...], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    """Launch `stream_kernel`; `after`, `epilogue`: its arguments and constants of epilogues (gemm.linear)."""
    rows, inputs = x.shape
    gated = bool(epilogue["ACT"])
    constants = stream.constants(len(weight), inputs, rows, gated)
    tiles, left, split = stream.tiles(len(weight), rows), stream.left(len(weight), rows), constants["SPLIT"]
    parts = None
    if constants["REST"]:
        parts = torch.empty(left * split * stream.rows * stream.outputs, dtype=torch.float32, device=x.device)
    stream_kernel[(stream.programs if tiles >= stream.programs else left * split,)](
        weight, TensorDescriptor.from_tensor(x, [stream.rows, stream.depth]),
        TensorDescriptor.from_tensor(weight, [constants["BN"], stream.depth]), bias, out, parts, arrived, rows,
        len(weight) // 2 if gated else len(weight), inputs, *after, WAIT=x.device.type == "cuda",
        BIAS=bias is not None, PDL=pdl, num_warps=stream.warps, num_stages=stream.stages, **constants, **epilogue,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
