"""POST /v1/rerank, /rerank and /v2/rerank: documents in the order in which they fit a query, as vLLM's and Jina's.

Routed by app.py. How well two texts fit (`relevances`, which score.py uses, too) is said by a cross-encoder, a
classification model of one label that reads both at once; or by a model that embeds: the cosine of their vectors.
Invariant: `index` is the document's place in the request; results are sorted by relevance, ties by it.
"""

import uuid
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.admission import Submission
from ..actors.client import truncated
from ..actors.messages import Prompt, TextPrompt
from ..config import Pooling
from ..errors import EngineDown, RequestError
from ..models.pooling import embedding_of, relevance
from .embeddings import NOTHING_DRAWN, pooling_of
from .error_replies import decode_body
from .exchange import Exchange
from .openai import renamed
from .protocol import Priority, encode
from .service import Service

MAX_REPEATED: Final = 64 << 20
"""Of a text that goes with each of many, all its copies together: a body of a few bytes an item must not become a
gigabyte."""


class DocumentText(Struct, frozen=True):
    text: str


class RerankRequest(Struct, frozen=True, kw_only=True):
    """`top_n`: only so many, the best; 0, vLLM's default, is all. `return_documents`: with their texts.
    `truncate_prompt_tokens`: longer texts are cut to so many tokens, -1 to what the model takes; else they are
    refused."""

    query: str
    documents: Annotated[list[str | DocumentText], Meta(extra_json_schema={"minItems": 1})]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    return_documents: bool = True
    truncate_prompt_tokens: int | None = None
    user: str | None = None
    cache_salt: str | None = None
    priority: Priority | None = None


class RerankResult(Struct, frozen=True):
    """`relevance_score`: a cosine, from -1 to 1; of a cross-encoder from 0 to 1, or its logit if its folder says so."""

    index: int
    relevance_score: float
    document: DocumentText | UnsetType = UNSET


class RerankUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class RerankReply(Struct, frozen=True):
    id: str
    model: str
    usage: RerankUsage
    results: list[RerankResult]


class Asked(NamedTuple):
    """What `relevances` asks the engine with; see RerankRequest."""

    cut: int | None
    cache_salt: str
    priority: int


_decoder: Final = msgspec.json.Decoder(RerankRequest)


async def rerank(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/rerank: documents sorted by how well they fit a query."""
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    documents = [item if isinstance(item, str) else item.text for item in request.documents]
    _check(request.query, documents)
    service.check_batch(len(documents) + 1, "documents")
    asked = Asked(request.truncate_prompt_tokens, request.cache_salt or "", request.priority or 0)
    with renamed({"prompt": "documents"}):
        scores, tokens = await relevances(service, exchange, [request.query], documents, asked)
    name = f"rerank-{uuid.uuid4().hex}"
    results = _sorted(scores, documents, request)
    await exchange.reply(encode(RerankReply(name, service.model_name, RerankUsage(tokens, tokens), results)))


async def relevances(
    service: Service, exchange: Exchange, firsts: Sequence[str], seconds: Sequence[str], asked: Asked
) -> tuple[np.ndarray, int]:
    """How well each first text fits the second in its place, one first text all of them: (float64 [seconds], prompt
    tokens). Raises what ends the request."""
    pooling = pooling_of(service)
    paired = pooling.task == "classify"
    if paired and pooling.width != 1:
        what = f"this server's model tells {pooling.width} labels apart; how well texts fit is said by one of one label"
        raise RequestError(what, param="model", code="unsupported_model")
    prompts = _pairs(firsts, seconds) if paired else [TextPrompt(text) for text in (*firsts, *seconds)]
    longest = service.model.context_length
    cut: list[Prompt] = [truncated(prompt, asked.cut, longest) for prompt in prompts]
    submissions = [Submission(prompt, NOTHING_DRAWN, pooled=True) for prompt in cut]
    stream = service.client.submit_all(submissions, asked.cache_salt, asked.priority)
    async with exchange.watched(stream):
        chunks = await stream.collect()
    if not all(chunk.vector for chunk in chunks):
        raise EngineDown("the request was cancelled", code="cancelled")
    vectors = [chunk.vector for chunk in chunks]
    found = [relevance(raw, pooling) for raw in vectors] if paired else _cosines(vectors, len(firsts), pooling)
    return np.array(found, dtype=np.float64), sum(chunk.prompt_tokens for chunk in chunks)


def _pairs(firsts: Sequence[str], seconds: Sequence[str]) -> list[TextPrompt]:
    if len(firsts) == 1 and len(firsts[0]) * len(seconds) > MAX_REPEATED:
        what = f"the text is repeated for {len(seconds)} others, which may come to {MAX_REPEATED} characters"
        raise RequestError(what, param="prompt", code="too_large")
    every = firsts if len(firsts) == len(seconds) else list(firsts) * len(seconds)
    return [TextPrompt(first, second=second) for first, second in zip(every, seconds, strict=True)]


def _cosines(vectors: list[bytes], count: int, pooling: Pooling) -> list[float]:
    """Of the first `count` vectors, or the first one alone, with those behind."""
    wide = np.stack([embedding_of(raw, pooling, normalize=True) for raw in vectors])
    found: list[float] = (wide[count:] * wide[:count]).sum(axis=1).tolist()
    return found


def _check(query: str, documents: list[str]) -> None:
    if not query:
        raise RequestError("query is empty", param="query")
    if not documents:
        raise RequestError("documents is empty", param="documents")
    if not all(documents):
        raise RequestError("documents has an empty text", param="documents")


def _sorted(scores: np.ndarray, documents: list[str], request: RerankRequest) -> list[RerankResult]:
    order: list[int] = np.argsort(-scores, kind="stable")[: request.top_n or None].tolist()

    def shown(index: int) -> DocumentText | UnsetType:
        return DocumentText(documents[index]) if request.return_documents else UNSET

    return [RerankResult(i, float(scores[i]), shown(i)) for i in order]
