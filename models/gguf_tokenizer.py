"""tokenizer.json and tokenizer_config.json from a GGUF's metadata; used by gguf.py only.

The byte-level BPE kind ("gpt2") is complete in a GGUF but for the pre-tokenizer, which is only named. Invariant: text
gives the ids that the original tokenizer gives; a kind or a name that is not known here is refused, since the wrong
split gives other ids without an error.
Sources of the patterns: the tokenizer.json files of SmolLM2, GPT-2, Llama 3 and Qwen2.
"""

import json
from typing import Any

from ..errors import StartupError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

Json = dict[str, Any]


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> Json:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


SMOLLM = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
}
PRE_TOKENIZERS: dict[str, Json] = {
    "smollm": SMOLLM,
    "gpt-2": _byte_level(use_regex=True),
    "llama-bpe": _split(LLAMA3_PATTERN),
    "qwen2": _split(QWEN2_PATTERN),
}


def special_tokens(meta: Json) -> Json:
    """`bos_token_id`, `eos_token_id` (a list where the file names several ends) and `pad_token_id`, as far as known."""
    keys = ("bos", "eos", "eot", "eom", "padding")
    ids = {key: int(meta[f"tokenizer.ggml.{key}_token_id"]) for key in keys if f"tokenizer.ggml.{key}_token_id" in meta}
    ends = sorted({ids[key] for key in ("eos", "eot", "eom") if key in ids})
    found: Json = {}
    if "bos" in ids:
        found["bos_token_id"] = ids["bos"]
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if "padding" in ids:
        found["pad_token_id"] = ids["padding"]
    return found


def tokenizer_json(meta: Json) -> tuple[Json, Json]:
    """(tokenizer.json, tokenizer_config.json). StartupError for a tokenizer kind or pre-tokenizer not known here."""
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise StartupError(f"GGUF tokenizer kind {kind!r} is not supported yet; supported: gpt2 (byte-level BPE)")
    if pre not in PRE_TOKENIZERS:
        raise StartupError(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types: list[int] = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, tokens[i], t == CONTROL) for i, t in enumerate(types) if t in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": _post_processor(meta, tokens, pre),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",  # Llama 3 takes a whole piece that is in the vocabulary
            "vocab": {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != UNUSED},
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    _check(tokenizer)
    return tokenizer, _tokenizer_config(meta, tokens)


def _added(token_id: int, text: str, special: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": text} | flags


def _adds_bos(meta: Json) -> bool:
    """Whether texts begin with BOS; where the file is silent, Llama 3 does and the others do not."""
    return bool(meta.get("tokenizer.ggml.add_bos_token", meta.get("tokenizer.ggml.pre") == "llama-bpe"))


def _post_processor(meta: Json, tokens: list[str], pre: str) -> Json | None:
    """Adds BOS to a text where the model was trained so."""
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if bos is None or not _adds_bos(meta):
        return None
    token, text = tokens[bos], {"Sequence": {"id": "A", "type_id": 0}}
    mark = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [mark, text],
        "pair": [mark, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [int(bos)], "tokens": [token]}},
    }


def _tokenizer_config(meta: Json, tokens: list[str]) -> Json:
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(meta),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(meta["context_length"]),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = meta.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return config


def _check(tokenizer: Json) -> None:
    """StartupError if the library cannot load it (merges that name no token, a hole in the vocabulary)."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as error:  # the library raises bare Exception
        raise StartupError(f"the GGUF file's tokenizer is broken ({error})") from error
