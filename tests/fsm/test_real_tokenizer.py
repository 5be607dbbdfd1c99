"""The real SmolLM2 tokenizer: canonical tokens, the paper's regular expression, bytes that have no token."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import grammars
import numpy as np
import pytest

from actorserve.fsm import reference
from actorserve.fsm.compiler import compile_pattern
from actorserve.fsm.errors import Unspellable
from actorserve.fsm.jump import plan_jump
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.token_table import TokenTable
from actorserve.fsm.vocabulary import TokenizerTables, build_tables
from actorserve.models.tokenizer import load_tokenizer
from actorserve.perf.constrained import CHARACTER, WORDS

HARRY = """{
    "name": "Harry Potter",
    "house": "Gryffindor",
    "blood status": "Half-blood",
    "occupation": "student",
    "wand": {
        "wood": "Holly",
        "core": "Phoenix feather",
        "length": 11.0
    },
    "alive": "Alive",
    "patronus": "Stag",
    "bogart": "Dementor"
}"""
TEXTS = [
    (CHARACTER, HARRY),
    (r'\{"name": "[a-zA-Z ]+", "age": (0|[1-9][0-9]*)\}', '{"name": "Ada Lovelace", "age": 36}'),
    (r'\{"tool": "(search|weather)", "in": \{"city": "[^"]*"\}\}', '{"tool": "weather", "in": {"city": "Köln"}}'),
    (r"Thought: [^\n]{1,100}\nAction: (search|lookup)\n", "Thought: I should look this up.\nAction: search\n"),
    (r"def [a-z_]+\([a-z, ]*\) -> (int|str):\n    return [a-z +]+\n", "def add(a, b) -> int:\n    return a + b\n"),
    (r"今日は[\u3040-\u30ff\u4e00-\u9fff]+です。", "今日は天気です。"),
    (r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}Z", "2026-11-25T16:00Z"),
    (r"  (yes|no)   [a-z]+", "  yes   indeed"),
]  # fmt: skip


@dataclass(frozen=True)
class Real:
    tokens: list[bytes | None]
    tables: TokenizerTables
    encode: Callable[[str], list[int]]
    end: int

    def table(self, pattern: str) -> TokenTable:
        return compile_pattern(pattern, self.tables, self.encode)

    def text(self, tokens: list[int]) -> bytes:
        return b"".join(self.tokens[t] or b"" for t in tokens)


@pytest.fixture(scope="module")
def real(smollm: str) -> Real:
    tokenizer = load_tokenizer(smollm)
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    return Real(tokens, build_tables(tokens, tokenizer.eos_ids), encode, tokenizer.eos_ids[0])


def follow(real: Real, table: TokenTable, wanted: list[int]) -> tuple[list[int], int]:
    """A model that writes these tokens where it is asked: (all tokens, how often it was asked)."""
    state, output, asked = 0, [], 0
    while True:
        jump = plan_jump(table, state, 1000)
        output += jump.tokens
        state = jump.state
        assert output == wanted[: len(output)]
        if len(output) == len(wanted):
            assert table.final[state]
            return output, asked
        asked += 1
        output.append(wanted[len(output)])
        state = table.step(state, output[-1])
        assert state >= 0


@pytest.mark.parametrize(("pattern", "text"), TEXTS)
def test_output_is_the_tokenizers_own(pattern: str, text: str, real: Real) -> None:
    """A model that writes canonical tokens is never led away from them by what is forced."""
    assert re.fullmatch(pattern, text)
    follow(real, real.table(pattern), real.encode(text))


def test_forwards_of_the_papers_pattern(real: Real) -> None:
    tokens, asked = follow(real, real.table(CHARACTER), real.encode(HARRY))
    assert len(tokens) == 104
    assert asked <= 32


def test_unicode_words_fit(real: Real) -> None:
    """With the words as the paper spells them, Unicode's: 25,000 states, but the same jumps."""
    pattern = CHARACTER.replace(WORDS, r"[\w\d\s]{1,16}")
    table = real.table(pattern)
    assert follow(real, table, real.encode(HARRY))[1] <= 32
    greek = HARRY.replace("Holly", "Ἑλλάς 日本")
    assert re.fullmatch(pattern, greek)
    follow(real, table, real.encode(greek))


