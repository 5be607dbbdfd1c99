"""Embeddings, /encode, /judge and /v1/classify over HTTP: what the engine is asked, and how its vectors are written."""

import base64
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from msgspec.structs import replace

from actorserve.actors.messages import ChatPrompt, Chunk, Chunks, Generate, Refused, TextPrompt, TokenPrompt
from actorserve.config import Pooling

pytestmark = pytest.mark.anyio
WIDTH = 8
EMBEDDING = Pooling(kind="last", task="embed", width=WIDTH)
LABELS = Pooling(kind="cls", task="classify", width=3, normalize=False, causal=False, labels=("no", "yes", "maybe"))
LOGITS = np.array([0.5, 2.5, -1.0], dtype=np.float32)


def vector_for(generate: Generate) -> np.ndarray:
    """A vector that tells the prompt, not of length 1."""
    prompt = generate.prompt
    seed = len(prompt.text) if isinstance(prompt, TextPrompt) else sum(bytes(prompt.ids))
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32) * 3


def vectors(generate: Generate) -> list[Chunks]:
    """The script of an engine with an embedding model: 4 tokens a prompt, one of them cached."""
    assert generate.pooled and generate.n == 1 and generate.params.max_new_tokens == 0
    raw = vector_for(generate).tobytes()
    return [Chunks([Chunk(generate.rid, "", [], [], "stop", None, 4, 0, 1, vector=raw)])]


def logits(generate: Generate) -> list[Chunks]:
    return [Chunks([Chunk(generate.rid, "", [], [], "stop", None, 4, 0, 1, vector=LOGITS.tobytes())])]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.fixture
async def rig(anyio_backend: object, fakes: SimpleNamespace) -> AsyncIterator[Any]:
    """An engine with an embedding model."""
    model = replace(fakes.MODEL, pooling=EMBEDDING)
    async with fakes.open_rig(model, max_body_bytes=10_000, max_queued_requests=300) as opened:
        opened.text.script = vectors
        yield opened


@pytest.fixture
async def judging(anyio_backend: object, fakes: SimpleNamespace) -> AsyncIterator[Any]:
    """An engine with a classification head."""
    async with fakes.open_rig(replace(fakes.MODEL, pooling=LABELS)) as opened:
        opened.text.script = logits
        yield opened


@pytest.mark.parametrize(
    "given", ["a text", ["a text", "and another"], [5, 6, 7], [[5, 6], [7]]], ids=["text", "texts", "ids", "lists"]
)
async def test_inputs(rig: Any, client: openai.AsyncOpenAI, given: Any) -> None:
    """Base64, which the client asks for by default, and floats are the same numbers, of length 1."""
    reply = await client.embeddings.create(model="fake-model", input=given, user="somebody")
    floats = await client.embeddings.create(model="fake-model", input=given, encoding_format="float")
    asked = rig.text.generates[: len(reply.data)]
    assert [item.index for item in reply.data] == list(range(len(asked)))
    for item, other, generate in zip(reply.data, floats.data, asked, strict=True):
        assert item.embedding == other.embedding
        assert np.abs(unit(vector_for(generate)) - item.embedding).max() < 1e-6
    prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    for prompt, generate in zip(prompts, asked, strict=True):
        if isinstance(prompt, str):
            assert generate.prompt == TextPrompt(prompt)
        else:
            assert isinstance(generate.prompt, TokenPrompt) and generate.prompt.ids.cast("i").tolist() == prompt
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (4 * len(asked), 4 * len(asked))


async def test_base64_is_little_endian_float32(rig: Any) -> None:
    reply = await rig.http.post("/v1/embeddings", json={"input": "a text", "encoding_format": "base64"})
    found = np.frombuffer(base64.b64decode(reply.json()["data"][0]["embedding"]), "<f4")
    assert np.abs(found - unit(vector_for(rig.text.generates[0]))).max() < 1e-6
    assert reply.json()["object"] == "list" and reply.json()["data"][0]["object"] == "embedding"


async def test_dimensions_and_normalize(rig: Any) -> None:
    """The first numbers, again of length 1; or as the model made them."""
    cut = (await rig.http.post("/v1/embeddings", json={"input": "a text", "dimensions": 3})).json()
    raw = (await rig.http.post("/v1/embeddings", json={"input": "a text", "normalize": False})).json()
    vector = vector_for(rig.text.generates[0])
    assert np.abs(unit(vector[:3]) - cut["data"][0]["embedding"]).max() < 1e-6
    assert np.abs(vector - raw["data"][0]["embedding"]).max() < 1e-6


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1000]}, "input"),
        ({"input": ["a"] * 301}, "input"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        ({"input": "a", "model": "other"}, "model"),
    ],
)
async def test_bad_requests_name_the_field(rig: Any, body: dict[str, Any], param: str) -> None:
    reply = await rig.http.post("/v1/embeddings", json=body)
    assert reply.status_code == (404 if "model" in body else 400)
    assert reply.json()["error"]["param"] == param, reply.text
    assert not rig.text.generates


