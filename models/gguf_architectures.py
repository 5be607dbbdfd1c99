"""GGUF's architectures: which config.json each becomes, and which of its tensors is which of Hugging Face's.

Used by gguf.py. llama.cpp names a tensor by its part in the layer, whatever the family; what its converter changed in
the values (interleaved rotary halves, norms that count from 1) is said here and undone in gguf.py.
Invariant: a key or tensor that changes what a model computes is read here or refused; nothing is guessed.
Sources: the GGUF specification (ggml-org/ggml, docs/gguf.md); llama.cpp's conversion/*.py and what its graphs assume
where the file is silent (the period of windows, the scale of Gemma's scores).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..errors import StartupError

Metadata = dict[str, Any]
Settings = Callable[[Metadata, Metadata, Metadata], Metadata]
"""(metadata, tensors by name, config so far) -> what config.json has beside the common keys."""

ROPE_FACTORS: Final = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
BESIDE: Final = frozenset({ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS})
"""Tensors that are settings."""

ATTENTION: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP: Final = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
LLAMA: Final = ATTENTION | {"ffn_norm": "post_attention_layernorm"} | MLP
HEAD_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
PARALLEL: Final = ATTENTION | MLP
SANDWICH: Final = LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
POST: Final = {key: name for key, name in SANDWICH.items() if key not in ("attn_norm", "ffn_norm")} | HEAD_NORMS
FUSED_QKV: Final = {"attn_qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj"}
FUSED_MLP: Final = {"ffn_up": "mlp.gate_proj mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OUT: Final = {"attn_output": "self_attn.o_proj"}
FUSED: Final = NORMS | FUSED_QKV | OUT | FUSED_MLP
GLM4: Final = (
    ATTENTION
    | {"post_attention_norm": "post_self_attn_layernorm", "ffn_norm": "post_attention_layernorm"}
    | {"post_ffw_norm": "post_mlp_layernorm"}
    | FUSED_MLP
)
QWEN_EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
SHARED_EXPERT: Final = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
MIXTRAL_EXPERTS: Final = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How the files of one `general.architecture` are read."""

    model_type: str
    hf_class: str
    layer: Mapping[str, str]
    """A layer's parts: llama.cpp's name -> Hugging Face's module. With {} it is one for each index of the tensor's
    first axis; of several, separated by spaces, the tensor has the rows one after another."""
    settings: Settings
    interleaved: bool = False
    """The rotary halves of each query and key head are interleaved; Hugging Face has them one after the other."""
    norm_offset: float = 0.0
    """What norm weights are greater by than Hugging Face's."""
    layer_norm: bool = False
    """The norms are LayerNorms."""
    optional: frozenset[str] = frozenset()
    """Parts that not all files have."""


def number(meta: Metadata, key: str, default: int | None = None) -> int:
    """A whole number of the metadata. Per-layer lists (models whose layers differ) are not supported."""
    value = meta.get(key, default)
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise StartupError(f"GGUF: {key} = {value!r} is not supported (a positive whole number expected)")
    return int(value)


def decimal(value: float) -> float:
    """The decimal that a float32 stands for: 9.999999747378752e-06 -> 1e-05, as the original config.json had it."""
    return float(str(np.float32(value)))


def architecture_of(meta: Metadata) -> Architecture:
    """Raises StartupError for one that is not in the table."""
    name = meta["general.architecture"]
    if name not in ARCHITECTURES:
        raise StartupError(f"GGUF architecture {name!r} is not supported yet; supported: {', '.join(ARCHITECTURES)}")
    if name == "llama" and meta.get("expert_count"):
        return MIXTRAL
    return OLMO3 if name == "olmo2" and meta.get("attention.sliding_window") else ARCHITECTURES[name]


