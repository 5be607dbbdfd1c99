"""The linear maps of a decode step on a GPU: our GEMM where it was measured to be faster, cuBLAS everywhere else.

Used by triton_ops.py. GEMMS says which tile a weight of some shape is multiplied with at how many rows, by which kernel
(`Tile`, `Stream`, `Primed`); what is not in it goes to cuBLAS. perf/gemm.py finds the tiles and prints the table, and
perf/step_tiles.py those that are fastest in a step. Nothing is tuned at run time. With a tile, the work between this
GEMM and the next is done in its epilogue: rotation and KV write, activation, residual and norm (`Heads`, `act`, `Add`);
a norm's division follows in the next GEMM (`Unscaled`).
Tried with a `Tile` on an H200 and not kept: asking the L2 for a large weight while the predecessor ends, or for the
next GEMM's, made steps slower (Qwen2-7B, 32 rows: 4.26 to 4.50 ms for 4.20; Qwen2-0.5B, 64 rows: 1.10 to 1.15 for
1.06). Of a small weight in one request a thread it pays (Tile.fetch: 1.052 ms for 1.061), and more where the weight
comes into shared memory (Primed: 0.94 ms).
Invariant: a call does no host synchronisation and launches what depends on shapes only, so it can be captured.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gemm_kernels import linear_kernel
from .kv_cache import saturation
from .packed_gemm import Float8Rows, Packed
from .panel_gemm import Panel
from .panel_gemm import gated as gated_by_panels
from .primed_gemm import MOST_ROWS, Primed, can_prime
from .primed_gemm import multiply as multiply_primed
from .row_gemm import OneRow
from .row_gemm import multiply as multiply_row
from .stream_gemm import Stream, multiply
from .tuned_gemm import TunedGemms, by_torch
from .wide_gemm import Wide
from .wide_gemm import multiply as multiply_wide

T = TypeVar("T")
EARLY_BYTES: Final = 32 << 20
"""With PDL, the successor of a GEMM with a weight up to this may be launched at once, else when that has been read."""
FEW_PACKED_ROWS: Final = 16
"""Most rows of a tile of a quantized weight that takes pairs of a head."""
MAX_TILES: Final = 4096
"""Most tiles of a GEMM that is split along K."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A configuration of `linear_kernel`; the numbers are elements."""

    rows: int
    """Rows of x of a program: 16 or more (8 of a quantized weight), padded; or 1, multiplied without tensor cores."""
    outputs: int
    """Rows of the weight of a program."""
    depth: int
    """Columns of a pipeline stage."""
    split: int = 1
    """Programs that share a tile, each with its part of the columns."""
    warps: int = 4
    stages: int = 4
    swap: bool = True
    """The weight is the left operand of the tensor cores."""
    tma: bool = False
    ahead: int = 0
    """With PDL: stages of the weight that are loaded, into registers, before the predecessor ends; of a quantized
    weight, into the L2, a power of two. Not with tma."""
    fetch: bool = False
    """With PDL: the L2 is asked for the rest of the weight before the predecessor ends. Not of a quantized weight."""
    whole: int = 0
    """With split, of a quantized weight: so many tiles are not; see work_of in gemm_kernels.py."""
    slices: int = 1
    """Of a quantized weight: parts of the steps, each a warp's (as many as warps), that a program adds up itself. With
    PDL the words of each one's first stages - 1 steps are loaded before the predecessor ends."""
    registers: int = 0
    """Most registers of a thread; 0: as many as the compiler likes."""


Ahead = Primed | OneRow | Wide
"""Those whose weight is on its way before x is there; each names a tile for what it has no kernel for."""
Choice = Tile | Stream | Ahead
Choices = tuple[tuple[int, Choice | None], ...]
"""(most rows, tile) in rising order, None for cuBLAS; cuBLAS above the last."""

