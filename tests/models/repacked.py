"""Tiny models of families that transformers has no code for, and one table of these and all others (tiny.py).

A family that is another one under other names is the other's weights, renamed and fused; what is nobody's is plain.py's
in float64. Invariant: what is written is a checkpoint as the family's authors publish theirs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

Reference = Callable[[list[int]], Tensor]
"""Token ids -> logits [tokens, vocab]."""
Tensors = dict[str, Tensor]
Sizes = dict[str, int]
SIZES: Sizes = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
}


def make(name: str, folder: Path, **changed: Any) -> tuple[Reference, str]:
    """Write the tiny model `name`, some fields changed, into a folder; returns its reference and the folder.

    Of a model in REPACKED the fields are sizes, of those in SIZES.
    """
    if name in REPACKED:
        return REPACKED[name](folder, SIZES | changed)
    model = tiny.build(name, **changed)
    return lambda ids: tiny.exact_logits(model, ids), tiny.save(model, folder)


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> str:
    """Write a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    """Every change is made in every name, in order."""
    out = {}
    for name, tensor in tensors.items():
        for old, new in changes:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def fused(
    tensors: Tensors, parts: list[str], whole: str, join: Callable[[list[Tensor]], Tensor] = torch.cat
) -> Tensors:
    """Modules `parts` of each layer become the module `whole`."""
    out = dict(tensors)
    for first in [name for name in tensors if f".{parts[0]}." in name]:
        names = [first.replace(parts[0], part) for part in parts]
        out[first.replace(parts[0], whole)] = join([out.pop(name) for name in names])
    return out


def based_on(model: Any, folder: Path) -> Tensors:
    """The tensors of a transformers model, as it writes them."""
    return load_file(Path(tiny.save(model, folder / "base")) / "model.safetensors")


def dense(sizes: Sizes, **changed: int) -> Sizes:
    """The sizes of a model without experts."""
    return {key: size for key, size in sizes.items() if key != "moe_intermediate_size"} | changed


def exaone(folder: Path, sizes: Sizes) -> tuple[Reference, str]:
    """Llama 3.1 under other names, config.json as EXAONE's own code writes it."""
    model = tiny.build("llama-3.1", **dense(sizes), rms_norm_eps=1e-4)
    tensors = renamed(
        based_on(model, folder), ("model.layers", "transformer.h"), ("model.", "transformer."),
        ("embed_tokens", "wte"), ("transformer.norm", "transformer.ln_f"), ("self_attn", "attn.attention"),
        ("o_proj", "out_proj"), ("down_proj", "c_proj"), ("up_proj", "c_fc_1"), ("gate_proj", "c_fc_0"),
        ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
    )  # fmt: skip
    scaling = {key: value for key, value in tiny.LLAMA3.items() if key != "rope_theta"}
    config = tiny.COMMON | dense(sizes) | {
        "model_type": "exaone", "num_layers": 3, "layer_norm_epsilon": 1e-4, "activation_function": "silu",
        "rope_theta": tiny.LLAMA3["rope_theta"], "rope_scaling": scaling, "tie_word_embeddings": False,
    }  # fmt: skip
    del config["num_hidden_layers"]
    return lambda ids: tiny.exact_logits(model, ids), write(folder, config, tensors)


def internlm2(folder: Path, sizes: Sizes) -> tuple[Reference, str]:
    """Llama with queries, keys and values interleaved by KV head."""
    model = tiny.build("llama", **dense(sizes))
    hidden, kv_heads, width = (getattr(model.config, key) for key in ("hidden_size", "num_key_value_heads", "head_dim"))

    def by_head(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.view(kv_heads, -1, width, hidden) for part in parts], 1).reshape(-1, hidden)

    tensors = fused(based_on(model, folder), ["q_proj", "k_proj", "v_proj"], "wqkv", by_head)
    tensors = renamed(
        tensors, ("self_attn", "attention"), ("o_proj", "wo"), ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("mlp", "feed_forward"), ("gate_proj", "w1"), ("up_proj", "w3"),
        ("down_proj", "w2"), ("embed_tokens", "tok_embeddings"), ("lm_head", "output"),
    )  # fmt: skip
    scaling = {"type": "dynamic", "factor": 2.0}
    config = tiny.COMMON | dense(sizes) | {
        "model_type": "internlm2", "bias": False, "rope_theta": 100000.0, "rope_scaling": scaling
    }  # fmt: skip
    return lambda ids: tiny.exact_logits(model, ids), write(folder, config, tensors)


