"""The batch on the device: what every slot needs from step to step, in one buffer that deltas are scattered into.

Used by the runner. The scheduler never sends a batch, only what changed: a change is an (offset, value) pair of the
flat buffer, and all changes of a window go up in one copy and one launch. Steps advance the arrays on the device.
Invariants: `length` of a decoding slot is the number of its tokens whose KV is in its pages; the slot `padding` is
always done; a done slot writes its KV to the scratch page and draws nothing that anybody sees.
Legend: S slots, P pages in a table, B rows of a step.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..sampler.upload import upload
from .cpu_kernels import Slots, cpu_kernels_or_none

NUMBERS: Final = ("length", "last", "limit", "shift", "done")
"""The int32 numbers of a slot, in the order in which they lie before the tables."""
NO_TOKEN: Final = -1
LENGTH: Final = 2
"""messages.Finish.LENGTH."""


@dataclass(slots=True)
class DecodeInputs:
    """What a decode step reads, all [B]: made by `prepare`."""

    ids: Tensor
    """The slot's last token."""
    positions: Tensor
    """Its position, as the model counts them."""
    kv_slots: Tensor
    """Where its KV goes."""
    lengths: Tensor
    """int32; tokens that it sees, itself included."""
    draw_positions: Tensor
    """Position of the token to be drawn: positions + 1."""


