"""The families that are served: a table from `model_type` to a function config.json -> Spec, and checkpoint names.

Used by weights.py. Adding a family that the decoder can already run is one entry here; what differs between families
is data (spec.py). Defaults for keys that a config.json leaves out are those of transformers' config classes.
"""

import math
from collections.abc import Callable
from typing import Any

from ..errors import StartupError
from .spec import Norm, Rope, RopeScaling, Spec

Config = dict[str, Any]

ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

EMBED, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{}."
"""Names of tensors in a checkpoint, those of transformers' Llama: all families here use them."""


def spec_of(config: Config) -> Spec:
    """Return the Spec of a config.json. Raises StartupError for what is not served or malformed."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise StartupError(f"model_type {model_type!r} is not served yet; served: {', '.join(sorted(FAMILIES))}")
    if config.get("quantization_config"):
        raise StartupError("quantized checkpoints (quantization_config) are not served yet")
    try:
        spec = family(config)
    except KeyError as error:
        raise StartupError(f"config.json lacks {error.args[0]!r}, which model_type {model_type!r} needs") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise StartupError(f"config.json holds a value that makes no sense: {error}") from None
    _check_shape(spec)
    return spec


def _check_shape(spec: Spec) -> None:
    """Refuse widths that do not fit together."""
    sizes = (spec.vocab, spec.hidden, spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.inter)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise StartupError("config.json: every size must be a positive integer")
    if spec.heads % spec.kv_heads:
        raise StartupError(f"config.json: {spec.heads} attention heads cannot share {spec.kv_heads} KV heads")
    for name, per_layer in (("layer_types", spec.windows), ("no_rope_layers", spec.nope_layers)):
        if per_layer and len(per_layer) != spec.layers:
            raise StartupError(f"config.json: {name} has {len(per_layer)} entries for {spec.layers} layers")


def _base(config: Config, **fields: Any) -> Spec:
    """The Llama reading of a config; `fields` override."""
    act = config.get("hidden_act") or "silu"
    if act not in ACTS:
        raise StartupError(f"config.json: hidden_act {act!r} is not served; served: {', '.join(sorted(ACTS))}")
    values: dict[str, Any] = {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": _head_dim(config),
        "inter": config["intermediate_size"],
        "norm": Norm("rms", config.get("rms_norm_eps", 1e-6)),
        "rope": rope_of(config),
        "act": ACTS[act],
        "tied": config.get("tie_word_embeddings", False),
    }
    return Spec(**(values | fields))


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Config, default_theta: float = 10000.0) -> Rope:
    """Rope of a config, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return Rope(
        theta=float(parameters.get("rope_theta") or config.get("rope_theta") or default_theta),
        dim=int(_head_dim(config) * partial),
        scaling=_scaling(parameters, config.get("max_position_embeddings", 0)),
    )


def _scaling(parameters: Config, max_position: int) -> RopeScaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(parameters["factor"]),
            int(parameters["original_max_position_embeddings"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
        )
    if kind == "yarn":
        return _yarn(parameters, max_position)
    raise StartupError(f"config.json: rope type {kind!r} is not served yet; served: default, linear, llama3, yarn")


def _yarn(parameters: Config, max_position: int) -> RopeScaling:
    original = int(parameters.get("original_max_position_embeddings") or max_position)
    factor = float(parameters.get("factor") or max_position / original)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    inferred = mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)
    given = parameters.get("attention_factor")
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=inferred if given is None else float(given),
    )


def _llama(config: Config, **fields: Any) -> Spec:
    bias = bool(config.get("attention_bias", False))
    biases = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}
    return _base(config, **(biases | fields))


def _mistral(config: Config) -> Spec:
    window = config.get("sliding_window", 4096)
    return _base(config, windows=(window,) * config["num_hidden_layers"] if window else ())


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    """Windows of Qwen 2 and 3: off unless `use_sliding_window`; then the layers from `max_window_layers` on."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    layers = config["num_hidden_layers"]
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _qwen2(config: Config) -> Spec:
    return _base(config, qkv_bias=True, windows=_qwen_windows(config))


def _qwen3(config: Config) -> Spec:
    head_dim = int(config.get("head_dim") or 128)
    norm = Norm("rms", config.get("rms_norm_eps", 1e-6))
    bias = bool(config.get("attention_bias", False))
    return _base(
        config | {"head_dim": head_dim}, qk_norm=norm, qkv_bias=bias, o_bias=bias, windows=_qwen_windows(config)
    )


def _granite(config: Config) -> Spec:
    return _llama(
        config,
        embed_scale=float(config.get("embedding_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
        scale=float(config.get("attention_multiplier", 1.0)),
    )


def _smollm3(config: Config) -> Spec:
    layers = config["num_hidden_layers"]
    interval = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or ["full_attention" if r else "sliding_attention" for r in rotated]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return _llama(
        config,
        rope=rope_of(config, default_theta=2000000.0),
        nope_layers=() if all(rotated) else tuple(not r for r in rotated),
        windows=windows if any(windows) else (),
        tied=config.get("tie_word_embeddings", True),
    )


FAMILIES: dict[str, Callable[[Config], Spec]] = {
    "granite": _granite,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}
