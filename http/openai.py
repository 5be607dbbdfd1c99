"""POST /v1/completions and /v1/chat/completions: what a request asks the engine for, and how its reply is written.

Used by the routes in app.py; the replies' pieces come from openai_replies.py. Invariant: a field that changes the
result is either honoured or refused; `param` in errors is the name that OpenAI's API gives the field.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from ..actors.admission import Submission
from ..actors.client import token_prompt
from ..actors.conversation import chat_prompt
from ..actors.messages import ChatPrompt, Chunk, Prompt, TextPrompt, TokenPrompt
from ..actors.stream import Stream
from ..errors import ActorserveError, RequestError
from ..sampler.params import SamplingParams
from .chat_replies import ChatWriter
from .chat_tools import Reading, ToolPlan, plan_tools, template_arguments
from .chat_types import CHAT_REFUSED, ChatRequest
from .error_replies import decode_body
from .exchange import Exchange
from .native import split_ids
from .openai_grammar import requested_grammar
from .openai_replies import CompletionWriter, Head, UsageFrames
from .openai_types import OPENAI_REFUSED, CompletionRequest, OpenAIRequest, StreamOptions
from .service import Service
from .sse import AtEnd, send_output
from .timelines import timeline_of

_DEFAULT_COMPLETION_TOKENS: Final = 16
_completion_decoder: Final = msgspec.json.Decoder(CompletionRequest)
_chat_decoder: Final = msgspec.json.Decoder(ChatRequest)

# Fields of both requests that SamplingParams has under the same name.
_SAME_NAME: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "ignore_eos",
    "no_stop_trim",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


async def completions(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/completions."""
    request = decode_body(_completion_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    _refuse(request, OPENAI_REFUSED)
    if request.suffix:
        raise RequestError("suffix is not supported", param="suffix", code="unsupported_value")
    n = request.n or 1
    best_of = _best_of(request, n)
    prompts, texts = _completion_prompts(request, service.model.vocab_size)
    service.check_batch(len(prompts), "prompt")
    echoes = await _echoes(service, request, prompts, texts)
    ids = None
    if request.return_token_ids:
        ids = [await service.client.questions.tokenize(prompt, add_special_tokens=True) for prompt in prompts]
    usage_frames = _usage_frames(request, len(prompts), best_of)
    max_tokens = request.max_tokens if request.max_tokens is not None else _DEFAULT_COMPLETION_TOKENS
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    grammar, grammar_names = requested_grammar(request)
    if request.best_of is not None:
        names["n"] = "best_of"
    with renamed(names | grammar_names):
        # The choice among candidates needs the logprobs of their tokens.
        logprobs = 0 if best_of > n and request.logprobs is None else request.logprobs
        params = _sampling(request, service.model.sampling, max_tokens, logprobs)
        if request.echo and request.logprobs is not None:
            params = msgspec.structs.replace(params, logprob_start_len=0)
        head = Head(f"cmpl-{uuid.uuid4().hex}", int(time.time()), service.model_name)
        rank = service.rank_of(request.routed_dp_rank, request.data_parallel_rank)
        submissions = [Submission(prompt, params, best_of, grammar, name=head.id, dp_rank=rank) for prompt in prompts]
        stream = service.client.submit_all(submissions, request.cache_salt or "", request.priority or 0)
        writer = CompletionWriter(head, stream, n, best_of, echoes, request.logprobs, usage_frames, ids)
        await send_output(exchange, stream, writer, bool(request.stream), at_end=_timeline(service, request, head))


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/chat/completions."""
    request = decode_body(_chat_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    _refuse(request, OPENAI_REFUSED + CHAT_REFUSED)
    usage_frames = _usage_frames(request, 1, request.n or 1)
    head = Head(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), service.model_name)
    with submitted_chat(service, request, head.id) as (stream, reading):
        ids = await _prompt_ids(service, stream) if request.return_token_ids else None
        writer = ChatWriter(head, stream, reading, bool(request.logprobs), usage_frames, ids)
        await send_output(exchange, stream, writer, bool(request.stream), at_end=_timeline(service, request, head))


async def _prompt_ids(service: Service, stream: Stream) -> list[int]:
    """Return the token ids of a chat's prompt. Raises what the engine refuses, and ends the stream then."""
    try:
        return await service.client.questions.tokenize(stream.requests[0].prompt, add_special_tokens=False)
    except BaseException:
        stream.cancel()
        raise


def _timeline(service: Service, request: OpenAIRequest, head: Head) -> AtEnd | None:
    """What puts the timeline into the head, if the request wants one."""

    async def learn(chunks: list[Chunk]) -> None:
        head.timeline = await timeline_of(service, head.id)

    return learn if request.timeline else None


@contextmanager
def submitted_chat(service: Service, request: ChatRequest, name: str) -> Iterator[tuple[Stream, Reading]]:
    """Ask the engine for the answers to a chat; (their stream, how to read each of them). `name`: the reply's id.

    Errors that come out of it, also of what is done inside, bear the names of the request's fields.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    newer = request.max_completion_tokens is not None
    max_tokens = request.max_completion_tokens if newer else request.max_tokens
    names = {
        "max_new_tokens": "max_completion_tokens" if newer else "max_tokens",
        "min_new_tokens": "min_tokens",
        "logprobs": "top_logprobs",
        "tool_calls": "tools",
    }
    grammar, grammar_names = requested_grammar(request, request.response_format)
    plan = plan_tools(request, grammar, service.model)
    with renamed(names | grammar_names):
        logprobs = request.top_logprobs or 0 if request.logprobs else None
        params = _sampling(request, service.model.sampling, max_tokens, logprobs)
        prompt = planned_prompt(request, plan)
        salt, priority = request.cache_salt or "", request.priority or 0
        rank = service.rank_of(request.routed_dp_rank, request.data_parallel_rank)
        stream = service.client.submit(prompt, params, request.n or 1, salt, priority, plan.grammar, name, rank)
        yield stream, plan.reading


def planned_prompt(request: ChatRequest, plan: ToolPlan) -> ChatPrompt:
    """Return the prompt of a chat whose tools are settled."""
    return chat_prompt(
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        chat_template_kwargs=template_arguments(request),
        tools=plan.tools,
        shown=plan.reading.shown,
        opens=plan.reading.opens,
    )


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Give errors about the engine's parameters the names that the client used."""
    try:
        yield
    except ActorserveError as error:
        if error.param in names:
            error.message = error.message.replace(error.param, names[error.param])
            error.param = names[error.param]
        raise


def _refuse(request: OpenAIRequest, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(request, name):
            raise RequestError(f"{name} is not supported yet", param=name, code="unsupported_value")


def _best_of(request: CompletionRequest, n: int) -> int:
    """How many continuations of each prompt are made; the n best of them are sent."""
    best_of = n if request.best_of is None else request.best_of
    if best_of < n:
        raise RequestError(f"best_of must be at least n, which is {n}", param="best_of")
    if best_of > n and request.stream:
        raise RequestError("best_of above n cannot be streamed: the best is known at the end", param="best_of")
    return best_of


def _usage_frames(request: OpenAIRequest, prompts: int, n: int) -> UsageFrames:
    options = request.stream_options or StreamOptions()
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    return UsageFrames(prompts * n, n, bool(options.include_usage), bool(options.continuous_usage_stats))


def _sampling(
    request: OpenAIRequest, defaults: dict[str, float], max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Return the engine's parameters. `defaults`: ModelInfo.sampling. Without `max_tokens` a reply may go on to the end
    of the context."""
    given: dict[str, Any] = dict(defaults)
    for name in _SAME_NAME:
        value = getattr(request, name)
        if value is not None:
            given[name] = value
    if request.top_k == 0:
        given["top_k"] = -1
    if request.include_stop_str_in_output:
        given["no_stop_trim"] = True
    stop, patterns = request.stop, request.stop_regex
    return SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=request.min_tokens or 0,
        stop=(stop,) if isinstance(stop, str) else stop or (),
        stop_regex=(patterns,) if isinstance(patterns, str) else patterns or (),
        seed=request.seed,
        logprobs=logprobs,
        **given,
    )


def _completion_prompts(request: CompletionRequest, vocab_size: int) -> tuple[list[Prompt], list[str]]:
    """Return the prompts, and their texts where they are texts."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [TextPrompt(prompt)], [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    if not prompt or (texts and len(texts) < len(prompt)):
        what = "mixes texts and token ids" if texts else "is empty"
        raise RequestError(f"prompt {what}", param="prompt", code="invalid_type")
    if texts:
        return [TextPrompt(text) for text in texts], texts
    ids, lists = split_ids([item for item in prompt if not isinstance(item, str)], "prompt")
    return [token_prompt(item, vocab_size, "prompt") for item in ([ids] if lists is None else lists)], []


async def _echoes(service: Service, request: CompletionRequest, prompts: list[Prompt], texts: list[str]) -> list[str]:
    """Return what comes before each prompt's continuation: its text."""
    if not request.echo:
        return []
    ids = [list(prompt.ids.cast("i")) for prompt in prompts if isinstance(prompt, TokenPrompt)]
    skip = request.skip_special_tokens is not False
    return texts or [await service.client.questions.detokenize(one, skip) for one in ids]
