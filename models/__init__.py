"""One decoder described by data, its attention backends, weights and tokenizers."""
