"""A model's folder for --load-format stub: a small tokenizer and a config.json, no weights."""

import json
from pathlib import Path

import tiny_tokenizers
from tokenizers import Tokenizer


def stub_folder(folder: Path, context_length: int = 4096) -> str:
    """Make it; its vocabulary is the tokenizer's."""
    tiny_tokenizers.byte_level(folder)
    vocab = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    facts = {
        "model_type": "llama", "vocab_size": vocab, "max_position_embeddings": context_length, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    return str(folder)