def test_masks_equal_the_reference(real: Real) -> None:
    for pattern, _ in TEXTS[1:]:
        table = compile_pattern(pattern, real.tables, None)
        rng = random.Random(pattern)
        state, ways = 0, reference.start(parse_pattern(pattern))
        for _ in range(4):
            bits = np.unpackbits(table.masks([int(table.row[state])]).view(np.uint8), bitorder="little")
            some = rng.sample(range(len(real.tokens)), 300) + np.flatnonzero(bits)[:300].tolist()
            for token in some:
                spelling = real.tokens[token]
                if token in real.tables.eos:
                    assert bool(bits[token]) == (None in ways)
                else:
                    assert bool(bits[token]) == (bool(spelling) and bool(reference.walk(ways, spelling or b"")))
            live = [t for t in np.flatnonzero(bits).tolist() if t not in real.tables.eos]
            if not live:
                break
            token = rng.choice(live)
            state, ways = table.step(state, token), reference.walk(ways, real.tokens[token] or b"")


CLASSES_DIFFER = re.compile(r"\\[wWsSdD]|\\ud800|\(\?")
"""In llguidance \\w, \\s and \\d are Unicode's recommendation, not Python's; and it has few kinds of (?...)."""


def test_masks_equal_those_of_llguidance(real: Real, smollm: str) -> None:
    """Over the whole vocabulary; where it forces a token of its own choice, ours must allow that."""
    llguidance = pytest.importorskip("llguidance")
    matrix = pytest.importorskip("llguidance.numpy")
    size = real.tables.size
    tokenizer = llguidance.LLTokenizer(f"{smollm}/tokenizer.json", n_vocab=size, eos_token=list(real.tables.eos))
    mask, compared = matrix.allocate_token_bitmask(1, size), 0
    for pattern in (
        p for p in [*grammars.PATTERNS, *grammars.random_patterns(40, seed=8)] if not CLASSES_DIFFER.search(p)
    ):
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex(pattern), log_level=0)
        table = compile_pattern(pattern, real.tables, None)
        rng, state = random.Random(pattern), 0
        for _ in range(6):
            matrix.fill_next_token_bitmask(matcher, mask)
            if matcher.is_error() or matcher.is_stopped():
                break
            ours, theirs = table.masks([int(table.row[state])])[0], mask[0].view(np.uint32)
            if (ours != theirs).any():
                forced = np.unpackbits(theirs.view(np.uint8)).sum() == 1
                assert forced and (ours & theirs == theirs).all(), pattern
            compared += 1
            both = np.flatnonzero(np.unpackbits((ours & theirs).view(np.uint8), bitorder="little")).tolist()
            token = rng.choice(both)
            if token in real.tables.eos:
                break
            matcher.consume_token(token)
            state = table.step(state, token)
    assert compared > 300


def test_walks_match(real: Real) -> None:
    for pattern, _ in TEXTS:
        table = real.table(pattern)
        masks = np.unpackbits(table.masks(range(table.rows)).view(np.uint8), axis=1, bitorder="little")
        rng = random.Random(pattern)
        for _ in range(8):
            state, tokens = 0, []
            for _ in range(200):
                allowed = np.flatnonzero(masks[table.row[state]])
                token = int(allowed[rng.randrange(len(allowed))])
                if token in real.tables.eos or (table.final[state] and rng.random() < 0.2):
                    assert re.fullmatch(pattern, real.text(tokens).decode()), pattern
                    break
                tokens.append(token)
                state = table.step(state, token)


@pytest.mark.parametrize("pattern", [r"ab\x04", "\U00050000", r"x[\x04\x06]"])
def test_bytes_without_a_token(pattern: str, real: Real) -> None:
    """SmolLM2 lacks 21 bytes: what needs them is refused when it is compiled."""
    with pytest.raises(Unspellable):
        real.table(pattern)


def test_bytes_without_a_token_are_left_out(real: Real) -> None:
    table = real.table("x(y|\U00050000|\U00060000)")
    state = table.step(0, real.encode("x")[0])
    mask = np.unpackbits(table.masks([int(table.row[state])]).view(np.uint8), bitorder="little")
    assert [real.tokens[t] for t in np.flatnonzero(mask)] == [b"y"]


def test_a_longer_token_holds_back(real: Real) -> None:
    """Forced bytes that a longer token could spell together with what is free are not forced as tokens."""
    for pattern in ("orderId|orderName", '"[^"]*"', ', "[a-z]+', "a[a-z]"):
        free, table = compile_pattern(pattern, real.tables, None), real.table(pattern)
        token = int(table.canonical[0])
        longer = [t for t in real.tables.longer(real.tokens[token] or b"").tolist() if free.step(0, t) >= 0]
        assert token < 0 or not longer
