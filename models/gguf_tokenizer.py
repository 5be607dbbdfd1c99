"""tokenizer.json and tokenizer_config.json from a GGUF's metadata; used by gguf.py only.

The byte-level BPE kind ("gpt2") is complete in a GGUF but for the pre-tokenizer, which is only named; SentencePiece's
("llama") has no merges, but scores (gguf_sentencepiece.py). Invariant: text gives the ids that the original tokenizer
gives; a kind or a name that is not known here is refused, since the wrong split gives other ids without an error.
Sources of the patterns: the tokenizer.json files of SmolLM2, GPT-2, Llama 3, Qwen2, Command-R and Mistral NeMo; which
names share one: llama.cpp's src/llama-vocab.cpp.
"""

import json
from collections.abc import Callable
from typing import Any

from ..errors import StartupError
from . import gguf_sentencepiece as sentencepiece
from .gguf_sentencepiece import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, types_of

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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
COMPOSED = ("qwen2", "command-r")
"""Pre-tokenizers of texts in Unicode's form NFC."""
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Pre-tokenizers whose pieces are tokens where they are in the vocabulary, whatever the merges say; texts begin with
BOS where the file does not say otherwise."""
PRE_TOKENIZERS: dict[str, Json] = {
    **dict.fromkeys(("smollm", "command-r", "starcoder", "refact", "exaone"), SMOLLM),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), _byte_level(use_regex=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "glm4", "chatglm-bpe"), _split(LLAMA3_PATTERN)),
    **dict.fromkeys(("qwen2", "stablelm2"), _split(QWEN2_PATTERN)),
    "tekken": _split(TEKKEN_PATTERN),
}


def special_tokens(meta: Json) -> Json:
    """`bos_token_id`, `eos_token_id` (a list where the file names several ends) and `pad_token_id`, as far as known."""
    keys = ("bos", "eos", "eot", "eom", "padding")
    ids = {key: token for key in keys if (token := _special(meta, key)) is not None}
    ends = sorted({ids[key] for key in ("eos", "eot", "eom") if key in ids})
    found: Json = {}
    if "bos" in ids:
        found["bos_token_id"] = ids["bos"]
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if "padding" in ids:
        found["pad_token_id"] = ids["padding"]
    return found


def _special(meta: Json, key: str) -> int | None:
    """Id of a special token. One for padding or unknown text that is no token is none, as with llama.cpp: converters
    wrote -1 so."""
    token = meta.get(f"tokenizer.ggml.{key}_token_id")
    if token is None or (key in ("padding", "unknown") and not 0 <= token < len(meta["tokenizer.ggml.tokens"])):
        return None
    return int(token)


def tokenizer_json(meta: Json) -> tuple[Json, Json]:
    """(tokenizer.json, tokenizer_config.json). StartupError for a tokenizer kind or pre-tokenizer not known here."""
    kind = meta.get("tokenizer.ggml.model")
    if kind not in PARTS:
        raise StartupError(f"GGUF tokenizer kind {kind!r} is not supported yet; supported: gpt2 and llama")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(meta, tokens, types_of(meta)),
        "post_processor": _post_processor(meta, tokens),
        **PARTS[kind](meta),
    }
    _check(tokenizer)
    return tokenizer, _tokenizer_config(meta, tokens)


def _byte_level_parts(meta: Json) -> Json:
    """What gguf_sentencepiece.parts is, for byte-level BPE."""
    pre, tokens = meta.get("tokenizer.ggml.pre"), meta["tokenizer.ggml.tokens"]
    if pre not in PRE_TOKENIZERS:
        raise StartupError(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    return {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_PIECES,
            "vocab": {token: i for i, (token, t) in enumerate(zip(tokens, types_of(meta), strict=True)) if t != UNUSED},
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }


PARTS: dict[str, Callable[[Json], Json]] = {"gpt2": _byte_level_parts, "llama": sentencepiece.parts}
"""By `tokenizer.ggml.model`."""


def _added_tokens(meta: Json, tokens: list[str], types: list[int]) -> list[Json]:
    """Tokens that are found in a text before it is cut into pieces."""
    found = [
        _added(i, tokens[i], t != USER_DEFINED)
        for i, t in enumerate(types)
        if t in (CONTROL, USER_DEFINED) or (t == UNKNOWN and meta["tokenizer.ggml.model"] == "llama")
    ]
    name = str(meta.get("general.name", "")).lower()
    if meta["tokenizer.ggml.model"] == "llama" and ("phi-3" in name or "phi3" in name):
        for token in found:  # the file does not say it, and llama.cpp knows it by the name too
            token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    return found


def _added(token_id: int, text: str, special: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": text} | flags


def _adds_bos(meta: Json) -> bool:
    """Whether texts begin with BOS; where the file is silent, as llama.cpp takes it."""
    silent = meta.get("tokenizer.ggml.pre") in WHOLE_PIECES or meta["tokenizer.ggml.model"] == "llama"
    return bool(meta.get("tokenizer.ggml.add_bos_token", silent))


def _post_processor(meta: Json, tokens: list[str]) -> Json | None:
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
        token_id = _special(meta, key)
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
