"""Incremental detokenization equals the library's decode of the whole, and never splits a character."""

from pathlib import Path

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.models.detokenize import Detokenizers
from actorserve.models.tokenizer import Tokenizer, load_tokenizer

KINDS = ["byte-level", "sentencepiece", "word-piece"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "byte-level": tiny_tokenizers.byte_level(root / "byte"),
        "sentencepiece": tiny_tokenizers.sentencepiece(root / "spm"),
        "word-piece": tiny_tokenizers.word_piece(root / "word"),
    }
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


def pushed(
    tokenizer: Tokenizer, ids: list[int], prompt: list[int], skip: bool = True, spaces: bool = True
) -> list[str]:
    detokenizer = Detokenizers(tokenizer).new(prompt, skip, spaces)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


def check(tokenizer: Tokenizer, ids: list[int], prompt: list[int], skip: bool) -> None:
    """The text after the prompt, as the library decodes both together."""
    before = tokenizer.decode(prompt, skip)
    whole = tokenizer.decode(prompt + ids, skip)
    assert whole.startswith(before)
    assert "".join(pushed(tokenizer, ids, prompt, skip)) == whole[len(before) :]


@settings(deadline=None)
@given(data=st.data(), kind=st.sampled_from(["byte-level", "word-piece"]), skip=st.booleans())
def test_any_tokens(tokenizers: dict[str, Tokenizer], data: st.DataObject, kind: str, skip: bool) -> None:
    tokenizer = tokenizers[kind]
    tokens = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    prompt = data.draw(st.sampled_from([[], tokenizer.encode("hello there")]))
    check(tokenizer, data.draw(tokens), prompt, skip)


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_with_byte_tokens(tokenizers: dict[str, Tokenizer], data: st.DataObject, skip: bool) -> None:
    """Characters as byte tokens, whole or broken, but whole and broken ones never side by side."""
    tokenizer = tokenizers["sentencepiece"]

    def byte_tokens(raw: bytes) -> list[int]:
        return [3 + byte for byte in raw]

    ordinary = st.integers(259, tokenizer.vocab_size - 1) | st.sampled_from(sorted(tokenizer.special_ids))
    ordinary = ordinary.filter(lambda token: skip is False or token not in tokenizer.special_ids)
    whole = st.text(min_size=1, max_size=2).map(lambda text: byte_tokens(text.encode(errors="ignore")))
    broken = st.sampled_from([b"\xe2", b"\xe2\x82", b"\xf0\x9f\x8e", b"\x80", b"\xff", b"\xed\xa0\x80"]).map(
        byte_tokens
    )
    runs = st.lists(st.tuples(ordinary, st.just([]) | whole | broken), max_size=10)
    ids = [token for first, run in data.draw(runs) for token in (first, *run)]
    for prompt in ([], [1], tokenizer.encode("Hello")):
        check(tokenizer, ids, prompt, skip)


def test_complete_characters_of_a_broken_run_stay(tokenizers: dict[str, Tokenizer]) -> None:
    """Here the library replaces all bytes of the run; they may have been shown already."""
    ids = [3 + byte for byte in "é".encode() + b"\xff"]
    assert pushed(tokenizers["sentencepiece"], ids, [300]) == ["", "é", "\ufffd", ""]


@settings(deadline=None, max_examples=50)
@given(text=st.text(), kind=st.sampled_from(["byte-level", "sentencepiece"]))
def test_characters_are_never_split(tokenizers: dict[str, Tokenizer], text: str, kind: str) -> None:
    tokenizer = tokenizers[kind]
    text = "x" + text.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pushed(tokenizer, ids, [])
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == ""


def test_an_emoji_comes_in_one_piece(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    ids = [3 + byte for byte in "🎉".encode()]
    assert pushed(tokenizer, ids, [300]) == ["", "", "", "🎉", ""]
    assert pushed(tokenizer, ids[:3], [300]) == ["", "", "", "\ufffd" * 3]


def test_the_first_space(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    (hello,) = tokenizer.encode("Hello", add_special_tokens=False)
    assert pushed(tokenizer, [hello, hello], []) == ["Hello", " Hello", ""]
    assert pushed(tokenizer, [hello, hello], [1]) == ["Hello", " Hello", ""]  # only BOS before it
    assert pushed(tokenizer, [hello], [1, hello]) == [" Hello", ""]


def test_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    (eos,) = tokenizer.eos_ids
    ids = [eos, *tokenizer.encode("Hello"), eos]
    assert "".join(pushed(tokenizer, ids, [], skip=True)) == "Hello"
    assert "".join(pushed(tokenizer, ids, [], skip=False)) == "<|im_end|>Hello<|im_end|>"


def test_spaces_between_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word-piece"]
    ids = [*tokenizer.encode("hello dogs"), 1, 1]
    assert "".join(pushed(tokenizer, ids, [], skip=False)) == "hello dogs [SEP] [SEP]"
    assert "".join(pushed(tokenizer, ids, [], skip=False, spaces=False)) == "hello dogs [SEP][SEP]"


def test_ids_beyond_the_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    """Models have more rows than the tokenizer has tokens."""
    assert pushed(tokenizers["byte-level"], [100_000], []) == ["", ""]


def test_real_vocabulary(smollm: str) -> None:
    tokenizer = load_tokenizer(smollm)

    @settings(deadline=None)
    @given(ids=st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60), skip=st.booleans())
    def any_tokens(ids: list[int], skip: bool) -> None:
        check(tokenizer, ids, tokenizer.encode("Hello"), skip)

    any_tokens()


def test_every_token_of_the_real_vocabulary(smollm: str) -> None:
    tokenizer = load_tokenizer(smollm)
    for token in range(0, tokenizer.vocab_size, 7):
        assert tokenizer.token_bytes(token).decode(errors="replace") == tokenizer.decode([token], False)


def test_files_are_used(tmp_path: Path) -> None:
    """Two tokenizers do not share tables."""
    first = load_tokenizer(tiny_tokenizers.byte_level(tmp_path / "a"))
    second = load_tokenizer(tiny_tokenizers.sentencepiece(tmp_path / "b"))
    assert pushed(first, [5], []) != pushed(second, [300], [])
