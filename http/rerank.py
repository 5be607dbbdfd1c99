"""POST /v1/rerank, /rerank and /v2/rerank: documents in the order in which they fit a query, as vLLM's and Jina's.

Routed by app.py, for models that embed: a document's relevance is the cosine of its vector and the query's.
Invariant: `index` is the document's place in the request; results are sorted by relevance, ties by it.
"""

import uuid
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.admission import Submission
from ..actors.client import truncated
from ..actors.messages import TextPrompt
from ..errors import EngineDown, RequestError
from ..models.pooling import embedding_of
from .embeddings import NOTHING_DRAWN, pooling_of
from .error_replies import decode_body
from .exchange import Exchange
from .openai import renamed
from .protocol import Priority, encode
from .service import Service


class DocumentText(Struct, frozen=True):
    text: str


class RerankRequest(Struct, frozen=True, kw_only=True):
    """`top_n`: only so many, the best. `return_documents`: with their texts. `truncate_prompt_tokens`: longer texts are
    cut to so many tokens, -1 to what the model takes; else they are refused."""

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
    """`relevance_score`: from -1 to 1."""

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


_decoder: Final = msgspec.json.Decoder(RerankRequest)


async def rerank(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/rerank: documents sorted by how well they fit a query."""
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    pooling = pooling_of(service, "embed")
    documents = [item if isinstance(item, str) else item.text for item in request.documents]
    _check(request.query, documents)
    service.check_batch(len(documents) + 1, "documents")
    longest = service.model.context_length
    prompts = [truncated(TextPrompt(t), request.truncate_prompt_tokens, longest) for t in [request.query, *documents]]
    with renamed({"prompt": "documents"}):
        submissions = [Submission(prompt, NOTHING_DRAWN, pooled=True) for prompt in prompts]
        stream = service.client.submit_all(submissions, request.cache_salt or "", request.priority or 0)
        async with exchange.watched(stream):
            chunks = await stream.collect()
            if not all(chunk.vector for chunk in chunks):
                raise EngineDown("the request was cancelled", code="cancelled")
            query, *rest = (embedding_of(chunk.vector, pooling, normalize=True) for chunk in chunks)
            results = _sorted(query, np.stack(rest), documents, request)
            tokens = sum(chunk.prompt_tokens for chunk in chunks)
            name = f"rerank-{uuid.uuid4().hex}"
            await exchange.reply(encode(RerankReply(name, service.model_name, RerankUsage(tokens, tokens), results)))


def _check(query: str, documents: list[str]) -> None:
    if not query:
        raise RequestError("query is empty", param="query")
    if not documents:
        raise RequestError("documents is empty", param="documents")
    if not all(documents):
        raise RequestError("documents has an empty text", param="documents")


def _sorted(query: np.ndarray, vectors: np.ndarray, documents: list[str], request: RerankRequest) -> list[RerankResult]:
    """`query`: [width], `vectors`: [documents, width], all of length 1, float32."""
    scores = vectors @ query
    order: list[int] = np.argsort(-scores, kind="stable")[: request.top_n].tolist()

    def shown(index: int) -> DocumentText | UnsetType:
        return DocumentText(documents[index]) if request.return_documents else UNSET

    return [RerankResult(i, float(scores[i]), shown(i)) for i in order]
