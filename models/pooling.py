"""What a model that generates nothing makes of a prompt: read from its folder, as Pooling, without torch; and the
vector as a user gets it.

Used by resolve.py, and by http/ and engine.py. Sources are config.json and the files of sentence-transformers, where
they are: modules.json, the pooling's config.json, sentence_bert_config.json. A module that nothing here implements is
refused, never left out.
"""

import json
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..config import EngineConfig, Pooling
from ..errors import StartupError
from .encoder_families import FAMILIES as ENCODERS

Json = dict[str, Any]
Kind = Literal["last", "mean", "cls"]

CLASSIFIERS: Final = ("ForSequenceClassification", "ForRewardModel")
MODES: Final[dict[str, Kind]] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
"""Of sentence-transformers' Pooling; others are refused."""
SHORT_MODES: Final[dict[str, Kind]] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
"""The same in its newer files, `pooling_mode`."""
SMALLEST_LENGTH: Final = 1e-12
"""Of a vector, as torch's normalize has it: zeros stay zeros."""


def pooling_of(folder: Path, facts: Json, config: EngineConfig) -> Pooling | None:
    """How the model in `folder` is pooled; None if it generates text. Raises StartupError for what is not served.

    `facts`: its config.json.
    """
    architecture = str((facts.get("architectures") or [""])[0])
    encoder = facts.get("model_type") in ENCODERS
    if architecture.endswith(CLASSIFIERS) and not config.is_embedding:
        return _classifier(facts, architecture, encoder, _is_causal(facts, encoder, config))
    modules = _modules(folder)
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    if not (config.is_embedding or encoder or modules or bare):
        return None
    kind: Kind = "mean" if encoder else "last"
    normalize = True
    if modules:
        kind, normalize = _of_modules(folder, modules)
    return Pooling(
        kind=kind,
        task="embed",
        width=_hidden(facts),
        normalize=normalize,
        causal=_is_causal(facts, encoder, config),
    )


def longest_text(folder: Path) -> int | None:
    """The most tokens that sentence-transformers would read of a text, where the folder says it."""
    found = _read(folder / "sentence_bert_config.json")
    longest = found.get("max_seq_length") if isinstance(found, dict) else None
    return longest if isinstance(longest, int) and longest > 0 else None


def _classifier(facts: Json, architecture: str, encoder: bool, causal: bool) -> Pooling:
    names = facts.get("id2label")
    labels = tuple(str(names[key]) for key in sorted(names, key=int)) if isinstance(names, dict) else ()
    count = facts.get("num_labels") or len(labels) or (1 if architecture.endswith("ForRewardModel") else 2)
    if not isinstance(count, int) or count < 1 or (labels and len(labels) != count):
        raise StartupError(f"config.json: num_labels {count!r} does not fit {len(labels)} names in id2label")
    return Pooling(
        kind="cls" if encoder else "last",
        task="classify",
        width=count,
        normalize=False,
        causal=causal,
        labels=labels or tuple(f"LABEL_{i}" for i in range(count)),
        several=facts.get("problem_type") == "multi_label_classification",
        raw=_is_raw(facts),
    )


def _is_raw(facts: Json) -> bool:
    """Whether a cross-encoder's score is its logit; sentence-transformers' two ways to say so, else the sigmoid."""
    nested = facts.get("sentence_transformers")
    name = nested.get("activation_fn") if isinstance(nested, dict) else None
    name = str(name or facts.get("sbert_ce_default_activation_function") or "Sigmoid")
    kind = name.rpartition(".")[2].removesuffix("()")
    if kind not in ("Sigmoid", "Identity"):
        raise StartupError(f"config.json: scores by {name} are not served; served: Sigmoid, Identity")
    return kind == "Identity"


def _is_causal(facts: Json, encoder: bool, config: EngineConfig) -> bool:
    """As configured, else as transformers reads it: `is_causal: false` lets a decoder's tokens see those behind them.

    gte-Qwen2-1.5B says so and was trained otherwise: hence the setting.
    """
    if config.embedding_attention != "auto":
        return config.embedding_attention == "causal"
    return not encoder and facts.get("is_causal") is not False and not facts.get("use_bidirectional_attention")


def _hidden(facts: Json) -> int:
    for key in ("hidden_size", "n_embd", "d_model"):
        if isinstance(facts.get(key), int):
            return int(facts[key])
    raise StartupError("config.json has no hidden_size, which is the width of embeddings")


def _modules(folder: Path) -> list[Json]:
    """sentence-transformers' modules behind the transformer, in their order; [] for a folder without."""
    found = _read(folder / "modules.json")
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in found):
        raise StartupError("modules.json is not a list of modules with a type each")
    return found[1:]


def _of_modules(folder: Path, modules: list[Json]) -> tuple[Kind, bool]:
    """(pooling, whether the vectors are normalised)"""
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in (["Pooling"], ["Pooling", "Normalize"]):
        raise StartupError(
            f"modules.json: {', '.join(kinds)} behind the transformer is not served; served: Pooling, then Normalize"
        )
    name = Path(str(modules[0].get("path", ""))).name  # a folder beside modules.json, and no other place
    settings = _read(folder / name / "config.json")
    if not isinstance(settings, dict):
        raise StartupError(f"modules.json names the folder {name}, which has no config.json")
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    given = settings.get("pooling_mode")
    kind = SHORT_MODES.get(str(given)) if given is not None else MODES.get(modes[0]) if len(modes) == 1 else None
    if kind is None:
        raise StartupError(
            f"{name}/config.json: pooling {given or ', '.join(modes) or 'none'} is not served; served: "
            "cls_token, mean_tokens, lasttoken, one of them"
        )
    return kind, len(kinds) == 2


def _read(path: Path) -> Any:
    """A JSON file's value; None if there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path.name} cannot be read: {type(error).__name__}") from None


# ------------------------------------------------------------------ vectors as users get them


def embedding_of(
    raw: bytes, pooling: Pooling, dimensions: int | None = None, normalize: bool | None = None
) -> NDArray[np.float32]:
    """Return a prompt's vector, float32 [dimensions], of the bytes that the executor made.

    `dimensions`: its first ones, all for None (Matryoshka: Kusupati et al. 2022). `normalize`: to length 1; None: as
    the model's folder says.
    """
    vector = np.frombuffer(raw, dtype=np.float32)[:dimensions]
    if not (pooling.normalize if normalize is None else normalize):
        return vector
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / max(length, SMALLEST_LENGTH)).astype(np.float32)


def relevance(raw: bytes, pooling: Pooling) -> float:
    """Return how well the two texts of a prompt fit, from the bytes of a cross-encoder's one logit."""
    (logit,) = np.frombuffer(raw, dtype=np.float32)
    return float(logit) if pooling.raw else float(probabilities(np.array([logit]), pooling)[0])


def probabilities(logits: NDArray[np.float32], pooling: Pooling) -> NDArray[np.float64]:
    """Return the labels' probabilities [labels]: a softmax, or of one label or of labels side by side the sigmoids."""
    wide = logits.astype(np.float64)
    if pooling.several or len(wide) == 1:
        found = 1.0 / (1.0 + np.exp(-wide.clip(-700, 700)))
    else:
        weights = np.exp(wide - wide.max())
        found = weights / weights.sum()
    return np.asarray(found, dtype=np.float64)
