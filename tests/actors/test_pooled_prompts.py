"""Prompts of models that end in vectors: their last token, and how long they may be."""

from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers
import tokenizers
from tokenizers import processors

from actorserve.actors.messages import Generate, TextPrompt, TokenPrompt
from actorserve.actors.prompts import Prompts
from actorserve.config import EngineConfig, ModelInfo, Pooling
from actorserve.errors import RequestError
from actorserve.models.tokenizer import load_tokenizer
from actorserve.sampler.params import SamplingParams

POOLING = Pooling(kind="last", task="embed", width=4)


def prompts(folder: Path, pooling: Pooling | None, **config: object) -> tuple[Prompts, int]:
    """(of a small tokenizer and a context of 8 tokens, its end token)"""
    tokenizer = load_tokenizer(tiny_tokenizers.byte_level(folder, **config))
    size = tokenizer.vocab_size
    model = ModelInfo(
        name="m", path="", model_type="qwen2", vocab_size=size, context_length=8, eos_ids=(2,), pooling=pooling
    )
    return Prompts(EngineConfig(), model, tokenizer, None), tokenizer.core.token_to_id("<|im_end|>")


def test_texts_end_as_the_tokenizers_own_code_ends_them(tmp_path: Path) -> None:
    """gte-Qwen2 has `add_eos_token` in tokenizer_config.json, and nothing of it in tokenizer.json."""
    text = TextPrompt("Hi")
    plain, end = prompts(tmp_path / "plain", POOLING)
    ended, _ = prompts(tmp_path / "ended", POOLING, add_eos_token=True)
    generating, _ = prompts(tmp_path / "generating", None, add_eos_token=True)
    ids = plain.encode(text).ids.tolist()
    assert ended.encode(text).ids.tolist() == [*ids, end]
    assert ended.tokenize(text, add_special_tokens=True).tolist() == [*ids, end]
    assert ended.tokenize(text, add_special_tokens=False).tolist() == ids
    assert generating.encode(text).ids.tolist() == ids
    own, _ = prompts(tmp_path / "own", POOLING, single="$A <|im_end|>", add_eos_token=True)
    assert own.encode(text).ids.tolist() == [*ids, end], "not twice"
    long = plain.encode(TextPrompt("Hi there")).ids.tolist()
    for ending in (own, ended):
        assert ending.encode(TextPrompt("Hi there, how are you?", most=4)).ids.tolist() == [*long[:3], end]


def test_a_prompt_may_fill_the_context(tmp_path: Path) -> None:
    """A model that generates needs room for a token."""
    pooled, _ = prompts(tmp_path / "pooled", POOLING)
    generating, _ = prompts(tmp_path / "generating", None)

    def of(length: int) -> TokenPrompt:
        return TokenPrompt(memoryview(np.full(length, 5, dtype=np.int32).tobytes()))

    encoded = pooled.encode(of(8))
    (submit,) = pooled.submits(Generate(1, 1, of(8), SamplingParams(max_new_tokens=0), pooled=True), encoded)
    assert submit.pooled and submit.params.max_new_tokens == 0 and len(submit.ids) == 32
    for refusing, length in ((pooled, 9), (generating, 8)):
        with pytest.raises(RequestError, match="8") as caught:
            refusing.encode(of(length))
        assert (caught.value.param, caught.value.code) == ("input_ids", "context_length_exceeded")


def test_pairs_of_texts_know_where_the_second_begins(tmp_path: Path) -> None:
    """By the tokenizer's own template; cut, the longer text loses its end first."""
    core = tokenizers.Tokenizer.from_file(str(Path(tiny_tokenizers.word_piece(tmp_path)) / "tokenizer.json"))
    around = [("[SEP]", core.token_to_id("[SEP]"))]
    core.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="[SEP] $A [SEP] $B:1 [SEP]:1", special_tokens=around
    )
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    model = ModelInfo(
        name="m", path="", model_type="bert", vocab_size=tokenizer.vocab_size, context_length=64, eos_ids=(),
        pooling=Pooling(kind="cls", task="classify", width=1, causal=False),
    )  # fmt: skip
    pooled = Prompts(EngineConfig(), model, tokenizer, None)
    texts = ["the dog", "hello there, the dogs", "dog " * 9]
    for first in texts:
        for second in texts:
            for most in (0, 3, 4, 5, 8, 9, 15, 30):
                prompt = TextPrompt(first, most=most, second=second)
                encoded = pooled.encode(prompt)
                if most:
                    core.enable_truncation(most)
                else:
                    core.no_truncation()
                wanted = core.encode(first, second)
                assert encoded.ids.tolist() == wanted.ids
                assert encoded.second == wanted.type_ids.index(1) > 1
                request = Generate(1, 1, prompt, SamplingParams(max_new_tokens=0), pooled=True)
                (submit,) = pooled.submits(request, encoded)
                assert submit.second == encoded.second
    core.no_truncation()
    assert pooled.encode(TextPrompt("the dog")).second == 0
    with pytest.raises(RequestError, match="surrogate") as caught:
        pooled.encode(TextPrompt("the", second="\ud800"))
    assert caught.value.param == "prompt"
