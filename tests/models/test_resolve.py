"""--model to ModelInfo: what is read, and one clear sentence for every mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actorserve.config import EngineConfig, ModelInfo, Thoughts
from actorserve.errors import StartupError
from actorserve.models import resolve
from actorserve.models.resolve import resolve_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder, as far as resolve looks."""
    path = tmp_path / "tiny"
    path.mkdir()
    write(path / "config.json", CONFIG)
    (path / "model.safetensors").touch()
    return path


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def resolved(folder: Path, **settings: Any) -> ModelInfo:
    return resolve_model(EngineConfig(model=str(folder), **settings))


def test_facts(folder: Path) -> None:
    assert resolved(folder) == ModelInfo(
        name="tiny", path=str(folder), model_type="llama", vocab_size=100, context_length=2048, eos_ids=(2,)
    )
    assert resolved(folder, served_model_name="mine").name == "mine"


def test_context_length(folder: Path) -> None:
    assert resolved(folder, context_length=100).context_length == 100
    with pytest.raises(StartupError, match="4096 is more than the model's 2048"):
        resolved(folder, context_length=4096)
    write(folder / "config.json", {k: v for k, v in CONFIG.items() if k != "max_position_embeddings"})
    assert resolved(folder, context_length=300).context_length == 300
    with pytest.raises(StartupError, match="pass --context-length"):
        resolved(folder)


def test_context_of_qwen_1_is_what_it_was_trained_on(folder: Path) -> None:
    write(folder / "config.json", CONFIG | {"model_type": "qwen", "seq_length": 512})
    assert resolved(folder).context_length == 512


def test_vocabulary_of_chatglm_is_the_padded_one(folder: Path) -> None:
    facts = {"model_type": "chatglm", "padded_vocab_size": 128, "seq_length": 64, "eos_token_id": 120}
    for more in ({}, {"vocab_size": 100}):
        write(folder / "config.json", facts | more)
        found = resolved(folder)
        assert (found.vocab_size, found.context_length, found.eos_ids) == (128, 64, (120,))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, 2, (2,)), ([5, 2, 5], 3, (5, 2)), (7, None, (7,)), (None, None, ()), (None, [1, 2], (1, 2))],
)
def test_eos_ids(folder: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    write(folder / "config.json", CONFIG | {"eos_token_id": config})
    write(folder / "generation_config.json", {"eos_token_id": generation})
    assert resolved(folder).eos_ids == expected


def test_eos_outside_the_vocabulary(folder: Path) -> None:
    write(folder / "generation_config.json", {"eos_token_id": [2, 100]})
    with pytest.raises(StartupError, match="not a token of its vocabulary"):
        resolved(folder)


def test_sampling_defaults(folder: Path) -> None:
    assert resolved(folder).sampling == {}
    usual = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    write(folder / "generation_config.json", usual | {"do_sample": True, "min_p": None, "max_new_tokens": 2048})
    assert resolved(folder).sampling == usual
    assert resolved(folder, sampling_defaults="openai").sampling == {}
    write(folder / "generation_config.json", {"top_k": 0, "temperature": 1})
    assert resolved(folder).sampling == {"top_k": -1, "temperature": 1}
    for wrong, message in (({"top_p": 1.5}, "top_p must be between"), ({"temperature": "hot"}, "temperature")):
        write(folder / "generation_config.json", wrong)
        with pytest.raises(StartupError, match=f"generation_config.json.*{message}.*--sampling-defaults openai"):
            resolved(folder)
        assert resolved(folder, sampling_defaults="openai").sampling == {}


def test_chat_template(folder: Path, tmp_path: Path) -> None:
    write(folder / "tokenizer_config.json", {"bos_token": "<s>"})
    assert not resolved(folder).has_chat_template
    (folder / "chat_template.jinja").touch()
    assert resolved(folder).has_chat_template
    (folder / "chat_template.jinja").unlink()
    write(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert resolved(folder).has_chat_template
    other = tmp_path / "tokenizer"
    other.mkdir()
    assert not resolved(folder, tokenizer_path=str(other)).has_chat_template
    (tmp_path / "mine.jinja").touch()
    assert resolved(folder, tokenizer_path=str(other), chat_template=str(tmp_path / "mine.jinja")).has_chat_template
    for settings in ({"chat_template": "none.jinja"}, {"tokenizer_path": "none"}):
        with pytest.raises(StartupError, match="no such"):
            resolved(folder, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("hermes", "qwen3")),
        ({"tool_call_parser": "mistral", "reasoning_parser": "none"}, ("mistral", None)),
        ({"reasoning_parser": "deepseek-r1"}, ("hermes", "deepseek-r1")),
    ],
)
def test_parsers(folder: Path, settings: dict[str, str], expected: tuple[str, str | None]) -> None:
    """By the flags, else by what the template writes."""
    write(folder / "tokenizer_config.json", {"chat_template": "<tool_call> {{ thinking }} </think>"})
    info = resolved(folder, **settings)
    assert (info.tool_parser, info.reasoning_parser) == expected


