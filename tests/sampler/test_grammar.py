"""Grammars in the sampler: the reference follows them, the fused kernels do the same, and outputs match."""

import re

import numpy as np
import pytest
import torch

from actorserve.fsm.compiler import compile_pattern
from actorserve.fsm.token_table import TokenTable
from actorserve.fsm.vocabulary import build_tables
from actorserve.sampler.grammar import END, Grammars, allowed
from actorserve.sampler.params import SamplingParams
from actorserve.sampler.reference import DEAD, POISON, STOP, sample
from actorserve.sampler.state import SamplerState

WORDS: list[bytes | None] = [
    None, *(bytes([b]) for b in b"abcdefgh0123456789 .-"), b"ab", b"cd", b"abc", b"12", b" a", None,
]  # fmt: skip
EOS = 0
VOCAB = len(WORDS) + 5  # as models pad it
CPU = torch.device("cpu")
NONE = np.empty(0, np.int32)


def table(pattern: str) -> TokenTable:
    """With a tokenizer that takes the longest words first, for canonical tokens."""
    words = sorted((w for w in WORDS if w), key=len, reverse=True)

    def encode(text: str) -> list[int]:
        data, ids = text.encode(), []
        while data:
            word = next(w for w in words if data.startswith(w))
            ids.append(WORDS.index(word))
            data = data[len(word) :]
        return ids

    return compile_pattern(pattern, build_tables(WORDS, [EOS]), encode)


def load(state: SamplerState, handle: int, t: TokenTable) -> None:
    state.load_grammar(handle, t.token_class, t.transitions, t.canonical)


def text_of(ids: list[int]) -> str:
    return b"".join(WORDS[i] or b"" for i in ids).decode()


PATTERNS = ["(ab|cd)+[0-9]{2}", "a(bc)?d?", "abcabcabc[0-9]{1,3} ab", "[a-h]{3,5}\\.", "(-?[0-9]+)( -?[0-9]+)*"]


@pytest.mark.parametrize("greedy", [True, False])
def test_finished_outputs_match(greedy: bool) -> None:
    rows = len(PATTERNS)
    state = SamplerState(rows, VOCAB, (EOS,), CPU)
    tables = [table(p) for p in PATTERNS]
    finished = 0
    for seed in range(40):
        for slot, t in enumerate(tables):
            if not seed:
                load(state, slot, t)
            params = SamplingParams(temperature=0.0 if greedy else 1.0, seed=seed)
            state.admit(slot, params, NONE, NONE, 1, 0, grammar=slot)
        outputs: list[list[int]] = [[] for _ in range(rows)]
        live = list(range(rows))
        for step in range(30):
            if not live:
                break
            logits = torch.randn(len(live), VOCAB, generator=torch.Generator().manual_seed(100 * seed + step))
            drawn = sample(logits, torch.tensor(live), torch.full((len(live),), step + 1), state)
            for slot, token, finish in zip(list(live), drawn.ids.tolist(), drawn.finish.tolist(), strict=True):
                assert finish in (0, STOP)
                if finish:
                    assert token == EOS and re.fullmatch(PATTERNS[slot], text_of(outputs[slot])), outputs[slot]
                    finished += 1
                    live.remove(slot)
                else:
                    outputs[slot].append(token)
    assert finished > 100


