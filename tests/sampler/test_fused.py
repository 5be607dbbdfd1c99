"""The fused sampler draws what the reference draws; on a CPU in Triton's interpreter, on a GPU for real.

Two sampled ids may differ where rounding decides: the tests then ask the reference for the scores of both.
"""

import itertools
import math
import random
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from actorserve.sampler.params import SamplingParams
from actorserve.sampler.reference import DEAD, POISON, STOP, sample
from actorserve.sampler.state import SamplerState

pytest.importorskip("triton")
from actorserve.sampler.fused import BLOCK, MOST, MOST_MODES, FusedSampler

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
EOS = (2, 3)
VOCABS = [49, 5003, 152064] if CUDA else [49, 3001]


class Pair:
    """The same requests in the reference's state and in the fused sampler's."""

    def __init__(self, vocab: int, params: list[SamplingParams], history: int = 12, seed: int = 0) -> None:
        self.vocab, self.params = vocab, params
        slots = len(params) + 1
        self.plain = SamplerState(slots, vocab, EOS, torch.device("cpu"), static=False)
        self.state = SamplerState(slots, vocab, EOS, DEVICE, static=True)
        self.fused = FusedSampler(self.state, slots + 2)
        chance = np.random.default_rng(seed)
        self.slots = chance.permutation(slots)[: len(params)]
        self.positions = []
        for slot, p in zip(self.slots, params, strict=True):
            prompt, output = (chance.integers(0, vocab, history).astype(np.int32) for _ in range(2))
            for state in (self.plain, self.state):
                state.admit(int(slot), p, prompt, output, len(prompt), len(output))
            self.positions.append(2 * history)

    def logits(self, seed: int, spread: float = 2.5) -> torch.Tensor:
        return torch.randn(len(self.params), self.vocab, generator=torch.Generator().manual_seed(seed)) * spread

    def draw(self, logits: torch.Tensor, padding: int = 0) -> tuple:
        """(reference, fused) results of one step; `padding` more rows of the padding slot for the fused one."""
        slots, positions = torch.tensor(self.slots), torch.tensor(self.positions)
        expected = sample(logits, slots, positions, self.plain)
        more = torch.full((padding,), len(self.plain.flags.greedy) - 1)
        rows = torch.cat([logits, torch.zeros(padding, self.vocab)]).to(DEVICE)
        got = self.fused.draw(
            rows, torch.cat([slots, more]).int().to(DEVICE),
            torch.cat([positions, torch.zeros(padding, dtype=torch.int64)]).int().to(DEVICE),
            self.fused.mode_of(self.slots),
        )  # fmt: skip
        return expected, got

    def check(self, logits: torch.Tensor, padding: int = 0, misses: int = 0) -> None:
        expected, got = self.draw(logits, padding)
        n = len(self.params)
        different = (expected.ids != got.ids[:n].cpu()).nonzero()[:, 0].tolist()
        assert len(different) <= misses, [(self.params[i], expected.ids[i], got.ids[i]) for i in different]
        same = [i for i in range(n) if i not in different]
        assert expected.finish[same].tolist() == got.finish[:n].cpu()[same].tolist()
        if expected.logprobs is not None:
            assert torch.allclose(expected.logprobs[same], got.logprobs[:n].cpu()[same], atol=1e-4, equal_nan=True)
            m = expected.top_n
            assert expected.top_ids.tolist() == got.top_ids[:n, :m].cpu().tolist()
            assert torch.allclose(expected.top_logprobs, got.top_logprobs[:n, :m].cpu(), atol=1e-4, equal_nan=True)
        if expected.listed is not None:
            m = expected.listed.shape[1]
            assert torch.allclose(expected.listed, got.listed[:n, :m].cpu(), atol=1e-4, equal_nan=True)
            assert got.listed[:n, m:].isnan().all()


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, **more)


@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_is_exact_also_among_equals(vocab: int) -> None:
    pair = Pair(vocab, [greedy()] * 6)
    pair.check(pair.logits(0), padding=2)
    pair.check(pair.logits(1).round(), padding=1)  # many equal largest
    pair.check(torch.zeros(6, vocab))