@pytest.mark.parametrize(
    ("added", "family", "expected"),
    [
        ([("<think>", 90), ("</think>", 91)], "auto", Thoughts((90,), (91,))),
        ([("<think>", 90), ("</think>", 91)], "deepseek-r1", Thoughts((90,), (91,), opened=True)),
        ([("<think>", 90)], "auto", None),
        ([("<think>", 90), ("</think>", 91)], "none", None),
    ],
)
def test_tags_of_thoughts(folder: Path, added: list[tuple[str, int]], family: str, expected: Thoughts | None) -> None:
    """Their ids, if each is a token."""
    write(folder / "tokenizer_config.json", {"chat_template": "{{ thinking }} </think>"})
    write(folder / "tokenizer.json", {"added_tokens": [{"content": text, "id": i} for text, i in added]})
    assert resolved(folder, reasoning_parser=family).thoughts == expected


def test_parsers_of_other_templates(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "Action:"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert resolved(folder).tool_parser == "command-r"
    file = tmp_path / "template.jinja"
    file.write_text("[TOOL_CALLS]")
    assert resolved(folder, chat_template=str(file)).tool_parser == "mistral"
    for flag in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(StartupError, match="there are: "):
            resolved(folder, **{flag: "latin"})


@pytest.mark.parametrize("content", ['{"vocab_size": 5', "[]", '{"vocab_size": 5}', '{"model_type": "llama"}', "\xff"])
def test_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(StartupError, match=r"config\.json"):
        resolved(folder)


def test_missing_things(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(StartupError, match="no such file or folder"):
        resolved(Path("./nowhere"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(StartupError, match=r"no \*\.safetensors weights"):
        resolved(folder)
    assert resolved(folder, load_format="dummy").vocab_size == 100
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(StartupError, match="pickle"):
        resolved(folder)
    (folder / "config.json").rename(folder / "model.gguf")
    with pytest.raises(StartupError, match=r"no config\.json .* did you mean --model .*model\.gguf"):
        resolved(folder)
    with pytest.raises(StartupError, match=r"a folder with config\.json or a \.gguf file"):
        resolved(folder / "pytorch_model.bin")


def test_unsupported_settings(folder: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 96}
    write(folder / "config.json", CONFIG | sizes | {"num_key_value_heads": 2})
    assert resolved(folder, tp_size=2) == resolved(folder)
    with pytest.raises(StartupError, match="--tp-size 3 does not divide 8 attention heads and 2 KV heads"):
        resolved(folder, tp_size=3)
    with pytest.raises(StartupError, match="--tp-size needs --placement process"):
        resolved(folder, tp_size=2, placement="inline")
    with pytest.raises(StartupError, match="--dp-size needs --placement process"):
        resolved(folder, dp_size=2, placement="inline")
    with pytest.raises(StartupError, match=r"needs a \.gguf file"):
        resolved(folder, load_format="gguf")


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTORSERVE_CACHE", str(tmp_path / "cache"))
    calls: list[Path] = []

    def convert(gguf: Path, out: Path, progress: object) -> None:
        calls.append(gguf)
        write(out / "config.json", CONFIG)
        (out / "model.safetensors").touch()

    monkeypatch.setattr(resolve, "convert", convert)
    file = tmp_path / "tiny.Q4_0.gguf"
    file.write_bytes(b"one")
    first = resolved(file)
    assert first.name == "tiny.Q4_0"
    assert resolved(file) == first
    assert len(calls) == 1
    file.write_bytes(b"two")
    assert resolved(file).path != first.path
    assert len(calls) == 2


def test_no_torch(folder: Path) -> None:
    """The root holds every process of the engine; it must stay small and start at once."""
    code = f"""
import sys
from actorserve.config import EngineConfig
from actorserve.models.resolve import resolve_model
resolve_model(EngineConfig(model={str(folder)!r}))
print(sorted({{"torch", "transformers", "starlette", "gguf"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
