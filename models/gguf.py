"""GGUF to Hugging Face folder, once: config.json, bfloat16 safetensors, tokenizer, chat template. Used by embedded.py
and resolve.py; the loader then knows one format only. Runs in the root, so without torch, one block of rows at a time.
Quantized tensors that quantized.py multiplies with are also kept as they are, in a file of their own.

Invariant: what is written means the same as the file, or StartupError says what is not supported; nothing is guessed.
Sources: the GGUF specification (ggml-org/ggml, docs/gguf.md); llama.cpp's converter, which interleaves the rotary
halves of q and k for `llama` and leaves `qwen2` alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import StartupError
from .cache import Progress, no_progress
from .gguf_tokenizer import special_tokens, tokenizer_json

FORMAT = 2  # part of the cache key: raise it when the output changes
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
KEPT_FILE = "gguf_blocks.safetensors"
KEPT_TYPES = ("Q4_0", "Q4_1", "Q8_0")
BLOCK_VALUES = 16 << 20  # values dequantised at a time: 64 MiB of float32

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

Metadata = dict[str, Any]


def convert(gguf_path: Path | str, out_dir: Path | str, progress: Progress = no_progress) -> None:
    """Write the Hugging Face folder of a GGUF file into the existing folder `out_dir`.

    The weights are `gguf.dequantize` rounded to the nearest bfloat16. Callers use `cache.publish`, which makes the
    folder appear whole or not at all. Raises StartupError for what is not supported and for a broken file.
    """
    reader = _open(Path(gguf_path))
    try:
        _convert(reader, Path(out_dir), progress)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StartupError(f"the GGUF file is incomplete or inconsistent ({error!r})") from error


def _convert(reader: Any, out: Path, progress: Progress) -> None:
    meta = _metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = hf_config(meta, tensors)
    tokenizer, tokenizer_config = tokenizer_json(meta)
    _write_json(out / "config.json", config)
    _write_json(out / "tokenizer.json", tokenizer)
    _write_json(out / "tokenizer_config.json", tokenizer_config)
    generation: Metadata = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    _write_json(out / "generation_config.json", generation)
    names = _names(config, tensors)
    _write_kept(out / KEPT_FILE, tensors, names, config)
    _write_weights(out / "model.safetensors", tensors, names, config, progress)


def _write_json(path: Path, value: Metadata) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=None if len(value) > 40 else 1), encoding="utf-8")


def _open(path: Path) -> Any:
    """The gguf package's reader: a memory map, so nothing of the weights is read yet."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # the reader lets numpy's and struct's errors through on a broken file
        raise StartupError(f"{path.name} is not a readable GGUF file ({error})") from error


