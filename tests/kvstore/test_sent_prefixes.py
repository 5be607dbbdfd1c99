"""SentPrefixes against what was really sent, its bound, and that it answers the same every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actorserve.kvstore.sent_prefixes import FINENESS, SentPrefixes, marks

PAGE = 4
CACHES = 3
prompts = st.lists(st.integers(0, 2), max_size=80)
"""Of few tokens, so that they begin alike."""
salts = st.sampled_from(["", "a", "b"])


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def shared(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return same


@given(st.integers(0, 5000), st.integers(1, 64))
def test_marks_are_whole_pages_and_near_to_each_other(length: int, page: int) -> None:
    found = list(marks(length, page))
    assert all(mark % page == 0 and 0 < mark <= length for mark in found) and found == sorted(set(found))
    # Of any shared length all but a page, or but an eighth, is told apart.
    last = found[-1] if found else 0
    assert length - last < max(page, last / FINENESS + 1)
    assert found == list(marks(length + 1, page))[: len(found)]


class Comparison(RuleBasedStateMachine):
    """Without forgetting, what it knows is the longest mark within what was really sent."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = SentPrefixes(PAGE)
        self.sent: list[list[tuple[str, list[int]]]] = [[] for _ in range(CACHES)]

    @rule(tokens=prompts, salt=salts, cache=st.integers(0, CACHES - 1))
    def send(self, tokens: list[int], salt: str, cache: int) -> None:
        self.prefixes.sent(self.prefixes.hashes(ids(tokens), salt), cache)
        self.sent[cache].append((salt, tokens))

    @precondition(lambda self: any(self.sent))
    @rule(data=st.data(), more=prompts, salt=salts)
    def ask(self, data: st.DataObject, more: list[int], salt: str) -> None:
        known = [tokens for sent in self.sent for _, tokens in sent]
        tokens = data.draw(st.sampled_from(known))
        tokens = tokens[: data.draw(st.integers(0, len(tokens)))] + more
        found = self.prefixes.known(self.prefixes.hashes(ids(tokens), salt), CACHES)
        for cache in range(CACHES):
            longest = max((shared(tokens, other) for s, other in self.sent[cache] if s == salt), default=0)
            assert found[cache] == max([0, *marks(longest, PAGE)])

    @rule(cache=st.integers(0, CACHES - 1))
    def lose(self, cache: int) -> None:
        self.prefixes.forget(cache)
        self.sent[cache].clear()

    @invariant()
    def nothing_is_kept_for_nobody(self) -> None:
        assert any(tokens[PAGE - 1 :] for sent in self.sent for _, tokens in sent) == bool(len(self.prefixes))


TestComparison = Comparison.TestCase


@given(st.integers(1, 12), st.lists(st.tuples(prompts, salts, st.integers(0, CACHES - 1)), max_size=30))
def test_it_stays_bounded_and_answers_the_same(most: int, calls: list[tuple[list[int], str, int]]) -> None:
    """What it forgets are whole ends of prompts: what it still knows was really sent."""
    one, other = SentPrefixes(PAGE, most), SentPrefixes(PAGE, most)
    sent: list[list[tuple[str, list[int]]]] = [[] for _ in range(CACHES)]
    for tokens, salt, cache in calls:
        hashes = one.hashes(ids(tokens), salt)
        found = one.known(hashes, CACHES)
        assert found == other.known(other.hashes(ids(tokens), salt), CACHES)
        for number, length in enumerate(found):
            assert length <= max((shared(tokens, t) for s, t in sent[number] if s == salt), default=0)
        for prefixes in (one, other):
            prefixes.sent(hashes, cache)
            assert len(prefixes) <= most
        sent[cache].append((salt, tokens))
        if tokens[PAGE - 1 :]:
            assert one.known(hashes, CACHES)[cache] >= PAGE, "what was sent last is known"


@pytest.mark.parametrize("length", [131072, 1 << 20])
def test_a_long_prompt_takes_few_places(length: int) -> None:
    prefixes = SentPrefixes(16)
    tokens = np.random.default_rng(1).integers(0, 150_000, length).astype(np.int32)
    hashes = prefixes.hashes(tokens, "")
    assert len(hashes) < 120
    prefixes.sent(hashes, 5)
    assert prefixes.known(hashes, 8) == [length if cache == 5 else 0 for cache in range(8)]
    tokens[length // 2] += 1
    (found,) = {n for n in prefixes.known(prefixes.hashes(tokens, ""), 8) if n}
    assert length // 2 * 7 // 8 <= found <= length // 2
