"""Tiny transformers models as GGUF files, written as llama.cpp's converter writes them: the other direction of gguf.py.

Used by test_gguf_architectures.py. Names come from the gguf package's own table, keys and changed values from
llama.cpp's conversion/*.py, so that nothing of models/gguf_architectures.py is needed to make what it reads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]
Facts = dict[str, Any]

INTERLEAVED = {"llama", "granite", "smollm3", "internlm2"}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
EXPERTS |= {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama models."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


BYTES = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
"""Bytes of 256 values, and where its float16 numbers are."""


def random_rows(kind: str, rows: int, inputs: int, scale: float = 0.01) -> np.ndarray:
    """A K-quant's blocks of random bytes, but with float16 numbers around `scale`."""
    size, places = BYTES[kind]
    rng = np.random.default_rng(rows)
    blocks = rng.integers(0, 256, (rows, inputs // 256, size), np.uint8)
    for place in places:
        numbers = rng.normal(0, scale / 16, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = numbers[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def rounded(model: Any) -> Any:
    """The model, its parameters rounded to what bfloat16 holds; buffers stay as they are."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    return model


def write(path: Path, arch: str, model: Any, folder: Path, **more: Any) -> None:
    """Write a model, saved in `folder`, as the file `path`; `more`: facts in the place of what its config tells."""
    config = model.config.to_dict()
    tensors = load_file(Path(tiny.save(model, folder)) / "model.safetensors")
    writer = gguf.GGUFWriter(path, arch)
    layers = config["num_hidden_layers"] if "num_hidden_layers" in config else config["num_layers"]
    for key, value in (facts(arch, config) | more).items():
        add(writer, key if key.startswith(("general.", "tokenizer.")) else f"{arch}.{key}", value)
    for name, tensor in renamed(arch, config, tensors, layers).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a key with the type that llama.cpp has for it."""
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def facts(arch: str, config: Facts) -> Facts:
    """Keys of a model's file, those of the architecture without its prefix."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    rope = rope.get("full_attention", rope)
    rms = config.get("rms_norm_eps", config.get("layer_norm_epsilon"))
    norm = {"attention.layer_norm_epsilon": config["layer_norm_eps"]} if "layer_norm_eps" in config else {}
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": config.get("num_hidden_layers") or config["num_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope.get("rope_theta") or 10000.0),
        "rope.dimension_count": int(head_dim * partial),
    }
    found |= norm or {"attention.layer_norm_rms_epsilon": rms}
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
        found |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    return found | MORE.get(arch, lambda config: {})(config) | vocabulary(config["vocab_size"])


def vocabulary(size: int) -> Facts:
    """A SentencePiece vocabulary of so many tokens, which nobody encodes with."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(16)), *(f"t{i}" for i in range(size - 19))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(size)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 16 + [1] * (size - 19),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sliding(config: Facts) -> Facts:
    return {"attention.sliding_window": config["sliding_window"]}


def pattern(config: Facts) -> Facts:
    kinds = [kind == "sliding_attention" for kind in config["layer_types"]]
    return sliding(config) | {"attention.sliding_window_pattern": kinds}


def experts(config: Facts) -> Facts:
    count = config.get("num_local_experts") or config.get("num_experts")
    found = {"expert_count": count, "expert_used_count": config["num_experts_per_tok"]}
    if "moe_intermediate_size" in config:
        found["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if "shared_expert_intermediate_size" in config:
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return found


def granite(config: Facts) -> Facts:
    return {
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "attention.scale": config["attention_multiplier"],
        "logit_scale": config["logits_scaling"],
    }


MORE: dict[str, Callable[[Facts], Facts]] = {
    "llama": lambda c: experts(c) if "num_local_experts" in c else {},
    "qwen2moe": experts,
    "qwen3moe": experts,
    "granite": granite,
    "gemma2": lambda c: (
        sliding(c)
        | {
            "attn_logit_softcapping": c["attn_logit_softcapping"],
            "final_logit_softcapping": c["final_logit_softcapping"],
        }
    ),
    "gemma3": sliding,
    "phi3": lambda c: (
        {"attention.sliding_window": c["sliding_window"] or 0}
        | {"rope.scaling.original_context_length": c["max_position_embeddings"]}
    ),
    "stablelm": lambda c: {"use_parallel_residual": c["use_parallel_residual"]},
    "command-r": lambda c: {"logit_scale": c["logit_scale"], "rope.scaling.type": "none"},
    "cohere2": lambda c: sliding(c) | {"logit_scale": c["logit_scale"], "rope.scaling.type": "none"},
    "exaone4": pattern,
    "olmo2": lambda c: pattern(c) if "sliding_window" in c else {},
}


def renamed(arch: str, config: Facts, tensors: Tensors, layers: int) -> dict[str, np.ndarray]:
    """llama.cpp's tensors of a checkpoint's."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(kind, layers)
    out: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        value = tensor.float().numpy()
        if arch in INTERLEAVED and "_proj." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
            value = interleave(value, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        parts = name.split(".")
        if "experts" in parts:
            stacks.setdefault(f"blk.{parts[2]}.{EXPERTS[parts[-2]]}.weight", {})[int(parts[-3])] = value
        elif "norms" in parts:
            stacks.setdefault(f"blk.{parts[2]}.attn_{parts[4][0]}_norm.weight", {})[int(parts[-2])] = value
        else:
            found = table.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            out[found] = value.squeeze() if "shared_expert_gate" in name else value
    for name, rows in stacks.items():
        out[name] = np.stack([rows[i] for i in range(len(rows))])
    return out