# fmt: off
GEMMS: Final[dict[tuple[int, int], Choices]] = {
    (3584, 3584): ((1, Tile(16, 64, 256, 2, 4, 3)), (32, Stream(32, 64, 256, 132, swap=True))),
    (37888, 3584): (
        (16, Stream(16, 128, 128, 132, 4, 5, True)), (32, Stream(32, 128, 128, 132, 4, 5, True)),
        (64, Stream(64, 128, 64, 264)),
    ),
    (3584, 18944): (
        (16, Stream(16, 64, 128, 396, 4, 3, True)), (32, Stream(32, 64, 128, 396, 4, 3, True)),
        (64, Stream(64, 64, 128, 264, 4, 3)),
    ),
    (4608, 3584): ((16, Stream(16, 128, 128, 264, 4, 3, True)), (32, Stream(32, 128, 128, 264, 4, 2, True))),
    (152064, 3584): ((1, Tile(16, 64, 128, 1, 4, 4)), (32, Tile(32, 64, 128, 1, 4, 4, tma=True))),
    (9728, 896): (
        (1, Tile(1, 8, 512, 1, 2, 3, ahead=2)), (16, Tile(16, 128, 64, 1, 4, 6, tma=True)),
        (64, Primed(64, 64, 64, Tile(64, 128, 64, 1, 4, 6, swap=False, tma=True), 7, 3)),
    ),
    (896, 4864): (
        (1, Tile(1, 4, 1024, 1, 4, 3, ahead=5)), (16, Tile(16, 64, 128, 8, 4, 4, tma=True)),
        (64, Primed(64, 64, 128, Tile(64, 16, 128, 4, 4, 5, swap=False, tma=True), 5, 3, 8)),
    ),
    (1152, 896): (
        (1, Tile(1, 8, 512, 1, 2, 3, ahead=2)), (56, Primed(16, 64, 128, Tile(16, 64, 128, 1, 4, 7))),
        (64, Primed(32, 64, 64, Tile(16, 64, 128, 1, 4, 7))),
    ),
    (896, 896): (
        (1, Tile(1, 8, 512, 1, 2, 3, ahead=2)), (64, Primed(16, 64, 128, Tile(16, 64, 128, 1, 4, 7, fetch=True))),
    ),
    (151936, 896): (
        (1, Tile(1, 8, 1024, 1, 4, 3)), (16, Tile(16, 64, 128, 1, 4, 4, tma=True)),
        (64, Tile(64, 64, 64, 1, 4, 4, tma=True)),
    ),
}
"""By (outputs, inputs) of the weight."""
# fmt: on


PARTS: Final[dict[tuple[int, int], tuple[tuple[int, int], ...]]] = {(3584, 18944): ((64, 1), (256, 2))}
"""Into how many parts of its columns cuBLAS's product is cut, which the norm after it adds up: (most rows, parts).

cuBLAS cuts this one itself, and launches a kernel that adds up. A step of Qwen2-7B at 128 rows takes 2.1 % less so.
"""

Panels = tuple[tuple[int, Panel | None], ...]
"""(most rows, panel) in rising order, None for what GEMMS says; so it is above the last."""
PANELS: Final[dict[tuple[int, int], Panels]] = {
    (37888, 3584): ((64, None), (128, Panel(144, 4))),
}
"""What multiplies gate and up instead of cuBLAS and the activation's kernel.

A step of Qwen2-7B on an H200 takes 118 us less so at 96 rows and 86 at 128; at 256, in two panels of rows, 320 more.
"""


def choose(choices: Iterable[tuple[int, T]], rows: int) -> T | None:
    """What a table says of this many rows, None above its last: of `Choices` the tile, None for cuBLAS."""
    return next((choice for most, choice in choices if rows <= most), None)


def unprimed(choices: Choices, which: Callable[[Ahead], bool] = lambda ahead: True) -> Choices:
    """The choices for GPUs and weights without the kernels of `which` of the Primed, OneRow and Wide."""
    return tuple((most, c.plain if isinstance(c, Ahead) and which(c) else c) for most, c in choices)


def stream_rows(outputs: int, inputs: int) -> int:
    """Up to how many rows a weight [outputs, inputs] is multiplied by streams; 0 without."""
    choices = GEMMS.get((outputs, inputs), ())
    return max((most for most, choice in choices if isinstance(choice, Stream)), default=0)


def arrivals(device: torch.device) -> Tensor:
    """The counters of split GEMMs, shared by all that run one after another: int32 [MAX_TILES], zero between them."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@dataclass(slots=True)
class Unscaled:
    """Hidden states between the two halves of a norm: the rows' division by their root mean square is outstanding."""

    x: Tensor
    """[T, hidden], times the norm's weight."""
    squares: Tensor
    """float32 [T, parts]: sums of squares of parts of the rows before that."""
    eps: float

    def __len__(self) -> int:
        return len(self.x)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device


@dataclass(slots=True)
class Add:
    """Epilogue: the product, times `scale`, is added to the residual, and the sum prepared for a norm with `gain`."""

    residual: Tensor
    scale: float
    gain: Tensor
    new_residual: Tensor
    squares: Tensor
    """float32 [T, tiles of the outputs]"""


