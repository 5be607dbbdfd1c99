"""Logprobs of a request's prompt: which of them are wanted, which are known, and which rows must be computed for them.

Used by schedule.py. The logprob of a token comes from the forward of the token before it, so tokens whose KV is cached
have none to give, unless it is in the radix tree beside their pages, where what becomes known here goes: each token's
own, and those of the most likely ones. With tokens that the request names, it must be computed.
Invariant: the wanted tokens before `known` are known; each is told once and in order; what of a prompt may come from
the cache ends before the token whose forward gives the first one that is not known.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ..kvstore.radix import RadixTree
from ..sampler.params import SamplingParams

TOLD_AT_ONCE: Final = 4096
"""Tokens of one message."""
NOTHING: Final = np.empty((0, 1), np.float32)


@dataclass(slots=True, eq=False)
class PromptScores:
    """One request's. Places are those of tokens in the prompt."""

    start: int
    """The tokens behind this one are wanted."""
    end: int
    """The prompt's length."""
    top: int
    """Those of so many most likely tokens are wanted too."""
    named: bool
    """And those of named tokens, which the tree does not have."""
    known: int
    told: int
    """Of the wanted tokens before this place the text actor was told."""
    values: np.ndarray = field(default_factory=lambda: NOTHING)
    """float32 [end, 1 + 2 top], from its first life on; NaN where unknown or not wanted. The token's own logprob, then
    logprob and id of each of the most likely tokens (float32 holds ids up to 2**24)."""
    first_row: int = 0
    """In its present life, the first token whose forward is to give the next one's."""
    kept: int = 0
    """The tokens before this place are in the tree, with what is known of them."""

    @property
    def columns(self) -> int:
        """Of `values`."""
        return 1 + 2 * self.top

    def look_up(self, tree: RadixTree, ids: np.ndarray, namespace: str) -> np.ndarray:
        """Count what the tree knows now of those that were not told, and return it; ids int32, the prompt at least.

        A request that waits has no more than the count: what it has of an earlier life, it has told.
        """
        self.known = self.told
        if self.named or self.told >= self.end:
            return NOTHING
        found = tree.logprobs(ids[: self.end], self.columns, namespace)[self.told :]
        missing = np.flatnonzero(np.isnan(found).any(axis=1))
        found = found[: missing[0]] if len(missing) else found
        self.known += len(found)
        return found

    def reusable(self, tokens: int) -> int:
        """Of so many leading tokens of the request, those whose KV may come from the cache."""
        return tokens if self.known >= self.end else min(tokens, self.known - 1)

    def provides(self, other: "PromptScores") -> bool:
        """Whether what becomes known here spares another request, with the same prompt so far, its own rows."""
        return not other.named and self.start <= other.start and self.top >= other.top

    def seat(self, tree: RadixTree, ids: np.ndarray, namespace: str) -> None:
        """A life begins: take what `look_up` finds; rows are computed from the first one that is needed."""
        found = self.look_up(tree, ids, namespace)
        if not len(self.values):
            self.values = np.full((self.end, self.columns), np.nan, np.float32)
        self.values[self.told : self.known] = found
        self.first_row, self.kept = self.known - 1, 0

    def rows(self, start: int, end: int) -> tuple[int, int]:
        """(the first, how many) of the tokens of a chunk [start, end) whose forward gives the next one's."""
        first = max(start, self.first_row)
        return first, max(0, min(end, self.end - 1) - first)

    def learn(self, start: int, values: np.ndarray) -> None:
        """Take those of the tokens from `start` on, as they were computed: who does tells of them.

        values float32 [n, columns], as here; with more columns, those of requests that want more.
        """
        values = values[:, : self.columns]
        self.known = self.told = start + len(values)
        self.values[start : self.known, : values.shape[1]] = values

    def keep(self, tree: RadixTree, ids: np.ndarray, namespace: str) -> None:
        """Give the tree what is known of the first tokens, ids int32: their pages are in it."""
        tree.keep_logprobs(ids, self.values, namespace, self.kept)
        self.kept = len(ids)

    def untold(self) -> tuple[int, np.ndarray] | None:
        """(place of the first, `values`) of the known ones that nobody was told of, some at a time; then None."""
        if self.told >= self.known:
            return None
        start, self.told = self.told, min(self.known, self.told + TOLD_AT_ONCE)
        return start, self.values[start : self.told]


def prompt_scores(params: SamplingParams, prompt_length: int) -> PromptScores | None:
    """Return what a new request wants of its prompt; None: nothing."""
    if not params.wants_prompt or params.logprob_start_len >= prompt_length:
        return None
    start = params.logprob_start_len
    named = bool(params.token_ids_logprob)
    return PromptScores(start, prompt_length, params.logprobs or 0, named, known=start + 1, told=start + 1)
