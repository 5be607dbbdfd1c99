"""POST /v1/embeddings, /encode, /judge and /v1/classify: prompts in, one vector each out.

Routed by app.py. Each prompt is a request of its own, which ends with its prefill: a batch goes through the scheduler
like many users at once. Invariant: replies are in the order of the prompts; `param` in errors is the client's field.
"""

import base64
import time
import uuid
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from ..actors.admission import Submission, check_task
from ..actors.client import token_prompt, truncated
from ..actors.conversation import ChatMessage, chat_prompt
from ..actors.messages import Chunk, Prompt, TextPrompt
from ..actors.stream import Stream
from ..config import Pooling
from ..errors import EngineDown, RequestError
from ..models.pooling import embedding_of, probabilities
from ..sampler.params import SamplingParams
from .embedding_types import (
    Classification,
    ClassifyReply,
    ClassifyRequest,
    Embedding,
    EmbeddingReply,
    EmbeddingRequest,
    EncodeMeta,
    EncodeReply,
    EncodeRequest,
    JudgeRequest,
    PromptUsage,
)
from .error_replies import decode_body
from .exchange import Exchange
from .native import native_prompts, per_prompt, split_ids
from .openai import renamed
from .protocol import PromptTokensDetails, encode
from .service import Service

NOTHING_DRAWN: Final = SamplingParams(max_new_tokens=0)
_embedding_decoder: Final = msgspec.json.Decoder(EmbeddingRequest)
_encode_decoder: Final = msgspec.json.Decoder(EncodeRequest)
_judge_decoder: Final = msgspec.json.Decoder(JudgeRequest)
_classify_decoder: Final = msgspec.json.Decoder(ClassifyRequest)
_OF_INPUT: Final = {"prompt": "input", "input_ids": "input"}


