"""Forced runs: what follows when nothing can be chosen."""

import grammars
import numpy as np
import pytest

from actorserve.fsm.budget import Budget
from actorserve.fsm.compiler import compile_bytes
from actorserve.fsm.compressed import compress
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.utf8 import ByteDfa


def automaton(pattern: str) -> ByteDfa:
    return compile_bytes(parse_pattern(pattern), Budget())


def plain_run(dfa: ByteDfa, state: int) -> tuple[bytes, int]:
    run = b""
    while not dfa.final[state]:
        out = [byte for byte in range(256) if dfa.step(state, byte) >= 0]
        if len(out) != 1:
            break
        run += bytes(out)
        state = dfa.step(state, out[0])
    return run, state


@pytest.mark.parametrize(
    "patterns", [grammars.PATTERNS, grammars.random_patterns(100, seed=2)], ids=["fixed", "generated"]
)
def test_runs_are_what_one_byte_after_another_gives(patterns: list[str]) -> None:
    for pattern in patterns:
        dfa = automaton(pattern)
        edges = compress(dfa)
        for state in range(len(dfa.final)):
            assert edges.forced_run(state) == plain_run(dfa, state), pattern


def test_runs_can_be_cut() -> None:
    edges = compress(automaton("a(bcdefgh|cdefgh)ijk"))
    whole, _ = edges.forced_run(2)
    assert [edges.forced_run(2, n)[0] for n in range(4)] == [whole[:n] for n in range(4)]


def test_memory_is_linear() -> None:
    """A thousand options with a long end in common: the end is there once."""
    options = "|".join(f"{i:03d}" for i in range(1000))
    dfa = automaton(f"({options}){'x' * 500}")
    edges = compress(dfa)
    assert len(edges.arena) == np.count_nonzero(edges.run_len) <= len(dfa.final)


@pytest.mark.parametrize("pattern", ['[^"]*"', "(a|b)+c?", "a?", "(ab|ac)d", "a*"])
def test_a_choice_forces_nothing(pattern: str) -> None:
    dfa = automaton(pattern)
    assert compress(dfa).forced_run(0)[0] in (b"", b"a")
    assert all(not length or not final for length, final in zip(compress(dfa).run_len, dfa.final, strict=True))