def _kinds(meta: Metadata, layers: int, period: int) -> list[str]:
    """`layer_types`: by the file's pattern, else a layer without a window after each `period` - 1 with one."""
    pattern = meta.get("attention.sliding_window_pattern")
    windows = pattern if isinstance(pattern, list) else [bool((i + 1) % (pattern or period)) for i in range(layers)]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _plain(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {}


def _llama(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _mixtral(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {
        "num_local_experts": number(meta, "expert_count"),
        "num_experts_per_tok": number(meta, "expert_used_count"),
        "sliding_window": None,
    }


def _granite(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return _llama(meta, tensors, config) | {
        "embedding_multiplier": decimal(meta["embedding_scale"]),
        "residual_multiplier": decimal(meta["residual_scale"]),
        "attention_multiplier": decimal(meta["attention.scale"]),
        "logits_scaling": decimal(meta["logit_scale"]),
    }


def _qwen3(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors}


def _qwen2_moe(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {
        "num_experts": number(meta, "expert_count"),
        "num_experts_per_tok": number(meta, "expert_used_count"),
        "moe_intermediate_size": number(meta, "expert_feed_forward_length"),
        "shared_expert_intermediate_size": number(meta, "expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
    }


def _qwen3_moe(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {
        "num_experts": number(meta, "expert_count"),
        "num_experts_per_tok": number(meta, "expert_used_count"),
        "moe_intermediate_size": number(meta, "expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _gemma(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _score_width(config: Metadata, largest: int) -> int:
    """`query_pre_attn_scalar`: the largest model of Gemma 2 and of 3 has the width of a head as if hidden / heads."""
    whole = config["num_hidden_layers"] == largest
    return int(config["hidden_size"] // config["num_attention_heads"] if whole else config["head_dim"])


def _gemma2(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return _gemma(meta, tensors, config) | {
        "attn_logit_softcapping": decimal(meta["attn_logit_softcapping"]),
        "final_logit_softcapping": decimal(meta["final_logit_softcapping"]),
        "sliding_window": number(meta, "attention.sliding_window"),
        "layer_types": _kinds(meta, config["num_hidden_layers"], 2),
        "query_pre_attn_scalar": _score_width(config, 46),
    }


def _gemma3(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    cap = meta.get("final_logit_softcapping")
    return _gemma(meta, tensors, config) | {
        "final_logit_softcapping": None if cap is None else decimal(cap),
        "attn_logit_softcapping": None,
        "sliding_window": number(meta, "attention.sliding_window"),
        "layer_types": _kinds(meta, config["num_hidden_layers"], 6),
        "query_pre_attn_scalar": _score_width(config, 62),
        "rope_local_base_freq": decimal(meta.get("rope.freq_base_swa", 10000.0)),
    }


def _phi3(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {"sliding_window": int(meta.get("attention.sliding_window", 0)) or None}


def _stablelm(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
    }


def _cohere(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {
        "logit_scale": decimal(meta["logit_scale"]),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }


def _cohere2(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {
        "logit_scale": decimal(meta["logit_scale"]),
        "sliding_window": number(meta, "attention.sliding_window"),
        "layer_types": _kinds(meta, config["num_hidden_layers"], 4),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }


def _exaone4(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    if "attention.sliding_window" not in meta:
        return {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
    return {
        "sliding_window": number(meta, "attention.sliding_window"),
        "layer_types": _kinds(meta, config["num_hidden_layers"], 4),
    }


def _olmo2(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {"attention_bias": False}


def _olmo3(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {
        "attention_bias": False,
        "sliding_window": number(meta, "attention.sliding_window"),
        "layer_types": _kinds(meta, config["num_hidden_layers"], 4),
    }


def _glm(meta: Metadata, tensors: Metadata, config: Metadata) -> Metadata:
    return {"attention_bias": any(f"blk.0.{part}.bias" in tensors for part in ("attn_qkv", "attn_q"))}


OLMO3: Final = Architecture("olmo3", "Olmo3ForCausalLM", POST, _olmo3)
MIXTRAL: Final = Architecture(
    "mixtral", "MixtralForCausalLM", NORMS | ATTENTION | MIXTRAL_EXPERTS, _mixtral, interleaved=True
)
ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture("llama", "LlamaForCausalLM", LLAMA, _llama, interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA, _plain),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", LLAMA | HEAD_NORMS, _qwen3),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", NORMS | ATTENTION | QWEN_EXPERTS | SHARED_EXPERT, _qwen2_moe
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", NORMS | ATTENTION | HEAD_NORMS | QWEN_EXPERTS, _qwen3_moe
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", LLAMA, _gemma, norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", SANDWICH, _gemma2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", SANDWICH | HEAD_NORMS, _gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", FUSED, _phi3),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        LLAMA | {"attn_q_norm": "self_attn.q_layernorm.norms.{}", "attn_k_norm": "self_attn.k_layernorm.norms.{}"},
        _stablelm,
        layer_norm=True,
        optional=frozenset({"ffn_norm", "attn_q_norm", "attn_k_norm"}),
    ),
    "command-r": Architecture(
        "cohere", "CohereForCausalLM", PARALLEL | HEAD_NORMS, _cohere, layer_norm=True, optional=frozenset(HEAD_NORMS)
    ),
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", PARALLEL, _cohere2, layer_norm=True),
    "granite": Architecture("granite", "GraniteForCausalLM", LLAMA, _granite, interleaved=True),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", LLAMA, _llama, interleaved=True),
    "internlm2": Architecture("llama", "LlamaForCausalLM", LLAMA, _llama, interleaved=True),
    "exaone": Architecture("llama", "LlamaForCausalLM", LLAMA, _llama),
    "exaone4": Architecture("exaone4", "Exaone4ForCausalLM", POST, _exaone4),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", POST, _olmo2),
    "chatglm": Architecture("glm", "GlmForCausalLM", FUSED, _glm),
    "glm4": Architecture("glm4", "Glm4ForCausalLM", GLM4, _glm),
}
"""By `general.architecture`. InternLM 2 and EXAONE 3 are Llamas under other names, ChatGLM is GLM."""
