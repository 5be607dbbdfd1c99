"""Grammars after thoughts, against what is meant: any text between tags, then the grammar as it is alone."""

import random
from collections.abc import Callable

import grammars
import numpy as np
import pytest
from vocabularies import Vocabulary, listed, make, table_of

from actorserve.config import Thoughts
from actorserve.fsm.matcher import Matchers
from actorserve.fsm.thoughts import Tables, after_thoughts
from actorserve.fsm.token_table import NONE, TokenTable

PATTERNS = ["a*", "(ab|th)+!?", '\\{"a": [0-9]{1,2}\\}', "the (ing|Hello)", "", "[^a]{0,3}", "12"]


def vocabulary() -> tuple[Vocabulary, int, int]:
    """A vocabulary with an opening and a closing tag."""
    tokens = [*listed().tokens[:-1], None, None, None]
    return make(tokens, grammars.longest_first(tokens)), len(tokens) - 3, len(tokens) - 2


VOCABULARY, OPEN, CLOSE = vocabulary()
TEXT = VOCABULARY.tables.place >= 0


def drawable(tables: Tables, state: int) -> set[int]:
    """What a sampler lets through."""
    if tables.canonical[state] != NONE:
        return {int(tables.canonical[state])}
    return set(np.flatnonzero(tables.transitions[state][tables.token_class] >= 0).tolist())


def meant(table: TokenTable, place: str, state: int) -> set[int]:
    alone = {t for t in range(len(VOCABULARY.tokens)) if table.allows(state, t)}
    if place == "thoughts":
        return set(np.flatnonzero(TEXT).tolist()) | {CLOSE}
    return alone | ({OPEN} if place == "start" else set())


def walk(
    table: TokenTable, opened: bool, seed: int, allowed: Callable[[], set[int]], take: Callable[[int], None]
) -> list[str]:
    """Compare at each step of a random output; returns the places that it came through."""
    rng, place, state, places = random.Random(seed), "thoughts" if opened else "start", 0, []
    for _ in range(30):
        places.append(place)
        found = allowed()
        assert found == meant(table, place, state), place
        choices = sorted(found - {VOCABULARY.end}) or [VOCABULARY.end]
        tags = [t for t in choices if t in (OPEN, CLOSE)]
        token = rng.choice(tags if tags and rng.random() < 0.3 else choices)
        if token == VOCABULARY.end:
            break
        if token in (OPEN, CLOSE):
            place = "thoughts" if token == OPEN else "answer"
        elif place != "thoughts":
            place, state = "answer", table.step(state, token)
        take(token)
    return places


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tables(pattern: str, opened: bool) -> None:
    table = table_of(pattern, VOCABULARY)
    assert table is not None
    tables = after_thoughts(
        Tables(table.token_class, table.transitions, table.canonical), Thoughts((OPEN,), (CLOSE,), opened), TEXT
    )
    seen: set[str] = set()
    for seed in range(20):
        at = [0]

        def take(token: int, at: list[int] = at) -> None:
            at[0] = int(tables.transitions[at[0], tables.token_class[token]])

        seen |= set(walk(table, opened, seed, lambda at=at: drawable(tables, at[0]), take))  # type: ignore[misc]
    assert seen == {"thoughts", "answer"} | (set() if opened else {"start"})


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("pattern", ["a*", "(ab|th)+!?", "[^a]{0,3}"])
def test_matchers(pattern: str, opened: bool) -> None:
    """The library has no canonical tokens, so the reference is a table without."""
    table = table_of(pattern, VOCABULARY, canonical=False)
    assert table is not None
    names = [token or b"<%d>" % i for i, token in enumerate(VOCABULARY.tokens)]
    matchers = Matchers(names, [OPEN, CLOSE, VOCABULARY.end], [VOCABULARY.end], VOCABULARY.encode)
    first = matchers.new(f"start: /(?s:{pattern})/", Thoughts((OPEN,), (CLOSE,), opened))
    for seed in range(10):
        matcher = first.copy()

        def allowed(matcher=matcher) -> set[int]:  # type: ignore[no-untyped-def]
            mask = np.zeros(matchers.words, np.int32)
            matcher.fill(mask)
            return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())

        walk(table, opened, seed, allowed, lambda token, matcher=matcher: matcher.consume([token]))  # type: ignore[misc]


def test_tokens_in_one_message() -> None:
    names = [token or b"<%d>" % i for i, token in enumerate(VOCABULARY.tokens)]
    matchers = Matchers(names, [OPEN, CLOSE, VOCABULARY.end], [VOCABULARY.end], VOCABULARY.encode)
    matcher = matchers.new("start: /ab/", Thoughts((OPEN,), (CLOSE,)))
    matcher.consume([OPEN, *VOCABULARY.encode("the Hello"), CLOSE, *VOCABULARY.encode("ab")])
    mask = np.zeros(matchers.words, np.int32)
    matcher.fill(mask)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == [VOCABULARY.end]


def test_too_many_states() -> None:
    tables = Tables(np.zeros(4, np.uint16), np.zeros((32767, 2), np.int16), np.full(32767, NONE, np.int32))
    with pytest.raises(ValueError, match="too many"):
        after_thoughts(tables, Thoughts((1,), (2,)), np.ones(4, np.bool_))
