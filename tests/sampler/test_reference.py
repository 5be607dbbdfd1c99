"""The batched sampler against an obvious sampler of one row, and the laws that a slow one cannot show."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.sampler.params import SamplingParams as P
from actorserve.sampler.philox import MASK, row_keys
from actorserve.sampler.race import id_terms, race
from actorserve.sampler.reference import argmax, sample, score
from actorserve.sampler.state import SamplerState
from actorserve.sampler.weights import PROBE, race_kept, threshold, weights

pytestmark = pytest.mark.usefixtures("one_thread")
NONE = np.empty(0, np.int32)
EOS = (2, 5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from two threads, and beside other processes they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


class Batch:
    """Rows of (params, prompt, output) in their slots, and what both samplers say of them."""

    def __init__(self, vocab: int, requests: list[tuple[P, list[int], list[int]]], slots: list[int] | None = None):
        self.requests, self.vocab = requests, vocab
        self.slots = torch.tensor(slots if slots is not None else range(len(requests)))
        self.state = SamplerState(int(self.slots.max()) + 1, vocab, EOS, CPU)
        for slot, (params, prompt, output) in zip(self.slots.tolist(), requests, strict=True):
            arrays = (np.array(ids, np.int32) for ids in (prompt, output))
            self.state.admit(slot, params, *arrays, len(prompt), len(output))
        self.positions = torch.tensor([len(p) + len(o) for _, p, o in requests])

    def sample(self, logits: torch.Tensor, bitmask: torch.Tensor | None = None):
        return sample(logits, self.slots, self.positions, self.state, bitmask)


def slow_log_times(key: int, vocab: int) -> np.ndarray:
    """log E of step 8 for one row, token by token in Python's integers."""
    hashes = []
    for i in range(vocab):
        h = (i * 0x9E3779B1 + key) & MASK
        h = (h ^ h >> 16) * 0x21F0AAAD & MASK
        h = (h ^ h >> 15 ^ key >> 32 & MASK) * 0x735A2D97 & MASK
        hashes.append(h ^ h >> 15)
    v = torch.from_numpy(np.array(hashes, np.uint32).astype(np.float32) + np.float32(0.5)) * 2.0**-32
    return torch.log(-torch.log1p(-v.clamp(max=1 - 2**-24))).numpy()  # torch's, as in slow_kept


