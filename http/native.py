"""POST /generate: SGLang's native protocol. One prompt or a batch, text or token ids, streamed or whole.

Invariant: `text`, `output_ids` and logprobs of a frame are cumulative (all so far); a batch is answered with a list in
the order prompt by prompt, each with its n continuations, and a frame of a streamed batch says its `index` in it.
"""

import math
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from ..actors.admission import Submission
from ..actors.client import token_prompt
from ..actors.grammar_fields import GIVEN as GRAMMAR_FIELDS
from ..actors.grammar_fields import UNSUPPORTED as GRAMMAR_UNSUPPORTED
from ..actors.grammar_fields import grammar_spec
from ..actors.image_fields import with_images
from ..actors.messages import Chunk, GrammarSpec, Prompt, TextPrompt, TokenLogprob
from ..actors.stream import Choice, Stream
from ..errors import RequestError
from ..sampler.params import SamplingParams
from .error_replies import decode_body
from .exchange import Exchange
from .native_types import (
    NATIVE_REFUSED,
    GenerateReply,
    GenerateRequest,
    MetaInfo,
    NativeFinish,
    NativeSampling,
    TokenRow,
    TokenRows,
)
from .protocol import encode, said
from .service import Service
from .sse import DONE, AtEnd, data_event, send_stream
from .timelines import RequestTimeline, timeline_of

T = TypeVar("T")
_decoder: Final = msgspec.json.Decoder(GenerateRequest)


@dataclass(slots=True)
class Continuation:
    """What one choice has said so far, and how it is to be shown."""

    rid: str
    params: SamplingParams
    with_text: bool
    index: int | None
    constrained: bool = False
    shows_rank: bool = False
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    input: "Rows" = field(default_factory=lambda: Rows())
    output: "Rows" = field(default_factory=lambda: Rows())
    timeline: RequestTimeline | UnsetType | None = UNSET

    def add(self, chunk: Chunk) -> None:
        """Append the output of `chunk`."""
        self.texts.append(chunk.text)
        self.ids += chunk.ids
        if self.params.logprobs is not None:
            self.input.add(chunk.prompt_logprobs, self.params, self.with_text)
            self.output.add([*chunk.logprobs, *chunk.end_logprobs], self.params, self.with_text)

    def reply(self, chunk: Chunk, choice: Choice) -> GenerateReply:
        """Return everything so far; `chunk` is the newest."""
        with_logprobs = self.params.logprobs is not None
        with_top, with_listed = bool(self.params.logprobs), with_logprobs and bool(self.params.token_ids_logprob)
        meta = MetaInfo(
            self.rid,
            _finish(chunk),
            chunk.prompt_tokens,
            chunk.completion_tokens,
            chunk.cached_tokens,
            (time.monotonic_ns() - choice.arrival_ns) / 1e9,
            self.output.tokens if with_logprobs else UNSET,
            self.output.top if with_top else UNSET,
            self.output.listed if with_listed else UNSET,
            self.input.tokens if with_logprobs else UNSET,
            self.input.top if with_top else UNSET,
            self.input.listed if with_listed else UNSET,
            chunk.forced_tokens if self.constrained else UNSET,
            chunk.jumps if self.constrained else UNSET,
            said(chunk.valid),
            self.timeline,
            chunk.dp_rank if self.shows_rank else UNSET,
        )
        return GenerateReply("".join(self.texts), self.ids, meta, UNSET if self.index is None else self.index)


@dataclass(slots=True)
class Rows:
    """Logprobs of tokens, and at each place those of the most likely ones and of those that the request named."""

    tokens: list[TokenRow] = field(default_factory=list)
    top: TokenRows = field(default_factory=list)
    listed: TokenRows = field(default_factory=list)

    def add(self, items: list[TokenLogprob], params: SamplingParams, with_text: bool) -> None:
        """Append what the request wants of the next tokens."""

        def row(token: int, logprob: float, text: bytes) -> TokenRow:
            return (logprob, token, text.decode("utf-8", "replace") if with_text else None)

        for item in items:
            self.tokens.append(row(item.token, item.logprob, item.text))
            first = len(self.tokens) == 1 and math.isnan(item.logprob)  # of a prompt: nothing came before it
            if params.logprobs:
                self.top.append(None if first else [row(*other) for other in item.top[: params.logprobs]])
            if params.token_ids_logprob:
                self.listed.append(None if first else [row(*other) for other in item.listed])


