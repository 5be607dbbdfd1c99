"""Jumps: the same output with them and without."""

import random
from collections.abc import Sequence

import grammars
import pytest

from actorserve.fsm.compiler import compile_pattern
from actorserve.fsm.errors import EmptyLanguage
from actorserve.fsm.jump import plan_jump
from actorserve.fsm.token_table import TokenTable
from actorserve.fsm.vocabulary import build_tables

TOKENS = grammars.bytes_vocabulary(
    "ab", "abc", "th", "the", " the", "  ", '"', '",', '": "', "Hello", " there", "quick", " brown",
    "日本", b"\xe6\x97",
    "red", '"red', '", "', "name", "house", "Gryff", "indor", "\n", "\n    ", "start", " user",
)  # fmt: skip
END = len(TOKENS) - 1
TABLES = build_tables(TOKENS, [END])
ENCODE = grammars.longest_first(TOKENS)


@pytest.fixture(scope="module")
def tables() -> list[TokenTable]:
    found = []
    for pattern in [*grammars.PATTERNS[::2], *grammars.random_patterns(100, seed=4)]:
        try:
            found.append(compile_pattern(pattern, TABLES, ENCODE))
        except EmptyLanguage:
            continue
    return found


def allowed(table: TokenTable, state: int) -> list[int]:
    mask = table.masks([int(table.row[state])])[0]
    return [t for t in range(len(TOKENS)) if mask[t // 32] >> (t % 32) & 1]


def test_a_jump_is_what_single_steps_force(tables: Sequence[TokenTable]) -> None:
    jumps = 0
    for table in tables:
        for state in range(len(table.row)):
            jump = plan_jump(table, state, 1000)
            jumps += len(jump.tokens) > 1
            at = state
            for token in jump.tokens:
                assert allowed(table, at) == [token]
                at = table.step(at, token)
            assert at == jump.state
            assert table.canonical[at] < 0
            assert bool(table.complete[at]) == (allowed(table, at) == [END])
    assert jumps > 100


def test_jumps_can_be_cut_anywhere(tables: Sequence[TokenTable]) -> None:
    for table in tables:
        whole = plan_jump(table, 0, 1000)
        for limit in range(len(whole.tokens) + 1):
            first = plan_jump(table, 0, limit)
            rest = plan_jump(table, first.state, 1000)
            assert len(first.tokens) == limit
            assert first.tokens + rest.tokens == whole.tokens and rest.state == whole.state


def generate(table: TokenTable, seed: int, jumps: bool) -> tuple[list[int], int]:
    """A model whose choice depends on the position alone: (its output, how often it was asked)."""
    state, output, asked = 0, [], 0
    while len(output) < 60:
        if jumps:
            jump = plan_jump(table, state, 60 - len(output))
            output += jump.tokens
            state = jump.state
            if len(output) == 60:
                break
        asked += 1
        token = random.Random(seed * 1000 + len(output)).choice(allowed(table, state))
        output.append(token)
        if token == END:
            break
        state = table.step(state, token)
    return output, asked


def test_output_is_the_same_with_jumps_and_without(tables: Sequence[TokenTable]) -> None:
    saved = 0
    for table in tables:
        for seed in range(3):
            without, often = generate(table, seed, jumps=False)
            with_jumps, seldom = generate(table, seed, jumps=True)
            assert with_jumps == without
            saved += often - seldom
    assert saved > 500
