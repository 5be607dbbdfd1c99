"""--model org/name: what is fetched from a hub (a stand-in on this machine), what is not, and what errors say.

Each hub's library reads its address when it is imported, so all of a hub's cases run in one child process of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import HubStandIn, serve

from actorserve.errors import StartupError
from actorserve.models.hub import is_hub_name, wanted

CONFIG = {"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 64, "eos_token_id": 2}
WEIGHTS = bytes(300_000)
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "1_Pooling/config.json": b'{"mean": true}',
    "model-00001-of-00001.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"code",
    "original/consolidated.safetensors": WEIGHTS,
    "onnx/config.json": b"{}",
}
FETCHED = {"config.json", "tokenizer.json", "chat_template.jinja", "1_Pooling/config.json"}
CHILD = """
import json, sys
from actorserve.config import EngineConfig
from actorserve.errors import StartupError
from actorserve.models.resolve import resolve_model
for settings in json.loads(sys.argv[1]):
    steps = []
    try:
        model = resolve_model(EngineConfig(**settings), lambda *step: steps.append(step))
        print(json.dumps({"name": model.name, "path": model.path, "steps": steps[-1:]}))
    except StartupError as error:
        print(json.dumps({"error": str(error)}))
"""


def resolved(home: Path, url: str, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What `resolve_model` makes of each, one after another, in a process that knows the hub at `url`."""
    own = {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": url, "MODELSCOPE_ENDPOINT": url, "HOME": str(home)}
    own |= {"MODELSCOPE_CACHE": str(home / "ms"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(settings)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_hub(source: str, tmp_path: Path) -> None:
    model = {"model": "org/name", "download_source": source}
    with serve(HubStandIn(FILES)) as hub:
        described, whole, again, missing, other = resolved(
            tmp_path,
            hub.url,
            model | {"load_format": "dummy"},
            model,
            model,
            model | {"revision": "nowhere"},
            model | {"model": "org/other"},
        )
        assert described["name"] == whole["name"] == "org/name"
        assert Path(whole["path"], "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
        assert sorted(hub.fetched) == sorted({*FETCHED, "model-00001-of-00001.safetensors"})  # each once
        total = sum(len(FILES[name]) for name in FETCHED) + len(WEIGHTS)
        assert whole["steps"] == [["fetch", total, total]] and again["path"] == whole["path"]
        assert "nowhere" in missing["error"] and "org/other" in other["error"]
    (offline, unknown) = resolved(tmp_path, hub.url, model, model | {"model": "org/other"})
    assert offline["path"] == whole["path"]
    assert "cannot be reached" in unknown["error"]


def test_a_gguf_of_a_hub(tmp_path: Path) -> None:
    files = {"README.md": b"", "tiny-Q4_K_M.gguf": b"GGUF", "tiny-Q8_0.gguf": b"GGUF"}
    with serve(HubStandIn(files)) as hub:
        chosen, unsaid = resolved(tmp_path, hub.url, {"model": "org/name:q8_0"}, {"model": "org/name"})
        assert hub.fetched == ["tiny-Q8_0.gguf"]
    assert "tiny-Q8_0.gguf" in chosen["error"]  # it is not a real one
    assert "say which GGUF file" in unsaid["error"] and "tiny-Q4_K_M.gguf" in unsaid["error"]


@pytest.mark.parametrize(
    ("model", "files", "said"),
    [
        ("a/b", ["model.safetensors"], "no config.json"),
        ("a/b", ["config.json", "pytorch_model.bin"], "pickle"),
        ("a/b:Q4", ["config.json", "x-Q8_0.gguf"], "no GGUF file of that name"),
        ("a/b", ["x-Q8-00001-of-00002.gguf", "x-Q8-00002-of-00002.gguf"], "join them"),
        ("a/b:Q8", ["config.json"], "no GGUF file"),
    ],
)
def test_what_cannot_be_served_costs_no_download(model: str, files: list[str], said: str) -> None:
    with pytest.raises(StartupError, match=said):
        wanted(model, dict.fromkeys(files, 1), model.partition(":")[2] or None, weights=True)


@pytest.mark.parametrize("model", ["a", "./a/b", "../b", "a/b/c", "/a/b", "a/", "a/b:", "-a/b", "a/../b", "~/b"])
def test_paths_are_no_names(model: str) -> None:
    assert not is_hub_name(model)
