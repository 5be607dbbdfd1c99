"""POST /v1/score, as SGLang's: how likely given tokens are to come next, behind a query and each of several items.

Routed by app.py. Each pair of query and item is a prompt whose first token is drawn with the logprobs of the named
tokens; what pairs have in common at their start is computed once. Invariant: scores are in the order of the items.
"""

import math
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
from .protocol import Usage, encode
from .service import Service

MAX_REPEATED: Final = 64 << 20
"""Of a query, all its copies together: a body of a few bytes an item must not become a gigabyte."""


class ScoreRequest(Struct, frozen=True, kw_only=True):
    """Query and items are both texts or both token ids; `item_first` puts each item before the query.

    A score is a probability among all tokens, or with `apply_softmax` among the named ones.
    """

    query: str | list[int]
    items: str | list[str | list[int]]
    label_token_ids: Annotated[list[int], Meta(extra_json_schema={"minItems": 1})]
    apply_softmax: bool = False
    item_first: bool = False
    model: str | None = None


class ScoreReply(Struct, frozen=True):
    """`scores`: of each item, one a label token."""

    scores: list[list[float]]
    model: str
    usage: Usage
    object: Literal["scoring"] = "scoring"


_decoder: Final = msgspec.json.Decoder(ScoreRequest)


async def score(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/score."""
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    if not request.label_token_ids:
        raise RequestError("label_token_ids is empty", param="label_token_ids")
    params = SamplingParams(
        max_new_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        logprobs=0,
        token_ids_logprob=tuple(request.label_token_ids),
    )
    service.check_batch(1 if isinstance(request.items, str) else len(request.items), "items")
    prompts = _prompts(request, service.model.vocab_size)
    with renamed({"token_ids_logprob": "label_token_ids", "prompt": "items", "input_ids": "items"}):
        stream = service.client.submit_all([Submission(prompt, params) for prompt in prompts])
        async with exchange.watched(stream):
            chunks = await stream.collect()
            scores = [_scores(chunk, request.apply_softmax) for chunk in chunks]
            await exchange.reply(encode(ScoreReply(scores, service.model_name, usage(chunks, 1))))


def _prompts(request: ScoreRequest, vocab_size: int) -> list[Prompt]:
    query, items = request.query, [request.items] if isinstance(request.items, str) else request.items
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
