"""Automata: the right language, minimal, UTF-8 only, and within budget."""

import random
import sys

import grammars
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.fsm import compiler, lengths, nfa, reference
from actorserve.fsm.budget import Budget, charged
from actorserve.fsm.compiler import compile_bytes, compile_pattern
from actorserve.fsm.dfa import determinise
from actorserve.fsm.errors import BudgetError, EmptyLanguage, GrammarError
from actorserve.fsm.lengths import least_states
from actorserve.fsm.minimise import components, minimise
from actorserve.fsm.nfa import build_nfa
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.syntax import NOTHING, Choice, Concat, Node, Repeat, Text, chars
from actorserve.fsm.utf8 import ByteDfa
from actorserve.fsm.vocabulary import build_tables
from examples import examples


def automaton(pattern: str) -> ByteDfa:
    return compile_bytes(parse_pattern(pattern), Budget())


def nodes() -> st.SearchStrategy[Node]:
    leaves = st.one_of(
        st.builds(Text, st.text("abé日🎉", max_size=3)),
        st.builds(chars, st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 0x900)), max_size=3).map(
            lambda pairs: [(low, min(low + size, 0x10FFFF)) for low, size in pairs]), st.booleans()),
        st.just(NOTHING),
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(Concat, st.lists(inner, max_size=3).map(tuple)),
            st.builds(Choice, st.lists(inner, max_size=3).map(tuple)),
            st.builds(lambda n, low, more: Repeat(n, low, None if more is None else low + more), inner,
                      st.integers(0, 2), st.one_of(st.none(), st.integers(0, 2))),
        ),
        max_leaves=6,
    )  # fmt: skip


@settings(max_examples=examples(200, 80), deadline=None)
@given(nodes(), st.randoms(use_true_random=False))
def test_every_byte_agrees_with_the_reference(node: Node, rng: random.Random) -> None:
    """Random walks over the automaton and the set of partial derivatives, with all 256 bytes compared on the way."""
    if not reference.possible(node):
        with pytest.raises(EmptyLanguage):
            compile_bytes(node, Budget())
        return
    dfa = compile_bytes(node, Budget())
    state, ways = 0, reference.start(node)
    for _ in range(12):
        assert bool(dfa.final[state]) == (None in ways)
        following = [reference.step(ways, byte) for byte in range(256)]
        assert [dfa.step(state, byte) >= 0 for byte in range(256)] == list(map(bool, following))
        live = [byte for byte, after in enumerate(following) if after]
        if not live:
            break
        byte = rng.choice(live)
        state, ways = dfa.step(state, byte), following[byte]


def moore(dfa: ByteDfa) -> int:
    """How many states the smallest automaton has, the plain way."""
    block = dfa.final.astype(int).tolist()
    while True:
        rows = [(block[s], *(block[t] if t >= 0 else -1 for t in row)) for s, row in enumerate(dfa.delta.tolist())]
        numbers = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        if len(numbers) == len(set(block)):
            return len(numbers)
        block = [numbers[row] for row in rows]


CYCLES = [
    "(a[ab]*|b[ab]*)", "((ab)*|(ab)*)x|y(ab)*x", "(a(bc)*|d(bc)*)e", "x(a|ba)*y|z(a|ba)*y", "(aa)*|(aaaa)*",
    "(aa)*(aaa)*", "(a|b)*a(a|b){6}", "p(ab|ac|bd)*q|r(ab|ac|bd)*q", "(abab)*|(ab)*", "[0-9]*(,[0-9]*)*",
    "((ab){2})*c|d(ab)*c", "([a-z]{1,40},)*", "(a{30}b{30}c?)*", "(abcabcabd)*x|(abcabcabd)*y", 
    "(([a-c]{1,4} ){1,4},)*",
]  # fmt: skip
"""Languages whose automata have large or several cycles, some of them alike."""


@pytest.mark.parametrize("many", [0, 1000])
def test_minimal(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not long texts in cycles are looked at first."""
    monkeypatch.setattr(sys.modules["actorserve.fsm.minimise"], "MANY", many)
    for pattern in [*grammars.PATTERNS, *grammars.random_patterns(150, seed=1 + many), *CYCLES]:
        dfa = automaton(pattern)
        assert moore(dfa) == len(dfa.final), pattern


def test_long_cycles_are_told_apart_at_once() -> None:
    """Moore's refinement alone takes a round per character: minutes."""
    text = "".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(16_000))
    dfa = compile_bytes(Repeat(Text(text), 0, None), Budget(seconds=60))
    assert len(dfa.final) == len(text)


