"""Dense families that transformers knows: config.json to Spec. Used by families.py, which has the table.

Defaults for keys that a config.json leaves out are those of transformers' config classes.
"""

from typing import Any

from ..errors import StartupError
from .rope_config import Config, head_dim_of, rope_of
from .spec import Act, Norm, Spec

ACTS: dict[str, Act] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
SLIDING = "sliding_attention"


def act_of(name: Any) -> Act:
    """The Spec's name of an activation function. Raises StartupError for others."""
    if name not in ACTS:
        raise StartupError(f"config.json: hidden_act {name!r} is not served; served: {', '.join(sorted(ACTS))}")
    return ACTS[name]


def refuse(config: Config, **wanted: Any) -> None:
    """Raise StartupError naming a key whose value is not the only one that is served."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise StartupError(f"config.json: {key} = {config[key]!r} is not served; served: {value!r}")


def base(config: Config, **fields: Any) -> Spec:
    """The Llama reading of a config; `fields` override."""
    values: dict[str, Any] = {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": head_dim_of(config),
        "inter": config["intermediate_size"],
        "norm": rms_of(config),
        "rope": fields.get("rope") or rope_of(config),
        "act": fields.get("act") or act_of(config.get("hidden_act") or "silu"),
        "tied": config.get("tie_word_embeddings", False),
    }
    return Spec(**(values | fields))


def rms_of(config: Config, default: float = 1e-6, offset: float = 0.0) -> Norm:
    """The RMS norm of a config."""
    return Norm("rms", config.get("rms_norm_eps", default), offset)


def windows_of(kinds: list[str], window: int | None) -> tuple[int | None, ...]:
    """Windows of the layers, of which those of kind "sliding_attention" have one; () if none has."""
    windows = tuple(window if kind == SLIDING else None for kind in kinds)
    return windows if any(windows) else ()


def same_window(config: Config, default: int | None) -> tuple[int | None, ...]:
    """The same window in all layers, `sliding_window`."""
    window = config.get("sliding_window", default)
    return (window,) * config["num_hidden_layers"] if window else ()


def llama(config: Config, **fields: Any) -> Spec:
    """Llama 1 to 3.3, Yi, SmolLM 2."""
    bias = bool(config.get("attention_bias", False))
    biases = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}
    return base(config, **(biases | fields))


def mistral(config: Config) -> Spec:
    """Mistral 7B, Nemo (no window, head_dim of its own), Small."""
    return base(config, windows=same_window(config, 4096))


def qwen_windows(config: Config) -> tuple[int | None, ...]:
    """Windows of Qwen 2 and 3: off unless `use_sliding_window`; then the layers from `max_window_layers` on."""
    if not config.get("use_sliding_window"):
        return ()
    first = config.get("max_window_layers", 28)
    kinds = [SLIDING if i >= first else "full_attention" for i in range(config["num_hidden_layers"])]
    return windows_of(config.get("layer_types") or kinds, config.get("sliding_window", 4096))


def qwen2(config: Config) -> Spec:
    """Qwen 2 and 2.5."""
    return base(config, qkv_bias=True, windows=qwen_windows(config))


def qwen3(config: Config, **fields: Any) -> Spec:
    """Qwen 3."""
    config = config | {"head_dim": int(config.get("head_dim") or 128)}
    bias = bool(config.get("attention_bias", False))
    values = {"qk_norm": rms_of(config), "qkv_bias": bias, "o_bias": bias, "windows": qwen_windows(config)}
    return base(config, **(values | fields))


def granite(config: Config) -> Spec:
    """Granite 3."""
    return llama(
        config,
        embed_scale=float(config.get("embedding_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
        scale=float(config.get("attention_multiplier", 1.0)),
    )


def smollm3(config: Config) -> Spec:
    """SmolLM 3: every fourth layer has no rope."""
    layers = config["num_hidden_layers"]
    interval = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or ["full_attention" if r else SLIDING for r in rotated]
    return llama(
        config,
        rope=rope_of(config, default_theta=2000000.0),
        nope_layers=() if all(rotated) else tuple(not r for r in rotated),
        windows=windows_of(kinds, window),
        tied=config.get("tie_word_embeddings", True),
    )


def _gemma(config: Config, **fields: Any) -> Spec:
    """What all Gemmas have: weights of norms as differences from 1, scaled embeddings, tanh GELU."""
    act = config.get("hidden_activation") or config.get("hidden_act")
    config = config | {"head_dim": config.get("head_dim") or 256}
    values: dict[str, Any] = {
        "norm": rms_of(config, offset=1.0),
        "act": "gelu_tanh" if act in (None, "gelu") else act_of(act),
        "embed_scale": float(config["hidden_size"]) ** 0.5,
        "tied": config.get("tie_word_embeddings", True),
        "causal": not config.get("use_bidirectional_attention"),
    }
    return llama(config, **(values | fields))


def gemma(config: Config) -> Spec:
    """Gemma 1."""
    return _gemma(config)


def gemma2(config: Config) -> Spec:
    """Gemma 2: a window in every other layer, soft caps."""
    kinds = [SLIDING if i % 2 == 0 else "full_attention" for i in range(config["num_hidden_layers"])]
    return _gemma(
        config,
        layout="sandwich",
        windows=windows_of(config.get("layer_types") or kinds, config.get("sliding_window", 4096)),
        scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        attn_softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
    )


def gemma3(config: Config) -> Spec:
    """Gemma 3, text: five layers with a window and a rope of their own, then one without."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    kinds = [SLIDING if (i + 1) % pattern else "full_attention" for i in range(config["num_hidden_layers"])]
    by_kind = config.get("rope_parameters") or {}
    local = by_kind.get(SLIDING) or {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    whole = by_kind.get("full_attention") or (config.get("rope_scaling") or {}) | {
        "rope_theta": config.get("rope_theta", 1000000.0)
    }
    config = config | {"head_dim": config.get("head_dim") or 256}
    return _gemma(
        config,
        layout="sandwich",
        qk_norm=rms_of(config, offset=1.0),
        windows=windows_of(config.get("layer_types") or kinds, config.get("sliding_window", 4096)),
        scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        attn_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
        rope=rope_of(config | {"rope_parameters": whole}),
        local_rope=rope_of(config | {"rope_parameters": local}),
    )


def stablelm(config: Config) -> Spec:
    """StableLM 2: LayerNorm, a quarter of each head rotated, optionally parallel with norms of heads (12B)."""
    norm = Norm("layer", config.get("layer_norm_eps", 1e-5), bias=True)
    return base(
        config,
        norm=norm,
        rope=rope_of(config, default_partial=0.25),
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        layout="parallel" if config.get("use_parallel_residual") else "pre",
        qk_norm=Norm("layer", norm.eps) if config.get("qk_layernorm") else None,
        qk_norm_shape="head",
    )


def cohere(config: Config, **fields: Any) -> Spec:
    """Command-R and R+: LayerNorm, attention and MLP side by side, interleaved rope, scaled logits."""
    norm = Norm("layer", config.get("layer_norm_eps", 1e-5))
    bias = bool(config.get("attention_bias", False))
    return base(
        config,
        norm=norm,
        rope=rope_of(config, interleaved=True),
        qkv_bias=bias,
        o_bias=bias,
        layout="parallel",
        qk_norm=norm if config.get("use_qk_norm") else None,
        qk_norm_shape="head",
        logit_scale=float(config.get("logit_scale", 0.0625)),
        tied=config.get("tie_word_embeddings", True),
        **fields,
    )


def cohere2(config: Config) -> Spec:
    """Command-R7B and Command-A: three layers with a window, then one without, which has no rope."""
    pattern, layers = config.get("sliding_window_pattern") or 4, config["num_hidden_layers"]
    kinds = config.get("layer_types") or [SLIDING if (i + 1) % pattern else "full_attention" for i in range(layers)]
    return cohere(
        config,
        windows=windows_of(kinds, config.get("sliding_window", 4096)),
        nope_layers=tuple(kind != SLIDING for kind in kinds),
    )


def glm(config: Config, **fields: Any) -> Spec:
    """GLM-4-9B in transformers' own format: half of each head rotated, in pairs."""
    config = config | {"head_dim": config.get("head_dim") or 128}
    return base(
        config,
        norm=rms_of(config, 1.5625e-07),
        rope=rope_of(config, default_partial=0.5, interleaved=True),
        qkv_bias=bool(config.get("attention_bias", True)),
        **fields,
    )


def glm4(config: Config) -> Spec:
    """GLM-4-0414."""
    return glm(config, layout="sandwich")


def phi3(config: Config) -> Spec:
    """Phi 3 and 4."""
    return base(config, norm=rms_of(config, 1e-5), windows=same_window(config, None))


def gpt2(config: Config) -> Spec:
    """GPT-2: learned positions, biases everywhere, no gate."""
    refuse(config, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    hidden, heads = config["n_embd"], config["n_head"]
    return Spec(
        vocab=config["vocab_size"],
        hidden=hidden,
        layers=config["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inter=config.get("n_inner") or 4 * hidden,
        norm=Norm("layer", config.get("layer_norm_epsilon", 1e-5), bias=True),
        learned_positions=config["n_positions"],
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        scale=None if config.get("scale_attn_weights", True) else 1.0,
        act=act_of(config.get("activation_function", "gelu_new")),
        gated=False,
        tied=config.get("tie_word_embeddings", True),
    )


def olmo2(config: Config, **fields: Any) -> Spec:
    """OLMo 2: norms after each part, queries and keys normalised over all heads."""
    norm = rms_of(config, 1e-5)
    bias = bool(config.get("attention_bias", False))
    values = {"norm": norm, "layout": "post", "qk_norm": norm, "qk_norm_shape": "all", "qkv_bias": bias, "o_bias": bias}
    return base(config, **(values | fields))


def olmo3(config: Config) -> Spec:
    """OLMo 3: windows in three of four layers; only those without one stretch their rope."""
    layers, theta = config["num_hidden_layers"], config.get("rope_theta", 500000.0)
    kinds = config.get("layer_types") or [SLIDING if (i + 1) % 4 else "full_attention" for i in range(layers)]
    by_kind = config.get("rope_parameters") or {}
    whole = by_kind.get("full_attention") or (config.get("rope_scaling") or {}) | {"rope_theta": theta}
    local = by_kind.get(SLIDING) or {"rope_theta": theta}
    rope, local_rope = (rope_of(config | {"rope_parameters": parameters}) for parameters in (whole, local))
    return olmo2(
        config,
        windows=windows_of(kinds, config.get("sliding_window", 4096)),
        rope=rope,
        local_rope=None if local_rope == rope else local_rope,
    )


def exaone(config: Config) -> Spec:
    """EXAONE 3: a Llama under other names."""
    known = {
        "num_layers": "num_hidden_layers",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    }
    config = {"rms_norm_eps": 1e-5} | {known.get(key, key): value for key, value in config.items()}
    return llama(config, rope=rope_of(config, default_theta=500000.0))


def exaone4(config: Config) -> Spec:
    """EXAONE 4: norms after each part; with windows, the layers without one have no rope."""
    norm, layers, window = rms_of(config, 1e-5), config["num_hidden_layers"], config.get("sliding_window", 4096)
    pattern = config.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        kinds = [SLIDING if pattern[i % len(pattern)] == "L" and i + 1 < layers else "full" for i in range(layers)]
    else:
        kinds = [SLIDING if pattern and (i + 1) % pattern else "full" for i in range(layers)]
    kinds = config.get("layer_types") or kinds
    nope = tuple(kind != SLIDING for kind in kinds) if window else ()
    return base(
        config,
        norm=norm,
        layout="post",
        qk_norm=norm,
        windows=windows_of(kinds, window),
        nope_layers=nope if any(nope) else (),
    )
