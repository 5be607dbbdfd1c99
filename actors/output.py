"""Output: one running request as the text actor knows it, from token ids to what the client may see.

Invariant: `chunk` gives out each character, token and logprob once and in order; the text does not depend on how many
tokens came between two chunks; work per token does not grow with the output.
"""

from array import array
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..models.detokenize import Detokenizer
from ..models.stop import StopMatcher
from ..models.stop_regex import PatternMatcher
from ..sampler.params import SamplingParams
from .messages import Chunk, Finish, ImagePixels, PromptLogprobs, Resumed, Submit, TokenLogprob, Tokens
from .replicas import Replica

MOST_ENTRIES: Final = 4096
"""Logprobs of a prompt in one chunk, those beside each token counted."""


class Output:
    """The output of one request id."""

    __slots__ = (
        "_detokenizer",
        "_end_logprob",
        "_ends",
        "_fed",
        "_followed",
        "_keep_stop",
        "_known_prompt",
        "_logprobs",
        "_new_ids",
        "_new_logprobs",
        "_new_prompt",
        "_new_text",
        "_next_prompt",
        "_shown",
        "_skip_chars",
        "_skip_ids",
        "_stop",
        "_submit",
        "_vector",
        "aborted",
        "begun",
        "cached_tokens",
        "finish",
        "forced_tokens",
        "front",
        "ids",
        "images",
        "jumps",
        "matched",
        "params",
        "prompt_tokens",
        "replica",
        "rid",
        "thinking",
    )

    def __init__(
        self,
        submit: Submit,
        front: str,
        replica: Replica,
        params: SamplingParams,
        detokenizer: Detokenizer | None,
        thinking: bool = False,
    ) -> None:
        """`submit`: how the scheduler of `replica` was asked; `params`: the front's, with the stop strings.

        `detokenizer` None: token ids only. `thinking`: as Chunk.thinking.
        """
        self.rid = submit.rid
        self.front = front
        self.replica = replica
        self.prompt_tokens = len(submit.ids) // 4
        self.cached_tokens = 0
        self.ids = array("i")
        """The tokens so far."""
        self.images: tuple[ImagePixels, ...] = ()
        """Its prompt's, for a scheduler that is asked again."""
        self.aborted = False
        """Its front wants it to end with what there is."""
        self.begun = False
        """Its front has been told something of it."""
        self.forced_tokens = 0
        self.jumps = 0
        self.thinking = thinking
        self.params = params
        self.finish: Literal["stop", "length", "abort"] | None = None
        self.matched: int | str | None = None
        self._submit = submit
        self._detokenizer = detokenizer
        self._stop = _stop_matcher(params)
        self._keep_stop = params.no_stop_trim
        self._new_text = ""
        self._new_ids: list[int] = []
        self._new_logprobs: list[TokenLogprob] = []
        self._new_prompt: list[TokenLogprob] = []
        self._next_prompt = self._known_prompt = 0
        """Of the prompt's tokens whose logprobs are wanted: the one that comes next, and how many were told or wait."""
        self._logprobs: deque[tuple[int, TokenLogprob]] = deque()
        """Logprobs that wait for their token's text to be shown, with the place of its first character."""
        self._end_logprob: list[TokenLogprob] = []
        """That of the token that ended it, if it has no text."""
        self._fed = 0
        """Characters that came out of the detokenizer; of these, `_shown` went to the client or wait for `chunk`."""
        self._shown = 0
        self._followed = False
        """All places where the text matches its grammar come to be known."""
        self._ends: deque[int] = deque()
        """Where the text matches its grammar, in characters; all of them until the text there is shown."""
        self._vector = b""
        self._skip_ids = self._skip_chars = 0
        """Of what comes next, the front has these already."""

    @property
    def completion_tokens(self) -> int:
        """Tokens so far."""
        return len(self.ids)

    def is_called(self, name: str, tenant: str | None) -> bool:
        """Whether AbortNamed means it."""
        return name in ("", self._submit.name) and tenant in (None, self._submit.tenant)

    def prompt(self) -> tuple[NDArray[np.int32], str]:
        """Its token ids, and the salt of what they may share."""
        return np.frombuffer(self._submit.ids, dtype=np.int32), self._submit.cache_salt

    def submission(self) -> Submit:
        """How to ask a scheduler for the rest of it."""
        self._next_prompt = min(self._next_prompt, 1)  # the first one is not the scheduler's to tell
        return replace(self._submit, generated=memoryview(self.ids.tobytes())) if self.ids else self._submit

    def resume(self, m: Resumed) -> None:
        """Go on where the front lost the last text actor: before anything else was pushed.

        Tokens whose logprobs it lacks are drawn again; they come out the same, and are not given out twice.
        """
        ids = array("i")
        ids.frombytes(m.ids)
        known = ids if self.params.logprobs is None else ids[: m.logprobs]
        for token in known:
            self.push(token, Finish.NONE)
        self._skip_ids, self._skip_chars = len(ids), m.chars
        self._known_prompt = m.prompt_logprobs
        self.cached_tokens, self.forced_tokens, self.jumps = m.cached_tokens, m.forced_tokens, m.jumps

    def push(self, token: int, finish: int, logprob: TokenLogprob | None = None, *, complete: bool = False) -> None:
        """Take the next token. `finish` is the row's Finish, not POISON. A token of -1 is none (max_new_tokens 0).

        The token that ended the output counts, and is among the ids; it has no text (unless no_stop_trim).
        `complete`: what is seen of the output matches its grammar now.
        """
        hidden = token < 0 or (finish == Finish.STOP and not self._keep_stop)
        if token >= 0:
            self.ids.append(token)
            self._new_ids.append(token)
        if logprob is not None and not hidden:
            self._logprobs.append((self._fed, logprob))
        elif logprob is not None and token >= 0:
            self._end_logprob.append(logprob)
        if finish == Finish.STOP:
            self.finish, self.matched = "stop", token
        elif finish == Finish.LENGTH:
            self.finish = "length"
        if self._detokenizer is not None:
            text = "" if hidden else self._detokenizer.push(token)
            if finish:
                text += self._detokenizer.finish()
            if text or finish:
                self._show(text)
        if complete:
            self._may_end()
        if self._logprobs:
            self._release_logprobs()

    def push_vector(self, vector: bytes) -> None:
        """Take the prompt's vector, float32: the request wanted that and no output."""
        self._vector = vector
        self.finish = "stop"

    def push_prompt(self, logprobs: list[TokenLogprob]) -> None:
        """Take the next tokens of the prompt whose logprobs are wanted; those that were told before count once."""
        self._new_prompt += logprobs[max(0, self._known_prompt - self._next_prompt) :]
        self._next_prompt += len(logprobs)
        self._known_prompt = max(self._known_prompt, self._next_prompt)

    @property
    def holds_prompt(self) -> bool:
        """Whether `chunk` has more of the prompt's logprobs to give: it gives no more than a message can well hold."""
        return bool(self._new_prompt)

    def follow(self, complete: bool) -> None:
        """It has a grammar, and it will be told whenever the output matches; an empty one does if `complete`."""
        self._followed = True
        if complete:
            self._may_end()

    def _may_end(self) -> None:
        self._ends.append(self._fed)
        while self._ends[0] < self._shown:
            self._ends.popleft()

    def abort(self) -> None:
        """The scheduler gave it up unasked: end with what there is."""
        self.finish = "abort"
        if self._stop is not None:
            held = self._stop.finish()
            self._shown += len(held)
            self._new_text += held
        self._release_logprobs()

    def chunk(self) -> Chunk | None:
        """What is new since the last call; None if there is nothing to see yet. A prompt's logprobs come first."""
        if self._skip_ids or self._skip_chars:
            self._skip()
        if self._new_prompt:
            width = 1 + (self.params.logprobs or 0) + len(self.params.token_ids_logprob)
            most = max(1, MOST_ENTRIES // width)
            prompt, self._new_prompt = self._new_prompt[:most], self._new_prompt[most:]
            return self._chunk("", [], [], prompt) if self._new_prompt else self._all(prompt)
        if self.finish is None and not self._new_text and (self._detokenizer is not None or not self._new_ids):
            return None
        return self._all([])

    def _all(self, prompt: list[TokenLogprob]) -> Chunk:
        """A chunk with all output that is new, and the end if there is one."""
        text, ids, logprobs = self._new_text, self._new_ids, self._new_logprobs
        self._new_text, self._new_ids, self._new_logprobs = "", [], []
        return self._chunk(text, ids, logprobs, prompt, ends=True)

    def _chunk(
        self,
        text: str,
        ids: list[int],
        logprobs: list[TokenLogprob],
        prompt: list[TokenLogprob],
        ends: bool = False,
    ) -> Chunk:
        self.begun = True
        return Chunk(
            rid=self.rid,
            text=text,
            ids=ids,
            logprobs=logprobs,
            finish=self.finish if ends else None,
            matched=self.matched if ends else None,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            forced_tokens=self.forced_tokens,
            jumps=self.jumps,
            thinking=self.thinking,
            valid=self._valid() if ends else None,
            prompt_logprobs=prompt,
            vector=self._vector if ends else b"",
            dp_rank=self.replica.number,
            end_logprobs=self._without_text() if ends and self.finish is not None else [],
        )

    def _without_text(self) -> list[TokenLogprob]:
        """Logprobs that are left at the end."""
        return [*(logprob for _, logprob in self._logprobs), *self._end_logprob]

    def _skip(self) -> None:
        ids, chars = min(self._skip_ids, len(self._new_ids)), min(self._skip_chars, len(self._new_text))
        self._new_ids, self._new_text = self._new_ids[ids:], self._new_text[chars:]
        self._skip_ids -= ids
        self._skip_chars -= chars

    def _valid(self) -> bool | None:
        """Whether the text matches the grammar; None before the end, and where that is not known."""
        if self.finish is None:
            return None
        return self._shown in self._ends or (False if self._followed else None)

    def _show(self, text: str) -> None:
        """Pass text on, as far as it can be no part of a stop string. Those of the first min_new_tokens are none."""
        self._fed += len(text)
        if self._stop is not None and len(self.ids) > self.params.min_new_tokens:
            text = self._stop.feed(text)
            if self._stop.matched is not None:
                self.finish, self.matched = "stop", self._stop.matched
            elif self.finish is not None:
                text += self._stop.finish()
        self._shown += len(text)
        self._new_text += text

    def _release_logprobs(self) -> None:
        """Those whose text is shown; at the end all, except of what a stop string cut off."""
        cut = self._stop is not None and self._stop.matched is not None
        everything = self._detokenizer is None or (self.finish is not None and not cut)
        while self._logprobs and (everything or self._logprobs[0][0] < self._shown):
            self._new_logprobs.append(self._logprobs.popleft()[1])


def _stop_matcher(params: SamplingParams) -> StopMatcher | PatternMatcher | None:
    trim = not params.no_stop_trim
    if params.stop_regex:
        return PatternMatcher(params.stop, params.stop_regex, trim)
    return StopMatcher(params.stop, trim) if params.stop else None


def logprob_of(
    m: Tokens | PromptLogprobs,
    row: int,
    token: int,
    logprob: float,
    params: SamplingParams,
    spelled: Callable[[int], bytes],
) -> TokenLogprob:
    """Return the logprob of a message's row, with the others that its request wants; `spelled`: a token's bytes."""
    first, count = row * m.top_n, min(params.logprobs or 0, m.top_n)
    top: list[tuple[int, float, bytes]] = []
    if count:
        ids = np.frombuffer(m.top_ids, dtype=np.int32, count=count, offset=4 * first).tolist()
        values = np.frombuffer(m.top_logprobs, dtype=np.float32, count=count, offset=4 * first).tolist()
        top = [(i, value, spelled(i)) for i, value in zip(ids, values, strict=True)]
    named = params.token_ids_logprob
    if not named or not len(m.listed):
        return TokenLogprob(token, logprob, spelled(token), top)
    width = len(m.listed) // len(m.logprobs)
    values = np.frombuffer(m.listed, dtype=np.float32, count=len(named), offset=4 * row * width).tolist()
    listed = [(i, value, spelled(i)) for i, value in zip(named, values, strict=True)]
    return TokenLogprob(token, logprob, spelled(token), top, listed)
