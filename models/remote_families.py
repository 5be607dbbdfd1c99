"""Dense families whose code is beside their checkpoints, not in transformers: config.json to Spec.

Used by families.py, which has the table. What is here is read off that code, once; nothing of a checkpoint is ever run.
"""

from .dense_families import base, llama, refuse
from .rope_config import Config
from .spec import Norm, Rope, Spec


def internlm2(config: Config) -> Spec:
    """InternLM 2 and 2.5."""
    bias = bool(config.get("bias", True))
    return llama(config | {"attention_bias": bias})


def qwen(config: Config) -> Spec:
    """Qwen 1. What it does to its rope and scores beyond `seq_length` is not needed: no longer context is served."""
    refuse(config, rotary_pct=1.0, no_bias=True, scale_attn_weights=True)
    return base(
        config | {"intermediate_size": config["intermediate_size"] // 2},  # of its two halves together
        kv_heads=config["num_attention_heads"],
        head_dim=config.get("kv_channels", 128),
        norm=Norm("rms", config.get("layer_norm_epsilon", 1e-6)),
        rope=Rope(float(config.get("rotary_emb_base", 10000.0)), config.get("kv_channels", 128)),
        qkv_bias=True,
    )


def chatglm(config: Config) -> Spec:
    """ChatGLM 2 and 3, GLM-4-9B in its own format: half of each head rotated, in pairs."""
    refuse(
        config,
        rmsnorm=True,
        post_layer_norm=True,
        apply_residual_connection_post_layernorm=False,
        interleaved_qkv=False,
    )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("kv_channels") or hidden // heads
    bias = bool(config.get("add_bias_linear", False))
    return Spec(
        vocab=config.get("padded_vocab_size") or config["vocab_size"],
        hidden=hidden,
        layers=config["num_layers"],
        heads=heads,
        kv_heads=config["multi_query_group_num"] if config.get("multi_query_attention") else heads,
        head_dim=width,
        inter=config["ffn_hidden_size"],
        norm=Norm("rms", config.get("layernorm_epsilon", 1e-5)),
        rope=Rope(10000.0 * float(config.get("rope_ratio", 1.0)), width // 2, interleaved=True),
        qkv_bias=bias or bool(config.get("add_qkv_bias", False)),
        o_bias=bias,
        mlp_bias=bias,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
