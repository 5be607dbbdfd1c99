"""A random tiny model with the vocabulary of a byte-level tokenizer, for outputs that must match a grammar."""

from pathlib import Path

import tiny
import tiny_tokenizers

WORDS = 416
"""Its vocabulary. Id 2 ends outputs, by the model and by the tokenizer."""


def word_model(folder: Path) -> str:
    """Write it and return its path."""
    tiny_tokenizers.byte_level(folder)
    return tiny.save(tiny.build("llama", vocab_size=WORDS), folder)
