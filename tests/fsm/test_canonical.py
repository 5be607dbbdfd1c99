"""Canonical tokens: forced where that is safe, and never elsewhere."""

import random
import re
from pathlib import Path

import grammars
import pytest
import tiny_tokenizers
import vocabularies
from vocabularies import Vocabulary, Walker, make, table_of

from actorserve.fsm.token_table import TokenTable
from actorserve.models.tokenizer import load_tokenizer


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


def test_long_runs_are_canonical_throughout(tmp_path: Path) -> None:
    """Runs are encoded a window at a time, but come out as if encoded whole."""
    text = "The quick brown fox jumps over the lazy dog. Hello there, how are you today? I am fine.\n" * 30
    tiny = vocabularies.trained(tmp_path / "model")
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
