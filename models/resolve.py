"""From the `--model` setting to a folder that can be loaded, and what everybody must know of it (ModelInfo).

Runs in the root before any actor exists: no torch, and every mistake of the user ends here as one StartupError.
Used by cli.py and engine.py.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import msgspec

from ..config import EngineConfig, ModelInfo, Thoughts
from ..errors import RequestError, StartupError
from ..sampler.params import SamplingParams
from .cache import Progress, cache_folder, locked, no_progress, publish
from .embedded import BY_NAME, NAME, embedded_model
from .encoder_families import positions_of
from .families import pooled_spec, spec_of
from .gguf import FORMAT, convert
from .hub import hub_model, is_hub_name
from .parsers import guess, reasoning_family, tool_family
from .pooling import longest_text, pooling_of
from .reasoning_parser import ReasoningFamily
from .rope_config import longest_context
from .shard import sharded
from .tokenizer import chat_templates
from .vision_config import is_vision_model, is_yi, language_config, vision_facts

SAMPLED: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What generation_config.json may say of sampling, and SGLang and vLLM take from there, too."""
HEAD_BYTES = 1 << 20
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def resolve_model(config: EngineConfig, progress: Progress = no_progress) -> ModelInfo:
    """Check the configuration, fetch or convert the model where needed, and read its facts from its folder.

    Raises StartupError saying what is wrong and what to do.
    """
    folder, name = _folder(config, progress)
    whole = read_facts(folder)
    facts = language_config(whole)
    if config.load_format not in ("dummy", "stub"):
        _check_weights(folder)
    vocab_size = vocabulary(facts)
    if not isinstance(vocab_size, int) or vocab_size < 1 or not isinstance(facts.get("model_type"), str):
        raise StartupError(
            f"{folder / 'config.json'} has no model_type or no vocab_size: not a language model's folder"
        )
    pooling = pooling_of(folder, facts, config)
    vision = vision_facts(whole) if is_vision_model(whole) else None
    if config.dp_size > 1 and config.placement == "inline":
        raise StartupError("--dp-size needs --placement process: replicas compute at the same time")
    if config.tp_size > 1 and config.load_format != "stub":
        if config.placement == "inline":
            raise StartupError("--tp-size needs --placement process: ranks wait for each other")
        sharded(spec_of(facts) if pooling is None else pooled_spec(facts, pooling), config.tp_size)
    return ModelInfo(
        name=config.served_model_name or name,
        path=str(folder),
        model_type=whole["model_type"],
        vocab_size=vocab_size,
        context_length=_context_length(facts, config.context_length, longest_text(folder) if pooling else None),
        eos_ids=_eos_ids(folder, facts),
        sampling=_sampling(folder) if config.sampling_defaults == "model" else {},
        has_chat_template=_has_chat_template(folder, config),
        pooling=pooling,
        image_token_id=None if vision is None else vision.image_token,
        video_token_id=None if vision is None else vision.video_token,
        **_parsers(folder, config),
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """A model folder's config.json; with the config of a vision tower that has a folder of its own in it.

    Raises StartupError.
    """
    facts = read_json(folder / "config.json")
    if is_yi(facts):
        tower = read_json(tower_folder(folder, facts) / "config.json")
        facts["vision_config"] = tower.get("vision_config", tower)
    return facts


def tower_folder(folder: Path, facts: dict[str, Any]) -> Path:
    """Where the tower's config and processor are. Raises StartupError for a place outside of the model's folder."""
    named = str(facts["mm_vision_tower"])
    found = (folder / named).resolve()
    if not found.is_relative_to(folder.resolve()) or not found.is_dir():
        raise StartupError(f"config.json: mm_vision_tower {named!r} is no folder in the model's; Yi-VL has it in ./vit")
    return found


def _folder(config: EngineConfig, progress: Progress) -> tuple[Path, str]:
    """(folder with config.json, default name) of the configured model."""
    if config.model is None:
        return Path(embedded_model(progress)), NAME
    path, name = Path(config.model).expanduser(), None
    if not path.exists() and config.model in BY_NAME:
        return Path(BY_NAME[config.model](progress)), config.model
    if not path.exists():
        if not is_hub_name(config.model):
            raise StartupError(f"--model {config.model}: no such file or folder")
        weights, name = config.load_format not in ("dummy", "stub"), config.model
        path = hub_model(config.model, config.download_source, config.revision, weights, progress)
    if path.is_file():
        if path.suffix != ".gguf":
            raise StartupError(f"--model {config.model}: a folder with config.json or a .gguf file is needed")
        return _converted(path.absolute(), progress), name or path.stem
    if not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        hint = f"; did you mean --model {files[0]} ?" if files else ""
        raise StartupError(f"--model {config.model}: there is no config.json in this folder{hint}")
    if config.load_format == "gguf":
        raise StartupError("--load-format gguf needs a .gguf file as --model")
    return path.resolve(), name or path.resolve().name


def _converted(gguf: Path, progress: Progress) -> Path:
    """The converted folder of a GGUF file, from the cache or made now.

    The key is the file's size, time and first MiB (which holds the metadata): reading gigabytes at each start to find
    out that nothing has changed would cost more than the conversion saves.
    """
    with open(gguf, "rb") as file:
        digest = hashlib.sha256(file.read(HEAD_BYTES))
    stat = gguf.stat()
    digest.update(f"{stat.st_size} {stat.st_mtime_ns} {FORMAT}".encode())
    target = cache_folder() / f"{gguf.stem}-{digest.hexdigest()[:16]}"
    if not target.exists():
        with locked(target, progress):
            if not target.exists():
                with publish(target) as folder:
                    convert(gguf, folder, progress)
    return target


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or StartupError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} is not a JSON object")
    return value


