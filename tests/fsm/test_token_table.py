"""Token tables: masks against the reference, walks under masks, bytes that no token spells, the arrays."""

import random
import re
from pathlib import Path

import grammars
import numpy as np
import pytest
import vocabularies
from vocabularies import Vocabulary, Walker, bits, make, table_of

from actorserve.fsm import reference
from actorserve.fsm.budget import Budget
from actorserve.fsm.compiler import compile_bytes, compile_pattern
from actorserve.fsm.errors import BudgetError, Unspellable
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.token_table import END, mask_key
from actorserve.fsm.vocabulary import build_tables

GENERATED = grammars.random_patterns(120, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabularies.trained(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def plain() -> Vocabulary:
    return vocabularies.listed()


@pytest.mark.parametrize("patterns", [grammars.PATTERNS, GENERATED], ids=["fixed", "generated"])
@pytest.mark.parametrize("name", ["tiny", "plain"])
def test_finished_walks_match(patterns: list[str], name: str, request: pytest.FixtureRequest) -> None:
    """10,000 walks in all; every output that ends is a match, and UTF-8."""
    vocabulary: Vocabulary = request.getfixturevalue(name)
    finished = 0
    for pattern in patterns:
        table = table_of(pattern, vocabulary)
        if table is None:
            continue
        walker, standard, rng = Walker(table, vocabulary), re.compile(pattern), random.Random(pattern)
        for _ in range(20):
            tokens, ended = walker.walk(rng)
            if ended:
                finished += 1
                text = b"".join(vocabulary.tokens[t] or b"" for t in tokens).decode()
                assert standard.fullmatch(text), (pattern, text)
    assert finished > 10 * len(patterns)


@pytest.mark.parametrize("name", ["tiny", "plain"])
def test_masks_equal_the_reference(name: str, request: pytest.FixtureRequest) -> None:
    """1,000 states: each token of the vocabulary, and the end, allowed or not; with and without canonical tokens."""
    vocabulary: Vocabulary = request.getfixturevalue(name)
    tokens, end = vocabulary.tokens, vocabulary.end
    states = 0
    for pattern in [*grammars.PATTERNS, *GENERATED][name == "tiny" :: 2]:
        free, forced = table_of(pattern, vocabulary, canonical=False), table_of(pattern, vocabulary)
        if free is None or forced is None:
            continue
        rng = random.Random(pattern)
        state, ways, other = 0, reference.start(parse_pattern(pattern)), 0
        for _ in range(6):
            states += 1
            expected = reference.allowed(ways, tokens, [end])
            assert bits(free, state) == expected, pattern
            some = rng.sample(range(len(tokens)), 20)
            assert [free.allows(state, token) for token in some] == [expected[token] for token in some]
            assert free.final[state] == expected[end] and free.canonical[state] == -1
            one = int(forced.canonical[other])
            mask = bits(forced, other)
            assert mask == (expected if one < 0 else [token == one for token in range(len(tokens))])
            assert one < 0 or (expected[one] and not expected[end])
            choices = [token for token, live in enumerate(mask) if live and token != end]
            if not choices:
                break
            token = rng.choice(choices)
            state, other, ways = (
                free.step(state, token),
                forced.step(other, token),
                reference.walk(ways, tokens[token] or b""),
            )
            assert free.step(state, vocabulary.end) == (state if free.final[state] else -1)
    assert states > 500


@pytest.mark.parametrize("name", ["tiny", "plain"])
def test_every_segmentation_is_accepted(name: str, request: pytest.FixtureRequest) -> None:
    """Texts of the language, in the tokenizer's own spelling and cut at random, except where a token is canonical."""
    vocabulary: Vocabulary = request.getfixturevalue(name)
    usable = {token: i for i, token in enumerate(vocabulary.tokens) if token}
    for pattern in [*grammars.PATTERNS, *GENERATED][name == "plain" :: 2]:
        free, forced = table_of(pattern, vocabulary, canonical=False), table_of(pattern, vocabulary)
        if free is None or forced is None:
            continue
        walker, rng = Walker(free, vocabulary), random.Random(pattern)
        for _ in range(6):
            tokens, ended = walker.walk(rng)
            if not ended:
                continue
            data = b"".join(vocabulary.tokens[t] or b"" for t in tokens)
            state = 0
            for token in vocabulary.encode(data.decode()):
                state = free.step(state, token)
                assert state >= 0, (pattern, data)
            assert free.final[state]
            for table in (free, forced):
                state, place = 0, 0
                while place < len(data):
                    token = int(table.canonical[state])
                    if token < 0:
                        sizes = [
                            n for n in range(1, 12) if place + n <= len(data) and data[place : place + n] in usable
                        ]
                        token = usable[data[place : place + rng.choice(sizes)]]
                    assert data.startswith(vocabulary.tokens[token] or b"", place)
                    state = table.step(state, token)
                    assert state >= 0, (pattern, data)
                    place += len(vocabulary.tokens[token] or b"")
                assert table.final[state] and bits(table, state)[vocabulary.end]


@pytest.mark.parametrize(
    ("pattern", "texts", "others"),
    [
        ("(ab)+", ["ab", "abab", "ababab"], ["a", "aba", ""]),
        ("a(bc)?", ["a", "abc"], ["ab", "abcbc"]),
        ("ab|abcd", ["ab", "abcd"], ["abc", "abcdab"]),
        ('[^"]*"', ['"', 'a"', 'the"'], ['""', "the"]),
        ("orderId|orderName", ["orderId", "orderName"], ["order"]),
    ],
)
def test_a_match_may_go_on(pattern: str, texts: list[str], others: list[str], plain: Vocabulary) -> None:
    table = table_of(pattern, plain)
    assert table is not None
    for text in texts + others:
        state = 0
        for byte in text.encode():
            canonical = int(table.canonical[state]) if state >= 0 else -1
            if canonical >= 0:
                break
            state = table.step(state, byte) if state >= 0 else -1
        else:
            assert (state >= 0 and bool(table.final[state])) == (text in texts), text


# ------------------------------------------------------------------ bytes without a token


def test_unspellable_is_named() -> None:
    tokens = [t for t in grammars.bytes_vocabulary("ab") if t != b"\x04"]
    vocabulary = make(tokens)
    with pytest.raises(Unspellable, match="0x04") as caught:
        table_of("ab\\x04", vocabulary)
    assert caught.value.missing == (4,)
    assert caught.value.status == 400


def test_dead_ends_are_left_out() -> None:
    """U+50000 and U+60000 begin with a byte that has no token; continuation bytes alone never are allowed."""
    tokens = [t for t in grammars.bytes_vocabulary("xy") if t not in (b"\xf1", b"\x04")]
    vocabulary = make(tokens)
    table = table_of("x(y|\U00050000|\U00060000|ab\\x04)z?", vocabulary)
    assert table is not None
    state = table.step(0, tokens.index(b"x"))
    assert [tokens[t] for t, live in enumerate(bits(table, state)) if live] == [b"y"]
    with pytest.raises(Unspellable, match="0xF1"):
        table_of("\U00050000", vocabulary)


def test_longer_tokens_spell_what_single_bytes_cannot() -> None:
    tokens: list[bytes | None] = [b"a", b"b", b"\x04b", b"c", None]
    vocabulary = make(tokens)
    table = table_of("a(\\x04b|\\x04c|b)", vocabulary)
    assert table is not None
    state = table.step(0, 0)
    assert bits(table, state) == [False, True, True, False, False]


def test_every_mask_leads_to_the_end() -> None:
    """Vocabularies with holes: whatever the masks allow can be completed."""
    rng = random.Random(5)
    refused = 0
    for pattern in [*grammars.PATTERNS, *GENERATED]:
        tokens = [
            t for t in grammars.bytes_vocabulary("ab", "the", "日本", " the", "c d") if t is None or rng.random() < 0.9
        ]
        try:
            table = table_of(pattern, make(tokens))
        except Unspellable:
            refused += 1
            continue
        if table is None:
            continue
        live = table.final.copy()
        for _ in range(len(live)):
            live |= (live[table.transitions] & (table.transitions >= 0)).any(1)
        assert live.all(), pattern
    assert refused > 10


# ------------------------------------------------------------------ the arrays


def test_arrays(tiny: Vocabulary) -> None:
    for pattern in [*grammars.PATTERNS[::5], *GENERATED[::10]]:
        table, again = table_of(pattern, tiny), table_of(pattern, tiny)
        if table is None or again is None:
            continue
        assert (table.transitions == again.transitions).all() and (table.token_class == again.token_class).all()
        assert (table.row == again.row).all() and (table.canonical == again.canonical).all()
        states, classes = table.transitions.shape
        assert table.transitions.dtype == np.int16 and table.token_class.dtype == np.uint16
        assert table.token_class.max() < classes and table.transitions.max() < states
        assert (table.transitions[:, 0] == -1).all()
        assert (table.transitions[:, END] == np.where(table.final, np.arange(states), -1)).all()
        columns = {tuple(column) for column in table.transitions[:, 2:].T.tolist()}
        assert len(columns) == classes - 2, "classes that do the same are one"
        masks = table.masks(range(table.rows))
        assert len({mask_key(mask) for mask in masks}) == table.rows, "rows that are the same are one"
        assert set(table.row.tolist()) == set(range(table.rows))
        shuffled = list(range(table.rows))[::-1] * 2
        assert (table.masks(shuffled) == masks[shuffled]).all()
        assert table.nbytes > 0 and table.fingerprint == tiny.tables.fingerprint
        assert (compile_bytes(parse_pattern(pattern), Budget()).final[table.byte_state] == table.final).all()


def test_unused_ids_and_ends() -> None:
    """Ids without bytes are never allowed, whatever their number; several ids may end an output."""
    tokens: list[bytes | None] = [None, b"a", b"", None, b"b", b"</s>", None, *[None] * 60]
    tables = build_tables(tokens, [3, 5, 900])
    table = compile_pattern("[ab</s>]*", tables, None)
    assert bits(table, 0) == [i in (1, 3, 4, 5) for i in range(len(tokens))]
    assert tables.eos == (3, 5)
    table = compile_pattern("a", tables, None)
    assert bits(table, 0) == [i == 1 for i in range(len(tokens))]
    assert bits(table, table.step(0, 1)) == [i in (3, 5) for i in range(len(tokens))]


def test_tables_are_within_budget(tiny: Vocabulary) -> None:
    with pytest.raises(BudgetError) as caught:
        compile_pattern("[a-z]{1,100}", tiny.tables, tiny.encode, Budget(table_bytes=1000))
    assert "bytes of transitions" in caught.value.message


def test_classes_are_within_budget() -> None:
    """A sampler has them as int16: of one beyond that it read a transition from before the table."""
    chance, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    words = sorted({"".join(chance.choices(letters, k=4)) for _ in range(36_000)})
    vocabulary = make(grammars.bytes_vocabulary(*words))
    pattern = "".join(f"[{''.join(sorted(chance.sample(letters, 18)))}]" for _ in range(50))
    with pytest.raises(BudgetError) as caught:
        compile_pattern(pattern, vocabulary.tables, None)
    assert "32000 classes of tokens" in caught.value.message
    with pytest.raises(ValueError, match="classes must be from 1 to 32767"):
        Budget(classes=1 << 15)
