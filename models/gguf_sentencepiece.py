"""tokenizer.json's model, normalizer and decoder from a GGUF's SentencePiece vocabulary ("llama" in the file).

Used by gguf_tokenizer.py. The file has pieces and their scores; SentencePiece's BPE joins the neighbours whose joint
piece has the highest score, so the merges are all ways to cut pieces in two, by the score of the whole. What is in no
piece becomes bytes (<0x0A>).
Invariant: text gives the ids that llama.cpp gives; it is whatever the file's own tokenizer was trained on.
"""

from typing import Any, Final

Json = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of tokenizer.ggml.token_type."""
SPACE: Final = "\u2581"
"""What SentencePiece writes for a space."""


def types_of(meta: Json) -> list[int]:
    """The type of each token."""
    types: list[int] = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(meta["tokenizer.ggml.tokens"])
    return types


def adds_space(meta: Json) -> bool:
    """Whether a text, and what follows a control token, begins with a space of the tokenizer's own."""
    return bool(meta.get("tokenizer.ggml.add_space_prefix", True))


def parts(meta: Json) -> Json:
    """The keys `normalizer`, `pre_tokenizer`, `decoder` and `model` of tokenizer.json."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    scores: list[float] = meta["tokenizer.ggml.scores"]
    types = types_of(meta)
    spaces: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space(meta):
        spaces = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    if unknown is None and (index := meta.get("tokenizer.ggml.unknown_token_id")) is not None:
        unknown = tokens[index]
    return {
        "normalizer": spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": BYTE in types,
            "ignore_merges": False,
            "vocab": {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED},
            "merges": merges(tokens, scores, types),
        },
    }


def merges(tokens: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """All pairs of normal pieces that are together one, that with the highest score first."""
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[index], index, -cut, left, right))
    found.sort()
    return [[left, right] for *_, left, right in found]
