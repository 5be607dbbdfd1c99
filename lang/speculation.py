"""API speculative execution: one call answers several `gen`s of a program (SGLang's paper, arXiv 2312.07104).

An API is paid by the call and by the prompt. With `num_api_spec_tokens` a call asks for more than its `gen` wants and
keeps the rest; while the program's own text agrees with the rest, later `gen`s are answered from it. Used by the
interpreter. Invariant: a `gen` gets from here exactly what a call of its own would have drawn had the model continued
as it did: same stop strings, same token limit. Where that cannot be told, there is no answer, and the call is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

import msgspec

from .expressions import Sampling

TRIES: Final = 3
"""Calls for one block of a chat model that may not fit the program's text before it is given up."""


@dataclass(slots=True)
class Speculation:
    """How it has gone in a branch so far, as `get_meta_info(name)["speculation"]` reports it."""

    calls: int = 0
    hits: int = 0
    """`gen`s that needed no call."""
    misses: int = 0
    """Texts ahead that the program did not go along with, or that ended too early."""
    tokens_saved: int = 0
    """Prompt tokens that the calls of the hits would have sent again."""

    def report(self) -> dict[str, int]:
        return {"calls": self.calls, "hits": self.hits, "misses": self.misses, "tokens_saved": self.tokens_saved}


@dataclass(slots=True)
class Ahead:
    """What a model has said beyond the program's text. `ends[i]`: where token i ends in `text`; None: unknown."""

    text: str
    ends: list[int] | None
    tokens: int
    """How many tokens the text has at most."""
    prompt_tokens: int
    """Tokens before the text."""
    finished: bool
    """The model ended there by itself."""
    sampling: Sampling
    """What it was drawn with."""

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature is not None and self.sampling.temperature < 1e-6

    def copy(self) -> "Ahead":
        return replace(self)

    def fits(self, sampling: Sampling) -> bool:
        """Whether a call with these parameters would have drawn the same."""
        return _drawing(self.sampling) == _drawing(sampling)

    def take_literal(self, text: str) -> bool:
        """Go past the program's own text; False if the model has said something else."""
        if not self.text.startswith(text):
            return False
        self._advance(len(text))
        return True

    def take_gen(self, stops: Sequence[str], max_tokens: int) -> tuple[str, str] | None:
        """(text, finish reason) of a `gen` here, as a call with these limits would give it; None if it is not known."""
        limit = self._limit(stops, max_tokens)
        if limit is None:
            return None
        length, is_cut = limit
        stop = _first(self.text[:length], stops)
        if stop is not None:
            length, finish = stop, "stop"
        elif is_cut:
            finish = "length"
        elif self.finished:
            finish = "stop"
        else:
            return None
        piece = self.text[:length]
        self._advance(length)
        return piece, finish

    def _limit(self, stops: Sequence[str], max_tokens: int) -> tuple[int, bool] | None:
        """(length of what `max_tokens` tokens cover, whether the limit ends it); None if that cannot be told."""
        if self.ends is not None:
            cut = len(self.ends) >= max_tokens
            return (self.ends[max_tokens - 1] if cut and max_tokens else len(self.text) if not cut else 0), cut
        if self.tokens <= max_tokens:
            return len(self.text), False
        # A token is a byte at least: what has no more bytes than the limit is within it.
        stop = _first(self.text, stops)
        longest = max(map(len, stops), default=0)
        if stop is not None and len(self.text[: stop + longest].encode()) <= max_tokens:
            return len(self.text), False
        return None

    def _advance(self, length: int) -> None:
        self.text = self.text[length:]
        if self.ends is None:
            return
        gone = sum(1 for end in self.ends if end <= length)
        self.prompt_tokens += gone
        self.ends = [end - length for end in self.ends[gone:]]


def ahead_of(text: str, meta: dict[str, Any], sampling: Sampling) -> Ahead:
    """What a reply says, before anything of it is taken. `meta`: its meta_info, with the tokens' texts if known."""
    texts = meta.get("output_token_texts") or [row[2] or "" for row in meta.get("output_token_logprobs") or ()]
    ends: list[int] | None = list(accumulate(map(len, texts)))
    while ends and ends[-1] > len(text):
        ends.pop()  # of the token that ended it, which is not in the text
    if not ends or "".join(texts[: len(ends)]) != text:
        ends = None
    finished = (meta.get("finish_reason") or {}).get("type") == "stop"
    tokens = len(ends) if ends is not None else meta.get("completion_tokens") or len(text.encode())
    return Ahead(text, ends, tokens, meta.get("prompt_tokens") or 0, finished, sampling)


def may_speculate(sampling: Sampling) -> bool:
    """Whether a `gen` can be answered from what another one's call drew: nothing but text is asked of it."""
    asked = (
        sampling.regex,
        sampling.json_schema,
        sampling.ebnf,
        sampling.dtype,
        sampling.tools,
        sampling.return_logprob,
        sampling.stop_regex,  # it is searched in all that a call draws, so another call finds it elsewhere
    )
    return not any(asked) and (sampling.n or 1) == 1 and not sampling.stop_token_ids and not sampling.min_new_tokens


def counts(sampling: Sampling) -> bool:
    """Whether what a call has drawn changes what it draws next: a call of a later `gen` would count from nothing."""
    return bool(sampling.frequency_penalty or sampling.presence_penalty)


def beyond(sampling: Sampling, tokens: int, tells_tokens: bool = True) -> Sampling:
    """The parameters of a call that also answers what may follow. Logprobs tell where its tokens end, where a server
    has them."""
    asked = msgspec.structs.replace(sampling, stop=(), max_new_tokens=max(sampling.max_new_tokens or 0, tokens))
    return msgspec.structs.replace(asked, return_logprob=True, return_text_in_logprobs=True) if tells_tokens else asked


def _drawing(sampling: Sampling) -> Sampling:
    ours = {"return_logprob": None, "return_text_in_logprobs": None}
    return msgspec.structs.replace(sampling, stop=None, max_new_tokens=None, seed=None, **ours)


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    found = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return min(found, default=None)
