"""How the stub draws: a token as a function of the seed and of every token before it, and its made-up logprob.

Used by stub_executor.py; torch-free. A sequence is known by a hash of 64 bits that each token moves on, so a draw costs
the same after a thousand tokens as after one. Invariant: stops, least lengths, grammars and masks mean here what they
mean to the real sampler (sampler/reference.py); temperatures and penalties mean nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ..fsm.token_table import END
from ..sampler.params import SamplingParams
from .constraint import Grammar
from .messages import Finish

MASK: Final = (1 << 64) - 1
START: Final = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """Return 64 bits that depend on all bits of `value` (the finaliser of SplitMix64; Steele, Lea, Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def moved(state: int, token: int) -> int:
    """Return the hash of a sequence with one more token."""
    return mix((state + token + 1) * START & MASK)


def hash_of(tokens: Sequence[int]) -> int:
    """Return the hash of a whole sequence."""
    state = START
    for token in tokens:
        state = moved(state, token)
    return state


def logprob_of(state: int) -> float:
    """Return the logprob of a sequence's last token: from 0 down to -8, exact in float32."""
    return -(state >> 40 & 0x7FF) / 256


@dataclass(slots=True)
class Draw:
    """How one slot draws."""

    params: SamplingParams
    prompt_length: int
    grammar: Grammar | None = None
    state: int = 0
    """Of the grammar, before the next token."""
    mask: np.ndarray | None = None
    """int32 [words], bit i of word w for token 32 w + i."""
    allowed: dict[int, np.ndarray] = field(default_factory=dict)
    """By the grammar's state: what may come."""

    def token(self, sequence: int, length: int, vocab_size: int, eos_ids: tuple[int, ...]) -> tuple[int, int]:
        """Return (token, Finish) after a sequence of `length` tokens with this hash; the grammar moves on."""
        seed = self.params.seed
        assert seed is not None, "the text actor resolves it"
        number = mix(sequence ^ mix(seed & MASK))
        ends = self.params.stop_token_ids if self.params.ignore_eos else (*eos_ids, *self.params.stop_token_ids)
        barred = ends if length - self.prompt_length < self.params.min_new_tokens else ()
        choice = self._choice()
        if choice is None:
            token = number % vocab_size
            while token in barred:
                token = (token + 1) % vocab_size
        else:
            choice = choice[~np.isin(choice, barred)] if barred else choice
            if not len(choice):
                return 0, Finish.GRAMMAR
            token = int(choice[number % len(choice)])
        stopped = token in ends
        if self.grammar is not None:
            stopped = stopped or self.grammar.ends(token)
            self.state = self.grammar.step(self.state, token)
        return token, Finish.STOP if stopped else Finish.NONE

    def _choice(self) -> np.ndarray | None:
        """The tokens that a grammar allows, in order; None: all of them."""
        if self.mask is not None:
            return np.flatnonzero(np.unpackbits(self.mask.view(np.uint8), bitorder="little"))
        grammar = self.grammar
        if grammar is None:
            return None
        if grammar.forced(self.state) >= 0:
            return np.array([grammar.forced(self.state)])
        found = self.allowed.get(self.state)
        if found is None:
            reach = grammar.transitions[self.state] >= 0 if self.state >= 0 else np.zeros(END + 1, dtype=bool)
            found = np.flatnonzero(reach[grammar.token_class]) if self.state >= 0 else np.empty(0, dtype=np.int64)
            self.allowed[self.state] = found
        return found


def vector_of(state: int, width: int) -> np.ndarray:
    """Return a sequence's made-up vector: float32 [width], each number from -1 to 1."""
    return np.array([mix(state + i & MASK) >> 40 for i in range(1, width + 1)], dtype=np.float32) / (1 << 23) - 1
