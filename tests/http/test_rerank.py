"""/v1/rerank over HTTP: what the engine is asked, the order of the results, and what is refused."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from actorserve.actors.messages import Chunk, Chunks, Generate, TextPrompt
from actorserve.config import Pooling

pytestmark = pytest.mark.anyio
VECTORS = {"query": [2, 0], "same": [5, 0], "half": [1, 1], "half too": [2, 2], "none": [0, 7], "against": [-1, 0]}


def vectors(generate: Generate) -> list[Chunks]:
    """The script of an engine with an embedding model: 4 tokens a prompt."""
    assert generate.pooled and generate.params.max_new_tokens == 0 and isinstance(generate.prompt, TextPrompt)
    raw = np.array(VECTORS[generate.prompt.text], dtype=np.float32).tobytes()
    return [Chunks([Chunk(generate.rid, "", [], [], "stop", None, 4, 0, 1, vector=raw)])]


@pytest.fixture
async def rig(anyio_backend: object, fakes: SimpleNamespace) -> AsyncIterator[Any]:
    """Vectors are not of length 1, and the model's folder does not ask for that."""
    pooling = Pooling(kind="last", task="embed", width=2, normalize=False)
    async with fakes.open_rig(replace(fakes.MODEL, pooling=pooling)) as opened:
        opened.text.script = vectors
        yield opened


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
async def test_documents_come_by_relevance(rig: Any, path: str) -> None:
    documents = ["against", "half", "none", {"text": "same"}, "half too"]
    reply = (await rig.http.post(path, json={"query": "query", "documents": documents})).json()
    assert [(r["index"], r["document"]["text"]) for r in reply["results"]] == [
        (3, "same"), (1, "half"), (4, "half too"), (2, "none"), (0, "against"),
    ]  # fmt: skip
    scores = [r["relevance_score"] for r in reply["results"]]
    assert scores == pytest.approx([1, 0.5**0.5, 0.5**0.5, 0, -1], abs=1e-6)
    assert (reply["model"], reply["usage"]) == ("fake-model", {"prompt_tokens": 24, "total_tokens": 24})
    few = {"query": "query", "documents": documents, "top_n": 2, "return_documents": False}
    best = (await rig.http.post(path, json=few)).json()["results"]
    assert [sorted(r) for r in best] == [["index", "relevance_score"]] * 2 and [r["index"] for r in best] == [3, 1]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "", "documents": ["half"]}, "query"),
        ({"query": "query", "documents": []}, "documents"),
        ({"query": "query", "documents": ["half", ""]}, "documents"),
        ({"query": "query", "documents": "half"}, "documents"),
        ({"query": "query", "documents": ["half"], "top_n": -1}, "top_n"),
        ({"query": "query", "documents": ["half"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"documents": ["half"]}, "query"),
    ],
)
async def test_bad_requests_name_their_field(rig: Any, body: dict[str, Any], param: str) -> None:
    reply = await rig.http.post("/v1/rerank", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_a_model_that_generates_is_refused(fakes: SimpleNamespace) -> None:
    async with fakes.open_rig() as rig:
        reply = await rig.http.post("/v1/rerank", json={"query": "query", "documents": ["half"]})
        assert reply.status_code == 400, reply.text