@pytest.mark.parametrize("vocab", VOCABS)
def test_edits_are_exact(vocab: int) -> None:
    bias = {int(i): (-1.0) ** i * i for i in range(0, 40, 3)}
    edits = [
        {"repetition_penalty": 1.7}, {"frequency_penalty": 1.5, "presence_penalty": -0.5}, {"logit_bias": bias},
        {"logit_bias": {5: 100.0}, "stop_token_ids": (5, 6)}, {"min_new_tokens": 30, "stop_token_ids": (7, 8)},
        {"min_new_tokens": 5}, {"repetition_penalty": 0.5, "presence_penalty": 2.0, "logit_bias": bias}, {},
    ]  # fmt: skip
    pair = Pair(vocab, [greedy(**e) for e in edits])
    for step in range(3):  # what was drawn counts
        logits = pair.logits(step)
        logits[:, 2] = 9.0  # EOS wins where it is allowed
        logits[6, 11] = 12.0
        pair.check(logits.clone(), padding=1)
        pair.positions = [p + 1 for p in pair.positions]


@pytest.mark.parametrize("vocab", VOCABS)
def test_sampled_rows(vocab: int) -> None:
    params = [SamplingParams(temperature=t, seed=s) for s, t in enumerate((0.3, 0.7, 1.0, 1.0, 1.5, 5.0, 0.01))]
    pair = Pair(vocab, [*params, greedy()])
    for step in range(4):
        pair.check(pair.logits(step), padding=step % 2)
        pair.check(pair.logits(step, 0.02))
        pair.positions = [p + 1 for p in pair.positions]


FILTERS: list[dict] = [
    {"top_k": 5}, {"top_k": 1}, {"top_p": 0.9}, {"top_p": 0.3}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.8},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.2}, {"top_p": 0.01}, {"min_p": 1.0}, {"top_p": 0.999, "min_p": 0.001},
    {"top_k": 2000}, {},
]  # fmt: skip


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [2.5, 0.05])
def test_filters(vocab: int, spread: float) -> None:
    pair = Pair(vocab, [SamplingParams(temperature=0.8, seed=i, **f) for i, f in enumerate(FILTERS)])
    for step in range(3 if CUDA else 1):
        pair.check(pair.logits(step, spread), misses=int(vocab > 100_000))
        pair.positions = [p + 1 for p in pair.positions]


def test_equal_weights_at_the_threshold_all_stay() -> None:
    pair = Pair(3001, [SamplingParams(seed=i, top_k=4, top_p=0.9) for i in range(8)])
    pair.check(pair.logits(0).round())


def test_everything_at_once() -> None:
    chance = random.Random(0)
    params = [
        SamplingParams(
            temperature=chance.choice([0.0, 0.7, 1.2]), top_k=chance.choice([-1, 10]), top_p=chance.choice([1.0, 0.9]),
            min_p=chance.choice([0.0, 0.05]), repetition_penalty=chance.choice([1.0, 1.3]), seed=i,
            frequency_penalty=chance.choice([0.0, 0.4]), logit_bias=chance.choice([{}, {9: 3.0}]),
            logprobs=chance.choice([None, 0, 3]), min_new_tokens=chance.choice([0, 60]),
            token_ids_logprob=((), (7, 3), tuple(range(20)))[i % 3],
        )
        for i in range(12)
    ]  # fmt: skip
    pair = Pair(3001, params)
    for step in range(2):
        pair.check(pair.logits(step), padding=1)
        pair.positions = [p + 1 for p in pair.positions]


def test_poison_is_seen_anywhere() -> None:
    for value, at in ((math.nan, 0), (math.nan, 2), (math.inf, 1700), (math.nan, 3000)):
        kinds = [greedy(), SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.9), greedy(min_new_tokens=99)]
        pair = Pair(3001, kinds)
        logits = pair.logits(0)
        logits[:, at] = value
        expected, got = pair.draw(logits)
        assert expected.finish.tolist() == got.finish[:4].tolist() == [POISON] * 4
        assert got.ids[:4].tolist() == [0] * 4
    pair = Pair(49, [greedy(), SamplingParams(seed=1)])
    pair.check(torch.full((2, 49), -math.inf))