class NativeRenderer:
    """An event a chunk; see sse.Renderer."""

    def __init__(self, stream: Stream, continuations: list[Continuation]) -> None:
        self._stream = stream
        self._continuations = continuations

    def head(self) -> Iterable[bytes]:
        return ()

    def chunk(self, chunk: Chunk) -> Iterable[bytes]:
        index = self._stream.index(chunk)
        continuation = self._continuations[index]
        continuation.add(chunk)
        return (data_event(encode(continuation.reply(chunk, self._stream.choices[index]))),)

    def tail(self) -> Iterable[bytes]:
        return (DONE,)


async def generate(service: Service, exchange: Exchange) -> None:
    """Serve POST or PUT /generate."""
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    for name in NATIVE_REFUSED:
        if getattr(request, name):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_value")
    for name in ("text", "input_ids"):
        value = getattr(request, name)
        if isinstance(value, list) and not isinstance(value[0] if value else 0, int):
            service.check_batch(len(value), name)
    rank = service.rank_of(request.routed_dp_rank, request.data_parallel_rank)
    submissions, continuations, is_list = _plan(request, service.model.vocab_size, rank)
    for continuation in continuations:
        continuation.shows_rank = service.config.dp_size > 1
    stream = service.client.submit_all(submissions, request.cache_salt or "", request.priority or 0)
    learn = _timelines(service, stream, continuations) if request.timeline else None
    async with exchange.watched(stream):
        if request.stream:
            await send_stream(exchange, stream, NativeRenderer(stream, continuations), at_end=learn)
            return
        replies = []
        chunks = await stream.collect()
        if learn is not None:
            await learn(chunks)
        for chunk, choice, continuation in zip(chunks, stream.choices, continuations, strict=True):
            continuation.add(chunk)
            continuation.index = None
            replies.append(continuation.reply(chunk, choice))
        await exchange.reply(encode(replies if is_list else replies[0]))


def _timelines(service: Service, stream: Stream, continuations: list[Continuation]) -> AtEnd:
    """What asks for the timelines of choices that have ended."""
    first: dict[str, int] = {}
    for i, continuation in enumerate(continuations):
        first.setdefault(continuation.rid, i)

    async def learn(chunks: list[Chunk]) -> None:
        known: dict[str, list[RequestTimeline]] = {}
        for chunk in chunks:
            index = stream.index(chunk)
            continuation = continuations[index]
            if continuation.rid not in known:
                known[continuation.rid] = await timeline_of(service, continuation.rid)
            place = index - first[continuation.rid]
            found = (one for one in known[continuation.rid] if one.index == place)
            continuation.timeline = next(found, None)

    return learn


def _plan(
    request: GenerateRequest, vocab_size: int, rank: int | None
) -> tuple[list[Submission], list[Continuation], bool]:
    """Return what to submit, one Continuation a choice, and whether the reply is a list."""
    prompts, is_batch = native_prompts(request.text, request.input_ids, vocab_size)
    prompts = with_images(prompts, request.image_data, is_batch, request.video_data)
    count = len(prompts)
    sampling = per_prompt(request.sampling_params, count, NativeSampling(), "sampling_params")
    logprobs = _logprobs(request, count)
    rids = per_prompt(request.rid, count, "", "rid", spread=not is_batch)
    submissions: list[Submission] = []
    continuations: list[Continuation] = []
    is_list = is_batch or sampling[0].n > 1
    for i, prompt in enumerate(prompts):
        params = _sampling(sampling[i], logprobs[i])
        grammar = _grammar(sampling[i])
        rid = rids[i] or uuid.uuid4().hex
        submissions.append(Submission(prompt, params, sampling[i].n, grammar, name=rid, dp_rank=rank))
        for _ in range(sampling[i].n):
            index = len(continuations) if is_list else None
            with_text = request.return_text_in_logprobs
            continuations.append(Continuation(rid, params, with_text, index, grammar is not None))
    return submissions, continuations, is_list


