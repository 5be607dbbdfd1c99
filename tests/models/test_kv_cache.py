"""The KV pool: layout, size, and page copies that may overlap."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from actorserve.models.kv_cache import KVCache
from actorserve.models.spec import Spec

SPEC = Spec(10, 8, 3, 6, 2, 4, 8)


def numbered(num_pages: int) -> KVCache:
    """A cache in which every value differs."""
    kv = KVCache(SPEC, num_pages, 16, torch.device("cpu"), torch.float32)
    kv.storage.copy_(torch.arange(kv.storage.numel()).view(kv.storage.shape))
    return kv


def test_layout_and_size() -> None:
    kv = KVCache(SPEC, 5, 16, torch.device("cpu"), torch.bfloat16)
    assert [k.shape for k in kv.k] == [(80, 2, 4)] * 3 == [v.shape for v in kv.v]
    assert KVCache.bytes_per_page(SPEC, 16, torch.bfloat16) * 5 == kv.storage.nbytes
    kv.k[1][7] = 1.0
    kv.v[2][9] = 2.0
    assert kv.storage[1, 7, 0].eq(1).all() and kv.storage[2, 9, 1].eq(2).all()
    assert kv.storage.count_nonzero() == 16


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 16)), max_size=8), st.permutations(range(8)))
def test_copies_read_before_they_write(sources: list[tuple[int, int]], targets: list[int]) -> None:
    kv = numbered(8)
    before = kv.storage.clone()
    copies = [(source, target, tokens) for (source, tokens), target in zip(sources, targets, strict=False)]
    kv.copy_pages(np.array(copies, dtype=np.int32).reshape(-1, 3))
    expected = before.clone()
    for source, target, tokens in copies:
        expected[:, target * 16 : target * 16 + tokens] = before[:, source * 16 : source * 16 + tokens]
    assert torch.equal(kv.storage, expected)
