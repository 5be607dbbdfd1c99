"""What perf/step_tiles.py tries for each kernel of a small model's layer at up to 64 rows."""

from dataclasses import replace
from typing import Final

from actorserve.models.gemm import Choice, Tile
from actorserve.models.primed_gemm import Primed
from actorserve.models.triton_attention import Launch

SMS = 132


def _narrow() -> list[Choice]:
    """For weights of about 900 inputs and outputs."""
    plain = [
        Tile(16, 64, 128, 1, 4, 7),
        Tile(16, 64, 128, 1, 4, 5),
        Tile(16, 64, 128, 1, 4, 4),
        Tile(16, 64, 128, 1, 4, 3),
        Tile(16, 64, 128, 1, 8, 7),
        Tile(32, 64, 128, 1, 4, 7),
        Tile(32, 64, 128, 1, 4, 5),
        Tile(64, 16, 128, 1, 4, 7, swap=False),
    ]
    primed = [Primed(rows, 64, depth, plain[0]) for rows, depth in ((16, 128), (16, 64), (32, 64), (32, 128))]
    return [*plain, *(replace(tile, fetch=True) for tile in plain), Tile(16, 64, 128, 1, 4, 3, ahead=3), *primed]


def _gate_up() -> list[Choice]:
    plain = [
        Tile(64, 128, 64, 1, 4, 6, swap=False, tma=True),
        Tile(64, 128, 64, 1, 4, 4, swap=False, tma=True),
        Tile(64, 128, 64, 1, 4, 8, swap=False, tma=True),
        Tile(64, 128, 64, 1, 4, 5, swap=False),
        Tile(64, 128, 64, 1, 4, 6, swap=False),
    ]
    primed = [
        Primed(64, outputs, depth, plain[0], weights, inputs)
        for outputs, depth, weights, inputs in (
            (64, 64, 7, 3), (64, 64, 6, 3), (64, 128, 3, 2), (128, 64, 10, 6), (128, 64, 8, 6), (128, 128, 5, 3),
        )
    ]  # fmt: skip
    return [*plain, *(replace(tile, fetch=True) for tile in plain), *primed]


def _down() -> list[Choice]:
    plain = [
        Tile(64, 16, 128, 4, 4, 5, swap=False, tma=True),
        Tile(64, 16, 128, 4, 4, 4, swap=False, tma=True),
        Tile(64, 16, 128, 4, 4, 7, swap=False, tma=True),
        Tile(64, 16, 64, 4, 4, 10, swap=False, tma=True),
        Tile(64, 16, 128, 5, 4, 5, swap=False, tma=True),
        Tile(64, 16, 128, 3, 4, 6, swap=False, tma=True),
        Tile(64, 32, 128, 4, 4, 5, swap=False, tma=True),
        Tile(32, 64, 128, 8, 4, 4, tma=True),
        Tile(64, 16, 128, 4, 4, 5, swap=False),
    ]
    primed = [
        Primed(64, outputs, depth, plain[0], weights, inputs, split)
        for outputs, depth, weights, inputs, split in (
            (64, 128, 5, 3, 8), (64, 128, 5, 5, 8), (64, 64, 10, 10, 8), (64, 128, 4, 3, 8), (32, 128, 10, 4, 4),
            (32, 128, 5, 3, 8), (64, 64, 5, 5, 16),
        )
    ]  # fmt: skip
    return [*plain, *(replace(tile, fetch=True) for tile in plain[:2]), *primed]


def _attention() -> list[Launch]:
    return [
        Launch(block, warps, stages, programs * SMS, 16, ahead)
        for block, warps, stages, programs, ahead in (
            (64, 4, 3, 4, 1), (64, 4, 2, 4, 1), (64, 4, 2, 4, 2), (64, 4, 5, 4, 0), (64, 4, 5, 4, 1),
            (64, 4, 3, 4, 0), (64, 4, 3, 8, 1), (64, 4, 3, 2, 1), (64, 8, 3, 2, 1), (64, 8, 2, 2, 2),
            (128, 4, 2, 4, 0), (128, 4, 2, 4, 1), (128, 8, 2, 2, 0), (128, 8, 2, 2, 1), (32, 4, 3, 4, 2),
            (32, 4, 2, 4, 4), (64, 2, 3, 4, 1), (64, 4, 3, 4, 2),
        )
    ]  # fmt: skip


CANDIDATES: Final[dict[str, list[Choice] | list[Launch]]] = {
    "attention": _attention(), "qkv": _narrow(), "o": _narrow(), "gate_up": _gate_up(), "down": _down(),
}  # fmt: skip
