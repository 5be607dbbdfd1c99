"""Runner: turns slots and prefill chunks into batches and runs forwards on them; the slot arrays are its state.

Used by the stepper. A decode step reads nothing from the host, so it can be captured in a CUDA graph; what a prefill
chunk needs is computed here from host mirrors and goes up in one copy.
Invariant: everything here can be rebuilt from what the scheduler sends.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..sampler.upload import upload
from .batch import Batch, Chunk
from .decoder import Decoder
from .kv_cache import KVCache
from .slots import DecodeInputs, SlotArrays

NOTHING: Final = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class ChunkWork:
    """These tokens follow the first `start` ones of a slot: of its prompt, or in a slot that decodes its last token and
    forced ones; with `draws` the last one's logits are wanted. `targets`: given tokens whose logprobs are wanted, those
    that follow the chunk's tokens from its `score_from`-th on. `ends`: the prompt ends here, and a vector of it is
    wanted, not a token."""

    slot: int
    start: int
    ids: np.ndarray
    draws: bool
    score_from: int = 0
    targets: np.ndarray = field(default_factory=lambda: NOTHING)
    ends: bool = False
    features: list[tuple[int, Tensor]] = field(default_factory=list)
    """Parts of images: (place in the chunk, features [n, hidden]); `ids` is 0 there."""
    positions: np.ndarray | None = None
    """int64 [3, n] in a slot with images, where the model has three positions; None: they are the tokens' numbers."""


@dataclass(slots=True)
class StepLogits:
    """Logits float32 [rows, vocab] of the slots [rows] at the positions [rows] of the tokens to be drawn."""

    logits: Tensor
    slots: Tensor
    positions: Tensor
    scored: Tensor | None = None
    """Normed hidden states [n, hidden] of the tokens before the chunks' targets, in their order, for Decoder.logits:
    logits of thousands of them would not fit."""


