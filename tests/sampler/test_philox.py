"""Philox4x32-10 against the published vectors and plain Python, and the keys of draws made of it."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from actorserve.sampler.philox import MASK, MULTIPLIERS, WEYL, philox, row_keys

WORD = st.integers(0, MASK)
INT63 = st.integers(0, (1 << 63) - 1)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)

# counter, key, output: the kat_vectors of Random123 (D. E. Shaw Research) for "philox4x32 10"
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_python(counter: list[int], key: list[int]) -> list[int]:
    """The paper's definition, one number at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def test_published_vectors_all_in_one_call():
    counter = torch.tensor([words(c) for c, _, _ in VECTORS]).T
    key = torch.tensor([words(k) for _, k, _ in VECTORS]).T
    assert philox(counter, key).T.tolist() == [words(out) for _, _, out in VECTORS]


@given(st.lists(st.tuples(*[WORD] * 6), min_size=1, max_size=5))
def test_equals_plain_python(rows):
    table = torch.tensor(rows).T
    assert philox(table[:4], table[4:]).T.tolist() == [philox_python([*r[:4]], [*r[4:]]) for r in rows]


@given(INT64, INT63)
def test_bit_layout_of_seed_and_position(seed, position):
    words = philox_python([position & MASK, position >> 32, 0, 0], [seed & MASK, seed >> 32 & MASK])
    key = row_keys(torch.tensor([seed]), torch.tensor([position])).item()
    assert [key & MASK, key >> 32 & MASK] == words[:2]


def test_a_seed_for_many_positions():
    seeds, positions = torch.tensor([[3], [-4]]), torch.arange(10).reshape(2, 5)
    one_by_one = [row_keys(seeds[i], positions[i, j, None]) for i in range(2) for j in range(5)]
    assert torch.equal(row_keys(seeds, positions), torch.cat(one_by_one).view(2, 5))


def test_words_are_flat_over_positions_and_over_seeds():
    many = torch.arange(64_000) - 32_000
    for seed, position in ((torch.full_like(many, 42), many + 32_000), (many, torch.full_like(many, 42))):
        for word in (row_keys(seed, position) & MASK, row_keys(seed, position) >> 32 & MASK):
            seen = np.bincount((word >> 26).numpy(), minlength=64)
            chi_square = float(((seen - 1000.0) ** 2 / 1000.0).sum())
            assert 30 < chi_square < 110  # 63 degrees of freedom; fixed seeds, so this never flickers
