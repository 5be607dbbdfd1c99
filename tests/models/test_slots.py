"""The slot arrays: deltas, what a step reads, what it leaves; and the Triton kernels against the plain torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.models.slots import LENGTH, NO_TOKEN, SlotArrays

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, SLOTS, PAGES = 16, 6, 5
SCRATCH = 99


def arrays(device: torch.device = DEVICE) -> SlotArrays:
    return SlotArrays(SLOTS, PAGES, SCRATCH, PAGE, device)


def seat(slots: SlotArrays, slot: int, length: int, last: int, limit: int, pages: list[int], shift: int = 0) -> None:
    slots.admit(slot, np.array(pages, dtype=np.int32), length, limit, shift)
    slots.flush()
    slots.last[slot] = last


def test_deltas_reach_the_device() -> None:
    slots = arrays()
    slots.admit(2, np.array([7, 8], dtype=np.int32), 20, 50)
    slots.admit(4, np.array([9], dtype=np.int32), 0, 16)
    slots.grow(np.array([2, 4, 2], dtype=np.int32), np.array([10, 11, 12], dtype=np.int32))
    assert slots.length[2] == 0  # nothing before the flush
    slots.flush()
    assert slots.tables[2].tolist() == [7, 8, 10, 12, SCRATCH] == slots.host_tables[2].tolist()
    assert slots.tables[4].tolist() == [9, 11, SCRATCH, SCRATCH, SCRATCH]
    assert (slots.length[2], slots.limit[2], slots.done[2]) == (20, 50, 0)
    assert slots.done.tolist() == [1, 1, 0, 1, 0, 1, 1]
    slots.admit(2, np.array([1], dtype=np.int32), 3, 9)  # the next request of the slot
    slots.flush()
    assert slots.tables[2, 0] == 1 and slots.length[2] == 3


def test_a_step_reads_and_advances() -> None:
    slots = arrays(torch.device("cpu"))
    seat(slots, 1, 17, 5, 40, [3, 4], shift=-6)
    rows = torch.tensor([1, slots.padding])
    inputs = slots.prepare(rows)
    assert inputs.ids.tolist()[0] == 5
    assert inputs.positions.tolist() == [11, 0]
    assert inputs.draw_positions.tolist() == [18, 1]
    assert inputs.kv_slots.tolist() == [4 * PAGE + 1, SCRATCH * PAGE]
    assert inputs.lengths.tolist() == [18, 1]
    out = torch.empty(2, 2, dtype=torch.int32)
    finish = torch.zeros(2, dtype=torch.uint8)
    slots.advance(rows, inputs.draw_positions, torch.tensor([8, 9]), finish, out)
    assert out.tolist() == [[8, NO_TOKEN], [0, 0]]
    assert (slots.length[1], slots.last[1], slots.done[1]) == (18, 8, 0)


def test_the_limit_ends_a_sequence_and_a_done_one_stays() -> None:
    slots = arrays(torch.device("cpu"))
    seat(slots, 0, 17, 5, 19, [3, 4])
    rows, out = torch.tensor([0]), torch.empty(2, 1, dtype=torch.int32)
    finish = torch.zeros(1, dtype=torch.uint8)
    slots.advance(rows, slots.prepare(rows).draw_positions, torch.tensor([8]), finish, out)
    assert out.tolist() == [[8], [LENGTH]]  # 18 tokens with KV and the new one are 19
    inputs = slots.prepare(rows)
    assert inputs.kv_slots.tolist() == [SCRATCH * PAGE]
    slots.advance(rows, inputs.draw_positions, torch.tensor([9]), finish, out)
    assert out.tolist() == [[NO_TOKEN], [0]]
    assert (slots.length[0], slots.last[0]) == (18, 8)


STATES = given(
    st.lists(
        st.tuples(st.integers(0, PAGES * PAGE - 1), st.integers(0, 999), st.integers(1, 100), st.booleans()),
        min_size=SLOTS, max_size=SLOTS,
    ),
    st.permutations(range(SLOTS + 1)),
    st.integers(1, SLOTS + 1),
    st.lists(st.sampled_from([0, 0, 1, 3]), min_size=SLOTS + 1, max_size=SLOTS + 1),
)  # fmt: skip


def filled(state: list[tuple], device: torch.device) -> SlotArrays:
    slots = arrays(device)
    for slot, (length, last, limit, done) in enumerate(state):
        seat(slots, slot, length, last, limit, [slot * PAGES + i for i in range(PAGES)], shift=-slot)
        slots.done[slot] = int(done)
    return slots


def same_numbers(one: SlotArrays, other: SlotArrays) -> bool:
    names = ("length", "last", "limit", "shift", "done")
    return all(torch.equal(getattr(one, name)[:SLOTS], getattr(other, name)[:SLOTS]) for name in names)


@settings(max_examples=25, deadline=None)
@STATES
def test_the_cpu_s_kernels_equal_the_plain_torch(
    state: list[tuple], order: list[int], count: int, finish: list[int]
) -> None:
    plain, host = (filled(state, torch.device("cpu")) for _ in range(2))
    rows = torch.tensor([*order[:count], SLOTS, SLOTS])
    expected, got = plain.prepare_plain(rows), host.prepare(rows)
    for name in ("ids", "positions", "kv_slots", "lengths", "draw_positions"):
        assert torch.equal(getattr(expected, name), getattr(got, name)), name
        assert getattr(expected, name).dtype == getattr(got, name).dtype, name
    ids, codes = torch.arange(100, 100 + len(rows)), torch.tensor([*finish[:count], 0, 0], dtype=torch.uint8)
    outs = [torch.empty(2, len(rows), dtype=torch.int32) for _ in range(2)]
    plain.advance_plain(rows, expected.draw_positions, ids, codes, outs[0])
    host.advance(rows, got.draw_positions, ids, codes, outs[1])
    assert torch.equal(*outs) and same_numbers(plain, host)


@settings(max_examples=25, deadline=None)
@STATES
def test_kernels_equal_the_plain_torch(state: list[tuple], order: list[int], count: int, finish: list[int]) -> None:
    pytest.importorskip("triton")
    from actorserve.models import slot_kernels

    pair = [filled(state, DEVICE) for _ in range(2)]
    rows = torch.tensor([*order[:count], SLOTS, SLOTS], dtype=torch.int32, device=DEVICE)
    plain, fused = pair[0].prepare_plain(rows), slot_kernels.prepare(pair[1], rows)
    for name in ("ids", "positions", "kv_slots", "lengths", "draw_positions"):
        assert torch.equal(getattr(plain, name).int(), getattr(fused, name)), name
    ids = torch.arange(100, 100 + len(rows), device=DEVICE)
    codes = torch.tensor([*finish[:count], 0, 0], dtype=torch.uint8, device=DEVICE)
    outs = [torch.empty(2, len(rows), dtype=torch.int32, device=DEVICE) for _ in pair]
    pair[0].advance_plain(rows, plain.draw_positions, ids, codes, outs[0])
    slot_kernels.advance(pair[1], rows, fused.draw_positions, ids, codes, outs[1])
    assert torch.equal(*outs) and same_numbers(*pair)