async def embeddings(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/embeddings."""
    request = decode_body(_embedding_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    pooling = pooling_of(service, "embed")
    _check_dimensions(request.dimensions, pooling)
    prompts = _prompts(request, service)
    with renamed(_OF_INPUT):
        stream = _submit(service, prompts, request)
        async with exchange.watched(stream):
            chunks = await stream.collect()
            data = [
                Embedding(_written(_vector(chunk, request, pooling), request.encoding_format), i)
                for i, chunk in enumerate(chunks)
            ]
            await exchange.reply(encode(EmbeddingReply(data, service.model_name, _usage(chunks))))


async def encode_prompts(service: Service, exchange: Exchange) -> None:
    """Serve POST or PUT /encode: SGLang's, the vector of a prompt or of each of a batch."""
    request = decode_body(_encode_decoder, await exchange.body(service.config.max_body_bytes))
    for name in ("image_data", "video_data", "audio_data", "lora_path"):
        if getattr(request, name):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_value")
    pooling = pooling_of(service)
    _check_dimensions(request.dimensions, pooling)
    prompts, is_batch = native_prompts(request.text, request.input_ids, service.model.vocab_size)
    with renamed({"prompt": "text"}):
        await _reply_natively(service, exchange, request, pooling, prompts, is_batch)


async def judge(service: Service, exchange: Exchange) -> None:
    """Serve POST or PUT /judge and /classify: SGLang's, the logits of a reward or classification head."""
    request = decode_body(_judge_decoder, await exchange.body(service.config.max_body_bytes))
    pooling = pooling_of(service, "classify")
    if request.conv is None:
        prompts, is_batch = native_prompts(request.text, request.input_ids, service.model.vocab_size)
    else:
        prompts, is_batch = _conversations(request.conv)
    with renamed({"prompt": "text", "messages": "conv"}):
        await _reply_natively(service, exchange, request, pooling, prompts, is_batch)


async def classify(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/classify: the label of each input, and the probabilities of all."""
    request = decode_body(_classify_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    pooling = pooling_of(service, "classify")
    prompts = _prompts(request, service)
    with renamed(_OF_INPUT):
        stream = _submit(service, prompts, request)
        async with exchange.watched(stream):
            chunks = await stream.collect()
            data = [_classified(i, _vector(chunk, request, pooling), pooling) for i, chunk in enumerate(chunks)]
            name, now = f"classify-{uuid.uuid4().hex}", int(time.time())
            await exchange.reply(encode(ClassifyReply(name, now, service.model_name, data, _usage(chunks))))


async def _reply_natively(
    service: Service,
    exchange: Exchange,
    request: EncodeRequest | JudgeRequest,
    pooling: Pooling,
    prompts: list[Prompt],
    is_batch: bool,
) -> None:
    rids = per_prompt(request.rid, len(prompts), "", "rid", spread=not is_batch)
    stream = _submit(service, prompts, request, [rid or uuid.uuid4().hex for rid in rids])
    async with exchange.watched(stream):
        replies = []
        for i, (chunk, choice) in enumerate(zip(await stream.collect(), stream.choices, strict=True)):
            seconds = (choice.last_ns - choice.arrival_ns) / 1e9
            meta = EncodeMeta(choice.name, chunk.prompt_tokens, chunk.cached_tokens, seconds)
            vector = _vector(chunk, request, pooling).tolist()
            replies.append(EncodeReply(vector, meta, i) if is_batch else EncodeReply(vector, meta))
        await exchange.reply(encode(replies if is_batch else replies[0]))


# ------------------------------------------------------------------ requests


def pooling_of(service: Service, task: str | None = None) -> Pooling:
    """How the model makes vectors. Raises RequestError where it makes none, or none of this task."""
    pooling = service.model.pooling
    check_task(pooling, pooled=True)
    assert pooling is not None
    if task is not None and pooling.task != task:
        what = "no embeddings, but labels: use /v1/classify" if task == "embed" else "embeddings, no labels"
        raise RequestError(f"this server's model gives {what}", param="model", code="unsupported_model")
    return pooling


def _check_dimensions(dimensions: int | None, pooling: Pooling) -> None:
    if dimensions is None:
        return
    if pooling.task != "embed":
        raise RequestError("dimensions are for embeddings, not for labels", param="dimensions")
    if dimensions > pooling.width:
        what = f"dimensions is {dimensions}, but the model's embeddings have {pooling.width}"
        raise RequestError(what, param="dimensions")


def _prompts(request: EmbeddingRequest | ClassifyRequest, service: Service) -> list[Prompt]:
    """The prompts of an `input`. Raises RequestError."""
    given = request.input
    prompts: list[Prompt]
    if isinstance(given, str):
        prompts = [_text(given)]
    else:
        texts = [_text(item) for item in given if isinstance(item, str)]
        if not given or (texts and len(texts) < len(given)):
            what = "mixes texts and token ids" if texts else "is empty"
            raise RequestError(f"input {what}", param="input", code="invalid_type")
        ids, lists = split_ids([item for item in given if not isinstance(item, str)], "input")
        ids_of = lists if lists is not None else [ids]
        prompts = [*texts] or [token_prompt(one, service.model.vocab_size, "input") for one in ids_of]
    most = service.config.max_queued_requests
    if len(prompts) > most:
        raise RequestError(f"input has {len(prompts)} entries, the most is {most}", param="input", code="too_many")
    longest = service.model.context_length
    return [truncated(prompt, request.truncate_prompt_tokens, longest) for prompt in prompts]


def _text(text: str) -> TextPrompt:
    if not text:
        raise RequestError("input has an empty text", param="input")
    return TextPrompt(text)


def _conversations(given: Sequence[ChatMessage | list[ChatMessage]]) -> tuple[list[Prompt], bool]:
    """The prompts of a `conv`, which end with its last message; and whether there were several."""
    turns = [item for item in given if isinstance(item, ChatMessage)]
    lists = [item for item in given if not isinstance(item, ChatMessage)]
    if not given or (turns and lists):
        what = "mixes messages and conversations" if turns else "is empty"
        raise RequestError(f"conv {what}", param="conv", code="invalid_type")
    with renamed({"messages": "conv"}):
        return [chat_prompt(conv, add_generation_prompt=False) for conv in lists or [turns]], bool(lists)


def _submit(
    service: Service,
    prompts: list[Prompt],
    request: EmbeddingRequest | EncodeRequest | JudgeRequest | ClassifyRequest,
    names: Sequence[str] = (),
) -> Stream:
    """`names`: what the client calls each prompt, where it can."""
    service.check_batch(len(prompts), "input")
    submissions = [
        Submission(prompt, NOTHING_DRAWN, pooled=True, name=name)
        for prompt, name in zip(prompts, names or [""] * len(prompts), strict=True)
    ]
    return service.client.submit_all(submissions, request.cache_salt or "", request.priority or 0)


# ------------------------------------------------------------------ replies


def _vector(
    chunk: Chunk, request: EmbeddingRequest | EncodeRequest | JudgeRequest | ClassifyRequest, pooling: Pooling
) -> np.ndarray:
    """What the request wants of a prompt's vector, float32."""
    if not chunk.vector:
        raise EngineDown("the request was cancelled", code="cancelled")
    if isinstance(request, EmbeddingRequest | EncodeRequest):
        return embedding_of(chunk.vector, pooling, request.dimensions, request.normalize)
    return embedding_of(chunk.vector, pooling)


def _written(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def _classified(index: int, logits: np.ndarray, pooling: Pooling) -> Classification:
    probs = probabilities(logits, pooling)
    return Classification(index, pooling.labels[int(probs.argmax())], probs.tolist(), len(probs))


def _usage(chunks: Sequence[Chunk]) -> PromptUsage:
    tokens = sum(chunk.prompt_tokens for chunk in chunks)
    return PromptUsage(tokens, tokens, PromptTokensDetails(sum(chunk.cached_tokens for chunk in chunks)))
