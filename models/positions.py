"""Positions of tokens in models that count them in three ways: an image's by frame, row and column (M-RoPE).

Used by image_features.py. Text has the same position three times, and counts on from one; an image's tokens begin where
the text before them ended, and the text behind begins after the highest of theirs (Qwen2-VL, 2024, section 2.1).
Invariant: positions follow from a sequence's spans alone, so from what the prefix cache knows it by.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class GridSpan(Protocol):
    """messages.ImageSpan."""

    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def grid(self) -> tuple[int, ...]:
        """Frames, rows and columns of its tokens; (): it counts on as text does."""

    @property
    def step(self) -> float:
        """Positions from one frame to the next."""


def shift_of(spans: Sequence[GridSpan]) -> int:
    """What is added to the number of a token behind all the spans, that it is its position."""
    return sum(_extent(span) - span.length for span in spans if span.grid)


def positions_between(spans: Sequence[GridSpan], start: int, stop: int) -> NDArray[np.int64]:
    """Positions int64 [3, stop - start] of a sequence's tokens; `spans` are in its order."""
    positions, shift = np.tile(np.arange(start, stop), (3, 1)), 0
    for span in spans:
        if span.start >= stop:
            break
        if not span.grid:
            continue
        begin, end = span.start + shift, span.start + span.length
        first, last = max(span.start, start), min(end, stop)
        if first < last:
            places = _grid(span)[:, first - span.start : last - span.start]
            positions[:, first - start : last - start] = begin + places
        shift += _extent(span) - span.length
        behind = max(end, start)
        positions[:, behind - start :] = np.arange(behind, stop) + shift
    return positions


def _extent(span: GridSpan) -> int:
    """How many positions a span takes."""
    _, rows, columns = span.grid
    return 1 + max(int(_times(span)[-1]), rows - 1, columns - 1)


def _grid(span: GridSpan) -> NDArray[np.int64]:
    """[3, length], counted from the span's own first position."""
    _, rows, columns = span.grid
    axes = np.meshgrid(_times(span), np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([axis.ravel() for axis in axes])


def _times(span: GridSpan) -> NDArray[np.int64]:
    return (np.arange(span.grid[0], dtype=np.float32) * np.float32(span.step)).astype(np.int64)
