"""What perf/step_tiles.py tries for each kernel of a small model's layer at up to 64 rows."""

from dataclasses import replace
from typing import Final

from actorserve.models.gemm import Tile
from actorserve.models.triton_attention import Launch

SMS = 132


def _narrow() -> list[Tile]:
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
    return [*plain, *(replace(tile, fetch=True) for tile in plain), Tile(16, 64, 128, 1, 4, 3, ahead=3)]


def _gate_up() -> list[Tile]:
    plain = [
        Tile(64, 128, 64, 1, 4, 6, swap=False, tma=True),
        Tile(64, 128, 64, 1, 4, 4, swap=False, tma=True),
        Tile(64, 128, 64, 1, 4, 8, swap=False, tma=True),
        Tile(64, 128, 64, 1, 4, 5, swap=False),
        Tile(64, 128, 64, 1, 4, 6, swap=False),
    ]
    return [*plain, *(replace(tile, fetch=True) for tile in plain)]


def _down() -> list[Tile]:
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
    return [*plain, *(replace(tile, fetch=True) for tile in plain[:2])]


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


CANDIDATES: Final[dict[str, list[Tile] | list[Launch]]] = {
    "attention": _attention(), "qkv": _narrow(), "o": _narrow(), "gate_up": _gate_up(), "down": _down(),
}  # fmt: skip
