"""Images and videos on the executor: which sequence has one where, the features that stand for its tokens' embeddings,
and the positions that tokens have because of them.

Used by the executor, told by the scheduler: what is kept here, and how long, is its decision (actors/image_store.py).
Images are encoded when the first chunk needs one of them, all that wait at once. Invariant: a slot's spans are those
of the request that was admitted to it last.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .positions import GridSpan, positions_between, shift_of
from .runner import ChunkWork
from .vision import Pixels, VisionTower


class Span(GridSpan, Protocol):
    """messages.ImageSpan."""

    @property
    def image(self) -> bytes: ...


@dataclass(slots=True)
class ImageFeatures:
    """The images of one executor."""

    tower: VisionTower
    waiting: dict[bytes, Pixels]
    features: dict[bytes, Tensor]
    spans: dict[int, tuple[Span, ...]]
    """By slot."""

    def take(self, message: Any) -> None:
        """An image has come, a messages.ImagePixels; its pixels are copied here."""
        dtype = np.uint8 if len(message.shape) == 2 else np.float32
        tiles = torch.from_numpy(np.frombuffer(message.pixels, dtype=dtype).reshape(message.shape).copy())
        self.waiting[message.image] = Pixels(tiles, message.size, message.alone, message.video)

    def drop(self, image: bytes) -> None:
        """Forget an image."""
        self.waiting.pop(image, None)
        self.features.pop(image, None)

    def clear(self) -> None:
        """Forget all: the scheduler that told of them died."""
        self.waiting.clear()
        self.features.clear()
        self.spans.clear()

    def admit(self, slot: int, spans: tuple[Span, ...]) -> int:
        """A sequence with these images, or none, takes a slot. Returns what its text's positions differ by behind."""
        self.spans.pop(slot, None)
        if spans:
            self.spans[slot] = spans
        return shift_of(spans)

    def apply(self, chunks: list[ChunkWork]) -> None:
        """Give chunks the features of their tokens that are images', and their positions."""
        for chunk in chunks:
            spans = self.spans.get(chunk.slot, ())
            if any(span.grid for span in spans):
                chunk.positions = positions_between(spans, chunk.start, chunk.start + len(chunk.ids))
        parts = [(chunk, span) for chunk in chunks for span in self.spans.get(chunk.slot, ()) if _touches(chunk, span)]
        if parts and self.waiting:
            self._encode()
        for chunk, span in parts:
            first, last = max(chunk.start, span.start), min(chunk.start + len(chunk.ids), span.start + span.length)
            rows = self.features[span.image][first - span.start : last - span.start]
            if not chunk.features:
                chunk.ids = chunk.ids.copy()
            chunk.ids[first - chunk.start : last - chunk.start] = 0
            chunk.features.append((first - chunk.start, rows))

    def _encode(self) -> None:
        found = self.tower.encode(list(self.waiting.values()))
        # Each on its own, or one that is kept would keep what was encoded with it.
        self.features |= {name: rows.clone() for name, rows in zip(self.waiting, found, strict=True)}
        self.waiting.clear()


def image_features(tower: VisionTower) -> ImageFeatures:
    """Those of an executor that has just started."""
    return ImageFeatures(tower, {}, {}, {})


def _touches(chunk: ChunkWork, span: Span) -> bool:
    return chunk.start < span.start + span.length and span.start < chunk.start + len(chunk.ids)
