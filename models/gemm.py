"""The linear maps of a decode step on a GPU: our GEMM where it was measured to be faster, cuBLAS everywhere else.

Used by triton_ops.py. GEMMS says which tile a weight of some shape is multiplied with at how many rows; what is not in
it goes to cuBLAS. perf/gemm.py finds the tiles and prints the table. Nothing is tuned at run time.
Tried on an H200 and not kept: gate, up and the activation in one kernel never beat cuBLAS and the activation after it;
prefetching the weight into the L2 while the predecessor ends made steps slower (4.26 to 4.50 ms for 4.20 at 32 rows).
Invariant: a call does no host synchronisation and launches what depends on shapes only, so it can be captured.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gemm_kernels import linear_kernel

EARLY_BYTES: Final = 32 << 20
"""With PDL, the successor of a GEMM with a weight up to this may be launched at once, else when that has been read."""
MAX_TILES: Final = 4096
"""Most tiles of a GEMM that is split along K."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A configuration of `linear_kernel`; the numbers are elements."""

    rows: int
    """Rows of x of a program: 16 or more, padded."""
    outputs: int
    """Rows of the weight of a program."""
    depth: int
    """Columns of a pipeline stage; divides the weight's columns."""
    split: int = 1
    """Programs that share a tile, each with its part of the columns."""
    warps: int = 4
    stages: int = 4
    swap: bool = True
    """The weight is the left operand of the tensor cores."""
    tma: bool = False


Choices = tuple[tuple[int, Tile | None], ...]
"""(most rows, tile) in rising order, None for cuBLAS; cuBLAS above the last."""

GEMMS: Final[dict[tuple[int, int], Choices]] = {
    (3584, 3584): ((1, Tile(16, 64, 256, 2, 4, 3)), (32, Tile(32, 64, 256, 2, 4, 3))),
    (37888, 3584): ((1, Tile(16, 32, 256, 1, 4, 4)), (32, Tile(32, 64, 128, 1, 4, 4, tma=True))),
    (3584, 18944): ((1, Tile(16, 64, 256, 2, 4, 3)),),
    (152064, 3584): ((1, Tile(16, 64, 128, 1, 4, 4)), (32, Tile(32, 64, 128, 1, 4, 4, tma=True))),
    (1152, 896): ((8, Tile(16, 64, 128, 3, 4, 5, tma=True)),),
    (896, 896): ((8, Tile(16, 64, 128, 3, 4, 5, tma=True)),),
    (896, 4864): ((8, Tile(16, 64, 128, 8, 4, 4)),),
    (151936, 896): ((8, Tile(16, 64, 128, 1, 4, 5, tma=True)), (64, Tile(64, 128, 64, 1, 4, 4))),
}
"""By (outputs, inputs) of the weight."""


def choose(choices: Choices, rows: int) -> Tile | None:
    """The tile for this many rows, None for cuBLAS."""
    for most, tile in choices:
        if rows <= most:
            return tile
    return None


def arrivals(device: torch.device) -> Tensor:
    """The counters of split GEMMs, shared by all that run one after another: int32 [MAX_TILES], zero between them."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def fits(tile: Tile, outputs: int, inputs: int, rows: int) -> bool:
    """Whether `tile` can multiply a weight [outputs, inputs] with this many rows."""
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows)
    return inputs % tile.depth == 0 and (tile.split == 1 or tiles <= MAX_TILES)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    arrived: Tensor,
    pdl: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [rows, inputs] @ weight [outputs, inputs].T + bias, in `dtype` (x's); contiguous, `tile` fits.

    `pdl`: launch before the predecessor ends.
    """
    rows, inputs = x.shape
    outputs = len(weight)
    out = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows)
    parts = None
    if tile.split > 1:
        parts = torch.empty(tiles * tile.split * tile.rows * tile.outputs, dtype=torch.float32, device=x.device)
    x_blocks = w_blocks = None
    if tile.tma:
        x_blocks = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
        w_blocks = TensorDescriptor.from_tensor(weight, [tile.outputs, tile.depth])
    linear_kernel[(tiles, tile.split)](
        x, weight, x_blocks, w_blocks, bias, out, parts, arrived, rows, outputs, inputs,
        int(weight.nbytes <= EARLY_BYTES), BM=tile.rows, BN=tile.outputs, BK=tile.depth, SPLIT=tile.split,
        SWAP=tile.swap, TMA=tile.tma, BIAS=bias is not None, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def can_multiply(weight: Tensor) -> bool:
    """Whether `linear` is for this weight at all: 16-bit (wider is not faster than cuBLAS), aligned, contiguous."""
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and weight.shape[1] % 16 == 0
    )


class TritonLinear:
    """x [T, in] -> [T, out] with weight [out, in]; float32 results with dtype=torch.float32; PDL up to `pdl_rows`."""

    __slots__ = ("arrived", "bias", "choices", "dtype", "pdl_rows", "weight")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        arrived: Tensor,
        pdl_rows: int,
        dtype: torch.dtype | None = None,
        gemms: dict[tuple[int, int], Choices] = GEMMS,
    ) -> None:
        self.weight, self.bias, self.arrived, self.pdl_rows, self.dtype = weight, bias, arrived, pdl_rows, dtype
        outputs, inputs = weight.shape
        self.choices = gemms.get((outputs, inputs), ()) if can_multiply(weight) else ()

    def __call__(self, x: Tensor) -> Tensor:
        tile = choose(self.choices, len(x))
        if tile is not None and len(x):
            pdl = len(x) <= self.pdl_rows
            return linear(x.contiguous(), self.weight, self.bias, tile, self.arrived, pdl, self.dtype)
        if self.dtype is None or self.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        y = torch.mm(x, self.weight.t(), out_dtype=self.dtype)
        return y if self.bias is None else y + self.bias