def test_masks_of_the_host_allow_what_they_say() -> None:
    pair = Pair(
        3001, [greedy(), SamplingParams(seed=1), SamplingParams(seed=2, top_k=3), greedy(), SamplingParams(seed=3)]
    )
    masks = np.random.default_rng(0).integers(-(2**31), 2**31, (4, 93), dtype=np.int64).astype(np.int32)
    masks[3] = 0  # the last word is left out: what it stands for never comes
    for state in (pair.plain, pair.fused.state):
        state.set_masks(np.array(pair.slots[:4], np.int32), masks)
    pair.check(pair.logits(0), padding=2)
    expected, got = pair.draw(pair.logits(1))
    assert expected.finish.tolist() == got.finish[:5].tolist() and got.finish.tolist()[3:5] == [DEAD, 0]
    for row, token in enumerate(got.ids[:3].tolist()):
        assert token < 93 * 32 and masks[row, token // 32] >> token % 32 & 1
    none = np.empty(0, np.int32)
    for state in (pair.plain, pair.fused.state):
        state.admit(pair.slots[3], greedy(), none, none, 1, 0)
    pair.check(pair.logits(2))
    assert pair.draw(pair.logits(2))[1].finish[3] == 0, "a slot's mask goes with its request"


def test_stops() -> None:
    pair = Pair(49, [greedy(stop_token_ids=(7,)), greedy(ignore_eos=True), greedy()])
    logits = torch.zeros(3, 49)
    logits[0, 7] = logits[1, 2] = logits[2, 3] = 5.0
    _, got = pair.draw(logits)
    assert got.finish[:3].tolist() == [STOP, 0, STOP]


def test_the_distribution() -> None:
    """Chi-square of draws at many positions against the softmax, and each draw is the reference's.

    In the interpreter a draw takes 10 ms, so there are few: test_race.py has a million of the reference's.
    """
    draws, rows = (1_000_000, 4096) if CUDA else (400, 100)
    probabilities = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02])
    none, params = np.empty(0, np.int32), SamplingParams(seed=5)
    state, plain = SamplerState(1, 7, (), DEVICE, static=True), SamplerState(1, 7, (), torch.device("cpu"))
    for s in (state, plain):
        s.admit(0, params, none, none, 1, 0)
    fused = FusedSampler(state, rows)
    slots = torch.zeros(rows, dtype=torch.int64)
    tally = torch.zeros(7)
    for start in range(0, draws, rows):
        positions = torch.arange(start, start + rows)
        logits = probabilities.log().expand(rows, -1).contiguous()
        mode = fused.mode_of(np.array([0]))
        ids = fused.draw(logits.to(DEVICE), slots.to(DEVICE), positions.to(DEVICE), mode).ids.cpu()
        assert (ids != sample(logits, slots, positions, plain).ids).sum() <= rows // 1000
        tally += torch.bincount(ids, minlength=7)
    expected = probabilities * tally.sum()
    assert ((tally - expected) ** 2 / expected).sum() < 22.5  # 6 degrees of freedom: one in a thousand


def test_filtered_rows_race_on_among_those_above() -> None:
    """A small top_p rejects most first winners, some several times: rounds of all programs, then of one a row."""
    count = 24 if CUDA else 8
    params = [SamplingParams(seed=i, top_p=0.08 + 0.01 * (i % 5), min_p=0.02 * (i % 3)) for i in range(count)]
    pair = Pair(3001, params)
    for step in range(3 if CUDA else 2):
        pair.check(pair.logits(step, 0.5))
        pair.positions = [p + 1 for p in pair.positions]


@pytest.mark.parametrize("vocab", VOCABS)
def test_top_k_at_the_edge_of_what_group_maxima_tell(vocab: int) -> None:
    """From k = 1 to more than there are groups, with and without ties."""
    ks = [2, 3, 31, 48, 64, 127, 128, 129, 512, 1024, 1025]
    pair = Pair(vocab, [SamplingParams(seed=i, top_k=k, top_p=0.95) for i, k in enumerate(ks)])
    pair.check(pair.logits(0), misses=int(vocab > 100_000))
    pair.check(pair.logits(1).mul(4).round() / 4)


def test_more_candidates_than_registers() -> None:
    vocab = 3 * MOST
    pair = Pair(vocab, [SamplingParams(seed=1, top_p=0.95), SamplingParams(seed=2, top_k=2 * MOST)])
    pair.check(pair.logits(0, 0.01), misses=1)


MANY = [
    {}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 9}, {"frequency_penalty": 0.5}, {"logprobs": 0},
    {"logprobs": 3}, {"logprobs": 20, "token_ids_logprob": (1, 2)}, {"min_p": 0.1, "logit_bias": {7: 3.0}},
]  # fmt: skip
"""Each wants work that the others do not."""


