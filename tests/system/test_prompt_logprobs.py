"""Logprobs of prompts by the real model in float32: those of transformers, computed or from the cache, in any batch."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actorserve import Engine, SamplingParams
from actorserve.errors import RequestError
from actorserve.outputs import Output
from actorserve.sync_engine import SyncEngine

TEXTS = [
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. " * 3,
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is Tokyo, which is large.",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n",
    "日本語のテキスト, ümläute and 🙂 emoji.",
]
NAMED = (260, 5, 31111)
NEAR = 1e-3


@pytest.fixture(scope="module")
def engine(smollm: str) -> Iterator[SyncEngine]:
    """Prompts come in chunks of 24 tokens at most, beside each other and beside rows that decode."""
    with Engine.sync(
        smollm, dtype="float32", placement="inline", max_total_tokens=8192, cpu_threads=2, chunked_prefill_size=24
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(smollm: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def truth(smollm: str, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of each prompt: the logprobs of all tokens behind each of its tokens, float32 [n, vocab], by transformers."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return [torch.log_softmax(model(torch.tensor([ids])).logits[0], -1) for ids in prompts]


def scored(engine: SyncEngine, prompts: list[list[int]], start: int = 0, salt: str = "", **more: Any) -> list[Output]:
    params = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 0, "logprobs": 0, **more}, logprob_start_len=start)
    outputs = engine.generate(prompts, params, cache_salt=salt)
    assert isinstance(outputs, list)
    return outputs


def check(output: Output, ids: list[int], truth: torch.Tensor, start: int = 0) -> None:
    """The tokens from `start` on, and of all but the first of them the logprobs."""
    first, *rest = output.prompt_logprobs
    assert math.isnan(first.logprob) and [first.token, *(row.token for row in rest)] == ids[start:]
    assert output.prompt_tokens == len(ids)
    for place, row in enumerate(rest, start + 1):
        assert row.logprob == pytest.approx(truth[place - 1, row.token].item(), abs=NEAR)


def test_cold_and_warm(engine: SyncEngine, prompts: list[list[int]], truth: list[torch.Tensor]) -> None:
    """In one batch, then all of it from the cache: nothing but each prompt's last token is computed again."""
    for outputs in (scored(engine, prompts), scored(engine, prompts)):
        for output, ids, expected in zip(outputs, prompts, truth, strict=True):
            check(output, ids, expected)
    assert [output.cached_tokens for output in outputs] == [len(ids) - 1 for ids in prompts]


def test_a_prompt_that_was_cached_without_them(
    engine: SyncEngine, prompts: list[list[int]], truth: list[torch.Tensor]
) -> None:
    """What is missing is computed, from the first token that is, and is there for the next one who asks."""
    ids, expected = prompts[0], truth[0]
    engine.generate([ids], SamplingParams(max_new_tokens=4, temperature=0.0), cache_salt="a")
    found = []
    for start in (40, 40, 10, 0, 0):
        (output,) = scored(engine, [ids], start, "a", max_new_tokens=2)
        check(output, ids, expected, start)
        assert len(output.logprobs) == 2 == output.completion_tokens
        found.append(output.cached_tokens)
    assert found == [40, len(ids) - 1, 10, 0, len(ids) - 1]


def test_a_longer_prompt_computes_what_is_new(
    engine: SyncEngine, prompts: list[list[int]], truth: list[torch.Tensor]
) -> None:
    """The logprob of the first new token needs the forward of the last old one."""
    ids, expected = prompts[0], truth[0]
    scored(engine, [ids[:37]], salt="b")
    (output,) = scored(engine, [ids], salt="b")
    check(output, ids, expected)
    assert output.cached_tokens == 36
    (output,) = scored(engine, [ids[:20]], salt="b")
    check(output, ids[:20], expected)
    assert output.cached_tokens == 19


def test_the_most_likely_tokens_and_named_ones(
    engine: SyncEngine, prompts: list[list[int]], truth: list[torch.Tensor]
) -> None:
    """Named ones are computed whatever is cached, from the start on; the others are kept."""
    for named in (NAMED, NAMED, ()):
        outputs = scored(engine, prompts, 5, "c", logprobs=3, token_ids_logprob=named, max_new_tokens=2)
        assert all(o.cached_tokens <= 5 if named else o.cached_tokens == o.prompt_tokens - 1 for o in outputs)
        for output, ids, expected in zip(outputs, prompts, truth, strict=True):
            check(output, ids, expected, 5)
            for place, row in enumerate([*output.prompt_logprobs[1:], output.logprobs[0]], 6):
                best = expected[place - 1].topk(3)
                assert [p for _, p, _ in row.top] == pytest.approx(best.values.tolist(), abs=NEAR)
                assert all(expected[place - 1, i].item() == pytest.approx(p, abs=NEAR) for i, p, _ in row.top)
                assert [token for token, _, _ in row.listed] == list(named)
                listed = expected[place - 1, list(named)].tolist()
                assert [p for _, p, _ in row.listed] == pytest.approx(listed, abs=NEAR)


def test_beside_others(engine: SyncEngine, prompts: list[list[int]], truth: list[torch.Tensor]) -> None:
    """Several times the same, with and without, and rows that decode with logprobs of their own."""
    plain = SamplingParams(temperature=0.0, max_new_tokens=12, logprobs=1, ignore_eos=True)
    alone = engine.generate(prompts[2], plain, cache_salt="d")
    with_prompt = SamplingParams(logprobs=0, logprob_start_len=0, max_new_tokens=1)
    outputs = engine.generate(prompts, with_prompt, cache_salt="e", n=2)
    assert isinstance(outputs, list) and len(outputs) == 8
    for i, output in enumerate(outputs):
        check(output, prompts[i // 2], truth[i // 2])
    again = engine.generate(prompts[2], plain, cache_salt="e")
    assert isinstance(alone, Output) and isinstance(again, Output) and again.ids == alone.ids
    assert again.prompt_logprobs == [] and len(again.logprobs) == 12


def test_a_start_behind_the_prompt(engine: SyncEngine, prompts: list[list[int]]) -> None:
    (output,) = scored(engine, [prompts[2]], len(prompts[2]) - 1)
    assert [row.token for row in output.prompt_logprobs] == prompts[2][-1:]
    with pytest.raises(RequestError) as raised:
        scored(engine, [prompts[2]], len(prompts[2]))
    assert raised.value.param == "logprob_start_len"
