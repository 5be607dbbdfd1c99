"""The race against its definition in Python's integers, and its hash against what random numbers do."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.sampler.philox import MASK, row_keys
from actorserve.sampler.race import BELOW_ONE, BLOCK, hashes, id_terms, log_times, race

CPU = torch.device("cpu")
MANY = 1 << 17


def unsigned(h: torch.Tensor) -> np.ndarray:
    return h.numpy().view(np.uint32)


def z_score(seen: np.ndarray, expected: np.ndarray | float) -> float:
    """Chi-square of counts, in standard deviations from its mean."""
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    return (chi_square - (seen.size - 1)) / math.sqrt(2 * (seen.size - 1))


@given(st.integers(0, MASK), st.integers(0, MASK), st.integers(0, 262_143))
def test_hash_is_the_definition(word0, word1, token):
    h = (token * 0x9E3779B1 + word0) & MASK
    h = (h ^ h >> 16) * 0x21F0AAAD & MASK
    h = ((h ^ h >> 15) ^ word1) * 0x735A2D97 & MASK
    key = torch.from_numpy(np.array([word1 << 32 | word0], np.uint64).view(np.int64))
    assert unsigned(hashes(id_terms(token + 1, CPU)[-1:], key)).tolist() == [[h ^ h >> 15]]


def test_times_are_finite_at_both_ends_and_exact_at_the_small_one():
    ends = torch.from_numpy(np.array([0, 1, 1 << 31, MASK - 200, MASK], np.uint32).view(np.int32))
    v = [0.5 * 2.0**-32, 1.5 * 2.0**-32, 0.5, BELOW_ONE, BELOW_ONE]
    truth = [math.log(-math.log1p(-x)) for x in v]
    assert log_times(ends).tolist() == pytest.approx(truth, rel=1e-6)


@given(st.sampled_from([1, 7, 100, BLOCK, 3 * BLOCK, 640]), st.integers(0, 1 << 40), st.sampled_from([0.0, 0.1, 3, 99]))
@settings(max_examples=50, deadline=None)
def test_blocks_left_out_change_nothing(vocab, seed, scale):
    """The race looks at few blocks in full: the winner is that of all tokens."""
    z = torch.randn(40, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    z[20:, 1::2] = -math.inf
    z -= z.amax(-1, keepdim=True)
    terms, keys = id_terms(vocab, CPU), row_keys(torch.tensor(seed), torch.arange(40))
    truth = (z - log_times(hashes(terms, keys))).argmax(-1)
    assert torch.equal(race(z, terms, keys), truth)


def test_equal_scores_go_to_the_lowest_id():
    terms = torch.zeros(6, 2 * BLOCK, dtype=torch.int32)  # the same hash for all
    z = torch.full((6, 2 * BLOCK), -1.0)
    for row, columns in enumerate(
        ([0], [5, 7], [5, BLOCK], [BLOCK - 1, BLOCK], [BLOCK, BLOCK + 3], [0, 2 * BLOCK - 1])
    ):
        z[row, columns] = 0.0
    assert race(z, terms, row_keys(torch.arange(6), torch.arange(6))).tolist() == [0, 5, 5, BLOCK - 1, BLOCK, 0]


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (1, 0), (-1, 5), (1 << 62, 1 << 40)], ids=["0", "1", "-1", "large"]
)
def test_hash_is_flat_over_ids(seed, position):
    h = unsigned(hashes(id_terms(MANY, CPU), row_keys(torch.tensor([seed]), torch.tensor([position]))))[0]
    for shift in (20, 10, 0):
        assert abs(z_score(np.bincount(h >> shift & 0xFFF, minlength=4096), MANY / 4096)) < 4.5


@pytest.mark.parametrize("token", [0, 1, 2, 49_151, 151_935])
def test_hash_is_flat_over_positions_and_over_seeds(token):
    term, many = id_terms(token + 1, CPU)[-1:], torch.arange(MANY)
    for keys in (row_keys(torch.tensor(7), many), row_keys(many, torch.full_like(many, 7))):
        h = unsigned(hashes(term, keys))[:, 0]
        for shift in (20, 0):
            assert abs(z_score(np.bincount(h >> shift & 0xFFF, minlength=4096), MANY / 4096)) < 4.5


def assert_independent(first: np.ndarray, second: np.ndarray) -> None:
    """Jointly flat in their upper 5 bits and in their lowest, and as often small together as chance has it."""
    for shift in (27, 0):
        joint = (first >> shift & 31) << 5 | (second >> shift & 31)
        assert abs(z_score(np.bincount(joint, minlength=1024), len(first) / 1024)) < 4.5
    both = int(((first >> 26 == 0) & (second >> 26 == 0)).sum())  # winners are small
    assert abs(both - len(first) / 4096) < 5 * math.sqrt(len(first) / 4096)


def test_neighbouring_ids_are_independent():
    """Among the distances the Fibonacci numbers, whose multiples of the golden ratio come closest together."""
    keys = row_keys(torch.tensor(3), torch.arange(MANY))
    terms = id_terms(60_000, CPU)
    first = unsigned(hashes(terms[1000:1001], keys))[:, 0]
    for distance in (1, 2, 3, 8, 64, 1597, 4096, 6765, 28657, 46368):
        assert_independent(first, unsigned(hashes(terms[1000 + distance, None], keys))[:, 0])


def test_neighbouring_positions_and_seeds_are_independent():
    many, zero = torch.arange(MANY), torch.zeros(MANY, dtype=torch.int64)
    term = id_terms(10, CPU)[-1:]
    first = unsigned(hashes(term, row_keys(many, many)))[:, 0]
    for keys in (row_keys(many, many + 1), row_keys(many + 1, many), row_keys(many + 1, many + 1)):
        assert_independent(first, unsigned(hashes(term, keys))[:, 0])
    h = unsigned(hashes(id_terms(MANY, CPU), row_keys(torch.arange(2), zero[:2])))  # seeds 0 and 1, all ids
    assert_independent(h[0], h[1])


@pytest.mark.parametrize(
    ("vocab", "draws", "power"),
    [
        (2, 1 << 20, 0.0),
        (2, 1 << 20, 3.0),
        (3, 1 << 20, 1.0),
        (10, 1 << 20, 2.0),
        (1000, 1 << 17, 0.0),
        (1000, 1 << 17, 1.2),
    ],
)
def test_winners_follow_the_probabilities(vocab, draws, power):
    p = np.arange(1, vocab + 1, dtype=np.float64) ** -power
    p /= p.sum()
    z = torch.from_numpy(np.log(p / p.max())).float()
    seen = np.zeros(vocab)
    terms = id_terms(vocab, CPU)
    for positions in torch.arange(draws).split(1 << 15 if vocab == 1000 else draws):
        winners = race(z.expand(len(positions), -1), terms, row_keys(torch.tensor(11), positions))
        seen += np.bincount(winners.numpy(), minlength=vocab)
    assert seen.sum() == draws
    assert abs(z_score(seen, p * draws)) < 4.5


def test_pairs_of_successive_draws_are_independent():
    draws = 1 << 20
    z = torch.zeros(1, 8).expand(draws, -1)
    for keys in (
        row_keys(torch.tensor(1), torch.arange(draws)),
        row_keys(torch.arange(draws), torch.arange(draws) * 0),
    ):
        winners = race(z, id_terms(8, CPU), keys).tolist()
        pairs = np.bincount([a * 8 + b for a, b in itertools.pairwise(winners)], minlength=64)
        assert abs(z_score(pairs, (draws - 1) / 64)) < 4.5