@dataclass(slots=True)
class Heads:
    """Epilogue of a QKV product: QK-norm, rotation, keys and values to the cache. See Ops.heads."""

    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool
    qk_norm: Tensor | None
    eps: float
    table: Tensor | None
    kv_slots: Tensor
    kv_rows: Tensor

    def fits(self, tile: Choice, weight: Tensor | Packed) -> bool:
        """Whether a tile has whole heads, or pairs of one.

        Of a quantized weight with many rows none has pairs: their epilogue has no registers left for it.
        """
        size, outputs = self.head_dim, tile.outputs
        if size & (size - 1):
            return False
        if isinstance(tile, Ahead):
            return self.fits(tile.plain, weight)
        if isinstance(tile, Stream):
            return outputs % size == 0
        few = isinstance(weight, Tensor) or tile.rows <= FEW_PACKED_ROWS
        pairs = few and not self.interleaved and self.qk_norm is None and not tile.tma
        return outputs % size == 0 or (pairs and size % outputs == 0)


def fits(tile: Choice, outputs: int, inputs: int, rows: int) -> bool:
    """Whether `tile` can multiply a weight [outputs, inputs] with this many rows."""
    if isinstance(tile, Stream):
        return tile.programs <= MAX_TILES
    if isinstance(tile, Primed):
        return tile.fits(outputs, inputs) and rows <= MOST_ROWS and fits(tile.plain, outputs, inputs, rows)
    if isinstance(tile, OneRow | Wide):
        return rows <= tile.rows and fits(tile.plain, outputs, inputs, rows)
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows)
    return (tile.split == 1 or tiles <= MAX_TILES) and not (tile.tma and tile.ahead)


def linear(
    x: Tensor | Unscaled | Float8Rows,
    weight: Tensor | Packed,
    bias: Tensor | None,
    tile: Choice,
    arrived: Tensor,
    pdl: bool,
    dtype: torch.dtype | None = None,
    act: str = "",
    add: Add | None = None,
    heads: Heads | None = None,
) -> Tensor:
    """x [rows, inputs] @ weight [outputs, inputs].T + bias, in `dtype` (x's); contiguous, `tile` fits.

    A quantized weight is multiplied in steps of `tile.depth` words. One epilogue at most. With `act`, act(first half) *
    second half; with `add`, what an Unscaled holds; with `heads`, the queries. `pdl`: launch before the predecessor
    ends.
    """
    if isinstance(tile, Ahead) and not tile.takes(len(x), bias, act, add, heads):
        tile = tile.plain
    norm, x = (x, x.x) if isinstance(x, Unscaled) else (None, x)
    columns = heads.heads * heads.head_dim if heads else len(weight) // (2 if act else 1)
    out = torch.empty(len(x), columns, dtype=dtype or x.dtype, device=x.device)
    after = _epilogue_arguments(norm, add, heads)
    epilogue = {"ACT": act, **_epilogue_constants(norm, add, heads)}
    LAUNCHES[type(tile)](x, weight, bias, out, tile, arrived, pdl, after, epilogue)
    return out


