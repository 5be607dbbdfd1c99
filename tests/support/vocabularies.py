"""Vocabularies as the tests of fsm/ need them, and walks under the masks of a token table."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grammars
import numpy as np
import tiny_tokenizers

from actorserve.fsm.compiler import compile_pattern
from actorserve.fsm.errors import EmptyLanguage
from actorserve.fsm.token_table import TokenTable
from actorserve.fsm.vocabulary import TokenizerTables, build_tables
from actorserve.models.tokenizer import load_tokenizer


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


def trained(folder: Path) -> Vocabulary:
    """A byte-level tokenizer with merges and a pre-tokenizer, trained on a few sentences."""
    tokenizer = load_tokenizer(tiny_tokenizers.byte_level(folder))
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return make([*tokens, None], lambda text: tokenizer.encode(text, add_special_tokens=False))


def listed() -> Vocabulary:
    """All bytes, some texts, and parts of characters."""
    pieces = 'ab abc abab aa th the 日本 é! ing Hel lo 1 12 " ", ":'.split()
    parts = [b"\xe6\x97", b"\x97\xa5", b"\xe6", b"\x9c\xac\xe8", b"\xf0\x9f"]
    return make(grammars.bytes_vocabulary(*pieces, " the", "  ", "    ", ': "', *parts))


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