def qwen(folder: Path, sizes: Sizes) -> tuple[Reference, str]:
    """Qwen 2 with as many KV heads as heads."""
    heads = sizes["num_attention_heads"]
    model = tiny.build("qwen2", **dense(sizes, num_key_value_heads=heads), rms_norm_eps=1e-4)
    tensors = fused(based_on(model, folder), ["q_proj", "k_proj", "v_proj"], "c_attn")
    tensors = renamed(
        tensors, ("model.layers", "transformer.h"), ("model.", "transformer."), ("embed_tokens", "wte"),
        ("transformer.norm", "transformer.ln_f"), ("self_attn", "attn"), ("o_proj", "c_proj"), ("down_proj", "c_proj"),
        ("up_proj", "w1"), ("gate_proj", "w2"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
    )  # fmt: skip
    config = tiny.COMMON | dense(sizes) | {
        "model_type": "qwen", "intermediate_size": 2 * sizes["intermediate_size"],
        "kv_channels": sizes["hidden_size"] // heads, "layer_norm_epsilon": 1e-4, "no_bias": True,
        "rotary_emb_base": 10000, "seq_length": 256, "use_dynamic_ntk": True, "use_logn_attn": True,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return lambda ids: tiny.exact_logits(model, ids), write(folder, config, tensors)


def chatglm(folder: Path, sizes: Sizes) -> tuple[Reference, str]:
    """GLM in its first format."""
    rope = {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}
    model = tiny.build("glm", **dense(sizes), rope_parameters=rope, rms_norm_eps=1e-4)
    tensors = fused(based_on(model, folder), ["q_proj", "k_proj", "v_proj"], "query_key_value")
    tensors = renamed(
        tensors, ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("lm_head", "transformer.output_layer"), ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.", "transformer.encoder."),
        ("self_attn", "self_attention"), ("o_proj", "dense"), ("gate_up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
    )  # fmt: skip
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
    config = {
        "model_type": "chatglm", "padded_vocab_size": tiny.VOCAB, "hidden_size": sizes["hidden_size"], "num_layers": 3,
        "num_attention_heads": sizes["num_attention_heads"], "kv_channels": 16, "multi_query_attention": True,
        "multi_query_group_num": sizes["num_key_value_heads"], "ffn_hidden_size": sizes["intermediate_size"],
        "layernorm_epsilon": 1e-4, "add_qkv_bias": True, "rope_ratio": 50, "seq_length": 512,
        "rmsnorm": True, "post_layer_norm": True,
    }  # fmt: skip
    return lambda ids: tiny.exact_logits(model, ids), write(folder, config, tensors)


def random_layers(norms: list[str], expert_names: list[str], sizes: Sizes) -> Tensors:
    """Random tensors of three layers with experts, by our names."""
    generator = torch.Generator().manual_seed(0)
    h, inter = sizes["hidden_size"], sizes["moe_intermediate_size"]
    kv = h // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (h, h), "self_attn.o_proj": (h, h), "mlp.gate": (8, h)}
    shapes |= {"self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
    for name in expert_names:
        shapes |= {f"{name}.gate_proj": (inter, h), f"{name}.up_proj": (inter, h), f"{name}.down_proj": (h, inter)}
    tensors = {}
    for layer in range(3):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator) * 0.15
        for name in norms:
            tensors[f"model.layers.{layer}.{name}.weight"] = 1 + 0.3 * torch.randn(h, generator=generator)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn(tiny.VOCAB, h, generator=generator) * 0.15
    tensors["model.norm.weight"] = 1 + 0.3 * torch.randn(h, generator=generator)
    return tensors


def layer_weights(tensors: Tensors, layer: int) -> Tensors:
    """One layer's tensors in float64, without its prefix."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): tensor.double() for name, tensor in tensors.items() if name.startswith(prefix)}


def heads_of(sizes: Sizes) -> tuple[int, int]:
    """(heads, KV heads)"""
    return sizes["num_attention_heads"], sizes["num_key_value_heads"]


def deepseek(folder: Path, sizes: Sizes) -> tuple[Reference, str]:
    """DeepSeekMoE: the first layer dense, shared experts, weights that do not sum to one."""
    names = [f"mlp.experts.{i}" for i in range(8)]
    tensors = random_layers(["input_layernorm", "post_attention_layernorm"], [*names, "mlp.shared_experts"], sizes)
    for name in [n for n in tensors if n.startswith("model.layers.0.mlp.") and "shared_experts" not in n]:
        del tensors[name]
    tensors = {name.replace("layers.0.mlp.shared_experts", "layers.0.mlp"): t for name, t in tensors.items()}
    config = tiny.COMMON | sizes | {
        "model_type": "deepseek", "intermediate_size": sizes["moe_intermediate_size"], "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "norm_topk_prob": False, "scoring_func": "softmax", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    heads, scale = heads_of(sizes), (sizes["num_attention_heads"] / sizes["hidden_size"]) ** 0.5

    def reference(ids: list[int]) -> Tensor:
        x = tensors["model.embed_tokens.weight"].double()[ids]
        for i in range(3):
            w = layer_weights(tensors, i)
            x = x + plain.attention(plain.rms(x, w["input_layernorm.weight"]), w, *heads, scale, None)
            y = plain.rms(x, w["post_attention_layernorm.weight"])
            x = x + (plain.experts(y, w, 3, F.silu, None, True) if i else plain.mlp(y, w, "mlp.", F.silu))
        return (plain.rms(x, tensors["model.norm.weight"].double()) @ tensors["lm_head.weight"].double().T).float()

    return reference, write(folder, config, tensors)


def grok1(folder: Path, sizes: Sizes) -> tuple[Reference, str]:
    """Grok-1: norms around each part, three soft caps and scales."""
    norms = ["input_layernorm", "attention_out_norm", "post_attention_layernorm", "mlp_out_norm"]
    tensors = random_layers(norms, [f"mlp.experts.{i}" for i in range(8)], sizes)
    checkpoint = renamed(
        tensors, (".mlp.", ".block_sparse_moe."), ("post_attention_layernorm", "pre_moe_norm"),
        ("input_layernorm", "pre_attn_norm"), ("attention_out_norm", "post_attn_norm"),
        ("mlp_out_norm", "post_moe_norm"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"),
    )  # fmt: skip
    config = tiny.COMMON | dense(sizes) | {
        "model_type": "grok-1", "intermediate_size": sizes["moe_intermediate_size"],
        "num_local_experts": 8, "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5, "attn_output_multiplier": 0.5, "embedding_multiplier_scale": 3.0,
        "output_multiplier_scale": 0.5, "attn_logit_softcapping": 2.0, "router_logit_softcapping": 1.0,
        "tie_word_embeddings": False,
    }  # fmt: skip

    def gelu(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def reference(ids: list[int]) -> Tensor:
        x = tensors["model.embed_tokens.weight"].double()[ids] * 3.0
        for i in range(3):
            w = layer_weights(tensors, i)
            before, after, before_mlp, after_mlp = (w[f"{name}.weight"] for name in norms)
            x = x + plain.rms(plain.attention(plain.rms(x, before), w, *heads_of(sizes), 0.5, 2.0), after)
            x = x + plain.rms(plain.experts(plain.rms(x, before_mlp), w, 2, gelu, 1.0, False), after_mlp)
        hidden = plain.rms(x, tensors["model.norm.weight"].double())
        return (hidden @ tensors["lm_head.weight"].double().T * 0.5).float()

    return reference, write(folder, config, checkpoint)


REPACKED: dict[str, Callable[[Path, Sizes], tuple[Reference, str]]] = {
    "exaone": exaone,
    "internlm2": internlm2,
    "qwen": qwen,
    "chatglm": chatglm,
    "deepseek": deepseek,
    "grok-1": grok1,
}
ALL = [*tiny.FAMILIES, *REPACKED]
