"""Which tile a quantized weight is multiplied with at how many rows, and from how many on it is unpacked instead.

Used by triton_ops.py. PACKED holds what was measured for some shapes; other shapes get tiles by rule. perf/gemm.py
finds the tiles and prints the table.
Invariant: every tile fits its weight: its steps are in one group, or one chunk.
"""

from typing import Final

import torch
import triton

from .gemm import MAX_TILES, Choices, Tile, unprimed
from .packed_gemm import CHUNK, Kind, Packed
from .primed_gemm import on_sm90
from .quantization import Scheme
from .row_gemm import OneRow
from .wide_gemm import STEP, Wide

PACKED: Final[dict[tuple[Kind, int, int], Choices]] = {
    ("int4", 37888, 3584): (
        (1, OneRow(256, 256, 3, Tile(8, 64, 32, 2, 2, 3, registers=96), 8, 132)),
        (8, Tile(8, 64, 32, 2, 2, 3, registers=96)), (16, Tile(16, 128, 32, 1, 4, 4)),
        (32, Wide(32, 132, 4, Tile(64, 128, 32, 2, 4, 3, whole=264, registers=168))),
        (64, Wide(64, 132, 4, Tile(64, 128, 32, 2, 4, 3, whole=264, registers=168))),
    ),
    ("int4", 3584, 18944): (
        (1, OneRow(128, 256, 3, Tile(8, 32, 32, 8, 1, 4), 14)),
        (8, Tile(8, 32, 32, 8, 1, 4)), (16, Tile(16, 64, 32, 8, 2, 4)), (64, Tile(64, 64, 32, 7, 4, 3)),
    ),
    ("int4", 4608, 3584): (
        (1, OneRow(128, 256, 3, Tile(8, 32, 32, 7, 1, 4, ahead=4), 7)),
        (8, Tile(8, 32, 32, 7, 1, 4, ahead=4)), (16, Tile(16, 128, 32, 7, 4, 4)), (64, Tile(64, 64, 32, 4, 4, 3)),
    ),
    ("int4", 3584, 3584): (
        (1, OneRow(64, 256, 2, Tile(8, 32, 32, 1, 4, 8, slices=4), 7)),
        (8, Tile(8, 32, 32, 1, 4, 8, slices=4)), (16, Tile(16, 64, 32, 7, 2, 4)), (64, Tile(64, 64, 32, 4, 4, 3)),
    ),
    ("fp8", 37888, 3584): (
        (1, OneRow(128, 128, 4, Tile(8, 128, 64, 1, 4, 4, ahead=4), 4, 132, 30)),
        (8, Tile(8, 128, 64, 1, 4, 4, ahead=4)), (16, Tile(16, 128, 64, 1, 4, 4)), (64, Tile(64, 128, 64, 1, 4, 3)),
    ),
    ("fp8", 3584, 18944): (
        (1, OneRow(64, 128, 6, Tile(8, 32, 64, 8, 1, 4), 7)),
        (8, Tile(8, 32, 64, 8, 1, 4)), (16, Tile(16, 128, 64, 8, 4, 4)), (64, Tile(64, 64, 128, 4, 4, 3)),
    ),
    ("fp8", 4608, 3584): (
        (1, OneRow(128, 128, 5, Tile(8, 128, 64, 2, 4, 4, ahead=8), 3)),
        (8, Tile(8, 128, 64, 2, 4, 4, ahead=8)), (16, Tile(16, 128, 64, 4, 4, 4)), (64, Tile(64, 128, 64, 2, 4, 4)),
    ),
    ("fp8", 3584, 3584): (
        (1, OneRow(64, 128, 7, Tile(8, 32, 64, 7, 1, 4), 4)),
        (8, Tile(8, 32, 64, 7, 1, 4)), (16, Tile(16, 64, 64, 4, 2, 4)), (64, Tile(64, 64, 128, 2, 4, 3)),
    ),
}  # fmt: skip
"""By kind, and outputs and inputs of the weight. Measured on an H200."""
LADDER: Final = (8, 16, 32, 64, 128, 256)
"""Most rows of each tile by rule."""
PROGRAMS: Final = {16: 396, 256: 264}
"""By most rows: that many programs at least keep an H200 busy, three or two for each SM."""
FEWEST_STEPS: Final = 2
"""A program takes so many at least: its pipeline has to fill."""
MOST_ROWS: Final = 256
"""Above, the weight is unpacked: one pass over 4.5 bytes a value, in the shade of the arithmetic."""
MOST_FLOAT8_ROWS: Final = 64
"""Above, float8 is multiplied by the library, whose tiles are for many rows."""


def choices_for(weight: Packed) -> Choices:
    """The tiles of a weight by the number of rows; above the last, `Packed.multiply`."""
    outputs, inputs = weight.shape
    measured = PACKED.get((weight.kind, outputs, inputs), ())
    ahead = on_sm90(weight.words.device)
    tiles = unprimed(measured)
    measured = unprimed(measured, lambda c: not (ahead and isinstance(c, OneRow | Wide) and c.fits(weight)))
    if not all(isinstance(tile, Tile) and weight.fits(tile.depth, tile.slices) for _, tile in tiles):
        measured = ()
    most, known = MOST_FLOAT8_ROWS if weight.quantises else MOST_ROWS, measured[-1][0] if measured else 0
    return measured + tuple((rows, by_rule(weight, rows)) for rows in LADDER if known < rows <= most)


def wide_rows(outputs: int, inputs: int, scheme: Scheme, device: torch.device) -> int:
    """Up to how many rows a weight of this scheme is multiplied by a Wide."""
    choices = PACKED.get(("int4", outputs, inputs), ()) if scheme.bits == 4 and scheme.group == STEP else ()
    wides = [rows for rows, choice in choices if isinstance(choice, Wide)]
    return max(wides, default=0) if on_sm90(device) else 0


def by_rule(weight: Packed, rows: int) -> Tile:
    """A tile for up to so many rows: 128 outputs, which whole heads fit into, and enough parts to keep a GPU busy."""
    outputs, width = weight.words.shape
    depth = 2 * CHUNK if weight.kind != "int4" and weight.fits(2 * CHUNK) else CHUNK  # 128 inputs
    tiles = triton.cdiv(outputs, 128) * triton.cdiv(rows, 128)
    steps = triton.cdiv(width, depth)
    wanted = next(programs for most, programs in PROGRAMS.items() if rows <= most)
    split = max(1, min(triton.cdiv(wanted, tiles), steps // FEWEST_STEPS))
    split = triton.cdiv(steps, triton.cdiv(steps, split))  # none is left without a step
    if split * tiles > MAX_TILES:
        split = 1
    return Tile(min(rows, 128), 128, depth, split, 4 if rows <= 64 else 8, 4 if rows <= 16 else 3)
