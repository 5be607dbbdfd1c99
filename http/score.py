"""POST /v1/score, as SGLang's: how likely given tokens are to come next, behind a query and each of several items; and
as vLLM's: how well two texts fit, by a cross-encoder or a model that embeds.

Routed by app.py. Each pair of query and item is a prompt whose first token is drawn with the logprobs of the named
tokens; what pairs have in common at their start is computed once. Invariant: scores are in the order of the items, or
of the pairs of texts.
"""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from ..actors.admission import Submission
from ..actors.client import token_prompt
from ..actors.messages import Chunk, Prompt, TextPrompt
from ..errors import EngineDown, RequestError
from ..sampler.params import SamplingParams
from .error_replies import decode_body
from .exchange import Exchange
from .openai import renamed
from .openai_replies import usage
from .protocol import Priority, Usage, encode
from .rerank import MAX_REPEATED, Asked, RerankUsage, relevances
from .service import Service


class ScoreRequest(Struct, frozen=True, kw_only=True):
    """SGLang's: `query`, `items`, `label_token_ids`, all of them. Query and items are both texts or both token ids;
    `item_first` puts each item before the query. A score is a probability among all tokens, or with `apply_softmax`
    among the named ones.

    vLLM's: `text_1` and `text_2`, of which `text_1` is one text for all of `text_2`, or as many. `cache_salt`,
    `priority` and `truncate_prompt_tokens` are as in /v1/rerank.
    """

    query: str | list[int] | None = None
    items: str | list[str | list[int]] | None = None
    label_token_ids: Annotated[list[int], Meta(extra_json_schema={"minItems": 1})] | None = None
    apply_softmax: bool = False
    item_first: bool = False
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    truncate_prompt_tokens: int | None = None
    model: str | None = None
    user: str | None = None
    cache_salt: str | None = None
    priority: Priority | None = None


class ScoreReply(Struct, frozen=True, tag_field="object", tag="scoring"):
    """`scores`: of each item, one a label token."""

    scores: list[list[float]]
    model: str
    usage: Usage


class PairScore(Struct, frozen=True):
    """As RerankResult's relevance_score."""

    index: int
    score: float
    object: Literal["score"] = "score"


class PairScores(Struct, frozen=True, tag_field="object", tag="list"):
    id: str
    created: int
    model: str
    data: list[PairScore]
    usage: RerankUsage


_decoder: Final = msgspec.json.Decoder(ScoreRequest)


async def score(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/score."""
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    if request.text_1 is not None or request.text_2 is not None:
        await _score_pairs(service, exchange, request)
        return
    query, given, labels = request.query, request.items, request.label_token_ids
    if query is None or given is None or labels is None:
        raise _missing(request, "query", "items", "label_token_ids")
    if not labels:
        raise RequestError("label_token_ids is empty", param="label_token_ids")
    if request.truncate_prompt_tokens is not None:
        raise RequestError("truncate_prompt_tokens is for text_1 and text_2", param="truncate_prompt_tokens")
    params = SamplingParams(
        max_new_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0, token_ids_logprob=tuple(labels)
    )
    items = [given] if isinstance(given, str) else given
    service.check_batch(len(items), "items")
    prompts = _prompts(request, query, items, service.model.vocab_size)
    with renamed({"token_ids_logprob": "label_token_ids", "prompt": "items", "input_ids": "items"}):
        submissions = [Submission(prompt, params) for prompt in prompts]
        stream = service.client.submit_all(submissions, request.cache_salt or "", request.priority or 0)
        async with exchange.watched(stream):
            chunks = await stream.collect()
            scores = [_scores(chunk, request.apply_softmax) for chunk in chunks]
            await exchange.reply(encode(ScoreReply(scores, service.model_name, usage(chunks, 1))))


def _missing(request: ScoreRequest, *names: str) -> RequestError:
    """What is wrong where not all of these fields are given."""
    name = next(name for name in names if getattr(request, name) is None)
    what = f"{name} is missing; there are query, items and label_token_ids, or text_1 and text_2"
    return RequestError(what, param=name, code="missing_required_parameter")


async def _score_pairs(service: Service, exchange: Exchange, request: ScoreRequest) -> None:
    """As vLLM."""
    if request.text_1 is None or request.text_2 is None:
        raise _missing(request, "text_1", "text_2")
    texts: list[list[str]] = []
    for name, given in (("text_1", request.text_1), ("text_2", request.text_2)):
        texts.append([given] if isinstance(given, str) else given)
        if not all(texts[-1]) or not texts[-1]:
            raise RequestError(f"{name} is empty or has an empty text", param=name)
        service.check_batch(len(texts[-1]), name)
    first, second = texts
    if len(first) not in (1, len(second)):
        raise RequestError(f"text_1 has {len(first)} texts, text_2 {len(second)}", param="text_1")
    asked = Asked(request.truncate_prompt_tokens, request.cache_salt or "", request.priority or 0)
    with renamed({"prompt": "text_2"}):
        scores, tokens = await relevances(service, exchange, first, second, asked)
    data = [PairScore(i, score) for i, score in enumerate(scores.tolist())]
    name, now = f"score-{uuid.uuid4().hex}", int(time.time())
    await exchange.reply(encode(PairScores(name, now, service.model_name, data, RerankUsage(tokens, tokens))))


def _prompts(
    request: ScoreRequest, query: str | list[int], items: Sequence[str | list[int]], vocab_size: int
) -> list[Prompt]:
    if not items:
        raise RequestError("items is empty", param="items")
    if len(query) * len(items) > MAX_REPEATED:
        what = f"the query is repeated for {len(items)} items, which may come to {MAX_REPEATED} characters or tokens"
        raise RequestError(what, param="items", code="too_large")
    if isinstance(query, str):
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) < len(items):
            raise RequestError("query is a text, so items must be texts", param="items", code="invalid_type")
        return [TextPrompt(item + query if request.item_first else query + item) for item in texts]
    lists = [item for item in items if not isinstance(item, str)]
    if len(lists) < len(items):
        raise RequestError("query is token ids, so items must be lists of them", param="items", code="invalid_type")
    pairs = [item + query if request.item_first else query + item for item in lists]
    return [token_prompt(pair, vocab_size, "items") for pair in pairs]


def _scores(chunk: Chunk, apply_softmax: bool) -> list[float]:
    if not chunk.logprobs:
        raise EngineDown("the request was cancelled", code="cancelled")
    logprobs = [logprob for _, logprob, _ in chunk.logprobs[0].listed]
    if not apply_softmax:
        return [math.exp(logprob) for logprob in logprobs]
    largest = max(logprobs)
    if largest == -math.inf:
        return [1 / len(logprobs)] * len(logprobs)
    weights = [math.exp(logprob - largest) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]
