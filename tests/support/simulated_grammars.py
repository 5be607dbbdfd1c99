"""Small grammars over the simulated executor's tokens: runs of forced tokens of many lengths between choices."""

from functools import cache

import numpy as np
from simulated_executor import EOS, VOCAB

from actorserve.actors.constraint import Grammar


@cache
def grammar_of(seed: int, states: int = 40) -> Grammar:
    """States in a ring: most force one token, some leave a choice of two classes, one of which skips ahead; a few are
    final."""
    rng = np.random.default_rng(seed)
    token_class = rng.integers(2, 6, VOCAB).astype(np.uint16)
    token_class[EOS] = 1
    transitions = np.full((states, 6), -1, np.int16)
    canonical = np.full(states, -1, np.int32)
    for state in range(states):
        after = (state + 1) % states
        if rng.random() < 0.75:
            canonical[state] = token = int(rng.integers(1, VOCAB))
            transitions[state, token_class[token]] = after
            continue
        classes = rng.choice(np.arange(2, 6), 2, replace=False)
        transitions[state, classes] = after, int(rng.integers(states))
        if rng.random() < 0.3:
            transitions[state, 1] = state
    return Grammar(seed, token_class, transitions, canonical)
