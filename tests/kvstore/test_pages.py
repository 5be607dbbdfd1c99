"""PagePool: conservation, no double free, determinism; a machine against a plain set of free pages."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from actorserve.kvstore.pages import OutOfPages, PagePool
from examples import examples


def test_new_pool_hands_out_ascending_pages() -> None:
    pool = PagePool(8)
    pages = pool.allocate(3)
    assert pages.dtype == np.int32
    assert pages.tolist() == [0, 1, 2]
    assert pool.allocate(2).tolist() == [3, 4]
    assert pool.num_free == 3


def test_recently_freed_pages_come_first_in_their_order() -> None:
    pool = PagePool(8)
    pool.allocate(6)
    pool.free([4, 1])
    pool.free(np.array([2, 3], np.int32))
    assert pool.allocate(5).tolist() == [2, 3, 4, 1, 6]


def test_too_many_pages_take_none() -> None:
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 4 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.allocate(1).tolist() == [3]


def test_empty_calls() -> None:
    pool = PagePool(0)
    assert pool.allocate(0).tolist() == []
    pool.free([])
    pool.check()
    with pytest.raises(OutOfPages):
        pool.allocate(1)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="-1 pages"):
        PagePool(-1)
    with pytest.raises(ValueError, match="-1 pages"):
        PagePool(4).allocate(-1)


@pytest.mark.parametrize(
    ("pages", "error"),
    [([0, 5], "double free"), ([0, 1, 0], "named twice"), ([-1, 0], "no page of this pool"), ([1, 8], "no page of")],
)
def test_bad_free_changes_nothing(pages: list[int], error: str) -> None:
    pool = PagePool(8)
    pool.allocate(4)
    with pytest.raises(ValueError, match=error):
        pool.free(pages)
    pool.check()
    assert pool.num_free == 4
    assert not pool.is_free([0, 1, 2, 3]).any()
    pool.free([3, 0, 2, 1])
    assert pool.is_free(np.arange(8, dtype=np.int32)).all()


def test_a_pool_without_pages_in_use_becomes_a_new_one() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="2 pages are in use"):
        pool.resize(6)
    pool.free(pages)
    for size in (6, 3):
        pool.resize(size)
        pool.check()
        taken = pool.allocate(size)
        assert taken.tolist() == list(range(size)) and pool.num_pages == size
        pool.free(taken)


def test_allocated_pages_are_the_callers_copy() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    more = pool.allocate(2)
    pool.free(more)
    pool.free(pages[::-1])
    assert pages.tolist() == [0, 1]
    pages[:] = 3
    assert pool.allocate(4).tolist() == [1, 0, 2, 3]
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Random allocations and frees, good and bad."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(20)
        self.used: list[int] = []

    @rule(n=st.integers(0, 24))
    def allocate(self, n: int) -> None:
        if n > 20 - len(self.used):
            with pytest.raises(OutOfPages):
                self.pool.allocate(n)
        else:
            pages = self.pool.allocate(n).tolist()
            assert len(set(pages)) == n and not set(pages) & set(self.used)
            self.used += pages

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(self.used), unique=True) if self.used else st.just([]))
        self.pool.free(pages)
        self.used = [page for page in self.used if page not in pages]

    @rule(pages=st.lists(st.integers(-2, 21), min_size=1, max_size=4))
    def free_anything(self, pages: list[int]) -> None:
        if len(set(pages)) == len(pages) and set(pages) <= set(self.used):
            self.pool.free(pages)
            self.used = [page for page in self.used if page not in pages]
        else:
            with pytest.raises(ValueError, match=r"double free|no page of this pool"):
                self.pool.free(pages)

    @invariant()
    def pages_are_conserved(self) -> None:
        self.pool.check()
        assert self.pool.num_free + len(self.used) == 20
        assert not self.pool.is_free(self.used).any()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=examples(60, 30), stateful_step_count=40, deadline=None)
