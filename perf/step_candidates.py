"""What perf/step_tiles.py tries for each kernel of a small model's layer at up to 64 rows."""

from dataclasses import replace
from typing import Final

from actorserve.models.gemm import Tile
from actorserve.models.triton_attention import Launch

SMS = 132


def _narrow() -> list[Tile]:
    """For weights of about 900 inputs and outputs: all of a program's weight is loaded, or asked for, ahead."""
    plain = [
        Tile(16, 64, 128, 1, 4, 7),
        Tile(16, 64, 128, 1, 4, 4),
        Tile(16, 32, 128, 1, 4, 7),
        Tile(32, 32, 128, 1, 4, 5),
        Tile(32, 64, 128, 1, 4, 5),
        Tile(64, 32, 128, 1, 4, 4, swap=False),
        Tile(64, 16, 128, 1, 4, 5, swap=False),
        Tile(64, 64, 128, 1, 4, 4),
    ]
    ahead = [
        Tile(16, 32, 128, 1, 4, 2, ahead=7),
        Tile(16, 64, 128, 1, 8, 2, ahead=7),
        Tile(32, 32, 128, 1, 4, 2, ahead=7),
        Tile(64, 16, 128, 1, 4, 2, swap=False, ahead=7),
        Tile(64, 32, 128, 1, 8, 2, swap=False, ahead=7),
        Tile(16, 64, 128, 1, 4, 3, ahead=3),
    ]
    return [*plain, *(replace(tile, fetch=True) for tile in plain), *ahead]


def _gate_up() -> list[Tile]:
    plain = [
        Tile(64, 128, 64, 1, 4, 6, swap=False, tma=True),
        Tile(64, 128, 64, 1, 4, 4, swap=False, tma=True),
        Tile(64, 128, 128, 1, 4, 3, swap=False, tma=True),
        Tile(64, 128, 64, 1, 8, 6, swap=False, tma=True),
        Tile(64, 64, 64, 1, 4, 6, swap=False, tma=True),
        Tile(64, 64, 128, 1, 4, 3, swap=False, tma=True),
        Tile(64, 64, 128, 1, 4, 3, swap=False),
        Tile(64, 128, 64, 1, 4, 5, tma=True),
        Tile(64, 128, 64, 1, 4, 5, swap=False),
        Tile(32, 128, 128, 1, 4, 3, tma=True),
    ]
    ahead = [
        Tile(64, 64, 128, 1, 4, 2, swap=False, ahead=2),
        Tile(64, 64, 128, 1, 4, 2, swap=False, ahead=3),
        Tile(64, 64, 128, 1, 8, 2, swap=False, ahead=5),
        Tile(64, 128, 128, 1, 8, 2, swap=False, ahead=2),
        Tile(32, 128, 128, 1, 8, 2, ahead=3),
    ]
    return [*plain, *(replace(tile, fetch=True) for tile in plain), *ahead]


def _down() -> list[Tile]:
    plain = [
        Tile(64, 16, 128, 4, 4, 5, swap=False, tma=True),
        Tile(64, 16, 128, 2, 4, 6, swap=False, tma=True),
        Tile(64, 32, 128, 4, 4, 4, swap=False, tma=True),
        Tile(64, 32, 64, 4, 4, 8, swap=False, tma=True),
        Tile(64, 32, 128, 8, 4, 4, swap=False, tma=True),
        Tile(64, 64, 128, 4, 4, 4, tma=True),
        Tile(64, 64, 128, 8, 4, 4, tma=True),
        Tile(64, 64, 128, 8, 8, 4, swap=False, tma=True),
        Tile(64, 64, 64, 9, 4, 6, tma=True),
        Tile(32, 32, 128, 4, 4, 5, tma=True),
        Tile(32, 64, 128, 4, 4, 4, tma=True),
        Tile(32, 64, 128, 8, 4, 4, tma=True),
        Tile(16, 64, 128, 4, 4, 5, tma=True),
    ]
    plain += [
        Tile(64, 32, 128, 4, 4, 4, swap=False),
        Tile(64, 64, 128, 8, 4, 3, swap=False, scatter=True),
        Tile(64, 64, 128, 8, 4, 4, tma=True, scatter=True),
        Tile(64, 64, 128, 8, 4, 4, swap=False, tma=True, scatter=True),
        Tile(64, 64, 128, 8, 8, 4, swap=False, tma=True, scatter=True),
        Tile(64, 64, 64, 8, 4, 8, swap=False, tma=True, scatter=True),
        Tile(64, 32, 128, 4, 4, 4, swap=False, tma=True, scatter=True),
        Tile(64, 128, 128, 16, 8, 3, tma=True, scatter=True),
    ]
    ahead = [
        Tile(64, 32, 128, 4, 4, 3, swap=False, ahead=4),
        Tile(64, 32, 128, 4, 8, 3, swap=False, ahead=8),
        Tile(64, 64, 128, 8, 8, 2, ahead=4),
        Tile(32, 64, 128, 8, 4, 2, ahead=4),
        Tile(64, 64, 128, 8, 8, 2, ahead=4, scatter=True),
    ]
    return [*plain, *(replace(tile, fetch=True) for tile in plain), *ahead]


def _attention() -> list[Launch]:
    found = [Launch(64, 4, 3, 4 * SMS, 16, 1), Launch(64, 4, 2, 4 * SMS, 16, 2), Launch(64, 4, 2, 4 * SMS, 16, 4)]
    for block, warps, stages, programs, ahead in (
        (64, 4, 2, 4, 1), (64, 4, 3, 4, 1), (64, 4, 2, 4, 2), (32, 4, 2, 4, 2), (32, 4, 3, 4, 1), (32, 4, 2, 4, 4),
        (64, 4, 3, 2, 1), (64, 4, 5, 2, 1), (64, 8, 2, 2, 2), (64, 8, 3, 2, 1), (128, 8, 2, 2, 1), (64, 8, 2, 4, 2),
        (64, 8, 5, 1, 1), (128, 8, 3, 1, 1), (64, 4, 3, 4, 0), (128, 4, 2, 4, 1),
    ):  # fmt: skip
        packed = Launch(block, warps, stages, programs * SMS, 16, ahead, 2)
        found += [packed, replace(packed, fetch=True)]
    return found


def _head() -> list[Tile]:
    return [
        Tile(64, 64, 64, 1, 4, 4, tma=True),
        Tile(64, 128, 64, 1, 4, 4, tma=True),
        Tile(64, 128, 64, 1, 8, 4, tma=True),
        Tile(64, 128, 64, 1, 4, 4, swap=False, tma=True),
        Tile(64, 256, 64, 1, 8, 3, swap=False, tma=True),
        Tile(64, 64, 128, 1, 4, 3, tma=True),
        Tile(64, 128, 128, 1, 8, 3, tma=True),
    ]


CANDIDATES: Final[dict[str, list[Tile] | list[Launch]]] = {
    "attention": _attention(), "qkv": _narrow(), "o": _narrow(), "gate_up": _gate_up(), "down": _down(),
    "head": _head(),
}  # fmt: skip
