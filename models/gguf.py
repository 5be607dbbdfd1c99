"""GGUF to Hugging Face folder, once: config.json, bfloat16 safetensors, tokenizer, chat template. Used by embedded.py
and resolve.py; the loader then knows one format only. Runs in the root, so without torch, one block of rows at a time.
Quantized tensors that quantized.py multiplies with are also kept as they are, or as blocks of 32 with the same values,
in a file of their own.
What differs between architectures is in gguf_architectures.py. Tensors that a family fuses come apart here (queries,
keys and values of Phi 3): so each can be kept quantized, and the loader takes them by their own names too.

Invariant: what is written means the same as the file, or StartupError says what is not supported; nothing is guessed.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import StartupError
from .cache import Progress, no_progress
from .gguf_architectures import (
    BESIDE,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Architecture,
    architecture_of,
    decimal,
    number,
)
from .gguf_blocks import K_TYPES, SIZES, blocks_of_32
from .gguf_tokenizer import special_tokens, tokenizer_json

FORMAT = 3  # part of the cache key: raise it when the output changes
KEPT_FILE = "gguf_blocks.safetensors"
KEPT_TYPES = ("Q4_0", "Q4_1", "Q8_0", *K_TYPES)
BLOCK_VALUES = 16 << 20  # values dequantised at a time: 64 MiB of float32

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

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
    pieces = _pieces(config, architecture_of(meta), tensors)
    _write_kept(out / KEPT_FILE, pieces)
    _write_weights(out / "model.safetensors", pieces, progress)


def _write_json(path: Path, value: Metadata) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=None if len(value) > 40 else 1), encoding="utf-8")


def _open(path: Path) -> Any:
    """The gguf package's reader: a memory map, so nothing of the weights is read yet."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):  # type: ignore[misc]
        """Which does not look for as many elements of an array as the file has no bytes for."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                count = int(self._get(orig_offs + 4, np.uint64)[0])  # after the elements' type
                if count > len(self.data):
                    raise ValueError(f"an array of {count} elements")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        return Reader(path)
    except Exception as error:  # the reader lets numpy's and struct's errors through on a broken file
        raise StartupError(f"{path.name} is not a readable GGUF file ({error})") from error


def _metadata(reader: Any) -> Metadata:
    """All key-value pairs; the architecture's own keys lose their prefix (`llama.block_count` -> `block_count`)."""
    try:
        arch = reader.fields["general.architecture"].contents()
        meta = {name.removeprefix(f"{arch}."): field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # as in _open
        raise StartupError(f"the GGUF file's metadata is broken ({error!r})") from error
    architecture_of(meta)
    return meta


# ------------------------------------------------------------------ config.json


def hf_config(meta: Metadata, tensors: Metadata) -> Metadata:
    """config.json of a GGUF's metadata. `tensors`: name -> tensor, for what only they tell (tied head, biases)."""
    arch = architecture_of(meta)
    hidden, heads = number(meta, "embedding_length"), number(meta, "attention.head_count")
    head_dim = number(meta, "attention.key_length", hidden // heads)
    if number(meta, "attention.value_length", head_dim) != head_dim:
        raise StartupError("GGUF: keys and values of different widths are not supported")
    rotated = number(meta, "rope.dimension_count", head_dim)
    if rotated != head_dim and arch.interleaved:
        raise StartupError("GGUF: rotary embeddings over a part of the head are not supported yet")
    if "token_embd.weight" not in tensors:
        raise StartupError("GGUF: token_embd.weight is missing (a split file must be merged first)")
    inter = "feed_forward_length" if "feed_forward_length" in meta else "expert_feed_forward_length"
    norm, eps = ("layer_norm_eps", "norm") if arch.layer_norm else ("rms_norm_eps", "norm_rms")
    config: Metadata = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": number(meta, inter),
        "num_hidden_layers": number(meta, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(meta, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number(meta, "context_length"),
        norm: decimal(meta[f"attention.layer_{eps}_epsilon"]),
        "rope_theta": decimal(meta.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    config |= arch.settings(meta, tensors, config)
    if scaling := _rope_scaling(meta, tensors, rotated, config):
        config["rope_scaling"] = scaling
    return config | special_tokens(meta)


def _rope_scaling(meta: Metadata, tensors: Metadata, rotated: int, config: Metadata) -> Metadata | None:
    """The `rope_scaling` entry of config.json, or None. `rotated`: elements of each head."""
    if ROPE_FACTORS in tensors:
        divisors = np.asarray(tensors[ROPE_FACTORS].data, np.float64)
        return None if (divisors == 1).all() else _llama3_scaling(divisors, rotated, config["rope_theta"])
    original = "rope.scaling.original_context_length"
    if LONG_FACTORS in tensors:
        short, long = ([float(x) for x in tensors[name].data] for name in (SHORT_FACTORS, LONG_FACTORS))
        scaling: Metadata = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        scaling["original_max_position_embeddings"] = number(meta, original)
        if "rope.scaling.attn_factor" in meta:
            scaling["attention_factor"] = decimal(meta["rope.scaling.attn_factor"])
        return scaling
    kind = meta.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise StartupError(f"GGUF: rope scaling {kind!r} is not supported; supported: none, linear, yarn, longrope")
    scaling = {"rope_type": kind, "factor": decimal(meta["rope.scaling.factor"])}
    if original in meta:
        scaling["original_max_position_embeddings"] = number(meta, original)
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


@dataclass(frozen=True, slots=True)
class Piece:
    """One of Hugging Face's tensors, in a GGUF's."""

    tensor: Any
    """gguf's tensor that it is in."""
    data: npt.NDArray[Any]
    """Its own part, a view: [rows, bytes of a row], or values of `shape`."""
    shape: tuple[int, ...]
    order: npt.NDArray[np.int64] | None = None
    """Which row of `data` each of its rows is; None: the same."""
    offset: float = 0.0
    """What its values are less than the file's."""

    @property
    def kept(self) -> bool:
        """Whether quantized.py may multiply with its blocks; experts are dequantised."""
        return self.tensor.tensor_type.name in KEPT_TYPES and len(self.tensor.shape) == 2


def _pieces(config: Metadata, arch: Architecture, tensors: Metadata) -> dict[str, Piece]:
    """Hugging Face's name -> where it is, of every tensor; StartupError if one is missing or unknown."""
    places = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in OUTER.items() for part in ("weight", "bias")}
    needed = {"token_embd.weight", "output_norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        for ours, modules in arch.layer.items():
            for part in ("weight", "bias"):
                names = [f"model.layers.{layer}.{module}.{part}" for module in modules.split()]
                places[f"blk.{layer}.{ours}.{part}"] = " ".join(names)
            needed |= set() if ours in arch.optional else {f"blk.{layer}.{ours}.weight"}
    if unknown := [name for name in tensors if name not in places and name not in BESIDE]:
        raise StartupError(f"GGUF: tensor {unknown[0]!r} is not part of a plain {config['model_type']} model")
    if missing := [name for name in places if name in needed and name not in tensors]:
        raise StartupError(f"GGUF: tensor {missing[0]!r} is missing")
    pieces: dict[str, Piece] = {}
    for name, places_of in places.items():
        if name in tensors:
            pieces |= _pieces_of(tensors[name], places_of.split(), config, arch)
    return pieces


def _pieces_of(tensor: Any, names: list[str], config: Metadata, arch: Architecture) -> dict[str, Piece]:
    """The pieces of one tensor: the whole, one for each index of its first axis, or rows one after another."""
    data, shape = tensor.data, tuple(int(size) for size in reversed(tensor.shape))
    if "{}" in names[0]:
        return {names[0].replace("{}", str(i)): Piece(tensor, part, shape[1:]) for i, part in enumerate(data)}
    if len(names) == 1:
        offset = arch.norm_offset if tensor.name.endswith("norm.weight") else 0.0
        if names[0].endswith("shared_expert_gate.weight"):
            shape = (1, math.prod(shape))
        order = _row_order(tensor.name, config) if arch.interleaved else None
        return {names[0]: Piece(tensor, data, shape, order, offset)}
    pieces, first = {}, 0
    for name in names:
        rows = _rows(name.split(".")[-2], config)
        pieces[name] = Piece(tensor, data[first : first + rows], (rows, *shape[1:]))
        first += rows
    if first != shape[0]:
        raise ValueError(f"{tensor.name} has {shape[0]} rows instead of {first}")
    return pieces


def _rows(module: str, config: Metadata) -> int:
    """Outputs of a linear map that can be part of a fused one."""
    if module in ("gate_proj", "up_proj"):
        return int(config["intermediate_size"])
    heads = config["num_attention_heads" if module == "q_proj" else "num_key_value_heads"]
    return int(heads * config["head_dim"])


def _write_weights(path: Path, pieces: dict[str, Piece], progress: Progress) -> None:
    """model.safetensors: all tensors in bfloat16."""
    with open(path, "wb") as file:
        end = _write_header(file, "BF16", 2, {name: list(piece.shape) for name, piece in pieces.items()})
        done = 0
        for piece in pieces.values():
            try:
                for block in _blocks(piece):
                    file.write(block.tobytes())
                    done += block.nbytes
            except NotImplementedError as error:
                kind = piece.tensor.tensor_type.name
                raise StartupError(f"GGUF: quantisation {kind} of {piece.tensor.name} is not supported") from error
            progress("convert", done, end)


def _write_kept(path: Path, pieces: dict[str, Piece]) -> None:
    """The matrices of KEPT_TYPES as bytes [rows, bytes of a row], rows in Hugging Face's order, and those of K_TYPES as
    blocks of 32; no file without any."""
    kept = {name: piece for name, piece in pieces.items() if piece.kept}
    if not kept:
        return
    with open(path, "wb") as file:
        _write_header(file, "U8", 1, {name: _kept_shape(piece) for name, piece in kept.items()})
        for piece in kept.values():
            kind = piece.tensor.tensor_type.name
            for rows in _row_blocks(piece):
                file.write((blocks_of_32(kind, rows) if kind in K_TYPES else rows).tobytes())


def _kept_shape(piece: Piece) -> list[int]:
    kind = piece.tensor.tensor_type.name
    return [len(piece.data), piece.shape[-1] // 32 * SIZES[kind]] if kind in K_TYPES else list(piece.data.shape)


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


def _row_order(name: str, config: Metadata) -> npt.NDArray[np.int64] | None:
    """For q and k: which row of the GGUF tensor each row of Hugging Face's is; None: the same.

    llama.cpp rotates neighbouring pairs (0,1)(2,3), Hugging Face the halves (0,d/2)(1,d/2+1), so the converter
    interleaved the halves of each head. Rows are quantised one by one: they can be moved before dequantising.
    """
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    half = config["head_dim"] // 2
    return np.arange(heads * half * 2).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


def _blocks(piece: Piece) -> Iterator[npt.NDArray[np.uint16]]:
    """The tensor as bfloat16 bit patterns, a block of rows at a time."""
    from gguf import dequantize

    for rows in _row_blocks(piece):
        values = dequantize(rows, piece.tensor.tensor_type)
        if not np.isfinite(values).all():
            raise StartupError(f"GGUF: {piece.tensor.name} holds NaN or infinity; the file is damaged")
        yield to_bfloat16(values - np.float32(piece.offset) if piece.offset else values)


def _row_blocks(piece: Piece) -> Iterator[npt.NDArray[Any]]:
    """Its rows in Hugging Face's order, some at a time."""
    data, order = piece.data, piece.order
    rows_per_block = max(1, BLOCK_VALUES // piece.shape[-1]) if data.ndim > 1 else len(data)
    for first in range(0, len(data), rows_per_block):
        rows = slice(first, first + rows_per_block)
        yield data[rows] if order is None else data[order[rows]]


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite float32 values, rounded to nearest (ties to even), as bfloat16 bit patterns of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