def _metadata(reader: Any) -> Metadata:
    """All key-value pairs; the architecture's own keys lose their prefix (`llama.block_count` -> `block_count`)."""
    try:
        arch = reader.fields["general.architecture"].contents()
        meta = {name.removeprefix(f"{arch}."): field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # as in _open
        raise StartupError(f"the GGUF file's metadata is broken ({error!r})") from error
    if arch not in ARCHITECTURES:
        raise StartupError(f"GGUF architecture {arch!r} is not supported yet; supported: {', '.join(ARCHITECTURES)}")
    return meta


# ------------------------------------------------------------------ config.json


def hf_config(meta: Metadata, tensors: Metadata) -> Metadata:
    """config.json of a GGUF's metadata. `tensors`: name -> tensor, for what only they tell (tied head, biases)."""
    arch = meta["general.architecture"]
    hidden, heads = _number(meta, "embedding_length"), _number(meta, "attention.head_count")
    head_dim = _number(meta, "attention.key_length", hidden // heads)
    if _number(meta, "rope.dimension_count", head_dim) != head_dim:
        raise StartupError("GGUF: rotary embeddings over a part of the head are not supported yet")
    if "token_embd.weight" not in tensors:
        raise StartupError("GGUF: token_embd.weight is missing (a split file must be merged first)")
    config: Metadata = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": _number(meta, "feed_forward_length"),
        "num_hidden_layers": _number(meta, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(meta, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _number(meta, "context_length"),
        "rms_norm_eps": _decimal(meta["attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(meta.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if scaling := _rope_scaling(meta, tensors, head_dim, config["rope_theta"]):
        config["rope_scaling"] = scaling
    return config | special_tokens(meta)


def _number(meta: Metadata, key: str, default: int | None = None) -> int:
    """A whole number of the metadata. Per-layer lists (models whose layers differ) are not supported."""
    value = meta.get(key, default)
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise StartupError(f"GGUF: {key} = {value!r} is not supported (a positive whole number expected)")
    return int(value)


def _decimal(value: float) -> float:
    """The decimal that a float32 stands for: 9.999999747378752e-06 -> 1e-05, as the original config.json had it."""
    return float(str(np.float32(value)))


def _rope_scaling(meta: Metadata, tensors: Metadata, head_dim: int, theta: float) -> Metadata | None:
    """The `rope_scaling` entry of config.json, or None."""
    if ROPE_FACTORS in tensors:
        return _llama3_scaling(np.asarray(tensors[ROPE_FACTORS].data, np.float64), head_dim, theta)
    kind = meta.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise StartupError(f"GGUF: rope scaling {kind!r} is not supported; supported: none, linear, yarn")
    scaling: Metadata = {"rope_type": kind, "factor": _decimal(meta["rope.scaling.factor"])}
    if "rope.scaling.original_context_length" in meta:
        scaling["original_max_position_embeddings"] = _number(meta, "rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(factors: npt.NDArray[np.float64], head_dim: int, theta: float) -> Metadata:
    """Llama 3.1's scaling from the factors that the GGUF holds in its stead.

    The file has the result (one divisor per frequency), config.json the rule. Every Llama 3.x uses the same bounds
    and its own `factor`, which is the largest divisor; the rule must give the file's divisors back.
    """
    factor, low, high, context = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise StartupError("GGUF: rope_freqs.weight does not follow Llama 3's rule, which is the only one supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


# ------------------------------------------------------------------ weights


def _names(config: Metadata, tensors: Metadata) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor; StartupError if one is missing or unknown."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTER.items()}
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in LAYER.items():
            for part in ("weight", "bias"):
                names[f"blk.{layer}.{ours}.{part}"] = f"model.layers.{layer}.{theirs}.{part}"
    known = {name: names[name] for name in tensors if name in names}
    if unknown := [name for name in tensors if name not in names and name != ROPE_FACTORS]:
        raise StartupError(f"GGUF: tensor {unknown[0]!r} is not part of a plain {config['model_type']} model")
    optional = {"output.weight"}
    if missing := [n for n in names if n not in known and n not in optional and n.endswith("weight")]:
        raise StartupError(f"GGUF: tensor {missing[0]!r} is missing")
    return known


def _write_weights(path: Path, tensors: Metadata, names: dict[str, str], config: Metadata, progress: Progress) -> None:
    """model.safetensors: all tensors in bfloat16."""
    shapes = {hf_name: [int(size) for size in reversed(tensors[name].shape)] for name, hf_name in names.items()}
    with open(path, "wb") as file:
        end = _write_header(file, "BF16", 2, shapes)
        _write_tensors(file, tensors, names, config, lambda done: progress("convert", done, end))


def _write_kept(path: Path, tensors: Metadata, names: dict[str, str], config: Metadata) -> None:
    """The matrices of KEPT_TYPES as bytes [rows, bytes of a row], rows in Hugging Face's order; no file without any."""
    kept = {name: hf_name for name, hf_name in names.items() if tensors[name].tensor_type.name in KEPT_TYPES}
    if not kept:
        return
    with open(path, "wb") as file:
        _write_header(file, "U8", 1, {hf_name: list(tensors[name].data.shape) for name, hf_name in kept.items()})
        for name in kept:
            data, order = tensors[name].data, _row_order(name, config)
            file.write((data if order is None else data[order]).tobytes())


def _write_header(file: BinaryIO, dtype: str, width: int, shapes: dict[str, list[int]]) -> int:
    """The beginning of a safetensors file, whose tensors of `width` bytes a value follow; returns their bytes.

    That is an 8-byte length and a JSON object with each tensor's place. Written by hand because the library needs all
    tensors at once, and torch for bfloat16.
    """
    header: Metadata = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    return end


def _write_tensors(file: BinaryIO, tensors: Metadata, names: dict[str, str], config: Metadata, progress: Any) -> None:
    done = 0
    for name in names:
        order = _row_order(name, config)
        try:
            for block in _blocks(tensors[name], order):
                file.write(block.tobytes())
                done += block.nbytes
        except NotImplementedError as error:
            raise StartupError(
                f"GGUF: quantisation {tensors[name].tensor_type.name} of {name} is not supported"
            ) from error
        progress(done)


def _row_order(name: str, config: Metadata) -> npt.NDArray[np.int64] | None:
    """For `llama`'s q and k: which row of the GGUF tensor each row of Hugging Face's is; None: the same.

    llama.cpp rotates neighbouring pairs (0,1)(2,3), Hugging Face the halves (0,d/2)(1,d/2+1), so the converter
    interleaved the halves of each head. Rows are quantised one by one: they can be moved before dequantising.
    """
    part = name.split(".")[-2]
    if config["model_type"] != "llama" or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    half = config["head_dim"] // 2
    return np.arange(heads * half * 2).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


def _blocks(tensor: Any, order: npt.NDArray[np.int64] | None) -> Iterator[npt.NDArray[np.uint16]]:
    """The tensor as bfloat16 bit patterns, a block of rows at a time."""
    from gguf import dequantize

    data = tensor.data  # [rows, bytes of a row], or float values of the tensor's shape
    rows_per_block = max(1, BLOCK_VALUES // int(tensor.shape[0])) if data.ndim > 1 else len(data)
    for first in range(0, len(data), rows_per_block):
        rows = slice(first, first + rows_per_block)
        values = dequantize(data[rows] if order is None else data[order[rows]], tensor.tensor_type)
        if not np.isfinite(values).all():
            raise StartupError(f"GGUF: {tensor.name} holds NaN or infinity; the file is damaged")
        yield to_bfloat16(values)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite float32 values, rounded to nearest (ties to even), as bfloat16 bit patterns of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
