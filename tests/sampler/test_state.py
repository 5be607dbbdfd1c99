"""SamplerState: admit overwrites everything, and after a retraction restores what an uninterrupted run has."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.sampler.params import SamplingParams as P
from actorserve.sampler.philox import row_keys
from actorserve.sampler.reference import sample
from actorserve.sampler.state import AHEAD, BIAS, FILTERED, FLOATS, IN_PROMPT, INTS, PENALTY, SamplerState

VOCAB = 24
NONE = np.empty(0, np.int32)
EVERYTHING = P(
    temperature=0.5,
    top_k=3,
    top_p=0.5,
    min_p=0.25,
    frequency_penalty=1.0,
    presence_penalty=1.0,
    repetition_penalty=1.5,
    seed=9,
    logit_bias={1: 5.0, 2: 6.0},
    stop_token_ids=(4, 5, 6),
    min_new_tokens=4,
    logprobs=3,
)


def new_state(slots: int = 4) -> SamplerState:
    return SamplerState(slots, VOCAB, (2, 3), torch.device("cpu"))


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_columns_hold_the_parameters_in_their_units():
    state = new_state()
    state.admit(1, EVERYTHING, ids(7, 7, 8), NONE, 3, 0)
    ints = dict(zip(INTS, state.ints[1].tolist(), strict=True))
    needs = {"needs": PENALTY | BIAS | FILTERED, "logprobs": -1 if EVERYTHING.logprobs is None else EVERYTHING.logprobs}
    assert ints == {"seed": 9, "top_k": 3, "top_p": 1 << 23, "min_weight": 1 << 38, "min_until": 7} | needs
    floats = dict(zip(FLOATS, state.floats[1].tolist(), strict=True))
    assert floats == {"inverse_temperature": 2.0, "repetition": 1.5, "frequency": 1.0, "presence": 1.0}
    assert sorted(state.stop_ids[1].tolist()) == [2, 3, 4, 5, 6]
    assert state.stop_ids[0].tolist() == [-1] * 5


def test_top_k_of_the_whole_vocabulary_is_off():
    state = new_state()
    state.admit(0, P(seed=0, top_k=VOCAB), NONE, NONE, 1, 0)
    assert not state.flags.filtered[0]
    state.admit(0, P(seed=0, top_k=VOCAB - 1), NONE, NONE, 1, 0)
    assert state.flags.filtered[0]


def test_big_tables_come_with_their_first_use():
    state = new_state()
    state.admit(0, P(seed=0, temperature=0.7, top_p=0.9), NONE, NONE, 1, 0)
    assert state.output_counts is None
    assert state.seen is None
    assert state.bias_ids.shape == (5, 0)
    state.admit(1, EVERYTHING, ids(7, 7, 8), ids(9, 9, 1), 3, 3)
    assert state.output_counts[1].tolist() == [{1: 1, 9: 2}.get(i, 0) for i in range(VOCAB)]
    assert state.seen[1].nonzero().flatten().tolist() == [1, 7, 8, 9]
    assert state.bias_ids.shape == (5, 2)


def test_a_slot_forgets_its_last_request():
    """A slot that had every parameter draws for a plain request what a fresh slot draws."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    slot, position = torch.tensor([1]), torch.tensor([5])
    for plain in (P(seed=3), P(seed=3, temperature=0.0), P(seed=3, repetition_penalty=1.2), P(seed=3, top_p=0.3)):
        used, fresh = new_state(), new_state()
        used.admit(1, EVERYTHING, ids(7, 7, 8), ids(9, 9, 1), 3, 3)
        for state in (used, fresh):
            state.admit(1, plain, ids(11, 12, 13), ids(14, 15), 3, 2)
        drawn = [sample(logits, slot, position, state) for state in (used, fresh)]
        assert torch.equal(drawn[0].ids, drawn[1].ids)
        assert drawn[0].logprobs is None
        assert torch.equal(used.ints[1], fresh.ints[1])
        assert torch.equal(used.floats[1], fresh.floats[1])
        assert [i for i in used.stop_ids[1].tolist() if i >= 0] == [2, 3]
        if plain.has_penalty:
            assert torch.equal(used.seen[1], fresh.seen[1])
            assert torch.equal(used.output_counts[1], fresh.output_counts[1])


