"""Greedy ids of the real model in float32: equal to transformers', and the same in every way that the engine has.

Chunks, prefix cache, windows of k steps, batch mixes and placement may change how a token is computed, never which.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kept_weights import with_kept_weights
from prompts import PROMPTS

from actorserve import Engine, SamplingParams
from actorserve.errors import StartupError
from actorserve.models.c_library import find_compiler

NEW_TOKENS = 64
BASE = {"dtype": "float32", "placement": "inline", "max_total_tokens": 16384, "window_ms": 0.0, "cpu_threads": 1}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)


def generate(model: str, prompts: list[str], **options: object) -> list[list[int]]:
    with Engine.sync(model, **{**BASE, **options}) as engine:
        outputs = engine.generate(prompts, GREEDY)
        return [list(o.ids) for o in outputs]


@pytest.fixture(scope="module")
def reference(smollm: str) -> Any:
    """transformers' model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32, attn_implementation="eager")


@torch.inference_mode()
def differences(smollm: str, model: Any, texts: list[str], generated: list[list[int]]) -> int:
    """How many outputs are not transformers' choice; where one is not, the two best must be nearly equal.

    One forward of transformers over prompt and output: its argmax at every place must be the next id. That is the same
    as comparing with its `generate`, up to the first difference.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    sequences = [prompt + ids for prompt, ids in zip(prompts, generated, strict=True)]
    different = 0
    for first in range(0, len(texts), 10):
        batch = sequences[first : first + 10]
        longest = max(map(len, batch))
        padded = torch.tensor([s + [0] * (longest - len(s)) for s in batch])  # padding behind changes nothing before it
        hidden = model.model(padded).last_hidden_state
        for row, sequence in enumerate(batch):
            start = len(prompts[first + row])
            logits = model.lm_head(hidden[row, start - 1 : len(sequence) - 1])
            wrong = (logits.argmax(-1) != torch.tensor(sequence[start:])).nonzero()
            if len(wrong):
                different += 1
                best = logits[int(wrong[0])].topk(2).values
                assert float(best[0] - best[1]) < 1e-3, (texts[first + row], int(wrong[0]))
    return different


@pytest.fixture(scope="module")
def texts(thorough: bool) -> list[str]:
    """All 50 prompts, or 7."""
    return PROMPTS if thorough else PROMPTS[::8]


PLAIN = {
    "chunked_prefill_size": 0, "disable_radix_cache": True, "num_continuous_decode_steps": 1, "plans_in_flight": 1,
}  # fmt: skip
"""Whole prompts, no cache, one step a window, one window in flight."""


@pytest.fixture(scope="module")
def plain(smollm: str, texts: list[str]) -> list[list[int]]:
    """The plainest way."""
    return generate(smollm, texts, **PLAIN)


@pytest.fixture(scope="module")
def kept(smollm: str, texts: list[str]) -> list[list[int]]:
    """The same with the weights that a CPU keeps by itself, the GGUF's blocks: exact too, and much faster."""
    return generate(smollm, texts, dtype="auto", **PLAIN)


def test_equal_to_transformers(smollm: str, reference: Any, texts: list[str], plain: list[list[int]]) -> None:
    assert differences(smollm, reference, texts, plain) <= 0.01 * len(texts)


def test_quantized_weights_equal_transformers(
    smollm: str, reference: Any, texts: list[str], kept: list[list[int]]
) -> None:
    """By themselves, as a CPU has them: the GGUF's blocks against transformers with what they mean, in float32."""
    try:
        find_compiler()
    except StartupError as error:
        pytest.skip(str(error))
    assert generate(smollm, texts[:1], dtype="auto", device="cpu", quantization="gguf") == kept[:1], "they are these"
    assert differences(smollm, with_kept_weights(copy.deepcopy(reference), smollm), texts, kept) == 0


WAYS: list[dict[str, Any]] = [
    {"chunked_prefill_size": 16, "num_continuous_decode_steps": 4},
    {"chunked_prefill_size": 16, "max_total_tokens": 720, "schedule_conservativeness": 0.1},
    {"chunked_prefill_size": 64, "num_continuous_decode_steps": 16},
    {"chunked_prefill_size": 0, "num_continuous_decode_steps": 16, "disable_radix_cache": True},
    {"chunked_prefill_size": 64, "max_running_requests": 5, "schedule_policy": "fcfs"},
    {"placement": "process", "num_continuous_decode_steps": 4},
]


def name_of(options: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("options", WAYS, ids=name_of)
def test_the_same_in_every_way(smollm: str, texts: list[str], kept: list[list[int]], options: dict[str, Any]) -> None:
    assert generate(smollm, texts, dtype="auto", **options) == kept


@pytest.mark.parametrize("options", WAYS if "TESTS_THOROUGH" in os.environ else WAYS[:2], ids=name_of)
def test_float32_is_the_same_in_every_way(
    smollm: str, texts: list[str], plain: list[list[int]], options: dict[str, Any]
) -> None:
    assert generate(smollm, texts, **options) == plain


@pytest.fixture(scope="module")
def engine(smollm: str) -> Iterator[object]:
    with Engine.sync(smollm, **{**BASE, "dtype": "auto"}) as e:
        yield e


def test_cold_and_warm_cache(engine: object, texts: list[str], kept: list[list[int]]) -> None:
    for _ in range(2):
        outputs = engine.generate(texts, GREEDY)  # type: ignore[attr-defined]
        assert [list(o.ids) for o in outputs] == kept
    assert all(o.cached_tokens == o.prompt_tokens - 1 for o in outputs)


def test_a_seeded_request_repeats_itself_in_any_company(engine: object) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_new_tokens=32, ignore_eos=True)
    alone = engine.generate(PROMPTS[7], params)  # type: ignore[attr-defined]
    crowd = engine.generate([*PROMPTS[20:26], PROMPTS[7]], params)  # type: ignore[attr-defined]
    assert crowd[-1].ids == alone.ids
