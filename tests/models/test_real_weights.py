"""Real models out of GGUF files: token ids are llama.cpp's, logits and greedy text those of transformers.

SmolLM2 runs in CI always; the others where `python tests/models/real_weights.py` has fetched them.
"""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_weights
import tiny
import torch
from tiny import Driver

from actorserve.config import EngineConfig
from actorserve.models.resolve import resolve_model
from actorserve.models.tokenizer import Tokenizer, load_tokenizer

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "Q: What is 12 + 30?\nA:",
    "Der schnelle braune Fuchs",
    "The three laws of thermodynamics:\n1.",
]
LENGTH = 24
"""Tokens of each continuation."""
TOLERANCE = 1e-4
"""Of the logits' standard deviation; measured: up to 2e-5. Thirty layers of float32 sums in another order."""

LLAMA_CPP_IDS = json.loads((Path(__file__).parent.parent / "data" / "llama_cpp_ids.json").read_text())
"""Model -> text -> ids by llama.cpp's server from the same file, BOS included where the file says so."""


@pytest.fixture(scope="module", params=["smollm2-135m", *real_weights.REAL])
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(name, folder) of each model."""
    name = request.param
    if name == "smollm2-135m":
        yield name, request.getfixturevalue("smollm")
        return
    file = real_weights.path_of(name)
    if not file.exists():
        pytest.skip(f"python tests/models/real_weights.py {name} fetches it")
    yield name, resolve_model(EngineConfig(model=str(file), device="cpu")).path
    gc.collect()


@pytest.fixture(scope="module")
def tokenizer(model: tuple[str, str]) -> Tokenizer:
    return load_tokenizer(model[1])


def test_token_ids_of_llama_cpp(model: tuple[str, str], tokenizer: Tokenizer) -> None:
    for text, ids in LLAMA_CPP_IDS[model[0]].items():
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@torch.inference_mode()
def continued(folder: str, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """(greedy ids, logits after the prompt) of each prompt, by our decoder on the dequantised weights."""
    driver = Driver.of(tiny.load(folder, quantization="none"), 8 * len(prompts))
    requests = [driver.request(ids, room=LENGTH) for ids in prompts]
    first = logits = torch.stack([driver.forward([(r, len(r.ids))])[-1] for r in requests])
    for step in range(LENGTH):
        for request, token in zip(requests, logits.argmax(-1).tolist(), strict=True):
            request.ids.append(token)
        if step < LENGTH - 1:
            logits = driver.forward([(r, 1) for r in requests])
    return [(r.ids[len(ids) :], row) for r, ids, row in zip(requests, prompts, first, strict=True)]


@pytest.mark.timeout(1800)  # minutes on two busy cores; Qwen2.5-Coder takes 14 GB
@torch.inference_mode()
def test_greedy_text_equals_transformers(model: tuple[str, str], tokenizer: Tokenizer) -> None:
    """Each token is the one that transformers puts first behind all before it, which is what it would go on with."""
    from transformers import AutoModelForCausalLM

    prompts = [tokenizer.encode(text) for text in PROMPTS]
    ours = continued(model[1], prompts)
    gc.collect()
    theirs: Any = AutoModelForCausalLM.from_pretrained(model[1], dtype=torch.float32)
    for ids, (text, logits) in zip(prompts, ours, strict=True):
        expected = theirs(torch.tensor([ids + text[:-1]])).logits[0, len(ids) - 1 :]
        assert (logits - expected[0]).abs().max() <= TOLERANCE * expected[0].std()
        assert len(text) == LENGTH and text == expected.argmax(-1).tolist(), tokenizer.decode(text)