class SlotArrays:
    """`cells` int32 holds, for S + 1 slots: length, last, limit, shift, done, then the tables [S + 1, P]."""

    def __init__(self, max_slots: int, max_pages: int, scratch_page: int, page_size: int, device: torch.device) -> None:
        self.padding = max_slots
        self.page_size = page_size
        self.device = device
        rows = max_slots + 1
        numbers = len(NUMBERS) * rows
        self.cells = torch.zeros(numbers + rows * max_pages, dtype=torch.int32, device=device)
        self.length, self.last, self.limit, self.shift, self.done = self.cells[:numbers].view(-1, rows).unbind(0)
        """int32 [S + 1] each. `shift`: what is added to a token's number, that it is its position: below 0
        behind images, whose tokens share positions."""
        self.tables = self.cells[numbers:].view(rows, max_pages)
        """int32 [S + 1, P]"""
        self.scratch_slot = scratch_page * page_size
        self.host_tables = np.zeros((rows, max_pages), dtype=np.int32)
        self.page_counts = np.zeros(rows, dtype=np.int64)
        self._numbers = numbers
        self._kernels = cpu_kernels_or_none() if device.type == "cpu" else None
        self._offsets: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self.tables.fill_(scratch_page)
        self.host_tables.fill(scratch_page)
        self.done.fill_(1)

    # ------------------------------------------------------------------ deltas

    def admit(self, slot: int, pages: np.ndarray, cached: int, limit: int, shift: int = 0) -> None:
        """Seat a sequence: pages int32 [n], of which the first `cached` tokens have KV; ends at `limit` tokens."""
        rows = self.padding + 1
        self._change(np.arange(len(NUMBERS)) * rows + slot, np.array([cached, 0, limit, shift, 0]))
        self.host_tables[slot, : len(pages)] = pages
        self.page_counts[slot] = len(pages)
        self._change(self._table_offset(slot) + np.arange(len(pages)), pages)

    def grow(self, slots: np.ndarray, pages: np.ndarray) -> None:
        """Append pages int32 [n] to the tables of slots int32 [n]; a slot may come several times."""
        offsets = np.empty(len(slots), dtype=np.int64)
        for i, (slot, page) in enumerate(zip(slots.tolist(), pages.tolist(), strict=True)):
            at = self.page_counts[slot]
            self.host_tables[slot, at] = page
            self.page_counts[slot] += 1
            offsets[i] = self._table_offset(slot) + at
        self._change(offsets, pages)

    def flush(self) -> None:
        """Apply all changes on the device, in stream order: one copy, one scatter."""
        if self._offsets:
            pairs = np.stack([np.concatenate(self._offsets), np.concatenate(self._values)]).astype(np.int64)
            offsets, values = upload(pairs, self.device)
            with torch.inference_mode():
                self.cells.index_copy_(0, offsets, values.to(torch.int32))
            self._offsets.clear()
            self._values.clear()

    def _table_offset(self, slot: int) -> int:
        return self._numbers + slot * self.tables.shape[1]

    def _change(self, offsets: np.ndarray, values: np.ndarray) -> None:
        if len(offsets):
            self._offsets.append(offsets)
            self._values.append(values)

    # ------------------------------------------------------------------ a step

    def prepare(self, rows: Tensor) -> DecodeInputs:
        """Read what a decode step of the slots `rows` [B] needs. int64 on the CPU, int32 on a GPU."""
        if self.device.type == "cuda" and len(rows):
            from .slot_kernels import prepare

            return prepare(self, rows)
        if self._kernels is None or rows.dtype != torch.int64:
            return self.prepare_plain(rows)
        read, lengths = torch.empty(4, len(rows), dtype=torch.int64), torch.empty(len(rows), dtype=torch.int32)
        self._kernels.prepare(self._some(rows), read.data_ptr(), lengths.data_ptr())
        ids, positions, kv_slots, draw_positions = read.unbind(0)
        return DecodeInputs(ids, positions, kv_slots, lengths, draw_positions)

    def _some(self, rows: Tensor) -> Slots:
        """These slots for the CPU's kernels, which keep no address."""
        return Slots(
            numbers=self.cells.data_ptr(), tables=self.tables.data_ptr(), count=self.padding + 1,
            pages=self.tables.shape[1], page_size=self.page_size, scratch=self.scratch_slot, row=rows.data_ptr(),
            rows=len(rows),
        )  # fmt: skip

    def prepare_plain(self, rows: Tensor) -> DecodeInputs:
        """`prepare` in torch: the reference."""
        positions = self.length[rows].to(rows.dtype)
        done = self.done[rows] != 0
        column = (positions // self.page_size).clamp_(max=self.tables.shape[1] - 1)
        kv_slots = self.tables[rows, column].to(rows.dtype) * self.page_size + positions % self.page_size
        scratch = torch.full_like(kv_slots, self.scratch_slot)
        return DecodeInputs(
            ids=self.last[rows].to(rows.dtype),
            positions=torch.where(done, 0, positions + self.shift[rows]),
            kv_slots=torch.where(done, scratch, kv_slots),
            lengths=torch.where(done, 1, positions + 1).to(torch.int32),
            draw_positions=positions + 1,
        )

    def advance(self, rows: Tensor, draw_positions: Tensor, ids: Tensor, finish: Tensor, out: Tensor) -> None:
        """Take in drawn tokens: ids [B] and finish uint8 [B] of the sampler, at draw_positions [B].

        Fills out int32 [2, B]: the id, NO_TOKEN where the slot was done before; the finish, LENGTH where the sequence
        reached its limit. A sequence that finishes is done.
        """
        if self.device.type == "cuda":
            from .slot_kernels import advance

            advance(self, rows, draw_positions, ids, finish, out)
        elif self._kernels is not None and rows.dtype == torch.int64:
            # Of other ranks they come in other dtypes; the kernel sees addresses only.
            wide = [tensor.to(torch.int64).contiguous() for tensor in (draw_positions, ids)]
            finish = finish.to(torch.uint8).contiguous()
            assert out.dtype == torch.int32 and out.is_contiguous()
            given = (tensor.data_ptr() for tensor in (*wide, finish, out))
            self._kernels.advance(self._some(rows), *given)
        else:
            self.advance_plain(rows, draw_positions, ids, finish, out)

    def advance_plain(self, rows: Tensor, draw_positions: Tensor, ids: Tensor, finish: Tensor, out: Tensor) -> None:
        """`advance` in torch: the reference."""
        was_done = self.done[rows] != 0
        positions = draw_positions.to(torch.int32)
        finished = torch.where((finish == 0) & (positions + 1 >= self.limit[rows]), LENGTH, finish.to(torch.int32))
        out[0] = torch.where(was_done, NO_TOKEN, ids.to(torch.int32))
        out[1] = torch.where(was_done, 0, finished)
        self.length[rows] = torch.where(was_done, self.length[rows], positions)
        self.last[rows] = torch.where(was_done, self.last[rows], ids.to(torch.int32))
        self.done[rows] = (was_done | (finished != 0)).to(torch.int32)