def test_modes_are_few_whatever_comes() -> None:
    """For each there are CUDA graphs of all sizes; a batch has what it needs all the same."""
    pair = Pair(49, [SamplingParams(seed=i, **more) for i, more in enumerate(MANY)])
    seen = set()
    for batch in itertools.chain.from_iterable(itertools.combinations(pair.slots, n) for n in (1, 2, 3)):
        mode, needed = pair.fused.mode_of(np.array(batch)), FusedSampler(pair.state, 1).mode_of(np.array(batch))
        assert all(has >= wanted for has, wanted in zip(astuple(mode), astuple(needed), strict=True))
        seen.add(mode)
    assert MOST_MODES < len(seen) <= MOST_MODES + 3
    assert pair.fused.mode_of(pair.slots[:1]) == FusedSampler(pair.state, 1).mode_of(pair.slots[:1])


def test_a_mode_for_everything_draws_what_its_own_draws() -> None:
    pair = Pair(49, [SamplingParams(seed=i, **more) for i, more in enumerate(MANY)])
    pair.fused.modes = {replace(pair.fused.mode_of(pair.slots), top_n=-1, listed=n) for n in range(MOST_MODES)}
    mode = pair.fused.mode_of(pair.slots)
    assert mode.constrained and mode.masked and mode not in pair.fused.modes
    pair.check(pair.logits(0), padding=1)


@pytest.mark.parametrize("vocab", [*VOCABS, 7])
def test_logprobs(vocab: int) -> None:
    """Of the drawn token, of the most likely ones, whatever ties there are, of named ones; nothing for other rows."""
    wanted = [None, 0, 1, 3, 5, 20, 20, None]
    named = [(), (), (vocab - 1,), (), tuple(range(7)), (3, 3, 0), (), ()]
    rows = zip(wanted, named, strict=True)
    pair = Pair(vocab, [SamplingParams(seed=i, logprobs=n, token_ids_logprob=t) for i, (n, t) in enumerate(rows)])
    logits = pair.logits(0)
    near = 20 + torch.arange(vocab) % 3 * 2.0**-19  # apart by what their logprobs cannot tell
    few = torch.full((vocab,), -math.inf)
    few[[vocab // 2, 1]] = torch.tensor([2.0, -1.0])
    for x in (
        logits,
        logits.round(),
        torch.zeros_like(logits),
        -0.0 * (logits > 0),
        near.expand(8, -1),
        few.expand(8, -1),
    ):
        pair.check(x.clone(), padding=1)


def test_logprobs_of_poison_are_no_numbers() -> None:
    vocab = 2 * BLOCK + 5
    pair = Pair(vocab, [SamplingParams(seed=i, logprobs=2, token_ids_logprob=(4,)) for i in range(4)])
    logits = pair.logits(0)
    logits[0, 3], logits[1, BLOCK + 3], logits[2] = math.nan, math.inf, -math.inf
    expected, got = pair.draw(logits)
    assert got.finish.tolist() == expected.finish.tolist() == [3, 3, 3, 0]
    assert got.logprobs[:3].isnan().all() and got.top_logprobs[:3].isnan().all() and got.listed[:3].isnan().all()
    assert got.top_ids[3].tolist()[:2] == expected.top_ids[3].tolist()
    assert torch.allclose(got.top_logprobs[3, :2].cpu(), expected.top_logprobs[3], atol=1e-4)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_graph_replays_it() -> None:
    pair = Pair(5003, [SamplingParams(seed=i, top_p=0.9, frequency_penalty=0.5) for i in range(4)])
    mode = pair.fused.mode_of(pair.slots)
    slots = torch.tensor(pair.slots, device=DEVICE)
    positions, logits = torch.tensor(pair.positions, device=DEVICE), pair.logits(0).to(DEVICE)
    start = logits.clone()
    pair.fused.draw(logits, torch.full_like(slots, len(pair.params) + 1), positions, mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pair.fused.draw(logits, slots, positions, mode)
    for step in range(3):
        logits.copy_(pair.logits(step).to(DEVICE))
        graph.replay()
        expected = sample(pair.logits(step), slots.cpu(), positions.cpu(), pair.plain)
        assert expected.ids.tolist() == got.ids[:4].tolist()
        positions += 1
    assert start.shape == logits.shape