def test_ignore_eos_leaves_the_stop_ids():
    state = new_state()
    state.admit(0, P(seed=0, ignore_eos=True, stop_token_ids=(9,)), NONE, NONE, 1, 0)
    assert [i for i in state.stop_ids[0].tolist() if i >= 0] == [9]


def test_refuses_an_unresolved_seed_and_a_part_of_the_sequence():
    state = new_state()
    with pytest.raises(ValueError, match="seed"):
        state.admit(0, P(), NONE, NONE, 1, 0)
    with pytest.raises(ValueError, match="all prompt and output"):
        state.admit(0, P(seed=0, presence_penalty=1.0), NONE, NONE, 3, 0)


def test_admit_keeps_no_reference_to_the_callers_arrays():
    state, output = new_state(), ids(5)
    state.admit(0, P(seed=0, presence_penalty=1.0), ids(4), output, 1, 1)
    output[0] = 6
    assert state.output_counts[0, 5] == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 11), st.integers(-(1 << 40), 1 << 40), st.sampled_from([0.0, 0.8]))
def test_retraction_restores_the_uninterrupted_state(cut, seed, temperature):
    """Twelve tokens in one go, and with a retraction after `cut` of them into another slot: same tokens and counts."""
    params = P(
        seed=seed,
        temperature=temperature,
        top_p=0.9,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        repetition_penalty=1.3,
        min_new_tokens=6,
    )
    prompt = ids(1, 2, 3, 3)
    logits = torch.randn(12, 1, VOCAB, generator=torch.Generator().manual_seed(seed % 1000))
    state = new_state()

    def run(slot: int, output: list[int], until: int) -> list[int]:
        state.admit(slot, params, prompt, np.array(output, np.int32), len(prompt), len(output))
        for step in range(len(output), until):
            position = torch.tensor([len(prompt) + step])
            output.append(int(sample(logits[step], torch.tensor([slot]), position, state).ids))
        return output

    whole = run(0, [], 12)
    before = run(1, [], cut)
    state.admit(1, EVERYTHING, ids(0), NONE, 1, 0)  # somebody else has the slot in between
    assert run(2, before, 12) == whole
    assert torch.equal(state.output_counts[0], state.output_counts[2])
    assert torch.equal(state.seen[0], state.seen[2])


def test_keys_are_those_of_seed_and_position():
    """Whatever was computed ahead: across blocks, back again, for another request in the slot."""
    state = new_state()
    for slot in range(4):
        state.admit(slot, P(seed=slot), NONE, NONE, 1, 0)
    for step in (0, 1, AHEAD - 1, AHEAD, 5 * AHEAD + 3, 2):
        slots = torch.tensor([2, 0, 3])
        positions = torch.tensor([step, step + AHEAD // 2, 1 << 40])
        assert torch.equal(state.row_keys(slots, positions), row_keys(slots, positions))
    state.admit(2, P(seed=99), NONE, NONE, 1, 0)
    at = torch.tensor([2])
    assert torch.equal(state.row_keys(torch.tensor([2]), at), row_keys(torch.tensor([99]), at))


def test_given_tokens_count_until_the_mark_is_full():
    """One more was the bit that says that a token is in the prompt: its penalty came and went."""
    state = SamplerState(1, 6, (), torch.device("cpu"), static=True)
    params = P(seed=0, frequency_penalty=0.5)
    output = np.array([1] * (IN_PROMPT - 2) + [2] * (IN_PROMPT - 2) + [3], dtype=np.int32)
    prompt = np.array([2, 4], dtype=np.int32)
    state.admit(0, params, prompt, output, len(prompt), len(output))
    state.count_given(0, np.array([1, 1, 1, 2, 2, 3, 4, 5, 5], dtype=np.int32))
    full = IN_PROMPT - 1
    assert state.marks[0].tolist() == [0, full, IN_PROMPT + full, 2, IN_PROMPT + 1, 2]
