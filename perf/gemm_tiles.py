"""Which tiles are worth measuring: the weights of a model as cases, and for each some tiles by the number of rows.

Used by perf/gemm.py, which times them. A case knows what follows its product in a layer, since that is done in the
tile's epilogue. Invariant: every candidate fits the weight, has whole heads where it must, and fits an SM.
"""

from dataclasses import dataclass, replace

from actorserve.models.families import spec_of
from actorserve.models.gemm import MAX_TILES, Tile, fits
from actorserve.models.shapes import KNOWN
from actorserve.models.stream_gemm import Stream

CHUNK = 32
SHARED = 227 << 10
"""Bytes of shared memory that a program may have."""
AHEAD_BYTES = 320
"""Bytes of weight that a thread may hold in registers while it waits for the predecessor."""


@dataclass(frozen=True)
class Case:
    """A weight of a model, and what follows: `heads`, `add` (and norm), `gated` or `logits` (float32)."""

    model: str
    name: str
    outputs: int
    inputs: int
    follows: str
    head_dim: int

    @property
    def weight_bytes(self) -> int:
        return 2 * self.outputs * self.inputs

    @property
    def normed(self) -> bool:
        """Its input comes from a norm."""
        return self.follows != "add"


def cases(model: str) -> list[Case]:
    """A model's weights, those first that a step spends most on."""
    spec = spec_of(KNOWN[model])
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    found = [
        ("gate_up", 2 * spec.inter, spec.hidden, "gated"),
        ("down", spec.hidden, spec.inter, "add"),
        ("qkv", q + 2 * kv, spec.hidden, "heads"),
        ("o", spec.hidden, q, "add"),
        ("head", spec.vocab, spec.hidden, "logits"),
    ]
    return [Case(model, name, outputs, inputs, follows, spec.head_dim) for name, outputs, inputs, follows in found]


def bases(rows: int) -> list[Tile]:
    """Tiles for tensor cores at this many rows, before splitting: (rows, outputs, depth, split, warps, stages, ...)."""
    if rows <= 16:
        return [
            Tile(16, 64, 128, 1, 4, 4),
            Tile(16, 64, 128, 1, 4, 4, ahead=2),
            Tile(16, 64, 128, 1, 4, 5, tma=True),
            Tile(16, 32, 256, 1, 4, 4, ahead=1),
            Tile(16, 128, 128, 1, 4, 4, ahead=1),
            Tile(16, 64, 256, 1, 4, 3),
            Tile(16, 16, 256, 1, 2, 5, ahead=1),
        ]
    if rows <= 32:
        return [
            Tile(32, 64, 128, 1, 4, 4),
            Tile(32, 64, 128, 1, 4, 4, ahead=1),
            Tile(32, 64, 128, 1, 4, 4, tma=True),
            Tile(32, 128, 64, 1, 4, 5),
            Tile(32, 64, 256, 1, 4, 3),
            Tile(32, 32, 128, 1, 2, 5),
        ]
    if rows <= 64:
        return [
            Tile(64, 128, 64, 1, 4, 5, tma=True),
            Tile(64, 64, 128, 1, 4, 3, ahead=1),
            Tile(64, 64, 64, 1, 4, 6, tma=True),
            Tile(64, 128, 128, 1, 8, 3, tma=True),
            Tile(64, 64, 128, 1, 4, 3),
            Tile(64, 128, 64, 1, 4, 4),
            Tile(64, 128, 128, 1, 4, 3, swap=False, tma=True),
            Tile(32, 64, 128, 1, 4, 4, tma=True),
            Tile(16, 64, 128, 1, 4, 7),
            Tile(16, 64, 128, 1, 4, 7, fetch=True),
            Tile(64, 16, 128, 1, 4, 7, swap=False),
            Tile(64, 16, 128, 1, 4, 4, swap=False, tma=True),
            Tile(64, 128, 64, 1, 4, 5, swap=False, tma=True),
        ]
    if rows <= 128:
        return [
            Tile(128, 128, 64, 1, 8, 6, swap=False, tma=True),
            Tile(128, 256, 64, 1, 8, 4, swap=False, tma=True),
            Tile(128, 128, 64, 1, 8, 4, tma=True),
            Tile(128, 64, 128, 1, 4, 4, swap=False, tma=True),
        ]
    return [
        Tile(128, 256, 64, 1, 8, 4, swap=False, tma=True),
        Tile(256, 128, 64, 1, 8, 4, swap=False, tma=True),
        Tile(256, 128, 64, 1, 8, 4, tma=True),
        Tile(128, 128, 64, 1, 4, 3, swap=False, tma=True),
        Tile(128, 256, 64, 1, 8, 4, tma=True),
        Tile(128, 128, 128, 1, 8, 3, swap=False, tma=True),
    ]


