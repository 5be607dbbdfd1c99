"""The Triton kernels of SlotArrays: what a decode step reads, and what it leaves, one launch each.

Used by slots.py on a GPU. They read and write the slot arrays in place, so that k steps follow each other without the
host. Invariant: they do what `prepare_plain` and `advance_plain` do.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .slots import DecodeInputs, SlotArrays

BLOCK = 256


@triton.jit
def _prepare(
    rows_ptr, length_ptr, last_ptr, shift_ptr, done_ptr, tables_ptr, out_ptr, count, width, scratch_slot,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    row = tl.load(rows_ptr + i, live, other=0).to(tl.int64)
    position = tl.load(length_ptr + row, live, other=0)
    done = tl.load(done_ptr + row, live, other=1) != 0
    column = tl.minimum(position // PAGE, width - 1)
    page = tl.load(tables_ptr + row * width + column, live, other=0)
    tl.store(out_ptr + i, tl.load(last_ptr + row, live, other=0), live)
    shift = tl.load(shift_ptr + row, live, other=0)
    tl.store(out_ptr + count + i, tl.where(done, 0, position + shift), live)
    tl.store(out_ptr + 2 * count + i, tl.where(done, scratch_slot, page * PAGE + position % PAGE), live)
    tl.store(out_ptr + 3 * count + i, tl.where(done, 1, position + 1), live)
    tl.store(out_ptr + 4 * count + i, position + 1, live)


@triton.jit
def _advance(
    rows_ptr, position_ptr, ids_ptr, finish_ptr, length_ptr, last_ptr, limit_ptr, done_ptr, out_ptr, count,
    NO_TOKEN: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    row = tl.load(rows_ptr + i, live, other=0).to(tl.int64)
    was_done = tl.load(done_ptr + row, live, other=1) != 0
    position = tl.load(position_ptr + i, live, other=0).to(tl.int32)
    token = tl.load(ids_ptr + i, live, other=0).to(tl.int32)
    finish = tl.load(finish_ptr + i, live, other=0).to(tl.int32)
    limit = tl.load(limit_ptr + row, live, other=0)
    finish = tl.where((finish == 0) & (position + 1 >= limit), LENGTH, finish)
    tl.store(out_ptr + i, tl.where(was_done, NO_TOKEN, token), live)
    tl.store(out_ptr + count + i, tl.where(was_done, 0, finish), live)
    going = live & ~was_done  # the padding slot comes several times: nothing is written for it
    tl.store(length_ptr + row, position, going)
    tl.store(last_ptr + row, token, going)
    tl.store(done_ptr + row, (finish != 0).to(tl.int32), going)


def prepare(slots: "SlotArrays", rows: Tensor) -> "DecodeInputs":
    """See SlotArrays.prepare; rows int32 [B], results int32."""
    from .slots import DecodeInputs

    count = len(rows)
    out = torch.empty(5, count, dtype=torch.int32, device=rows.device)
    _prepare[(triton.cdiv(count, BLOCK),)](
        rows, slots.length, slots.last, slots.shift, slots.done, slots.tables, out, count, slots.tables.shape[1],
        slots.scratch_slot, PAGE=slots.page_size, BLOCK=BLOCK,
    )  # fmt: skip
    return DecodeInputs(*out.unbind(0))


def advance(
    slots: "SlotArrays", rows: Tensor, draw_positions: Tensor, ids: Tensor, finish: Tensor, out: Tensor
) -> None:
    """See SlotArrays.advance."""
    from .slots import LENGTH, NO_TOKEN

    count = len(rows)
    _advance[(triton.cdiv(count, BLOCK),)](
        rows, draw_positions, ids, finish, slots.length, slots.last, slots.limit, slots.done, out, count,
        NO_TOKEN=NO_TOKEN, LENGTH=LENGTH, BLOCK=BLOCK,
    )  # fmt: skip
