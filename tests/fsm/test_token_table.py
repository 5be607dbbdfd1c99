"""Token tables: masks against the reference, walks under masks, bytes that no token spells, canonical tokens."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grammars
import numpy as np
import pytest
import tiny_tokenizers

from actorserve.fsm import reference
from actorserve.fsm.budget import Budget
from actorserve.fsm.compiler import compile_bytes, compile_pattern
from actorserve.fsm.errors import BudgetError, EmptyLanguage, Unspellable
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.token_table import END, TokenTable, mask_key
from actorserve.fsm.vocabulary import TokenizerTables, build_tables
from actorserve.models.tokenizer import load_tokenizer

GENERATED = grammars.random_patterns(120, seed=3)


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[bytes | None]
    tables: TokenizerTables
    encode: Callable[[str], list[int]]
    end: int


def make(tokens: list[bytes | None], encode: Callable[[str], list[int]] | None = None) -> Vocabulary:
    """The last id ends an output."""
    end = len(tokens) - 1
    return Vocabulary(tokens, build_tables(tokens, [end]), encode or grammars.longest_first(tokens), end)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A byte-level tokenizer with merges and a pre-tokenizer, trained on a few sentences."""
    tokenizer = load_tokenizer(tiny_tokenizers.byte_level(Path(tmp_path_factory.mktemp("tiny"))))
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return make([*tokens, None], lambda text: tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def plain() -> Vocabulary:
    pieces = [
        "ab",
        "abc",
        "abab",
        "aa",
        "th",
        "the",
        " the",
        "  ",
        "    ",
        '"',
        '",',
        '":',
        ': "',
        "日本",
        "é!",
        "ing",
        "Hel",
        "lo",
        "1",
        "12",
    ]
    return make(grammars.bytes_vocabulary(*pieces, b"\xe6\x97", b"\x97\xa5", b"\xe6", b"\x9c\xac\xe8", b"\xf0\x9f"))


def table_of(pattern: str, vocabulary: Vocabulary, canonical: bool = True) -> TokenTable | None:
    try:
        return compile_pattern(pattern, vocabulary.tables, vocabulary.encode if canonical else None)
    except EmptyLanguage:
        return None


def bits(table: TokenTable, state: int) -> list[bool]:
    """The mask of a state, a bool per token id."""
    mask = table.masks([int(table.row[state])])[0]
    unpacked = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
    assert not unpacked[len(table.token_class) :].any()
    return unpacked[: len(table.token_class)].tolist()


class Walker:
    """Random walks under the masks of a table."""

    def __init__(self, table: TokenTable, vocabulary: Vocabulary) -> None:
        self.table, self.vocabulary = table, vocabulary
        masks = np.unpackbits(table.masks(range(table.rows)).view(np.uint8), axis=1, bitorder="little")
        self.allowed = [np.flatnonzero(mask).tolist() for mask in masks]

    def walk(self, rng: random.Random, most: int = 40) -> tuple[list[int], bool]:
        """(tokens, whether the output ended)"""
        state, tokens = 0, []
        for _ in range(most):
            allowed = self.allowed[self.table.row[state]]
            assert allowed, "an empty mask"
            if self.vocabulary.end in allowed and rng.random() < 0.3:
                return tokens, True
            token = rng.choice(allowed)
            if token == self.vocabulary.end:
                return tokens, True
            tokens.append(token)
            state = self.table.step(state, token)
            assert state >= 0
        return tokens, False


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


def test_canonical_tokens_never_lead_astray() -> None:
    """X has no token of its own, so after the canonical "cab" one could only go round: then nothing is canonical."""
    tokens: list[bytes | None] = [b"c", b"a", b"ab", b"cab", b"bX", None]
    vocabulary = make(tokens)
    table = table_of("(cab)+X", vocabulary)
    assert table is not None
    assert (table.canonical == -1).all()
    state = 0
    for token in (3, 0, 1, 4):
        state = table.step(state, token)
    assert table.final[state]


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


# ------------------------------------------------------------------ canonical tokens


def spelled(table: TokenTable, vocabulary: Vocabulary) -> list[bytes | None]:
    """The canonical tokens from the start on."""
    state, found = 0, []
    while (token := int(table.canonical[state])) >= 0:
        found.append(vocabulary.tokens[token])
        state = table.step(state, token)
    return found


@pytest.mark.parametrize(
    ("pattern", "pieces", "expected"),
    [
        ("orderId|orderName", ["order", "orderId", "Id"], []),
        ("orderId|orderName", ["order", "Id"], [b"order"]),
        ('"name": "[a-z]+"', ['"name', '":', ' "', ' "a'], [b'"name', b'":']),
        ('"name": "[A-Z]+"', ['"name', '":', ' "', ' "a'], [b'"name', b'":', b' "']),
        ("abcd[0-9]", ["abc", "d", "cd1x", "cd1"], [b"abc", b"d"]),
        ("abcd[0-9]", ["abc", "d", "abcd1"], []),
        ("abcd[0-9]", ["abc", "d", "abcd1x"], [b"abc", b"d"]),
        ("日本[a語]", ["日本", b"\xe6\x9c"], [b"\xe6\x97\xa5\xe6\x9c\xac"]),
        ("日(本|木)", [], [b"\xe6", b"\x97", b"\xa5"]),
        ("a", [], [b"a"]),
        ("a?", [], []),
    ],
)
def test_forced_tokens(pattern: str, pieces: list[str | bytes], expected: list[bytes]) -> None:
    vocabulary = make(grammars.bytes_vocabulary(*pieces))
    table = table_of(pattern, vocabulary)
    assert table is not None
    assert spelled(table, vocabulary) == expected


def test_long_runs_are_canonical_throughout(tiny: Vocabulary) -> None:
    """Runs are encoded a window at a time, but come out as if encoded whole."""
    text = "The quick brown fox jumps over the lazy dog. Hello there, how are you today? I am fine.\n" * 30
    table = table_of(re.escape(text), tiny)
    assert table is not None
    assert b"".join(t or b"" for t in spelled(table, tiny)) == text.encode()
    state, tokens = 0, []
    while (token := int(table.canonical[state])) >= 0:
        tokens.append(token)
        state = table.step(state, token)
    assert tokens == tiny.encode(text)


def test_what_the_tokenizer_cannot_spell_is_not_forced() -> None:
    """A tokenizer that normalises, or returns a control token, says nothing about these bytes."""
    tokens = grammars.bytes_vocabulary()
    upper = make(tokens, lambda text: [ord(c) for c in text.upper()])
    table = table_of("Hello", upper)
    assert table is not None and spelled(table, upper) == [b"H"]
    silent = make(tokens, lambda text: [256])
    table = table_of("Hello", silent)
    assert table is not None and spelled(table, silent) == []


def test_sentencepiece(tmp_path: Path) -> None:
    """Spaces at the start of words, byte tokens for the rest; texts are encoded behind a line break, not at a start."""
    tokenizer = load_tokenizer(tiny_tokenizers.sentencepiece(tmp_path / "model", bos=False))
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    before = len(tokenizer.encode("\n"))
    vocabulary = make([*tokens, None], lambda text: tokenizer.encode("\n" + text)[before:])
    table = table_of("Oh, Hello there(!|\\?) 日本", vocabulary)
    assert table is not None
    assert spelled(table, vocabulary)[-3:] == [b",", b" Hello", b" there"]
    walker, rng = Walker(table, vocabulary), random.Random(0)
    for _ in range(20):
        output, ended = walker.walk(rng)
        text = b"".join(vocabulary.tokens[t] or b"" for t in output).decode()
        assert ended and text in ("Oh, Hello there! 日本", "Oh, Hello there? 日本")


def test_unknown_ends_change_the_tail() -> None:
    """A tokenizer that looks ahead: of spaces in a row it leaves the last one to the word behind, if there is one."""
    tokens = grammars.bytes_vocabulary("  ", "   ", " a")

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for piece in re.findall(r" ?[a-z]+| +(?=$)| +(?= [a-z])| +|.", text, re.S):
            found += [tokens.index(piece.encode())] if piece.encode() in tokens else list(piece.encode())
        return found

    vocabulary = make(tokens, encode)
    table = table_of(":   [a-z]", vocabulary)
    assert table is not None
    assert spelled(table, vocabulary) == [b":"]


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