def _check_weights(folder: Path) -> None:
    """StartupError unless the folder has safetensors weights; what is in them is the loader's to check."""
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise StartupError(f"{folder} has its weights as pickle files, which can run code; convert them to safetensors")
    raise StartupError(f"{folder} has no *.safetensors weights (--load-format dummy runs on random ones)")


def _parsers(folder: Path, config: EngineConfig) -> dict[str, Any]:
    """ModelInfo's `tool_parser`, `reasoning_parser`, `thoughts`: as configured, else as the chat template tells."""
    if config.tool_call_parser != "auto":
        tool_family(config.tool_call_parser)
    if config.reasoning_parser not in ("auto", "none"):
        reasoning_family(config.reasoning_parser)
    templates = _chat_templates(folder, config)
    default = templates.get("default", "")
    tools, reasoning = guess(templates.get("tool_use", default)).tools, guess(default).reasoning
    family = {"auto": reasoning, "none": None}.get(config.reasoning_parser, config.reasoning_parser)
    return {
        # Whatever its template, a model may answer with the plain JSON of a call.
        "tool_parser": (tools or "json") if config.tool_call_parser == "auto" else config.tool_call_parser,
        "reasoning_parser": family,
        "thoughts": None if family is None else _thoughts(folder, config, reasoning_family(family)),
    }


def _thoughts(folder: Path, config: EngineConfig, family: ReasoningFamily) -> Thoughts | None:
    """The ids of a family's tags; None if one of them is no token of its own."""
    tokenizer = Path(config.tokenizer_path).expanduser() if config.tokenizer_path else folder
    file = tokenizer / "tokenizer.json"
    added = read_json(file).get("added_tokens") if file.exists() else None
    ids = {t["content"]: t["id"] for t in added or [] if isinstance(t, dict) and {"content", "id"} <= t.keys()}
    if not all(isinstance(ids.get(tag), int) for tag in (*family.opens, *family.closes)):
        return None
    opens, closes = (tuple(ids[tag] for tag in tags) for tags in (family.opens, family.closes))
    return Thoughts(opens, closes, family.opened)


def _chat_templates(folder: Path, config: EngineConfig) -> dict[str, str]:
    """The templates that the text actor will use, by name."""
    if config.chat_template is not None:
        return {"default": Path(config.chat_template).expanduser().read_text(encoding="utf-8", errors="replace")}
    tokenizer = Path(config.tokenizer_path).expanduser() if config.tokenizer_path else folder
    settings = tokenizer / "tokenizer_config.json"
    return chat_templates(tokenizer, read_json(settings) if settings.exists() else {})


def vocabulary(facts: dict[str, Any]) -> Any:
    """config.json's number of logits; ChatGLM's `vocab_size` may be that of its tokenizer."""
    return facts.get("padded_vocab_size", facts.get("vocab_size"))


def _context_length(facts: dict[str, Any], wanted: int | None, usual: int | None) -> int:
    """The longest context to serve, in tokens: the model's, or a shorter one if so configured.

    `usual`: the model was trained with no longer ones; those that are configured may be longer.
    """
    own = next((facts[key] for key in CONTEXT_KEYS if isinstance(facts.get(key), int)), None)
    if own is not None and isinstance(facts.get("seq_length"), int):
        own = min(own, facts["seq_length"])  # Qwen 1: beyond it the model would change its rope and scores
    own = positions_of(facts, own)
    if own is None:
        if wanted is None:
            raise StartupError("config.json does not tell the model's context length; pass --context-length")
        return wanted
    longest = longest_context(facts, own)
    if wanted is not None and wanted > longest:
        raise StartupError(f"--context-length {wanted} is more than the model's {longest}")
    return wanted or min(own, usual or own)


def _eos_ids(folder: Path, facts: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json's end tokens, else config.json's, as transformers' generate has it; may be empty."""
    found = _generation(folder).get("eos_token_id")
    if found is None:
        found = facts.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and 0 <= token < vocabulary(facts) for token in ids):
        raise StartupError(f"eos_token_id {found!r} of the model's configuration is not a token of its vocabulary")
    return tuple(dict.fromkeys(ids))


def _sampling(folder: Path) -> dict[str, float]:
    """How generation_config.json would have tokens drawn. Raises StartupError for what no request could ask for."""
    given = {name: value for name, value in _generation(folder).items() if name in SAMPLED and value is not None}
    if given.get("top_k") == 0:
        given["top_k"] = -1
    try:
        msgspec.convert(given, SamplingParams).check(1)
    except (msgspec.ValidationError, RequestError) as error:
        raise StartupError(
            f"{folder / 'generation_config.json'}: {error}; --sampling-defaults openai does without it"
        ) from None
    return given


def _generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, if there is one."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _has_chat_template(folder: Path, config: EngineConfig) -> bool:
    """Whether chat requests can be served; checks that the paths given for it exist."""
    tokenizer = Path(config.tokenizer_path).expanduser() if config.tokenizer_path else folder
    if not tokenizer.is_dir():
        raise StartupError(f"--tokenizer-path {config.tokenizer_path}: no such folder")
    if config.chat_template is not None:
        if not Path(config.chat_template).expanduser().is_file():
            raise StartupError(f"--chat-template {config.chat_template}: no such file")
        return True
    if any((tokenizer / f"chat_template.{kind}").exists() for kind in ("jinja", "json")):
        return True
    settings = tokenizer / "tokenizer_config.json"
    return settings.exists() and bool(read_json(settings).get("chat_template"))