async def test_an_input_that_is_too_long(rig: Any) -> None:
    text = "prompt has 600 tokens; the model takes 512"
    rig.text.script = lambda g: [Refused(g.rid, g.n, 400, "context_length_exceeded", text, "prompt")]
    reply = await rig.http.post("/v1/embeddings", json={"input": "a " * 600})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "input", "context_length_exceeded")
    assert error["message"].startswith("input has 600 tokens")


async def test_truncation(rig: Any) -> None:
    """Of texts the tokenizer takes the first tokens; token ids are cut here. -1 is all that the model takes."""
    await rig.http.post("/v1/embeddings", json={"input": "a text", "truncate_prompt_tokens": 3})
    await rig.http.post("/v1/embeddings", json={"input": "a text", "truncate_prompt_tokens": -1})
    await rig.http.post("/v1/embeddings", json={"input": [5, 6, 7], "truncate_prompt_tokens": 2})
    three, all_of_it, ids = (generate.prompt for generate in rig.text.generates)
    assert (three, all_of_it) == (TextPrompt("a text", 3), TextPrompt("a text", 512))
    assert isinstance(ids, TokenPrompt) and ids.ids.cast("i").tolist() == [5, 6]


async def test_encode(rig: Any) -> None:
    """One prompt is answered with an object, a batch with a list."""
    one = (await rig.http.put("/encode", json={"text": "a text", "rid": "mine"})).json()
    many = (await rig.http.post("/encode", json={"input_ids": [[5, 6], [7]], "dimensions": 2})).json()
    first, *others = rig.text.generates
    assert np.abs(unit(vector_for(first)) - one["embedding"]).max() < 1e-6
    assert one["meta_info"]["id"] == first.name == "mine", "its timeline is found by it, on every front"
    assert (one["meta_info"]["prompt_tokens"], one["meta_info"]["cached_tokens"]) == (4, 1)
    assert [item["index"] for item in many] == [0, 1]
    for item, generate in zip(many, others, strict=True):
        assert np.abs(unit(vector_for(generate)[:2]) - item["embedding"]).max() < 1e-6
    for body, param in (({}, "text"), ({"text": "a", "input_ids": [1]}, "input_ids"), ({"text": []}, "text")):
        reply = await rig.http.post("/encode", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_a_model_does_one_thing(rig: Any, fakes: SimpleNamespace, judging: Any) -> None:
    """A clear 400 for text of an embedding model, for vectors of one that generates, and for the other kind of both."""
    async with fakes.open_rig() as generating:
        asked = [
            (rig, "/v1/completions", {"prompt": "a"}, "no text"),
            (rig, "/generate", {"text": "a"}, "no text"),
            (rig, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "no text"),
            (rig, "/v1/classify", {"input": "a"}, "no labels"),
            (generating, "/v1/embeddings", {"input": "a"}, "--is-embedding"),
            (generating, "/encode", {"text": "a"}, "--is-embedding"),
            (generating, "/judge", {"text": "a"}, "--is-embedding"),
            (judging, "/v1/embeddings", {"input": "a"}, "/v1/classify"),
        ]
        for server, path, body, said in asked:
            reply = await server.http.post(path, json=body)
            assert reply.status_code == 400, path
            error = reply.json()["error"]
            assert said in error["message"] and error["param"] == "model" and error["code"] == "unsupported_model"
            assert not server.text.generates
        described = [(await s.http.get("/model_info")).json()["is_generation"] for s in (rig, judging, generating)]
        assert described == [False, False, True]


async def test_judge(judging: Any) -> None:
    """Conversations by the template, without the beginning of an answer; or texts. The reply has the logits."""
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    for body, is_batch in (({"conv": turns}, False), ({"conv": [turns, turns]}, True), ({"text": "a"}, False)):
        reply = (await judging.http.post("/judge", json=body)).json()
        assert isinstance(reply, list) is is_batch
        for item in reply if is_batch else [reply]:
            assert item["embedding"] == LOGITS.tolist()
    prompts = [generate.prompt for generate in judging.text.generates]
    assert all(isinstance(prompt, ChatPrompt) for prompt in prompts[:3])
    assert b'"add_generation_prompt":false' in prompts[0].payload
    for conv in ([], [turns[0], turns]):
        reply = await judging.http.post("/judge", json={"conv": conv})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "conv")


async def test_classify(judging: Any) -> None:
    reply = (await judging.http.post("/v1/classify", json={"input": ["a", "b"]})).json()
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert [item["index"] for item in reply["data"]] == [0, 1]
    for item in reply["data"]:
        assert (item["label"], item["num_classes"]) == ("yes", 3)
        assert np.abs(expected - item["probs"]).max() < 1e-6
    assert reply["usage"]["prompt_tokens"] == 8


async def test_an_aborted_request_has_no_vector(rig: Any) -> None:
    rig.text.script = lambda g: [Chunks([Chunk(g.rid, "", [], [], "abort", None, 4, 0, 0)])]
    reply = await rig.http.post("/v1/embeddings", json={"input": "a text"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "cancelled")