def test_every_state_is_reached_and_completed() -> None:
    for pattern in grammars.PATTERNS:
        dfa = automaton(pattern)
        states = range(len(dfa.final))
        edges = {(s, t) for s in states for t in dfa.delta[s].tolist() if t >= 0}
        for begin, pairs in (({0}, edges), (set(np.flatnonzero(dfa.final).tolist()), {(t, s) for s, t in edges})):
            seen = set(begin)
            while more := {t for s, t in pairs if s in seen} - seen:
                seen |= more
            assert seen == set(states), pattern


def test_same_tree_same_automaton() -> None:
    """Hashes are random; nothing of a result may depend on them."""
    for pattern in grammars.PATTERNS[::3]:
        one, two = automaton(pattern), automaton(pattern)
        assert (one.delta == two.delta).all() and (one.byte_class == two.byte_class).all()


@pytest.mark.parametrize("pattern", [".", "[^a]", "(?s).", "\\W", "[\\ud000-\\uffff]"])
def test_only_utf8(pattern: str) -> None:
    """Of all sequences of up to four bytes near the edges, exactly the characters pass."""
    dfa = automaton(pattern)
    edges = [
        0,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xF5,
        0xFF,
    ]
    waiting = [b""]
    while waiting:
        data = waiting.pop()
        for byte in edges:
            longer = data + bytes([byte])
            state = dfa.walk(0, longer)
            try:
                text = longer.decode()
            except UnicodeDecodeError:
                assert state < 0 or not dfa.final[state]
            else:
                expected = reference.walk(reference.start(parse_pattern(pattern)), longer)
                assert (state >= 0 and bool(dfa.final[state])) == (None in expected), (pattern, text)
            if state >= 0 and len(longer) < 4:
                waiting.append(longer)


def test_components_come_behind_those_they_lead_to() -> None:
    delta = np.array([[1, 4], [2, -1], [0, 3], [3, -1], [5, -1], [-1, -1]], np.int32)
    found = components(delta)
    assert sorted(map(sorted, found)) == [[0, 1, 2], [3], [4], [5]]
    assert [sorted(c) for c in found].index([0, 1, 2]) == len(found) - 1


@pytest.mark.parametrize(
    "pattern", ["[^\\s\\S]", "\\ud800", "a[^\\x00-\\U0010ffff]", "(a[^\\w\\W])+", "[^\\d\\D]{1,3}|\\udfff"]
)
def test_nothing_matches(pattern: str) -> None:
    with pytest.raises(EmptyLanguage, match="nothing can match"):
        automaton(pattern)


@pytest.mark.parametrize(
    ("node", "resource"),
    [
        (parse_pattern("(a|b)*a(a|b){30}"), "dfa states"),
        (parse_pattern("z*((a{1,100}){1,100}){1,100}"), "nfa states"),
        (parse_pattern("z*(a?b?c?){0,20000}"), "nfa transitions"),
        (parse_pattern("\\w{1,500}"), "dfa states"),
        (
            parse_pattern(f"[ab]*({'|'.join(f'a[ab]{{30}}{c}' for c in 'cdefghijklmnopqrst')})"),
            "positions in dfa states",
        ),
    ],
)
def test_blow_ups_are_refused_soon(node: Node, resource: str) -> None:
    with pytest.raises(BudgetError) as caught:
        compile_bytes(node, Budget(seconds=100))  # they would take hours
    assert caught.value.resource == resource and resource in caught.value.message


