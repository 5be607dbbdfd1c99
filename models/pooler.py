"""Pooler: from the hidden states of prompt chunks to one vector a request, as config.Pooling says.

Used by the stepper, which runs no other requests on such a model. A prompt's chunks come in order, so a mean is a sum
that is kept for each slot between them. Invariant: a vector depends on its own prompt alone, not on how it was cut or
on what else ran beside it.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..config import Pooling
from ..sampler.upload import upload
from .decoder import Decoder
from .runner import ChunkWork

ACTIVATIONS: Final = {"tanh": torch.tanh, "relu": torch.relu}


class Pooler:
    """One model's. `slots`: how many requests may run at once."""

    def __init__(self, pooling: Pooling, decoder: Decoder, slots: int) -> None:
        self.kind = pooling.kind
        self.spec = decoder.spec
        self.score = decoder.weights.score
        self.device = decoder.device
        self.sums = torch.zeros(
            0 if self.kind == "last" else slots, self.spec.hidden, dtype=torch.float32, device=self.device
        )
        """[slots, hidden]: of a prompt's tokens so far, or for "cls" its first one."""

    def rows(self, chunks: list[ChunkWork]) -> np.ndarray:
        """Which of the chunks' tokens, one chunk after another, have hidden states that are needed: int64 [n]."""
        ends = np.cumsum([len(c.ids) for c in chunks], dtype=np.int64)
        if self.kind == "mean":
            return np.arange(ends[-1])
        if self.kind == "cls":
            return np.array([end - len(c.ids) for end, c in zip(ends, chunks, strict=True) if not c.start], np.int64)
        return np.array([end - 1 for end, c in zip(ends, chunks, strict=True) if c.ends], dtype=np.int64)

    def vectors(self, hidden: Tensor, chunks: list[ChunkWork]) -> Tensor:
        """Return float32 [chunks that end their prompts, width], from the hidden states [n, hidden] of `rows`."""
        hidden = hidden.float()
        ended = [c for c in chunks if c.ends]
        if self.kind != "last":
            self._keep(hidden, chunks)
            hidden = self.sums.index_select(0, self._index([c.slot for c in ended]))
        if self.kind == "mean":
            counts = np.array([c.start + len(c.ids) for c in ended], dtype=np.float32)
            hidden = hidden / upload(counts, self.device)[:, None]
        return hidden if self.score is None else self._scores(hidden)

    def _keep(self, hidden: Tensor, chunks: list[ChunkWork]) -> None:
        """Add what the chunks bring to the slots' sums, which begin with a prompt's first chunk."""
        first = self._index([c.slot for c in chunks if not c.start])
        self.sums.index_fill_(0, first, 0.0)
        if self.kind == "cls":
            self.sums.index_copy_(0, first, hidden)
            return
        # Each chunk is summed by itself, so that its neighbours in the batch change nothing.
        parts = [part.sum(0) for part in torch.split(hidden, [len(c.ids) for c in chunks])]
        self.sums.index_add_(0, self._index([c.slot for c in chunks]), torch.stack(parts))

    def _scores(self, pooled: Tensor) -> Tensor:
        """The classification head's logits."""
        assert self.score is not None and self.spec.score is not None
        if self.score.dense is not None and self.spec.score.dense is not None:
            pooled = ACTIVATIONS[self.spec.score.dense](self.score.dense(pooled))
        return self.score.labels(pooled)

    def _index(self, values: list[int]) -> Tensor:
        return upload(np.array(values, dtype=np.int64), self.device)
