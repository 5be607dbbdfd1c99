"""The CPU's kernel that draws tokens: the ids of the reference, whatever rows, masks, vocabulary and threads."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from actorserve.errors import StartupError
from actorserve.models.cpu_draw import CpuRace, cpu_race
from actorserve.models.cpu_kernels import kernels
from actorserve.sampler.params import SamplingParams
from actorserve.sampler.reference import Sampled, sample
from actorserve.sampler.state import SamplerState

PARAMS = (
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 3.0},
    {"temperature": 0.0, "repetition_penalty": 1.5}, {"temperature": 0.9, "presence_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": {3: 40.0, 5: -40.0}}, {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.8, "min_new_tokens": 9, "stop_token_ids": (4, 6)},
)  # fmt: skip


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernel() -> CpuRace:
    try:
        return CpuRace(kernels())
    except StartupError as error:
        pytest.skip(str(error))


class Case:
    """A row for each of PARAMS, and one more of each at another position."""

    def __init__(self, vocab: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = 2 * len(PARAMS)
        self.state = SamplerState(self.rows, vocab, (2,), torch.device("cpu"))
        for slot in range(self.rows):
            params = SamplingParams(seed=seed + slot, max_new_tokens=50, **PARAMS[slot % len(PARAMS)])
            prompt, output = np.array([1, 5, 3], np.int32), np.array([3], np.int32)
            self.state.admit(slot, params, prompt, output, 3, 1)
        self.slots = torch.randperm(self.rows, generator=generator)
        self.positions = torch.randint(4, 9, (self.rows,), generator=generator)
        self.logits = torch.randn(self.rows, vocab, generator=generator) * 3
        self.mask = torch.randint(-(2**31), 2**31, (self.rows, -(-vocab // 32)), generator=generator).to(torch.int32)
        self.mask[:, 0] |= 1 << 7

    def sample(self, mask: Tensor | None, kernel: CpuRace | None, rows: slice = slice(None)) -> Sampled:
        bits = None if mask is None else mask[rows]
        state = self.state
        if state.output_counts is not None:  # so that one draw does not change the next
            state.output_counts = state.output_counts.clone()
        counts = state.output_counts
        try:
            return sample(
                self.logits[rows], self.slots[rows], self.positions[rows], state, bits, kernel=kernel
            )  # fmt: skip
        finally:
            if counts is not None:
                self._reset()

    def _reset(self) -> None:
        assert self.state.output_counts is not None and self.state.seen is not None
        self.state.output_counts.zero_()
        self.state.output_counts[:, 3] = 1
        self.state.seen.zero_()
        self.state.seen[:, [1, 3, 5]] = True


@pytest.mark.parametrize("vocab", [33, 64, 200, 4099, 49152])
def test_ids_are_those_of_the_reference(kernel: CpuRace, vocab: int) -> None:
    for seed in range(4):
        case = Case(vocab, seed)
        few = torch.zeros_like(case.mask)
        few[:, 0] = 1 << 7 | 1 << 9
        for mask in (None, case.mask, few):
            expected, got = case.sample(mask, None), case.sample(mask, kernel)
            assert torch.equal(got.ids, expected.ids) and torch.equal(got.finish, expected.finish)


def test_a_row_s_id_is_its_own(kernel: CpuRace) -> None:
    """Alone as in a batch, on any number of threads."""
    case = Case(1000, 7)
    whole = case.sample(case.mask, kernel).ids
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(case.sample(case.mask, kernel).ids, whole)
    alone = [case.sample(case.mask, kernel, slice(row, row + 1)).ids for row in range(case.rows)]
    assert torch.equal(torch.cat(alone), whole)


def test_poison(kernel: CpuRace) -> None:
    """NaN and +inf anywhere, also under a mask; and where nothing is left."""
    case = Case(500, 1)
    good = case.sample(case.mask, kernel)
    case.logits[3, 499], case.logits[5, 0], case.logits[7] = float("nan"), float("inf"), -float("inf")
    mask = case.mask.clone()
    mask[9] = 0
    for bits in (case.mask, mask, None):
        expected, got = case.sample(bits, None), case.sample(bits, kernel)
        assert torch.equal(got.ids, expected.ids) and torch.equal(got.finish, expected.finish)
        assert got.finish[[3, 5, 7]].tolist() == [3, 3, 3]
    others = [row for row in range(case.rows) if row not in (3, 5, 7)]
    assert torch.equal(case.sample(case.mask, kernel).ids[others], good.ids[others])


def test_the_first_among_equals(kernel: CpuRace) -> None:
    state = SamplerState(1, 100, (2,), torch.device("cpu"))
    state.admit(0, SamplingParams(temperature=0.0, seed=0), np.empty(0, np.int32), np.empty(0, np.int32), 3, 0)
    for at in (0, 15, 16, 40, 99):
        logits = torch.zeros(1, 100)
        logits[0, at:] = 1.0
        assert sample(logits, torch.zeros(1, dtype=torch.int64), torch.tensor([3]), state, kernel=kernel).ids[0] == at


def test_draws_follow_the_distribution(kernel: CpuRace) -> None:
    """Frequencies of 20,000 draws at distinct positions, within 5 standard deviations."""
    state = SamplerState(1, 64, (2,), torch.device("cpu"))
    state.admit(0, SamplingParams(temperature=1.0, seed=3), np.empty(0, np.int32), np.empty(0, np.int32), 0, 0)
    logits, count = torch.linspace(-3, 1, 64), 20000
    slots = torch.zeros(count, dtype=torch.int64)
    ids = sample(logits.repeat(count, 1), slots, torch.arange(count), state, kernel=kernel).ids
    p = logits.softmax(-1).double()
    seen = torch.bincount(ids, minlength=64).double()
    assert ((seen - count * p).abs() < 5 * (count * p * (1 - p)).sqrt() + 1).all()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel() -> None:
        raise StartupError("there is no C compiler")

    monkeypatch.setattr("actorserve.models.cpu_kernels.kernels", no_kernel)
    assert cpu_race() is None
