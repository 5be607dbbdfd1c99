"""Families with experts, and with latent attention: config.json to Spec. Used by families.py, which has the table.

Grok-1 and the first DeepSeek have no code in transformers: these readings are of the code beside their checkpoints.
"""

from typing import Any

from ..errors import StartupError
from .dense_families import SLIDING, act_of, base, llama, qwen3, refuse, rms_of, same_window, windows_of
from .rope_config import Config, rope_of, yarn_scale
from .spec import Mla, Moe, Norm, Rope, Spec


def mixtral(config: Config) -> Spec:
    """Mixtral: experts in all layers."""
    layers = config["num_hidden_layers"]
    moe = Moe(
        experts=_experts(config),
        top_k=config["num_experts_per_tok"],
        inter=config["intermediate_size"],
        layers=(True,) * layers,
    )
    rope = rope_of(config, default_theta=1000000.0)
    return base(config, norm=rms_of(config, 1e-5), rope=rope, windows=same_window(config, None), moe=moe)


def _experts(config: Config) -> int:
    """How many experts there are, by either of the names in use."""
    return int(config["num_experts"] if "num_experts" in config else config["num_local_experts"])


def _qwen_moe(config: Config, **fields: Any) -> Moe:
    layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    return Moe(
        experts=_experts(config),
        top_k=config["num_experts_per_tok"],
        inter=config["moe_intermediate_size"],
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
        renorm=bool(config.get("norm_topk_prob", False)),
        **fields,
    )


def qwen2_moe(config: Config) -> Spec:
    """Qwen 1.5 and 2 with experts: a shared one too, behind a gate."""
    layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    kinds = [SLIDING if (i + 1) % 2 and i < first else "full_attention" for i in range(layers)]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return base(
        config,
        qkv_bias=bool(config.get("qkv_bias", True)),
        windows=windows_of(config.get("layer_types") or kinds, window),
        moe=_qwen_moe(config, shared_inter=config["shared_expert_intermediate_size"], shared_gate=True),
    )


def qwen3_moe(config: Config) -> Spec:
    """Qwen 3 with experts."""
    window = same_window(config, 4096) if config.get("use_sliding_window") else ()
    return qwen3(config, windows=window, moe=_qwen_moe(config))


def dbrx(config: Config) -> Spec:
    """DBRX: LayerNorm without biases, clamped queries, keys and values."""
    attention, ffn = config.get("attn_config") or {}, config.get("ffn_config") or {}
    refuse(ffn, moe_normalize_expert_weights=1.0)
    hidden, heads, layers = config["d_model"], config["n_heads"], config["n_layers"]
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or attention.get("rope_theta", 10000.0)
    inter = ffn.get("ffn_hidden_size", 3584)
    return Spec(
        vocab=config["vocab_size"],
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=attention.get("kv_n_heads", 1),
        head_dim=hidden // heads,
        inter=inter,
        norm=Norm("layer", 1e-5),
        rope=Rope(float(theta), hidden // heads),
        clip_qkv=attention.get("clip_qkv"),
        act=act_of((ffn.get("ffn_act_fn") or {}).get("name", "silu")),
        tied=config.get("tie_word_embeddings", False),
        moe=Moe(ffn.get("moe_num_experts", 4), ffn.get("moe_top_k", 1), inter, (True,) * layers),
    )


def _deepseek_moe(config: Config, **fields: Any) -> Moe | None:
    if config.get("n_routed_experts", 64) is None:
        return None
    first, every = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    inter = config["moe_intermediate_size"]
    return Moe(
        experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        inter=inter,
        layers=tuple(i >= first and i % every == 0 for i in range(config["num_hidden_layers"])),
        shared_inter=(config.get("n_shared_experts") or 0) * inter,
        **fields,
    )


def deepseek(config: Config) -> Spec:
    """DeepSeekMoE 16B and the dense 7B and 67B of `model_type` deepseek: attention as in Llama."""
    refuse(config, scoring_func="softmax")
    return llama(config, moe=_deepseek_moe(config, renorm=bool(config.get("norm_topk_prob", False))))


def _latent(config: Config, moe: Moe | None, interleaved: bool) -> Spec:
    """DeepSeek's attention; transformers' defaults."""
    if config.get("attention_bias"):
        raise StartupError("config.json: attention_bias with latent attention is not served")
    mla = Mla(
        q_rank=config.get("q_lora_rank", 1536),
        kv_rank=config.get("kv_lora_rank", 512),
        nope=config.get("qk_nope_head_dim", 128),
        rope=config.get("qk_rope_head_dim", 64),
        v=config.get("v_head_dim", 128),
    )
    rope = rope_of(config, interleaved=interleaved, dim=mla.rope)
    return base(
        config,
        kv_heads=1,
        head_dim=mla.kv_rank + mla.rope,
        rope=rope,
        scale=(mla.nope + mla.rope) ** -0.5 * yarn_scale(rope, config),
        mlp_bias=bool(config.get("mlp_bias", False)),
        mla=mla,
        moe=moe,
    )


def deepseek_v2(config: Config) -> Spec:
    """DeepSeek-V2, V2-Lite, V2.5 and Coder-V2."""
    refuse(config, norm_topk_prob=False, scoring_func="softmax")
    method = config.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise StartupError(f"config.json: topk_method {method!r} is not served")
    limited = method == "group_limited_greedy"
    moe = _deepseek_moe(
        config,
        renorm=False,
        groups=config["n_group"] if limited else 1,
        top_groups=config["topk_group"] if limited else 1,
        routed_scale=float(config.get("routed_scaling_factor", 1.0)),
    )
    return _latent(config, moe, interleaved=True)


def deepseek_v3(config: Config) -> Spec:
    """DeepSeek-V3 and R1, without the layers that predict several tokens."""
    refuse(config, scoring_func="sigmoid", topk_method="noaux_tc")
    moe = _deepseek_moe(
        config | {"first_k_dense_replace": config.get("first_k_dense_replace", 3)},
        scoring="sigmoid",
        score_bias=True,
        renorm=bool(config.get("norm_topk_prob", True)),
        groups=config.get("n_group", 8),
        top_groups=config.get("topk_group", 4),
        group_best=2,
        routed_scale=float(config.get("routed_scaling_factor", 2.5)),
    )
    return _latent(config, moe, interleaved=bool(config.get("rope_interleave", True)))


def grok1(config: Config) -> Spec:
    """Grok-1: norms around each part, soft caps of attention scores and router, experts with tanh GELU."""
    refuse(config, rope_type=None)
    layers, inter = config["num_hidden_layers"], config.get("moe_intermediate_size") or config["intermediate_size"]
    moe = Moe(
        experts=_experts(config),
        top_k=config["num_experts_per_tok"],
        inter=inter,
        layers=(True,) * layers,
        renorm=False,
        router_softcap=float(config.get("router_logit_softcapping", 30.0)),
    )
    return base(
        config,
        norm=rms_of(config, 1e-5),
        layout="sandwich",
        act="gelu_tanh",
        scale=float(config["attn_output_multiplier"]) if "attn_output_multiplier" in config else None,
        attn_softcap=float(config.get("attn_logit_softcapping") or config.get("max_attn_value") or 30.0),
        embed_scale=float(config.get("embedding_multiplier_scale", 1.0)),
        logit_scale=float(config.get("output_multiplier_scale", 1.0)),
        tied=config.get("tie_word_embeddings", True),
        moe=moe,
    )
