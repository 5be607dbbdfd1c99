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
    every = (await rig.http.post(path, json=few | {"top_n": 0})).json()["results"]
    assert [r["index"] for r in every] == [3, 1, 4, 2, 0]  # as vLLM, whose default it is
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


# ------------------------------------------------------------------ pairs of texts

FITS = {("query", "same"): 3.0, ("query", "half"): 0.0, ("query", "none"): -2.0, ("other", "same"): 1.0}


def logits(generate: Generate) -> list[Chunks]:
    """The script of an engine with a cross-encoder: 6 tokens a pair."""
    assert generate.pooled and isinstance(generate.prompt, TextPrompt) and generate.prompt.second is not None
    raw = np.array([FITS[generate.prompt.text, generate.prompt.second]], dtype=np.float32).tobytes()
    return [Chunks([Chunk(generate.rid, "", [], [], "stop", None, 6, 0, 1, vector=raw)])]


def cross_encoder(fakes: SimpleNamespace, **fields: Any) -> Any:
    pooling = Pooling(kind="cls", task="classify", width=1, causal=False, labels=("LABEL_0",), normalize=False)
    return fakes.open_rig(replace(fakes.MODEL, pooling=replace(pooling, **fields)))


def sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


@pytest.mark.parametrize("raw", [False, True])
async def test_a_cross_encoder_reads_both_texts(fakes: SimpleNamespace, raw: bool) -> None:
    score = float if raw else sigmoid
    async with cross_encoder(fakes, raw=raw) as rig:
        rig.text.script = logits
        body = {"query": "query", "documents": ["none", "same", {"text": "half"}], "truncate_prompt_tokens": -1}
        reply = (await rig.http.post("/v1/rerank", json=body)).json()
        assert [r["index"] for r in reply["results"]] == [1, 2, 0]
        assert [r["relevance_score"] for r in reply["results"]] == pytest.approx([score(3.0), score(0.0), score(-2.0)])
        assert reply["usage"]["prompt_tokens"] == 18
        assert {generate.prompt.most for generate in rig.text.generates} == {512}
        body = {"text_1": "query", "text_2": ["same", "none"]}
        reply = (await rig.http.post("/v1/score", json=body)).json()
        assert reply["object"] == "list" and reply["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
        assert [(one["index"], one["object"]) for one in reply["data"]] == [(0, "score"), (1, "score")]
        assert [one["score"] for one in reply["data"]] == pytest.approx([score(3.0), score(-2.0)])
        body = {"text_1": ["query", "other"], "text_2": ["half", "same"]}
        reply = (await rig.http.post("/score", json=body)).json()
        assert [one["score"] for one in reply["data"]] == pytest.approx([score(0.0), score(1.0)])
        one = (await rig.http.post("/score", json={"text_1": "other", "text_2": "same"})).json()["data"]
        assert [found["score"] for found in one] == pytest.approx([score(1.0)])


async def test_a_model_that_embeds_scores_pairs(rig: Any) -> None:
    reply = (await rig.http.post("/v1/score", json={"text_1": "query", "text_2": ["half", "against"]})).json()
    assert [one["score"] for one in reply["data"]] == pytest.approx([0.5**0.5, -1], abs=1e-6)
    body = {"text_1": ["half", "none"], "text_2": ["half too", "against"]}
    reply = (await rig.http.post("/v1/score", json=body)).json()
    assert [one["score"] for one in reply["data"]] == pytest.approx([1, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": "a"}, "text_2"),
        ({"text_2": "a"}, "text_1"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": ["a", ""], "text_2": ["a", "b"]}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": "a" * (1 << 17), "text_2": ["b"] * 513}, "text_2"),
        ({"query": "a", "items": ["b"]}, "label_token_ids"),
        ({}, "query"),
    ],
)
async def test_bad_pairs_name_their_field(fakes: SimpleNamespace, body: dict[str, Any], param: str) -> None:
    async with cross_encoder(fakes) as rig:
        reply = await rig.http.post("/v1/score", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert rig.text.got == [] and rig.front.client.table == {}


async def test_a_classifier_of_several_labels_does_not_rerank(fakes: SimpleNamespace) -> None:
    async with cross_encoder(fakes, width=3, labels=("a", "b", "c")) as rig:
        reply = await rig.http.post("/v1/rerank", json={"query": "query", "documents": ["half"]})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
        assert "3 labels" in reply.json()["error"]["message"]