@pytest.mark.parametrize(
    ("node", "least"),
    [
        (parse_pattern("((a{1,100}){1,100}){1,100}"), 1_000_001),
        (parse_pattern(".{1,100000}|b"), 100_001),
        (parse_pattern("([ab]{4000000000})*c[ab]{4000000000}"), 4_000_000_002),
        (Text("x" * 200_000), 200_001),
    ],
)
def test_hopeless_by_arithmetic_is_refused_at_once(node: Node, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written out."""
    monkeypatch.setattr(compiler, "build_nfa", None)
    assert least_states(node) == least
    with pytest.raises(BudgetError) as caught:
        compile_bytes(node, Budget())
    assert caught.value.resource == "dfa states"


def test_lengths_of_trees_with_shared_parts_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = Text("a")
    for _ in range(25):
        node = Concat((node, node))
    asked: list[Node] = []
    original = lengths._span
    monkeypatch.setattr(lengths, "_span", lambda node, known: (asked.append(node), original(node, known))[1])
    assert least_states(node) == (1 << 25) + 1 and len(asked) == 26


@settings(max_examples=examples(200, 80), deadline=None)
@given(nodes())
def test_no_automaton_has_fewer_states(node: Node) -> None:
    try:
        positions = build_nfa(node, Budget())
    except EmptyLanguage:
        return
    assert least_states(node) <= len(minimise(determinise(positions, Budget()), Budget()).final)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("([a-z]{1,10} ?){0,40}x", 842),
        ("(ab?c?){0,500}", 1500),
        (r"(\w{1,20}(, )?){1,20}", 441),
        ("((a{1,9} ?){1,9}b?){1,9}", 1000),
    ],
)
def test_repeats_of_repeats_have_a_state_per_length(pattern: str, states: int) -> None:
    """Not one per way to get there."""
    large = determinise(build_nfa(parse_pattern(pattern), Budget()), Budget())
    assert len(large.final) <= states * 1.01


def repeats() -> st.SearchStrategy[Node]:
    """Repeats of repeats of few letters, which overlap in many ways."""
    leaves = st.sampled_from(["a", "b", "[ab]", "[abc]", "ab", "ba"]).map(parse_pattern)
    counts = st.sampled_from([(0, 1), (0, 3), (1, 3), (2, 4), (3, 3), (0, None), (1, None)])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda n, bounds: Repeat(n, *bounds), inner, counts),
            st.builds(Concat, st.lists(inner, min_size=2, max_size=3).map(tuple)),
            st.builds(Choice, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        ),
        max_leaves=8,
    )


@settings(max_examples=examples(1000, 200), deadline=None)
@given(repeats())
def test_what_is_left_out_of_sets_changes_no_language(node: Node) -> None:
    def minimal() -> ByteDfa:
        return compile_bytes(node, Budget())

    found = minimal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nfa, "MAX_COMPARED", -1)
        expected = minimal()
    assert np.array_equal(found.delta, expected.delta) and np.array_equal(found.final, expected.final)


def test_deep_trees_are_refused() -> None:
    node: Node = Text("a")
    for _ in range(300):
        node = Concat((node, Text("b")))
    with pytest.raises(BudgetError, match="levels of nesting"):
        compile_bytes(node, Budget())


def test_empty_repeats_end_soon() -> None:
    for pattern in ("(){4000000000}", "(|()){1,4000000000}x", "(()*)*"):
        assert len(automaton(pattern).final) <= 2


def test_time_is_a_budget() -> None:
    with pytest.raises(BudgetError) as caught:
        compile_bytes(parse_pattern("([a-z]{1,10} ?){0,40}x"), Budget(seconds=0.01))
    assert caught.value.resource == "seconds"


@pytest.mark.parametrize(
    ("passed", "used", "seconds"), [(1.0, 1.0, 1.0), (1.0, 0.5, 1.0), (1.0, 0.25, 0.75), (1.0, 0.0, 0.2)]
)
def test_what_waits_for_a_core_is_not_slow(passed: float, used: float, seconds: float) -> None:
    assert charged(passed, used) == seconds


def test_a_large_answer_is_an_answer() -> None:
    dfa = automaton("([a-z]{1,10} ?){0,12}x")
    assert dfa.final[dfa.walk(0, b"abc def ghix")]
    assert dfa.walk(0, b"a  b") == -1


def test_long_patterns_are_refused() -> None:
    tables = build_tables(grammars.bytes_vocabulary(), [256])
    with pytest.raises(GrammarError, match="characters of pattern"):
        compile_pattern("a" * 70_000, tables, None)


def test_minimising_keeps_the_language() -> None:
    """Every pair of states that a text leads to in both automata, in all patterns."""
    for pattern in [*grammars.PATTERNS, *grammars.random_patterns(300, seed=6)]:
        budget = Budget()
        large = determinise(build_nfa(parse_pattern(pattern), budget), budget)
        small = minimise(large, budget)
        seen = {(0, 0)}
        waiting = [(0, 0)]
        while waiting:
            one, two = waiting.pop()
            assert large.final[one] == small.final[two], pattern
            assert ((large.delta[one] >= 0) == (small.delta[two] >= 0)).all(), pattern
            pairs = {
                (a, b) for a, b in zip(large.delta[one].tolist(), small.delta[two].tolist(), strict=True) if a >= 0
            }
            waiting += pairs - seen
            seen |= pairs


def test_minimise_joins_what_subsets_keep_apart() -> None:
    budget = Budget()
    dfa = determinise(build_nfa(parse_pattern("(aa)*|(aaaa)*"), budget), budget)
    assert len(minimise(dfa, budget).final) == 2 < len(dfa.final)


def test_equal_ends_are_made_once() -> None:
    """Forty optional parts, as the properties of an object: one after another, or as a choice of the first one."""
    parts = [Concat((Text(f'"property_{i}": '), Repeat(chars([(48, 57)]), 1, None))) for i in range(40)]
    rest: list[Node] = [Text("")]
    for part in reversed(parts):
        rest.append(Concat((Repeat(Concat((Text(", "), part)), 0, 1), rest[-1])))
    options = [Concat((part, rest[39 - i])) for i, part in enumerate(parts)]
    nfa = build_nfa(Choice(tuple(options)), Budget())
    assert len(nfa.charset) < 40 * 50


def test_budget_needs_int16() -> None:
    with pytest.raises(ValueError, match="32767"):
        Budget(dfa_states=40_000)
