"""Admission: how much one front may have in the engine, told before a request costs anything.

Used by client.py. A request is counted as what it may come to at worst: its prompt, the output up to its limit, and the
logprobs beside each token, times its continuations. Invariant: what is admitted and not yet over never sums to more
than the limits say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..config import EngineConfig, ModelInfo, Pooling
from ..errors import Overloaded, RequestError
from ..sampler.params import SamplingParams
from . import messages

TOKEN_BYTES: Final = 8
"""Of an output token: its id, and its text in a front."""
VECTOR_BYTES: Final = 32
"""Of a number in a vector: as float32, and on its way to JSON as a Python object."""
LOGPROB_BYTES: Final = 160
"""Of one logprob that waits for its reader: the value, the token and its bytes, as Python objects."""
ADDRESS_BYTES: Final = 1 << 20
"""Of an image that is still to be fetched; what it has is known then."""


@dataclass(slots=True, frozen=True)
class Submission:
    """One prompt of a request, how to continue it, and how often."""

    prompt: messages.Prompt
    params: SamplingParams
    n: int = 1
    grammar: messages.GrammarSpec | None = None
    pin: int = 0
    """Of `Client.new_pin`: see messages.Generate."""
    pooled: bool = False
    """Its vector is wanted, and no continuation."""
    name: str = ""
    """What the client calls it: `abort` and `Questions.timelines` find it by this."""
    dp_rank: int | None = None
    """The replica that is to serve it; None: any."""


class Admission:
    """The limits, and the requests and bytes in the engine."""

    def __init__(self, config: EngineConfig, model: ModelInfo) -> None:
        self._config = config
        self._model = model
        self.requests = 0
        self.bytes = 0

    def admit(self, submissions: Sequence[Submission]) -> list[int]:
        """Count them in; returns what a continuation of each comes to, in bytes: `leave` is told so at its end.

        Raises RequestError for what is never admitted, Overloaded for what does not fit now; then nothing is counted.
        """
        for submission in submissions:
            check_task(self._model.pooling, submission.pooled)
            submission.params.check(self._model.vocab_size)
            self._check(submission)
        costs = [self._cost(submission) for submission in submissions]
        count = sum(s.n for s in submissions)
        size = sum(cost * s.n for cost, s in zip(costs, submissions, strict=True))
        most, most_bytes = self._config.max_queued_requests, self._config.max_queued_bytes
        if count > most:
            raise RequestError(f"one request may ask for at most {most} continuations", code="too_many")
        if size > most_bytes:
            what = f"this may come to {size} bytes, of prompts, n times max_new_tokens, and logprobs beside each token"
            raise RequestError(f"{what}; the most is {most_bytes}", param="max_new_tokens", code="too_large")
        self.check_room(count)
        if self.bytes + size > most_bytes:
            raise Overloaded(f"the requests in the engine may come to {self.bytes} bytes; try again")
        self.requests += count
        self.bytes += size
        return costs

    def check_room(self, count: int) -> None:
        """Raise Overloaded where so many requests are too many for now."""
        most = self._config.max_queued_requests
        if self.requests + count > most:
            raise Overloaded(f"{self.requests} requests are in the engine, the most is {most}; try again")

    def leave(self, cost: int) -> None:
        """A continuation is over."""
        self.requests -= 1
        self.bytes -= cost

    def _check(self, submission: Submission) -> None:
        config, grammar, rank = self._config, submission.grammar, submission.dp_rank
        if rank is not None and rank not in range(config.dp_size):
            raise no_replica(rank, config, "dp_rank")
        if submission.n > config.max_n:
            raise RequestError(f"n must be at most {config.max_n}", param="n")
        if (submission.params.logprobs or 0) > config.max_logprobs:
            raise RequestError(f"logprobs must be at most {config.max_logprobs}", param="logprobs")
        if grammar is not None and _utf8_length(grammar.text) > config.max_grammar_bytes:
            what = f"{grammar.kind} is above {config.max_grammar_bytes} bytes"
            raise RequestError(what, param=grammar.kind, code="grammar_too_large")

    def _cost(self, submission: Submission) -> int:
        """Bytes that one continuation may come to."""
        params, prompt, context = submission.params, submission.prompt, self._model.context_length
        match prompt:
            case messages.TextPrompt():
                size = tokens = len(prompt.text) + len(prompt.second or "")
            case messages.ChatPrompt():
                size = tokens = len(prompt.payload)
            case messages.TokenPrompt():
                size, tokens = len(prompt.ids), len(prompt.ids) // 4
        files = [*prompt.images, *(frame for video in prompt.videos for frame in video.frames)]
        size += sum(ADDRESS_BYTES if file.url else len(file.data) for file in files)
        most = context if params.max_new_tokens is None else min(params.max_new_tokens, context)
        logprobs = 0
        if params.logprobs is not None:
            beside = 1 + params.logprobs + len(params.token_ids_logprob)
            logprobs = (most + (min(tokens, context) if params.wants_prompt else 0)) * beside
        grammar = 0 if submission.grammar is None else len(submission.grammar.text)
        vector = 0 if self._model.pooling is None else self._model.pooling.width * VECTOR_BYTES
        return size + grammar + most * TOKEN_BYTES + logprobs * LOGPROB_BYTES + vector


def no_replica(rank: int, config: EngineConfig, param: str) -> RequestError:
    """The error for a rank that no replica has."""
    text = "there is one, whose rank is 0" if config.dp_size == 1 else f"ranks are 0 to {config.dp_size - 1}"
    return RequestError(f"there is no replica {rank}: {text}", param=param, code="invalid_value")


def check_task(pooling: Pooling | None, pooled: bool) -> None:
    """Raise RequestError for a text of a model that has none to give, or a vector of one that generates."""
    if pooled and pooling is None:
        text = "this server's model generates text; for embeddings start it with --is-embedding"
        raise RequestError(text, param="model", code="unsupported_model")
    if not pooled and pooling is not None:
        what = "embeddings" if pooling.task == "embed" else "scores of a classification head"
        raise RequestError(f"this server's model gives {what}, no text", param="model", code="unsupported_model")


def _utf8_length(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