def test_masks_are_what_the_table_allows() -> None:
    t = table(PATTERNS[2])
    grammars = Grammars(3, VOCAB, CPU)
    grammars.load(9, t.token_class, t.transitions, t.canonical)
    grammars.bind(1, 9, 0)
    for state in range(len(t.transitions)):
        grammars.set_state(1, state)
        mask = grammars.mask(np.array([0, 1]), None)
        assert mask is not None and (mask[0] == -1).all()
        bits = [(int(mask[1, i // 32]) >> i % 32) & 1 for i in range(VOCAB)]
        assert bits == [int(i < len(WORDS) and t.allows(state, i)) for i in range(VOCAB)]
        only = torch.zeros(2, mask.shape[1], dtype=torch.int32)
        both = grammars.mask(np.array([0, 1]), only)
        assert both is not None and not both.any()
    assert not allowed(grammars._loaded[9], -1).any()


def test_grammars_come_and_go() -> None:
    t = table("ab")
    grammars = Grammars(2, VOCAB, CPU)
    for handle in range(4):
        grammars.load(handle, t.token_class, t.transitions, t.canonical)
    with pytest.raises(ValueError, match="cannot be loaded"):
        grammars.load(4, t.token_class, t.transitions, t.canonical)
    grammars.drop(2)
    with pytest.raises(ValueError, match="cannot be loaded"):
        grammars.load(3, t.token_class, t.transitions, t.canonical)
    grammars.load(4, t.token_class, t.transitions, t.canonical)
    grammars.bind(0, 4, 0)
    assert (grammars.mask(np.array([0]), None) != -1).any()
    grammars.bind(0, -1, 0)
    assert (grammars.mask(np.array([0]), None) == -1).all()


def test_a_grammar_without_a_way_is_not_the_models_fault() -> None:
    state = SamplerState(3, VOCAB, (EOS,), CPU)
    t = table("a")
    load(state, 0, t)
    done = t.step(0, WORDS.index(b"a"))
    state.admit(0, SamplingParams(temperature=0.0, seed=0, min_new_tokens=9), NONE, NONE, 1, 1, 0, done)
    state.admit(1, SamplingParams(temperature=0.0, seed=0), NONE, NONE, 1, 1, 0, done)
    state.admit(2, SamplingParams(temperature=0.0, seed=0, ignore_eos=True), NONE, NONE, 1, 1, 0, done)
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = float("nan")
    drawn = sample(logits, torch.tensor([0, 1, 2]), torch.tensor([2, 2, 2]), state)
    assert drawn.finish.tolist() == [DEAD, POISON, STOP] and drawn.ids[2] == EOS
    assert t.token_class[EOS] == END


triton = pytest.importorskip("triton")
from actorserve.sampler.fused import FusedSampler  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_the_fused_sampler_follows_grammars_as_the_reference_does() -> None:
    kinds = [
        {"temperature": 0.0}, {}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 0.0, "repetition_penalty": 1.5},
        {"min_p": 0.3, "frequency_penalty": 0.4}, {"temperature": 0.0, "min_new_tokens": 60}, {"logprobs": 2},
    ]  # fmt: skip
    slots = 2 * len(kinds)
    plain = SamplerState(slots, VOCAB, (EOS,), CPU, static=False)
    state = SamplerState(slots, VOCAB, (EOS,), DEVICE, static=True)
    fused = FusedSampler(state, slots + 1)
    for handle, pattern in enumerate(PATTERNS):
        for s in (plain, state):
            load(s, handle, table(pattern))
    for slot in range(slots):
        params = SamplingParams(**{"seed": slot, **kinds[slot % len(kinds)]})
        grammar = -1 if slot % 5 == 4 else slot % len(PATTERNS)
        for s in (plain, state):
            s.admit(slot, params, NONE, NONE, 0, 0, grammar)
    at = np.arange(slots)
    finishes = set()
    for step in range(14):
        logits = torch.randn(slots, VOCAB, generator=torch.Generator().manual_seed(step)) * 2
        if step == 9:
            logits[0, len(WORDS) + 1] = float("nan")  # where the grammar allows nothing
        rows, positions = torch.from_numpy(at), torch.full((slots,), step)
        expected = sample(logits, rows, positions, plain)
        got = fused.draw(logits.clone().to(DEVICE), rows.to(DEVICE), positions.to(DEVICE), fused.mode_of(at))
        assert expected.ids.tolist() == got.ids.tolist(), step
        assert expected.finish.tolist() == got.finish.tolist(), step
        bound = plain.grammars.host_bound >= 0
        healthy = bound[:slots] & (expected.finish.numpy() < POISON)
        states = state.grammars.state.cpu().numpy()[:slots]
        assert states[healthy].tolist() == plain.grammars._host_state[:slots][healthy].tolist()
        finishes |= set(expected.finish.tolist())
        for slot in np.flatnonzero(expected.finish.numpy()).tolist():  # it starts anew
            for s in (plain, state):
                if bound[slot]:
                    s.set_grammar_state(slot, 0)
    assert finishes == {0, STOP, POISON, DEAD}