def _logprobs(request: GenerateRequest, count: int) -> list[dict[str, Any]]:
    """Return what each prompt's SamplingParams say about logprobs: nothing without `return_logprob`."""
    wanted = per_prompt(request.return_logprob, count, False, "return_logprob")
    num_top = per_prompt(request.top_logprobs_num, count, 0, "top_logprobs_num")
    starts = per_prompt(request.logprob_start_len, count, -1, "logprob_start_len")
    ids, lists = split_ids(request.token_ids_logprob or [], "token_ids_logprob")
    listed = [ids] * count if lists is None else per_prompt(lists, count, ids, "token_ids_logprob")
    return [
        {"logprobs": top, "logprob_start_len": start, "token_ids_logprob": tuple(named)} if asked else {}
        for asked, top, start, named in zip(wanted, num_top, starts, listed, strict=True)
    ]


def native_prompts(
    text: str | list[str] | None, input_ids: list[int | list[int]] | None, vocab_size: int
) -> tuple[list[Prompt], bool]:
    """Return the prompts, and whether the client sent a list of them."""
    if (text is None) == (input_ids is None):
        raise RequestError("give either text or input_ids", param="text" if text is None else "input_ids")
    if isinstance(text, str):
        return [TextPrompt(text)], False
    if text is not None:
        prompts: list[Prompt] = [TextPrompt(item) for item in text]
        return _not_empty(prompts, "text"), True
    ids, lists = split_ids(input_ids or [], "input_ids")
    if lists is None:
        return [token_prompt(ids, vocab_size)], False
    return _not_empty([token_prompt(item, vocab_size) for item in lists], "input_ids"), True


def split_ids(items: list[int | list[int]], param: str) -> tuple[list[int], list[list[int]] | None]:
    """Return (ids, None) for one prompt's ids, or ([], lists) for a batch; raises RequestError for a mixture."""
    ids = [item for item in items if isinstance(item, int)]
    lists = [item for item in items if not isinstance(item, int)]
    if ids and lists:
        raise RequestError(f"{param} mixes token ids and lists of them", param=param, code="invalid_type")
    return (ids, None) if not lists else ([], lists)


def _not_empty(prompts: list[Prompt], param: str) -> list[Prompt]:
    if not prompts:
        raise RequestError(f"{param} is empty", param=param)
    return prompts


def per_prompt(value: T | list[T] | None, count: int, default: T, param: str, spread: bool = True) -> list[T]:
    """Return one value a prompt, from a single value or a list as long as the batch.

    Without `spread` a single value cannot serve several prompts (an id).
    """
    if value is None:
        return [default] * count
    if not isinstance(value, list):
        if spread or count == 1:
            return [value] * count
        raise RequestError(f"{param} must be a list as long as the batch ({count})", param=param)
    if len(value) != count:
        raise RequestError(f"{param} has {len(value)} entries for {count} prompts", param=param)
    return value


def _sampling(wire: NativeSampling, logprobs: dict[str, Any]) -> SamplingParams:
    """Return the engine's parameters; `logprobs` are more of their fields."""
    fields = msgspec.structs.asdict(wire)
    for name in ("n", *GRAMMAR_FIELDS, *GRAMMAR_UNSUPPORTED):
        del fields[name]
    fields["stop"] = (wire.stop,) if isinstance(wire.stop, str) else wire.stop or ()
    fields["stop_regex"] = (wire.stop_regex,) if isinstance(wire.stop_regex, str) else wire.stop_regex or ()
    fields["stop_token_ids"] = wire.stop_token_ids or ()
    fields["logit_bias"] = wire.logit_bias or {}
    return SamplingParams(**(fields | logprobs))


def _grammar(wire: NativeSampling) -> GrammarSpec | None:
    return grammar_spec({name: getattr(wire, name) for name in (*GRAMMAR_FIELDS, *GRAMMAR_UNSUPPORTED)})


def _finish(chunk: Chunk) -> NativeFinish | None:
    if chunk.finish is None:
        return None
    length = chunk.completion_tokens if chunk.finish == "length" else UNSET
    return NativeFinish(chunk.finish, chunk.matched, length)