def _by_tile(
    x: Tensor | Float8Rows, weight: Tensor | Packed, bias: Tensor | None, out: Tensor, tile: Tile, arrived: Tensor,
    pdl: bool, after: tuple[Any, ...], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    """Launch linear_kernel, or a quantized weight's."""
    rows, inputs = x.shape
    halves = 2 if epilogue["ACT"] else 1
    outputs, width = len(weight) // halves, tile.outputs // halves
    early = int(weight.nbytes <= EARLY_BYTES)
    tiles = triton.cdiv(outputs, width) * triton.cdiv(rows, tile.rows)
    parts = None
    whole = min(tile.whole, tiles)
    if tile.split > 1:
        count = (tiles - whole) * tile.split * tile.rows * tile.outputs
        parts = torch.empty(count, dtype=torch.float32, device=x.device)
    options = {
        "BM": tile.rows, "BN": width, "SPLIT": tile.split, "BIAS": bias is not None, "PDL": pdl, **epilogue,
        "num_warps": tile.warps, "num_stages": tile.stages,
        **({"launch_pdl": True} if pdl else {}), **({"maxnreg": tile.registers} if tile.registers else {}),
    }  # fmt: skip
    if isinstance(weight, Packed):
        before = (x, bias, out, parts, arrived, rows, outputs, early)
        options |= weight.constants(tile.depth) | {"STAGES": tile.stages, "AHEAD": tile.ahead, "WHOLE": whole}
        options["SLICES"] = tile.slices
        grid = (whole + (tiles - whole) * tile.split, 1) if whole else (tiles, tile.split)
        weight.launch(grid, before, after, **options)
        return
    x_blocks = w_blocks = None
    if tile.tma:
        x_blocks = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
        w_blocks = TensorDescriptor.from_tensor(weight, [width, tile.depth])
    share = triton.cdiv(triton.cdiv(inputs, tile.depth), tile.split)
    linear_kernel[(tiles, tile.split)](
        x, weight, x_blocks, w_blocks, bias, out, parts, arrived, rows, outputs, inputs, early, *after,
        BK=tile.depth, SWAP=tile.swap, TMA=tile.tma, EVEN=inputs % tile.depth == 0, AHEAD=min(tile.ahead, share),
        LOOP=share > tile.ahead, FETCH=tile.fetch,
        STAGES=tile.stages if tile.rows == 1 else None, **options,
    )  # fmt: skip


LAUNCHES: Final[dict[type[Choice], Callable[..., None]]] = {
    Tile: _by_tile, Stream: multiply, Primed: multiply_primed, OneRow: multiply_row, Wide: multiply_wide,
}  # fmt: skip
"""What multiplies with each kind of configuration."""


def _epilogue_arguments(norm: Unscaled | None, add: Add | None, heads: Heads | None) -> tuple[Any, ...]:
    """The part of `linear_kernel`'s arguments from `squares` to `kv_heads`."""
    of_norm = (norm.squares, norm.squares.shape[1], norm.eps) if norm else (None, 0, 0.0)
    of_add = (
        (add.residual, add.scale, add.gain, add.new_residual, add.squares) if add else (None, 1.0, None, None, None)
    )
    if heads is None:
        return (*of_norm, *of_add, None, 0.0, None, None, None, 0, 0, 0)
    return (
        *of_norm, *of_add, heads.qk_norm, heads.eps, heads.table, heads.kv_slots, heads.kv_rows,
        heads.kv_rows.stride(0), heads.heads, heads.kv_heads,
    )  # fmt: skip


def _epilogue_constants(norm: Unscaled | None, add: Add | None, heads: Heads | None) -> dict[str, Any]:
    """The constants of `linear_kernel` that say which epilogue it has."""
    return {
        "SQUARES": triton.next_power_of_2(norm.squares.shape[1]) if norm else 0,
        "ADD": add is not None,
        "HEADS": heads is not None,
        "D": heads.head_dim if heads else 0,
        "QK_NORM": heads is not None and heads.qk_norm is not None,
        "ROTATE": heads is not None and heads.table is not None,
        "INTERLEAVED": heads is not None and heads.interleaved,
        "KV_LIMIT": int(saturation(heads.kv_rows.dtype) or 0) if heads else 0,
    }


def can_multiply(weight: Tensor) -> bool:
    """Whether `linear` is for this weight at all: 16-bit (wider is not faster than cuBLAS), aligned, contiguous."""
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and weight.shape[1] % 16 == 0
    )