def single_row(case: Case, sms: int) -> list[Tile]:
    """Tiles without tensor cores (of heads: some pairs of one), each warp with 256 columns.

    As much of the weight is loaded ahead as a thread may hold.
    """
    found = []
    for warps, outputs in ((4, 8), (4, 4), (4, 16), (2, 8), (2, 4), (8, 4), (8, 8), (2, 16)):
        if (case.follows == "logits" and outputs < 8) or (case.follows == "heads" and case.head_dim % outputs):
            continue
        outputs *= 2 if case.follows == "gated" else 1
        depth = 256 * warps
        tiles, steps = -(-case.outputs // outputs), -(-case.inputs // depth)
        for split in whole_splits(steps)[:3]:
            if tiles <= MAX_TILES and (split == 1 or split * tiles <= 4 * sms):
                ahead = min(-(-steps // split), AHEAD_BYTES // (16 * outputs))
                found.append(Tile(1, outputs, depth, split, warps, 3, ahead=ahead))
            elif split == 1:
                found.append(Tile(1, outputs, depth, split, warps, 3))
    return [tile for tile in found if shared_bytes(tile) <= SHARED]


def whole_splits(steps: int) -> list[int]:
    """Numbers of parts of `steps` steps of which none is left empty."""
    return [s for s in range(1, min(steps, 16) + 1) if -(-steps // -(-steps // s)) == s]


def shared_bytes(tile: Tile) -> int:
    return 2 * tile.stages * tile.depth * (tile.rows + tile.outputs)


def splits(tile: Tile, case: Case, rows: int, sms: int) -> list[int]:
    """Numbers of parts that make about as many programs as are resident at once."""
    tiles = -(-case.outputs // tile.outputs) * -(-rows // tile.rows)
    if tiles >= 2 * sms or tiles > MAX_TILES:
        return [1]
    resident = sms * max(1, min(SHARED // shared_bytes(tile), 12 // tile.warps))
    filling = [s for s in whole_splits(-(-case.inputs // tile.depth)) if s * tiles <= resident] or [1]
    return filling[-2:]


def packed_candidates(case: Case, rows: int, sms: int, kind: str, group: int) -> list[Tile]:
    """Tiles to try for a quantized weight, `depth` in words of 32 to a chunk (models/packed_gemm.py).

    Up to 16 rows a warp has 32 outputs, and fewer than 4 warps multiply without waiting for one another.
    """
    unit = CHUNK * (4 if kind == "int4" else 2)
    width = -(-case.inputs // unit) * CHUNK
    deep = kind != "int4" and (not group or group % (2 * unit) == 0)
    depth = 2 * CHUNK if deep else CHUNK
    few = rows <= 16
    shapes = ((32, 1), (64, 2), (128, 2), (128, 4)) if few else ((64, 4), (128, 4), (128, 8), (256, 8))
    found = []
    for outputs, warps in shapes:
        if case.follows == "heads" and outputs % case.head_dim and (not few or case.head_dim % outputs):
            continue
        for stages in (3, 4, 6) if few else (3, 4):
            tile = Tile(max(8, min(128, 1 << (rows - 1).bit_length())), outputs, depth, 1, warps, stages)
            tiles = -(-case.outputs // outputs) * -(-rows // tile.rows)
            most = min(MAX_TILES // tiles, max(1, (32 // warps if few else 4) * sms // tiles))
            parts = [s for s in whole_splits(-(-width // depth)) if s <= most] or [1]
            found += [replace(tile, split=s) for s in dict.fromkeys((parts[-1], parts[len(parts) // 2], parts[0]))]
            found += crowded(tile, tiles, sms)
    if rows <= 8 and width % depth == 0:
        found += [Tile(8, 32, depth, 1, slices, stages, slices=slices) for slices in (2, 4, 8) for stages in (4, 8)]
    return [tile for tile in found if 2 * tile.stages * (tile.outputs * tile.depth + tile.rows * 4 * CHUNK) <= SHARED]


def crowded(tile: Tile, tiles: int, sms: int) -> list[Tile]:
    """The same with fewer registers, so that more of its programs are on an SM; of many rows what is left is split."""
    if tile.rows <= 16:
        return [replace(tile, split=2, registers=96)] if tile.warps == 2 and tile.stages == 3 else []
    whole = tiles // sms * sms
    return [replace(tile, split=2, whole=whole, registers=168)] if tile.warps == 4 and 0 < whole < tiles else []


def candidates(case: Case, rows: int, sms: int) -> list[Tile]:
    """Tiles to try for a case; the head, where there is less to gain, gets a few only."""
    found = single_row(case, sms)[: 4 if case.follows == "logits" else None] if rows == 1 else []
    for base in bases(rows)[: 3 if case.follows == "logits" or rows == 1 else None]:
        if case.follows == "heads" and base.outputs % case.head_dim and (base.tma or case.head_dim % base.outputs):
            base = replace(base, outputs=case.head_dim, stages=max(2, base.stages - 1))
        if base.tma and case.inputs % base.depth:
            base = replace(base, depth=64, stages=min(6, 2 * base.stages))
        if shared_bytes(base) <= SHARED:
            found += [replace(base, split=s) for s in splits(base, case, rows, sms)]
    return [t for t in dict.fromkeys(found) if fits(t, case.outputs, case.inputs, rows)]


def streams(case: Case, rows: int, sms: int) -> list[Stream]:
    """Streams to try: tiles of different forms, and one to three programs on each multiprocessor."""
    padded = max(16, 1 << (rows - 1).bit_length())
    if padded > 128:
        return []
    shapes = [(128, 128, 1), (128, 128, 2), (128, 64, 2), (64, 256, 1), (64, 128, 2), (64, 128, 3), (256, 64, 1)]
    found = []
    for outputs, depth, resident in shapes:
        stages = min(6, (SHARED // resident - 1024) // (2 * depth * (padded + outputs)))
        fits_heads = case.follows != "heads" or outputs % case.head_dim == 0
        if fits_heads and stages >= 2 and (outputs < 256 or padded > 32):
            warps = 8 if padded * outputs > 16384 else 4
            found.append(Stream(padded, outputs, depth, resident * sms, warps, stages, padded <= 32))
    return found
