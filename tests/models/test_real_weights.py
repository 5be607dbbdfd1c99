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
    decoder = tiny.load(folder, quantization="none")
    found = []
    for ids in prompts:
        driver = Driver.of(decoder, 8)
        request = driver.request(ids, room=LENGTH)
        first = logits = driver.forward([(request, len(ids))])[-1]
        while True:
            request.ids.append(int(logits.argmax()))
            if len(request.ids) == request.goal:
                break
            logits = driver.forward([(request, 1)])[-1]
        found.append((request.ids[len(ids) :], first))
    return found


@torch.inference_mode()
def test_greedy_text_equals_transformers(model: tuple[str, str], tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    prompts = [tokenizer.encode(text) for text in PROMPTS]
    ours = continued(model[1], prompts)
    gc.collect()
    theirs: Any = AutoModelForCausalLM.from_pretrained(model[1], dtype=torch.float32)
    for ids, (text, logits) in zip(prompts, ours, strict=True):
        expected = theirs(torch.tensor([ids])).logits[0, -1]
        assert (logits - expected).abs().max() <= TOLERANCE * expected.std()
        whole = theirs.generate(
            torch.tensor([ids]), max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, eos_token_id=-1
        )
        assert text == whole[0, len(ids) :].tolist(), tokenizer.decode(text)
