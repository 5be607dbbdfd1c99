"""Batch: the explicit input of one forward. Nothing in the model code is read from anywhere else.

A forward runs a flat list of tokens: first the decode rows (one token of each decoding sequence), then the prefill
chunks one after another. KV lives in pages of `page_size` tokens; flat KV slot = page * page_size + offset.
Legend: T tokens, D decode rows, C chunks, P pages in a table row, R rows whose logits are wanted.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

TILE_QUERIES: Final = 64
"""Queries of a tile."""


@dataclass(slots=True)
class Chunk:
    """A run of tokens of one sequence: `length` new tokens after `start` tokens whose KV is in its pages."""

    start: int
    length: int
    pages: Tensor
    """[pages of the sequence] int32; covers start + length tokens."""


@dataclass(slots=True)
class Tiles:
    """Prefill chunks cut into tiles of TILE_QUERIES tokens of one sequence."""

    meta: Tensor
    """int32 [tiles, 4]: first of the T tokens, tokens left in the chunk, first position, first entry of `pages`. A tile
    of zeros does nothing."""
    pages: Tensor
    """int32, flat: the sequences' page lists."""


@dataclass(slots=True)
class Batch:
    """One forward. Lives on the model's device."""

    ids: Tensor
    """[T] int64 token ids: D decode tokens, then the chunks' tokens."""
    positions: Tensor
    """[T] int64 position of each token in its sequence; [3, T] where an image's tokens have three (Rope.sections)."""
    kv_slots: Tensor
    """[T] int64 flat KV slot where each token's key and value are written."""
    decode_tables: Tensor
    """[N, P] int32 page tables; entries beyond a sequence's length are any valid page."""
    decode_lengths: Tensor
    """[D] int32 tokens of each decode row, the new one included."""
    max_decode_length: int
    """Upper bound of decode_lengths, known on the host."""
    logit_rows: Tensor | None
    """[R] int64 indices into the T tokens whose logits are wanted; None: all."""
    chunks: list[Chunk] = field(default_factory=list)
    tiles: Tiles | None = None
    """The chunks where the host must not be asked for them (CUDA graphs); `chunks` is empty then."""
    decode_rows: Tensor | None = None
    """[D] int32 or int64: the row of decode_tables of each decode row; None: row i."""
    decode_lengths_host: np.ndarray | None = None
    """decode_lengths on the host, exact; only for attention backends that plan there (`needs_host_lengths`)."""
    features: tuple[Tensor, Tensor] | None = None
    """([n] int64 rows of the T tokens, [n, hidden]): what stands for their embeddings, those of images."""
    token_types: Tensor | None = None
    """[T] int64 type of each token, for models that know types (BERT's segments); None: all are of the first."""

    @property
    def num_decode(self) -> int:
        return self.decode_lengths.shape[0]


def tile_table(chunks: list[tuple[int, int, int]], row: int) -> np.ndarray:
    """Return Tiles.meta int32 [tiles, 4] of chunks (length, start, first entry in the pages); the first is at `row`."""
    parts = [np.empty((0, 4), dtype=np.int32)]
    for length, start, entry in chunks:
        begin = np.arange(0, length, TILE_QUERIES)
        table = np.stack([row + begin, length - begin, start + begin, np.full_like(begin, entry)], 1)
        parts.append(table.astype(np.int32))
        row += length
    return np.concatenate(parts)


def plain_batch(ids: list[int], start: int, pages: Tensor, page_size: int, all_logits: bool = False) -> Batch:
    """Return a batch of one chunk: `ids` at positions start, start + 1, ... (tests, warm-up, scoring)."""
    positions = torch.arange(start, start + len(ids), device=pages.device)
    kv_slots = pages.long()[positions // page_size] * page_size + positions % page_size
    empty = torch.empty(0, dtype=torch.int32, device=pages.device)
    return Batch(
        ids=torch.tensor(ids, device=pages.device),
        positions=positions,
        kv_slots=kv_slots,
        decode_tables=empty.view(0, 1),
        decode_lengths=empty,
        max_decode_length=0,
        logit_rows=None if all_logits else torch.tensor([len(ids) - 1], device=pages.device),
        chunks=[Chunk(start, len(ids), pages)],
    )