class Runner:
    """`kv` has one page more than the scheduler knows: the scratch page, its last."""

    def __init__(self, decoder: Decoder, kv: KVCache, max_slots: int, max_pages: int) -> None:
        self.decoder = decoder
        self.kv = kv
        self.page_size = kv.page_size
        self.device = decoder.device
        self.exact = self.device.type == "cpu" or getattr(decoder.attention, "needs_host_lengths", False)
        """The host is to know all lengths, and waits for each step: decode steps are given their rows on the host."""
        self.index_dtype = torch.int64 if decoder.device.type == "cpu" else torch.int32
        rope = decoder.spec.rope
        self.axes = 1 if rope is None or rope.sections is None else len(rope.sections)
        """Positions of a token."""
        self.slots = SlotArrays(max_slots, max_pages, kv.num_pages - 1, kv.page_size, decoder.device)
        self.lengths = np.zeros(max_slots + 1, dtype=np.int64)
        """`slots.length` as the host knows it: exact where steps do not run ahead, of no use elsewhere."""
        self.seconds = np.zeros(max_slots + 1, dtype=np.int64)
        """Where a slot's tokens of the second type begin; 0: nowhere."""

    def admit(self, slot: int, pages: np.ndarray, cached: int, limit: int, shift: int = 0, second: int = 0) -> None:
        """Seat a sequence; see SlotArrays.admit. Takes effect with `flush`.

        `second`: where tokens of the second type begin, for models that know types; 0: nowhere.
        """
        self.slots.admit(slot, pages, cached, limit, shift)
        self.lengths[slot] = cached
        self.seconds[slot] = second

    def upload_rows(self, rows: np.ndarray) -> Tensor:
        """Return slots [B] on the device, in the dtype that the steps use."""
        return upload(rows.astype(np.int64 if self.index_dtype == torch.int64 else np.int32), self.device)

    def written_slots(self, host_rows: np.ndarray, chunks: list[ChunkWork]) -> np.ndarray:
        """Return where the last forward put its tokens: KV slots int64 [n]. Only where the host's lengths are exact."""
        places = [(c.slot, np.arange(c.start, c.start + len(c.ids))) for c in chunks]
        places += [(row, self.lengths[row : row + 1] - 1) for row in host_rows.tolist()]
        size, tables = self.page_size, self.slots.host_tables
        parts = [tables[slot, at // size].astype(np.int64) * size + at % size for slot, at in places]
        return np.concatenate([NOTHING, *parts])

    # ------------------------------------------------------------------ decode

    def decode(self, rows: Tensor, host_rows: np.ndarray | None) -> StepLogits:
        """Run one decode step of the slots `rows` [B]. Without `host_rows` nothing on the host is looked at."""
        inputs = self.slots.prepare(rows)
        batch = self.decode_batch(rows, inputs)
        if host_rows is not None:
            self._add_host_lengths(batch, host_rows)
        return StepLogits(self.decoder.forward(batch, self.kv), rows, inputs.draw_positions)

    def decode_batch(self, rows: Tensor, inputs: DecodeInputs) -> Batch:
        """A decode step of the slots `rows` [B] as the device knows it; inputs: what `prepare` read of them."""
        return Batch(
            ids=inputs.ids,
            positions=inputs.positions,
            kv_slots=inputs.kv_slots,
            decode_tables=self.slots.tables,
            decode_rows=rows,
            decode_lengths=inputs.lengths,
            max_decode_length=self.slots.tables.shape[1] * self.page_size,
            logit_rows=None,
        )

    def _add_host_lengths(self, batch: Batch, host_rows: np.ndarray) -> None:
        """Advance the host's lengths by the step's token, and let the batch be no wider than they are."""
        self.lengths[host_rows] += 1
        lengths = self.lengths[host_rows]
        longest = int(lengths.max()) if len(lengths) else 0
        batch.max_decode_length = longest
        batch.decode_lengths_host = lengths
        batch.decode_tables = self.slots.tables[:, : max(1, -(-longest // self.page_size))]

    # ------------------------------------------------------------------ prefill chunks, mixed with decode

    def mixed(self, host_rows: np.ndarray, chunks: list[ChunkWork], exact: bool) -> StepLogits:
        """Run one forward over the decoding slots `host_rows` [B] and the chunks, of other slots.

        Logits are those of the decode rows, then of the chunks that draw.
        `exact`: the host's lengths are (a CPU's).
        """
        rows = self.upload_rows(host_rows)
        inputs = self.slots.prepare(rows)
        packed, places = self.chunk_inputs(chunks, len(host_rows))
        parts = [*packed, *places]
        device = upload(np.concatenate(parts), self.device).to(self.index_dtype)
        ids, positions, kv_slots, wanted, slots, draw_positions = torch.split(device, [len(part) for part in parts])
        batch = Batch(
            ids=torch.cat([inputs.ids, ids]),
            positions=self.joined_positions(inputs.positions, positions),
            kv_slots=torch.cat([inputs.kv_slots, kv_slots]),
            decode_tables=self.slots.tables,
            decode_rows=rows,
            decode_lengths=inputs.lengths,
            max_decode_length=self.slots.tables.shape[1] * self.page_size,
            logit_rows=wanted,
            chunks=self._chunks(chunks),
            features=self._features(chunks, len(host_rows)),
        )
        if exact:
            self._add_host_lengths(batch, host_rows)
        for chunk in chunks:
            self.lengths[chunk.slot] = chunk.start + len(chunk.ids)
        drawing, scored = len(rows) + len(slots), None
        if drawing < len(wanted):
            hidden = self.decoder.hidden(batch, self.kv)
            logits, scored = self._logits(hidden[:drawing]), hidden[drawing:]
        else:
            logits = self.decoder.forward(batch, self.kv)
        positions = torch.cat([inputs.draw_positions, draw_positions])
        return StepLogits(logits, torch.cat([rows, slots]), positions, scored)

    def joined_positions(self, decoding: Tensor, chunks: Tensor) -> Tensor:
        """Those of decode rows [B], which are of text, before those of chunks as `chunk_inputs` has them."""
        if self.axes == 1:
            return torch.cat([decoding, chunks])
        return torch.cat([decoding.expand(self.axes, -1), chunks.view(self.axes, -1)], dim=1)

    def states(self, chunks: list[ChunkWork], wanted: np.ndarray) -> Tensor:
        """Run one forward over the chunks, and nothing else.

        Returns the normed hidden states [n, hidden] of `wanted` int64 [n], places in the chunks' tokens.
        """
        (ids, positions, kv_slots), _ = self.chunk_inputs(chunks, 0)
        given = [ids, positions, kv_slots, wanted]
        packed = upload(np.concatenate(given), self.device).to(self.index_dtype)
        parts = torch.split(packed, [len(part) for part in given])
        nobody = self.upload_rows(NOTHING)
        batch = Batch(
            ids=parts[0],
            positions=parts[1] if self.axes == 1 else parts[1].view(self.axes, -1),
            kv_slots=parts[2],
            decode_tables=self.slots.tables,
            decode_rows=nobody,
            decode_lengths=nobody.to(torch.int32),
            max_decode_length=0,
            logit_rows=parts[3],
            chunks=self._chunks(chunks),
            token_types=self._token_types(chunks),
        )
        return self.decoder.hidden(batch, self.kv)

    def _token_types(self, chunks: list[ChunkWork]) -> Tensor | None:
        """Of the chunks' tokens; None where all are of the first type."""
        seconds = self.seconds[[c.slot for c in chunks]]
        if self.decoder.spec.token_types < 2 or not seconds.any():
            return None
        types = [
            np.arange(c.start, c.start + len(c.ids)) >= second if second else np.zeros(len(c.ids), dtype=bool)
            for c, second in zip(chunks, seconds.tolist(), strict=True)
        ]
        return upload(np.concatenate(types).astype(np.int64), self.device)

    def _logits(self, hidden: Tensor) -> Tensor:
        if len(hidden):
            return self.decoder.logits(hidden)
        return torch.empty(0, self.decoder.whole.vocab, dtype=torch.float32, device=self.device)

    def _features(self, chunks: list[ChunkWork], decode_rows: int) -> tuple[Tensor, Tensor] | None:
        rows, values, at = list[np.ndarray](), list[Tensor](), decode_rows
        for chunk in chunks:
            for place, features in chunk.features:
                rows.append(np.arange(at + place, at + place + len(features)))
                values.append(features)
            at += len(chunk.ids)
        return (upload(np.concatenate(rows), self.device), torch.cat(values)) if rows else None

    def _chunks(self, chunks: list[ChunkWork]) -> list[Chunk]:
        parts = []
        for c in chunks:
            pages = -(-(c.start + len(c.ids)) // self.page_size)
            parts.append(Chunk(c.start, len(c.ids), self.slots.tables[c.slot, :pages]))
        return parts

    def chunk_inputs(self, chunks: list[ChunkWork], decode_rows: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return ([ids, positions, KV slots] of the chunks' tokens, [wanted rows, drawing slots, draw positions]).

        With several positions of a token, all first ones come before all second ones.
        """
        ids, positions, kv_slots, wanted = [], list[np.ndarray](), [], list(range(decode_rows))
        drawing = [c.slot for c in chunks if c.draws]
        draw_positions, scored = [], list[int]()
        at = decode_rows
        for c in chunks:
            place = np.arange(c.start, c.start + len(c.ids))
            pages = self.slots.host_tables[c.slot, place // self.page_size].astype(np.int64)
            ids.append(c.ids)
            positions.append(np.tile(place, (self.axes, 1)) if c.positions is None else c.positions)
            kv_slots.append(pages * self.page_size + place % self.page_size)
            scored += range(at + c.score_from, at + c.score_from + len(c.targets))
            at += len(c.ids)
            if c.draws:
                wanted.append(at - 1)
                draw_positions.append(c.start + len(c.ids))
        ahead = np.concatenate([np.empty((self.axes, 0), dtype=np.int64), *positions], axis=1).ravel()
        tokens = [np.concatenate([NOTHING, *part]).astype(np.int64) for part in (ids, [ahead], kv_slots)]
        return tokens, [np.array(part, dtype=np.int64) for part in (wanted + scored, drawing, draw_positions)]