def slow_kept(x: np.ndarray, params: P) -> np.ndarray:
    """Steps 6 and 7 of reference.py for one row, token by token in Python's integers: [vocab] bool, is it kept?"""
    scaled = (x - x.max()) * np.float32(1 / params.temperature)
    # exp is the one operation that libraries round differently, so it is torch's here too
    q = [int(w * 2**40) for w in torch.exp(torch.from_numpy(scaled)).double().tolist()]
    if 0 < params.top_k < len(q):
        kth = sorted(q, reverse=True)[params.top_k - 1]
        q = [w if w >= kth else 0 for w in q]
    if params.top_p < 1:
        limit = max(1, sum(q) * round(params.top_p * 2**24) // 2**24)
        q = [w if sum(v for v in q if v > w) < limit else 0 for w in q]
    q = [w if w >= int(params.min_p * 2**40) else 0 for w in q]
    return np.array(q) > 0  # what was too small for a weight cannot win


def slow_edited(logits: np.ndarray, params: P, prompt: list[int], output: list[int], mask: int | None) -> np.ndarray:
    """Steps 1 to 4 for one row."""
    x = logits.astype(np.float32).copy()
    for i in range(len(x)):
        if mask is not None and not mask >> i & 1:
            x[i] = -np.inf
        x[i] += np.float32(params.logit_bias.get(i, 0.0))
        if i in prompt or i in output:
            x[i] = (
                x[i] / np.float32(params.repetition_penalty)
                if x[i] > 0
                else x[i] * np.float32(params.repetition_penalty)
            )
        x[i] -= np.float32(params.frequency_penalty) * np.float32(output.count(i))
        x[i] -= np.float32(params.presence_penalty) * np.float32(i in output)
        if len(output) < params.min_new_tokens and i in (*EOS, *params.stop_token_ids):
            x[i] = -np.inf
    return x


def slow_sample(logits: np.ndarray, params: P, prompt: list[int], output: list[int], mask: int | None) -> tuple:
    """Return (id, finish) of one row."""
    x = slow_edited(logits, params, prompt, output, mask)
    if np.isnan(logits).any() or np.isposinf(logits).any() or not np.isfinite(x.max()):
        return 0, 3
    if params.greedy:
        token = int(np.flatnonzero(x == x.max())[0])
    else:
        scaled = (x - x.max()) * np.float32(1 / params.temperature)
        key = row_keys(torch.tensor([params.seed]), torch.tensor([len(prompt) + len(output)])).item()
        noise = slow_log_times(key, len(x))
        token = int(np.argmax(np.where(slow_kept(x, params), scaled - noise, -np.inf)))
    stops = (*params.stop_token_ids, *(() if params.ignore_eos else EOS))
    return token, int(token in stops)


@st.composite
def requests(draw, vocab: int):
    """A request with any mix of parameters; its tokens are few so that penalties hit."""
    token = st.integers(0, vocab - 1)
    maybe = lambda values, default: st.one_of(st.just(default), values)  # noqa: E731
    params = P(
        temperature=draw(st.sampled_from([0.0, 0.2, 1.0, 1.7, 100.0])),
        top_k=draw(maybe(st.integers(1, vocab + 2), -1)),
        top_p=draw(maybe(st.floats(1e-6, 1.0), 1.0)),
        min_p=draw(maybe(st.floats(0.0, 1.0), 0.0)),
        frequency_penalty=draw(maybe(st.floats(-2, 2, width=32), 0.0)),
        presence_penalty=draw(maybe(st.floats(-2, 2, width=32), 0.0)),
        repetition_penalty=draw(maybe(st.floats(0.125, 2, width=32), 1.0)),
        logit_bias=draw(maybe(st.dictionaries(token, st.floats(-100, 100, width=32), max_size=4), {})),
        min_new_tokens=draw(maybe(st.integers(0, 5), 0)),
        stop_token_ids=tuple(draw(maybe(st.lists(token, max_size=3), []))),
        ignore_eos=draw(st.booleans()),
        seed=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
    )
    return params, draw(st.lists(token, min_size=1, max_size=6)), draw(st.lists(token, max_size=6))


@st.composite
def batches(draw):
    """A few requests, logits with ties and -inf among them, and perhaps a bitmask."""
    vocab = draw(st.sampled_from([7, 33, 64]))
    rows = draw(st.lists(requests(vocab), min_size=1, max_size=5))
    logits = noise(len(rows), vocab, draw(st.integers(0, 1000)), draw(st.sampled_from([0.5, 3.0, 20.0])))
    if draw(st.booleans()):
        logits = logits.round()  # plenty of ties
    if draw(st.booleans()):
        logits[:, ::3] = -math.inf
    masks = [draw(st.integers(0, (1 << vocab) - 1)) for _ in rows] if draw(st.booleans()) else None
    return vocab, rows, logits.to(draw(st.sampled_from([torch.float32, torch.bfloat16]))), masks


def packed(masks: list[int], vocab: int) -> torch.Tensor:
    words = [[m >> 32 * w & 0xFFFFFFFF for w in range(-(-vocab // 32))] for m in masks]
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_equals_the_slow_sampler(case):
    vocab, rows, logits, masks = case
    before = logits.clone()
    drawn = Batch(vocab, rows).sample(logits, None if masks is None else packed(masks, vocab))
    slow = [
        slow_sample(logits[i].float().numpy(), *row, None if masks is None else masks[i]) for i, row in enumerate(rows)
    ]
    assert list(zip(drawn.ids.tolist(), drawn.finish.tolist(), strict=True)) == slow
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_a_row_alone_draws_what_it_draws_in_a_batch(case, random):
    vocab, rows, logits, masks = case
    bitmask = None if masks is None else packed(masks, vocab)
    together = Batch(vocab, rows).sample(logits, bitmask)
    for i in range(len(rows)):
        one = slice(i, i + 1)
        alone = Batch(vocab, [rows[i]], [random.randrange(9)]).sample(
            logits[one], None if bitmask is None else bitmask[one]
        )
        assert (alone.ids.item(), alone.finish.item()) == (together.ids[i].item(), together.finish[i].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_alone_and_in_a_batch(dtype):
    """A real vocabulary, every kind of row at once: the ids are those of each row on its own."""
    vocab = 49152
    kinds = [
        P(seed=1, temperature=0.0),
        P(seed=2),
        P(seed=3, temperature=0.7, top_p=0.95),
        P(seed=4, top_k=50),
        P(seed=5, top_k=1000, top_p=0.5, min_p=0.01, repetition_penalty=1.1, logprobs=3),
        P(seed=6, temperature=0.0, logit_bias={9: 3.0}, logprobs=5),
        P(seed=7, temperature=1.5, top_p=0.999),
        P(seed=8, min_new_tokens=10, frequency_penalty=0.5),
    ]
    rows = [(p, [1, 2, 3], [4, 5]) for p in kinds]
    logits = noise(len(rows), vocab, 5, 3.0).to(dtype)
    together = Batch(vocab, rows).sample(logits)
    for i, row in enumerate(rows):
        alone = Batch(vocab, [row]).sample(logits[i : i + 1])
        assert alone.ids.item() == together.ids[i].item()
        assert alone.finish.item() == together.finish[i].item()
        if alone.logprobs is not None:
            n = alone.top_n
            assert alone.logprobs.item() == together.logprobs[i].item()
            assert torch.equal(alone.top_ids[0], together.top_ids[i, :n])
            assert torch.equal(alone.top_logprobs[0], together.top_logprobs[i, :n])
    # sharp logits again, against the definition
    x = logits[3].float().numpy()
    assert together.ids[3].item() in np.argsort(-x, kind="stable")[:60]


def test_greedy_is_exact_and_takes_the_lowest_id_among_equals():
    for vocab in (7, 64, 1000, 49152):
        logits = noise(6, vocab).bfloat16()
        logits[1] = 3.0
        logits[2, vocab // 2 :] = 9.0
        logits[3] = -math.inf
        logits[3, vocab - 1] = -1e30
        drawn = Batch(vocab, [(P(temperature=0.0, seed=0), [0], [])] * 6).sample(logits)
        assert drawn.ids.tolist() == [int(np.argmax(row)) for row in logits.float().numpy()]
        assert drawn.ids[1:4].tolist() == [0, vocab // 2, vocab - 1]


def test_argmax_of_rows_that_are_not_contiguous():
    x = noise(3, 80)[:, :77]
    assert argmax(x)[0].tolist() == x.argmax(-1).tolist()


def chi_square(seen: np.ndarray, expected: np.ndarray) -> float:
    assert seen[expected == 0].sum() == 0
    keep = expected > 0
    return float(((seen[keep] - expected[keep]) ** 2 / expected[keep]).sum())


@pytest.mark.parametrize(
    "params",
    [
        P(seed=77),
        P(seed=77, temperature=0.5),
        P(seed=77, temperature=2.0, top_k=6),
        P(seed=77, top_p=0.8),
        P(seed=77, min_p=0.1),
        P(seed=77, top_k=10, top_p=0.9, min_p=0.05),
    ],
)
def test_draws_follow_the_distribution(params):
    """20,000 positions of one request against the distribution computed in float64 with other means."""
    vocab, draws = 16, 20_000
    logits = noise(1, vocab, 3, 1.5)
    p = torch.softmax(logits[0].double() / params.temperature, -1).numpy()
    order = np.argsort(-p)
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        p[order[int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1 :]] = 0
        p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    state = SamplerState(1, vocab, EOS, CPU)
    state.admit(0, params, NONE, NONE, 0, 0)
    slots = torch.zeros(draws, dtype=torch.int64)
    ids = sample(logits.expand(draws, -1), slots, torch.arange(draws), state).ids.numpy()
    kinds = int((p > 0).sum())
    statistic = chi_square(np.bincount(ids, minlength=vocab).astype(float), p * draws)
    assert statistic < kinds + 5 * math.sqrt(2 * kinds)  # mean + 5 sigma; the seed is fixed


def test_top_p_beyond_the_probe_and_for_flat_rows():
    """Nuclei wider than the first look take the sort; the threshold is the same as the definition's."""
    vocab = PROBE * 4
    q = torch.stack((torch.full((vocab,), 1 << 40), torch.arange(vocab) << 20, torch.arange(vocab).flip(0) + 1))
    share = torch.tensor([1 << 23, int(0.99 * 2**24), int(0.9 * 2**24)])
    off = torch.zeros(3, dtype=torch.int64)
    found = threshold(q, off, share, off)
    for row, limit, value in zip(q.tolist(), share.tolist(), found.tolist(), strict=True):
        target, above, kept = sum(row) * limit // 2**24, 0, []
        for weight in sorted(set(row), reverse=True):
            if above < target:
                kept.append(weight)
            above += weight * row.count(weight)
        assert value == min(kept)


@st.composite
def log_rows(draw):
    """Rows for the race and their filters, flat or steep, with ties or without, in a vocabulary beyond the probe."""
    vocab = draw(st.sampled_from([5, PROBE, PROBE + 1, 600]))
    x = noise(3, vocab, draw(st.integers(0, 1000)), draw(st.sampled_from([0.01, 1.0, 5.0])))
    if draw(st.booleans()):
        x = x.bfloat16().float()
    count = st.lists(st.integers(0, vocab - 1), min_size=3, max_size=3)
    share = st.lists(st.one_of(st.just(1 << 24), st.integers(0, 1 << 24)), min_size=3, max_size=3)
    least = st.lists(st.one_of(st.just(0), st.integers(0, 1 << 40)), min_size=3, max_size=3)
    return x - x.amax(-1, keepdim=True), torch.tensor(draw(count)), torch.tensor(draw(share)), torch.tensor(draw(least))


@settings(max_examples=60, deadline=None)
@given(log_rows(), st.integers(0, 1 << 60))
def test_threshold_and_the_short_way_to_the_draw(case, position):
    """The threshold is the definition's, and the draw from the largest few is the draw from all that it keeps."""
    z, top_k, top_p, least = case
    q = weights(z)
    found = threshold(q, top_k, top_p, least)
    for i, row in enumerate(q.tolist()):
        ranked = sorted(row, reverse=True)
        if k := int(top_k[i]):
            ranked = [w for w in ranked if w >= ranked[k - 1]]
        keep = ranked[-1]
        if top_p[i] < 1 << 24:
            limit = max(1, sum(ranked) * int(top_p[i]) >> 24)
            keep = next(w for w, mass in zip(ranked, itertools.accumulate(ranked), strict=True) if mass >= limit)
        keep = max(keep, int(least[i]))
        assert [w for w in row if w >= found[i]] == [w for w in row if w >= keep]
    keys, terms = row_keys(torch.tensor(0), position + torch.arange(3)), id_terms(z.shape[1], CPU)
    kept = z.masked_fill(q < found[:, None], -math.inf)
    assert torch.equal(race_kept(z, terms, keys, top_k, top_p, least), race(kept, terms, keys))


def test_top_p_met_exactly_needs_no_more():
    q = torch.tensor([[1 << 38, 1 << 40, 1 << 39, 1 << 38, 0]])
    off = torch.tensor([0])
    for share, least in ((1 << 23, 1 << 40), ((1 << 23) + 1, 1 << 39), (3 << 22, 1 << 39), ((3 << 22) + 1, 1 << 38)):
        assert threshold(q, off, torch.tensor([share]), off).item() == least


def test_ties_of_top_k_beyond_the_probe_count_for_top_p():
    """One weight of 4 and 599 of 1: top_k 2 keeps all, 1 % of their sum needs more than the first."""
    q = torch.full((1, 600), 1 << 38)
    q[0, 300] = 1 << 40
    parameters = torch.tensor([2]), torch.tensor([(1 << 24) // 100]), torch.tensor([0])
    assert threshold(q, *parameters).item() == 1 << 38
    z = (q.double() / 2**40).log().float().expand(2000, -1)
    many = [p.expand(2000) for p in parameters]
    drawn = race_kept(z, id_terms(600, CPU), row_keys(torch.tensor(0), torch.arange(2000)), *many)
    assert len(drawn.unique()) > 500


def test_equal_scores_among_the_kept_go_to_the_lowest_id():
    z = noise(64, 600, 9).clamp(max=-0.1)
    spots = torch.stack([torch.randperm(600, generator=torch.Generator().manual_seed(i))[:9] for i in range(64)])
    z.scatter_(1, spots, 0.0)
    top_k, whole, off = torch.full((64,), 9), torch.full((64,), 1 << 24), torch.zeros(64, dtype=torch.int64)
    same = torch.zeros(600, dtype=torch.int32)  # terms of which all hashes are the same
    drawn = race_kept(z, same, row_keys(torch.tensor(0), torch.arange(64)), top_k, whole, off)
    assert torch.equal(drawn, spots.amin(-1))


def test_min_p_alone_may_keep_more_than_the_probe():
    q = torch.stack((torch.full((PROBE * 4,), 1 << 40), (torch.arange(PROBE * 4) + 1) << 28))
    off, whole = torch.zeros(2, dtype=torch.int64), torch.full((2,), 1 << 24)
    assert threshold(q, off, whole, torch.tensor([1 << 39, 1 << 20])).tolist() == [1 << 39, 1 << 20]
    top_k = torch.tensor([3, 0])  # three and all their ties
    assert threshold(q, top_k, whole, off).tolist() == [1 << 40, 0]


def test_ties_at_the_threshold_stay():
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0, 1.0, -1.0]])
    for params in (P(seed=0, top_k=2), P(seed=0, top_p=0.6), P(seed=0, min_p=0.3)):
        state = SamplerState(1, 6, (), CPU)
        state.admit(0, params, NONE, NONE, 0, 0)
        slots = torch.zeros(500, dtype=torch.int64)
        ids = sample(logits.expand(500, -1), slots, torch.arange(500), state).ids
        assert set(ids.tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_a_draw_survives_what_rounding_does_to_logits(scale):
    """2,000 draws from flat and from peaked rows, and again with logits off by 1e-5 of themselves: hardly any changes.

    A draw by inversion changes about 50. Two: a thousandth.
    """
    vocab, rows, changed, drawn = 49152, 50, 0, set()
    generator = torch.Generator().manual_seed(1)
    state = SamplerState(1, vocab, EOS, CPU)
    state.admit(0, P(seed=5), NONE, NONE, 0, 0)
    slots = torch.zeros(rows, dtype=torch.int64)
    logits = noise(rows, vocab, 3, scale)
    off = logits * (1 + 1e-5 * torch.randn(rows, vocab, generator=generator))
    for start in range(0, 2000, rows):
        positions = torch.arange(start, start + rows)
        one, other = (sample(x, slots, positions, state).ids for x in (logits, off))
        changed += int((one != other).sum())
        drawn |= set(one.tolist())
    assert changed <= 2
    assert len(drawn) > 200  # not the peaks alone


def test_min_new_tokens_holds_back_every_stop():
    logits = torch.full((1, 64), -5.0)
    logits[0, [2, 5, 9]] = torch.tensor([9.0, 8.0, 7.0])
    logits[0, 11] = 1.0
    for output, expected in (([1], (11, 0)), ([1, 1], (2, 1))):
        params = P(temperature=0.0, seed=0, min_new_tokens=2, stop_token_ids=(9,))
        drawn = Batch(64, [(params, [1], output)]).sample(logits)
        assert (drawn.ids.item(), drawn.finish.item()) == expected


def test_finish_on_stop_ids_and_eos():
    logits = torch.full((4, 64), 0.0)
    for row, token in enumerate((5, 5, 9, 10)):
        logits[row, token] = 9.0
    greedy = {"temperature": 0.0, "seed": 0, "stop_token_ids": (9,)}
    rows = [P(**greedy), P(**greedy, ignore_eos=True), P(**greedy, ignore_eos=True), P(**greedy)]
    assert Batch(64, [(p, [1], []) for p in rows]).sample(logits).finish.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [P(temperature=0.0, seed=1), P(seed=1), P(seed=1, top_p=0.5, top_k=3, logprobs=2)])
def test_poison_is_found_and_stays_in_its_row(params, dtype):
    logits = noise(6, 64).to(dtype)
    good = Batch(64, [(params, [1], [])] * 6).sample(logits).ids
    logits[1, 63] = math.nan
    logits[2, 0] = math.inf
    logits[3] = -math.inf
    logits[4] = math.nan
    drawn = Batch(64, [(params, [1], [])] * 6).sample(logits)
    assert drawn.finish.tolist()[1:5] == [3] * 4
    assert drawn.ids.tolist()[1:5] == [0] * 4
    assert drawn.ids[[0, 5]].tolist() == good[[0, 5]].tolist()
    assert 3 not in drawn.finish[[0, 5]].tolist()


@pytest.mark.parametrize("penalty", [1e-300, 1e-40])
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0])
def test_a_penalty_that_float32_does_not_have_is_no_poison(penalty, temperature):
    """A token with a logit above 0 comes again, one below 0 becomes 0."""
    logits = torch.full((3, 64), -3.0)
    logits[0, 20], logits[1, 20] = 7.0, -7.0
    logits[2, 20] = -math.inf
    params = P(repetition_penalty=penalty, temperature=temperature, seed=1)
    drawn = Batch(64, [(params, [20], [])] * 3).sample(logits)
    assert 3 not in drawn.finish.tolist() and drawn.ids[0] == 20
    if temperature < 1:
        assert drawn.ids[1] == 20


@pytest.mark.parametrize("params", [P(temperature=0.0, seed=1), P(seed=1)])
def test_poison_under_a_mask(params):
    """A NaN that the mask hides is still the model's NaN; a mask that leaves nothing is poison too."""
    logits = noise(4, 64)
    logits[0, 1] = math.nan
    logits[1, 1] = math.inf
    masks = [1 << 7, 1 << 7, 0, 1 << 7]
    drawn = Batch(64, [(params, [1], [])] * 4).sample(logits, packed(masks, 64))
    assert drawn.finish.tolist() == [3, 3, 3, 0]
    assert drawn.ids.tolist() == [0, 0, 0, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_own(dtype):
    """Whatever changes the draw, the logprobs are log_softmax of what the model said; NaN for rows that didn't ask."""
    logits = noise(4, 300).to(dtype)
    wants = [0, None, 4, 2]
    rows = [
        (P(seed=i, temperature=0.3, top_k=5, logit_bias={7: 50.0}, presence_penalty=1.0, logprobs=n), [1], [7])
        for i, n in enumerate(wants)
    ]
    drawn = Batch(300, rows).sample(logits)
    truth = torch.log_softmax(logits.float(), -1)
    assert drawn.top_n == 4
    assert drawn.top_ids.dtype == torch.int32
    for i, n in enumerate(wants):
        if n is None:
            assert drawn.logprobs[i].isnan()
        else:
            assert drawn.logprobs[i] == truth[i, drawn.ids[i]]
        n = n or 0
        order = np.argsort(-truth[i].numpy(), kind="stable")[:n]  # stable: the lower id first among equals
        assert drawn.top_ids[i].tolist() == [*order.tolist(), *[-1] * (4 - n)]
        assert torch.equal(drawn.top_logprobs[i, :n], truth[i, torch.from_numpy(order)])
        assert drawn.top_logprobs[i, n:].isnan().all()


def test_logprobs_of_tokens_that_requests_name():
    """In their order, NaN beyond; a slot forgets what an earlier request named."""
    logits = noise(3, 300)
    truth = torch.log_softmax(logits, -1)
    named = [(5, 299, 5), (), (7,)]
    batch = Batch(300, [(P(seed=i, logprobs=0, token_ids_logprob=ids), [1], []) for i, ids in enumerate(named)])
    drawn = batch.sample(logits)
    for row, ids in enumerate(named):
        assert torch.equal(drawn.listed[row, : len(ids)], truth[row, list(ids)])
        assert drawn.listed[row, len(ids) :].isnan().all()
    given = score(logits, torch.tensor([4, 5, 6]), batch.state, np.array([0, 1, 2]))
    assert torch.equal(given.listed[:, :1].nan_to_num(), drawn.listed[:, :1].nan_to_num())
    assert torch.equal(given.logprobs, truth[range(3), [4, 5, 6]])
    batch.state.admit(0, P(seed=0, logprobs=0, token_ids_logprob=(8,)), *[np.empty(0, np.int32)] * 2, 1, 0)
    batch.state.admit(2, P(seed=0, token_ids_logprob=(8,)), *[np.empty(0, np.int32)] * 2, 1, 0)
    listed = batch.sample(logits).listed
    assert listed[0, 0] == truth[0, 8] and listed.isnan().tolist() == [[False], [True], [True]]


def test_no_logprobs_unless_asked():
    drawn = Batch(32, [(P(seed=0, token_ids_logprob=(3,)), [1], [])]).sample(noise(1, 32))
    assert (drawn.logprobs, drawn.top_n, drawn.top_ids, drawn.top_logprobs) == (None, 0, None, None)
    assert drawn.listed is None


def test_draws_are_counted_for_penalty_rows_only():
    logits = torch.full((2, 32), -9.0)
    logits[:, 4] = 5.0
    batch = Batch(
        32, [(P(temperature=0.0, seed=0, presence_penalty=2.0), [1], []), (P(temperature=0.0, seed=0), [1], [])]
    )
    for _ in range(3):
        batch.sample(logits)
    assert batch.state.output_counts[0, 4] == 3
    assert batch.state.output_counts[1].sum() == 0


def test_the_slots_may_come_from_the_host():
    batch = Batch(32, [(P(seed=0, top_p=0.5), [1], []), (P(seed=3, logprobs=1), [1], [])], slots=[5, 2])
    logits = noise(2, 32)
    told = sample(logits, batch.slots, batch.positions, batch.state, host_slots=np.array([5, 2]))
    assert torch.equal(told.ids, batch.sample(logits).ids)
