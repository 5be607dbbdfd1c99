"""GGUF files of every architecture: the converted folder gives transformers' logits, and llama.cpp's where it is."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf_writer
import pytest
import tiny
import torch
from tiny import Driver
from torch import Tensor

from actorserve.models.gguf import convert
from actorserve.models.gguf_architectures import ARCHITECTURES

TOLERANCE = 1e-5
"""Of the logits' standard deviation: the weights are the same to the last bit."""
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama-tied": ("llama", "llama-tied", {}),
    "llama-biases": ("llama", "llama-biases", {"mlp_bias": False}),
    "mixtral": ("llama", "mixtral", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {}),
    "qwen2moe": ("qwen2moe", "qwen2-moe", {"mlp_only_layers": []}),
    "qwen3moe": ("qwen3moe", "qwen3-moe", {}),
    "gemma": ("gemma", "gemma", {}),
    "gemma2": ("gemma2", "gemma2", {"query_pre_attn_scalar": 16, "num_hidden_layers": 4}),
    "gemma3": ("gemma3", "gemma3", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": None}),
    "phi3": ("phi3", "phi3", {"sliding_window": None}),
    "phi3-window": ("phi3", "phi3", {}),
    "stablelm": ("stablelm", "stablelm", {}),
    "stablelm-12b": ("stablelm", "stablelm-12b", {}),
    "command-r": ("command-r", "cohere", {}),
    "command-r-plus": ("command-r", "cohere-plus", {}),
    "cohere2": ("cohere2", "cohere2", {}),
    "granite": ("granite", "granite", {}),
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
    "internlm2": ("internlm2", "llama", {}),
    "exaone": ("exaone", "exaone-native", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "exaone4": ("exaone4", "exaone4", {}),
    "olmo2": ("olmo2", "olmo2", {}),
    "olmo3": ("olmo2", "olmo3", {}),
    "glm4": ("glm4", "glm4", {}),
}
"""Name -> (architecture, tiny model, changes to its config)."""
PROMPT = tiny.prompt(40)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def written(name: str, folder: Path) -> tuple[Any, Path]:
    """(transformers' model, its GGUF file)."""
    arch, family, changes = CASES[name]
    model = gguf_writer.rounded(tiny.build(family, **changes))
    gguf_writer.write(folder / "m.gguf", arch, model, folder / "model")
    return model, folder / "m.gguf"


def converted(file: Path) -> str:
    out = file.parent / "converted"
    out.mkdir()
    convert(file, out)
    return str(out)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model, file = written(name, tmp_path)
    expected = tiny.reference_logits(model, PROMPT)
    found = Driver.of(tiny.load(converted(file))).logits(PROMPT, [40])
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()


def test_every_architecture_is_tested() -> None:
    assert {arch for arch, _, _ in CASES.values()} | {"chatglm"} == set(ARCHITECTURES)


# ------------------------------------------------------------------ llama.cpp

SERVER = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.port, p.n_parallel, p.n_ctx = sys.argv[1], int(sys.argv[2]), 1, 512
p.hostnames, p.warmup, p.cpuparams.n_threads, p.cpuparams_batch.n_threads = ["127.0.0.1"], False, 1, 1
server = x.Server(p)
time.sleep(600)
"""


NOT_THERE = {"phi3-window", "command-r-plus", "exaone4"}
"""llama.cpp leaves out Phi's windows; norms of Command-R's heads and windows of EXAONE 4 it has for 64 layers only."""


@contextmanager
def llama_cpp(file: Path) -> Iterator[str]:
    """llama.cpp's server on a file, from the `xllamacpp` wheel; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with open(file.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", SERVER, str(file), str(port)], stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    assert process.poll() is None, file.with_suffix(".log").read_text()[-2000:]
                    time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def top_logprobs(url: str, ids: list[int]) -> dict[int, float]:
    body = {"prompt": ids, "n_predict": 1, "n_probs": 10, "temperature": 0.0, "cache_prompt": False}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in found}


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="pip install xllamacpp")
@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_THERE))
def test_logprobs_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Its cache is float16, so the bar is lower; what is read wrongly is off by more than 1."""
    _, file = written(name, tmp_path)
    decoder = tiny.load(converted(file))
    with llama_cpp(file) as url:
        for length in (5, 23, 40):
            logits: Tensor = Driver.of(decoder).logits(PROMPT[:length], [length])[-1]
            for token, logprob in top_logprobs(url, PROMPT[:length]).items():
                assert abs(logits.log_softmax(0)[token].item() - logprob) < 0.05, (length, token)
