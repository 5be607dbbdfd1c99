"""A forward over decode rows and small prefill chunks whose shape and launches depend on a bucket alone.

Used by graphs.py: with everything that differs from step to step in one buffer, such a forward can be captured in a
CUDA graph, and a chunk beside decode rows costs what it computes instead of what it takes to launch.
Invariant: it computes what Runner.mixed computes; what pads the batch writes to the scratch page only.
Legend: R rows that draw a token (decode rows, then chunks that draw, then padding), C tokens of chunks.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from ..sampler.upload import upload
from .batch import TILE_QUERIES, Batch, Tiles, tile_table
from .runner import ChunkWork, Runner, StepLogits

MOST_CHUNKS: Final = 32
"""Chunks of one step; more run eagerly."""
LONGEST: Final = 16384
"""Tokens that a chunk may look back on: beyond this FlashInfer's attention gains more than launching a graph does."""
PREPARED: Final = -1
"""In the place of a draw position: the row is a decode row, its position is on the device."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape of a step."""

    rows: int
    tokens: int

    @property
    def tiles(self) -> int:
        """Tiles that hold any MOST_CHUNKS chunks of `tokens` tokens in all, and the padding."""
        return -(-self.tokens // TILE_QUERIES) + MOST_CHUNKS


class MixedStep:
    """The buffer of a bucket, and the forward that reads it."""

    def __init__(self, runner: Runner, bucket: Bucket) -> None:
        self.runner = runner
        self.bucket = bucket
        r, c = bucket.rows, bucket.tokens
        self._sizes = [r, r, r, r, c, runner.axes * c, c, 4 * bucket.tiles]
        self._buffer = torch.empty(sum(self._sizes), dtype=runner.index_dtype, device=runner.device)
        parts = torch.split(self._buffer, self._sizes)
        self.decoding, self.slots, self.wanted, self.draw_positions, self.ids, self.positions, self.kv_slots = parts[:7]
        self.tiles = parts[7].view(bucket.tiles, 4)
        self.clear()

    def clear(self) -> None:
        """Padding everywhere."""
        self.fill(np.empty(0, dtype=np.int64), [])

    @torch.inference_mode()
    def fill(self, decoding: np.ndarray, chunks: list[ChunkWork]) -> None:
        """Take in a step of the slots `decoding` and the chunks; the bucket holds them (`fits`)."""
        dtype = np.int64 if self._buffer.dtype == torch.int64 else np.int32
        self._buffer.copy_(upload(np.concatenate(self._parts(decoding, chunks)).astype(dtype), self.runner.device))

    def _parts(self, decoding: np.ndarray, chunks: list[ChunkWork]) -> list[np.ndarray]:
        r, slots = self.bucket.rows, self.runner.slots
        tokens, (wanted, drawing, draw_positions) = self.runner.chunk_inputs(chunks, r)
        begin, end = len(decoding), len(decoding) + len(drawing)
        rows = np.full(r, slots.padding)
        rows[:begin] = decoding
        drawn, logits, positions = rows.copy(), np.arange(r), np.full(r, PREPARED)
        drawn[begin:end], logits[begin:end], positions[begin:end] = drawing, wanted[r:], draw_positions
        width = slots.tables.shape[1]
        spare = self.bucket.tokens - sum(len(c.ids) for c in chunks)
        # tokens of padding are a chunk without keys: zeros come of it, not what the memory held (a NaN, in the end)
        table = tile_table([*((len(c.ids), c.start, c.slot * width) for c in chunks), (spare, -spare, 0)], r)
        tiles = np.zeros((self.bucket.tiles, 4), dtype=np.int32)
        tiles[: len(table)] = table
        ids, places, kv_slots = tokens
        axes = places.reshape(self.runner.axes, -1)
        padded = [self._padded(ids, 0), *(self._padded(axis, 0) for axis in axes)]
        padded.append(self._padded(kv_slots, slots.scratch_slot))
        return [rows, drawn, logits, positions, *padded, tiles.ravel()]

    def _padded(self, values: np.ndarray, filler: int) -> np.ndarray:
        return np.concatenate([values, np.full(self.bucket.tokens - len(values), filler)])

    def forward(self) -> StepLogits:
        """Run it; R logits. Reads nothing from the host."""
        runner = self.runner
        inputs = runner.slots.prepare(self.decoding)
        tables = runner.slots.tables
        batch = Batch(
            ids=torch.cat([inputs.ids, self.ids]),
            positions=runner.joined_positions(inputs.positions, self.positions),
            kv_slots=torch.cat([inputs.kv_slots, self.kv_slots]),
            decode_tables=tables,
            decode_rows=self.decoding,
            decode_lengths=inputs.lengths,
            max_decode_length=tables.shape[1] * runner.page_size,
            logit_rows=self.wanted,
            tiles=Tiles(self.tiles.to(torch.int32), tables.view(-1)),
        )
        given = self.draw_positions
        positions = torch.where(given == PREPARED, inputs.draw_positions, given)
        return StepLogits(runner.decoder.forward(batch, runner.kv), self.slots, positions)


def fits(decoding: np.ndarray, chunks: list[ChunkWork], largest: Bucket) -> bool:
    """Whether a step of these can run in a bucket up to `largest`: few chunks, short context, somebody draws.

    Chunks with targets run eagerly, for how many logits they want is not a bucket's, and those with images do.
    """
    rows = len(decoding) + sum(c.draws for c in chunks)
    return (
        0 < rows <= largest.rows
        and len(chunks) <= MOST_CHUNKS
        and sum(len(c.ids) for c in chunks) <= largest.tokens
        and all(c.start + len(c.ids) <= LONGEST and not len(c.targets) and not c.features for c in chunks)
    )
