"""The batch on the device: slots with page tables and lengths, changed by deltas, advanced by steps.

Used by the executor actor. The scheduler never sends a batch, only what changed; a step reads the slot arrays, runs
one forward over the decoding slots and the prefill chunks, and advances lengths and last tokens on the device.
Invariant: `length` of a slot is the number of its tokens whose KV is in its pages.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Chunk
from .decoder import Decoder
from .kv_cache import KVCache


@dataclass(slots=True)
class ChunkWork:
    """A prefill chunk: these tokens follow what the slot has; with `draws` its last one's logits are wanted."""

    slot: int
    ids: np.ndarray
    draws: bool


@dataclass(slots=True)
class StepLogits:
    """Logits [rows, vocab] of the slots (int64 [rows]) at the positions (int64 [rows]) of the tokens to be drawn."""

    logits: Tensor
    slots: Tensor
    positions: Tensor


class Runner:
    """The executor's half of a request's state, by slot. Everything here can be rebuilt from the scheduler's."""

    def __init__(self, decoder: Decoder, kv: KVCache, max_slots: int, max_pages: int, page_size: int) -> None:
        self.decoder = decoder
        self.kv = kv
        self.page_size = page_size
        device = decoder.device
        self.tables = torch.zeros(max_slots, max_pages, dtype=torch.int32, device=device)
        self.length = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self.last = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self.limit = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self.page_counts = np.zeros(max_slots, dtype=np.int64)
        self.lengths = np.zeros(max_slots, dtype=np.int64)
        """`length` as the host knows it: exact on CPU, an upper bound where steps run ahead."""

    def admit(self, slot: int, pages: np.ndarray, cached: int, limit: int) -> None:
        """Seat a sequence: pages int32 [n], of which the first `cached` tokens have KV; ends at `limit` tokens."""
        self.tables[slot, : len(pages)] = torch.from_numpy(pages.copy()).to(self.tables.device)
        self.page_counts[slot] = len(pages)
        self.length[slot] = cached
        self.lengths[slot] = cached
        self.limit[slot] = limit

    def grow(self, slots: np.ndarray, pages: np.ndarray) -> None:
        """Append pages int32 [n] to the tables of slots int32 [n]; a slot may come several times."""
        for slot, page in zip(slots.tolist(), pages.tolist(), strict=True):
            self.tables[slot, self.page_counts[slot]] = page
            self.page_counts[slot] += 1

    def step(self, decoding: list[int], chunks: list[ChunkWork]) -> StepLogits:
        """Run one forward: the next token of each decoding slot, and the chunks.

        Lengths advance; the drawn tokens are handed in by `advance`.
        """
        device = self.length.device
        rows = torch.tensor(decoding, dtype=torch.int64, device=device)
        start = self.length[rows]
        ids, positions, owners = [self.last[rows]], [start], [rows]
        batch_chunks, wanted = [], list(range(len(decoding)))
        at = len(decoding)
        for c in chunks:
            first, n = int(self.lengths[c.slot]), len(c.ids)
            ids.append(torch.from_numpy(c.ids.astype(np.int64)).to(device))
            positions.append(torch.arange(first, first + n, device=device))
            owners.append(torch.full((n,), c.slot, dtype=torch.int64, device=device))
            pages = self.tables[c.slot, : -(-(first + n) // self.page_size)]
            batch_chunks.append(Chunk(first, n, pages))
            at += n
            if c.draws:
                wanted.append(at - 1)
            self.length[c.slot] += n
            self.lengths[c.slot] += n
        self.length[rows] += 1
        self.lengths[decoding] += 1
        batch = self._batch(rows, torch.cat(ids), torch.cat(positions), torch.cat(owners), decoding)
        batch.chunks = batch_chunks
        batch.logit_rows = torch.tensor(wanted, dtype=torch.int64, device=device) if chunks else None
        drawing = torch.tensor([c.slot for c in chunks if c.draws], dtype=torch.int64, device=device)
        slots = torch.cat([rows, drawing])
        logits = self.decoder.forward(batch, self.kv)
        return StepLogits(logits, slots, self.length[slots])

    def _batch(self, rows: Tensor, ids: Tensor, positions: Tensor, owners: Tensor, decoding: list[int]) -> Batch:
        longest = int(self.lengths[decoding].max()) if decoding else 0
        page = self.tables[owners, positions // self.page_size].to(torch.int64)
        return Batch(
            ids=ids,
            positions=positions,
            kv_slots=page * self.page_size + positions % self.page_size,
            decode_tables=self.tables[rows, : max(1, -(-longest // self.page_size))],
            decode_lengths=self.length[rows].to(torch.int32),
            max_decode_length=longest,
            logit_rows=None,
        )

    def advance(self, slots: Tensor, ids: Tensor) -> Tensor:
        """Take in drawn tokens int64 [rows]; return bool [rows]: the sequence is at its limit of tokens."""
        self.last[slots] = ids
        return self.length[slots] + 1 >= self.limit[slots]
