"""Prompts of models that end in vectors: their last token, and how long they may be."""

from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers

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