class TritonLinear:
    """x [T, in] -> [T, out] with weight [out, in]; float32 results with dtype=torch.float32; PDL up to `pdl_rows`.

    A quantized weight comes with `choices` of its own; where those end, it says itself how it is multiplied. The other
    methods are for as many rows as there is a `tile` for.
    """

    __slots__ = ("arrived", "bias", "choices", "dtype", "panels", "pdl_rows", "tuned", "weight")

    def __init__(
        self,
        weight: Tensor | Packed,
        bias: Tensor | None,
        arrived: Tensor,
        pdl_rows: int,
        dtype: torch.dtype | None = None,
        gemms: dict[tuple[int, int], Choices] = GEMMS,
        tuned: TunedGemms | None = None,
        choices: Choices = (),
        panels: dict[tuple[int, int], Panels] = PANELS,
    ) -> None:
        self.weight, self.bias, self.arrived, self.pdl_rows, self.dtype = weight, bias, arrived, pdl_rows, dtype
        self.panels: Panels = ()
        if isinstance(weight, Packed):
            self.choices, self.tuned = choices, None
            return
        outputs, inputs = weight.shape
        self.choices = gemms.get((outputs, inputs), ()) if can_multiply(weight) else ()
        primes = can_prime(weight) and dtype is None
        if primes and bias is None and can_multiply(weight):
            self.panels = panels.get((outputs, inputs), ())
        if not primes:
            self.choices = unprimed(self.choices)
        elif bias is not None:  # only the kernel for all of a weight adds one
            self.choices = unprimed(self.choices, lambda ahead: isinstance(ahead, Primed) and ahead.weights > 0)
        self.tuned = tuned if can_multiply(weight) else None
        if self.tuned is not None:
            self.tuned.register(weight, bias, dtype or weight.dtype)

    def tile(self, rows: int) -> Choice | None:
        """What this many rows are multiplied with, None for cuBLAS."""
        return choose(self.choices, rows) if rows else None

    def programs(self, rows: int) -> int:
        """Programs that multiply this many rows; 0 without a tile."""
        tile = self.tile(rows)
        return triton.cdiv(len(self.weight), tile.outputs) * triton.cdiv(rows, tile.rows) if tile else 0

    def panel(self, rows: int) -> Panel | None:
        """What `gated` multiplies this many rows with, None for a tile or cuBLAS."""
        return choose(self.panels, rows) if rows else None

    def parts(self, rows: int) -> int:
        """Into how many parts `in_parts` is to cut a product of this many rows; 1: it is to be one."""
        if isinstance(self.weight, Packed) or self.bias is not None or self.tile(rows) is not None:
            return 1
        outputs, inputs = self.weight.shape
        return choose(PARTS.get((outputs, inputs), ()), rows) or 1

    def in_parts(self, x: Tensor, parts: int) -> Tensor:
        """float32 [parts, T, out]: what each part of the columns adds to the product."""
        assert isinstance(self.weight, Tensor)
        (rows, inputs), outputs = x.shape, len(self.weight)
        left = x.contiguous().view(rows, parts, inputs // parts).transpose(0, 1)
        right = self.weight.view(outputs, parts, inputs // parts).permute(1, 2, 0)
        if x.is_cuda:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left.float(), right.float())

    def float8_rows(self, rows: int) -> Packed | None:
        """The weight, if it is multiplied with float8 inputs at this many rows."""
        weight = self.weight
        return weight if isinstance(weight, Packed) and weight.takes_float8(rows) else None

    def __call__(self, x: Tensor | Unscaled | Float8Rows) -> Tensor:
        if self.tile(len(x)) is not None:
            return self._run(x)
        if isinstance(x, Float8Rows):  # who makes them has asked whether they are wanted
            assert isinstance(self.weight, Packed)
            return self.weight.multiply_float8(x, self.bias, self.dtype or self.weight.dtype)
        assert isinstance(x, Tensor)  # who makes an Unscaled has asked for a tile
        dtype = self.dtype or x.dtype
        if isinstance(self.weight, Packed):
            return self.weight.multiply(x, self.bias, dtype)
        out = None if self.tuned is None else self.tuned.multiply(x, self.weight, self.bias, dtype)
        return by_torch(x, self.weight, self.bias, dtype) if out is None else out

    def gated(self, x: Tensor | Unscaled | Float8Rows, act: str) -> Tensor:
        """act(gate) * up of the product [T, 2 * inter]; returns [T, inter]. For as many rows as have a panel, too."""
        panel = self.panel(len(x))
        if panel is not None:
            assert isinstance(x, Tensor) and isinstance(self.weight, Tensor)  # without a tile x is not Unscaled
            return gated_by_panels(x.contiguous(), self.weight, act, panel)
        return self._run(x, act=act)

    def add(self, x: Tensor, residual: Tensor, scale: float, gain: Tensor, eps: float) -> tuple[Unscaled, Tensor]:
        """Return (norm of r with weight `gain`, r) with r = residual + scale * product."""
        tile = self.tile(len(x))
        assert tile is not None
        parts = triton.cdiv(len(self.weight), tile.outputs)
        squares = torch.empty(len(x), parts, dtype=torch.float32, device=x.device)
        residual = residual.contiguous()
        add = Add(residual, scale, gain, torch.empty_like(residual), squares)
        return Unscaled(self._run(x, add=add), squares, eps), add.new_residual

    def heads(self, x: Tensor | Unscaled | Float8Rows, heads: Heads) -> Tensor:
        """The queries [T, H, D] of a QKV product; keys and values are written."""
        return self._run(x, heads=heads).view(len(x), heads.heads, heads.head_dim)

    def _run(
        self, x: Tensor | Unscaled | Float8Rows, act: str = "", add: Add | None = None, heads: Heads | None = None
    ) -> Tensor:
        tile = self.tile(len(x))
        assert tile is not None
        pdl = len(x) <= self.pdl_rows
        if isinstance(x, Tensor):
            float8 = self.float8_rows(len(x))
            x = x.contiguous() if float8 is None else float8.quantised(x, pdl=pdl)
        return linear(x, self.weight, self.bias, tile, self.arrived, pdl, self.dtype, act, add, heads)
