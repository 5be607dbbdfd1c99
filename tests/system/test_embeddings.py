"""Embeddings by the whole engine: the real all-MiniLM-L6-v2 over HTTP, tiny models in this process, and deaths."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tiny
import torch
import transformers
from live_server import LiveServer, live_server, wait_until
from stub_model import stub_folder

import actorserve
from actorserve.actors.stub_draw import hash_of, vector_of
from actorserve.errors import RequestError

TEXTS = [
    "Hello, world",
    "The quick brown fox jumps over the lazy dog.",
    "Ünïcödé, 中文 and a cup of ☕ tea",
    "word " * 250,
    "?",
]


@pytest.fixture(scope="module")
def server(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("minilm")
    flags = ["--model", minilm, "--dtype", "float32", "--data-dir", str(folder / "data"), "--max-total-tokens", "8192"]
    with live_server(folder, *flags) as running:
        yield running
        running.assert_pages_add_up()


@pytest.fixture(scope="module")
def expected(minilm: str) -> list[np.ndarray]:
    """transformers' vectors of TEXTS: the mean of the last hidden states, of length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    return [torch.nn.functional.normalize(states.mean(0), dim=0).numpy() for states in hidden]


def far(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) - expected).max())


def test_minilm_equals_transformers(server: LiveServer, expected: list[np.ndarray]) -> None:
    """Through the openai client, in base64 (its default) and as floats; together and alone."""
    with server.client() as client:
        packed = client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS)
        floats = client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS, encoding_format="float")
        alone, written = (
            [client.embeddings.create(model="", input=text, **form).data[0].embedding for text in TEXTS]  # type: ignore[call-overload]
            for form in ({}, {"encoding_format": "float"})
        )
        cut = client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS[1], dimensions=64).data[0].embedding
    for i, vector in enumerate(expected):
        assert far(packed.data[i].embedding, vector) < 1e-5
        assert far(floats.data[i].embedding, vector) < 1e-5
        assert far(alone[i], vector) < 1e-5
    assert alone == written, "the same computation, in base64 and as floats"
    assert far(cut, expected[1][:64] / np.linalg.norm(expected[1][:64])) < 1e-5
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 250


def test_token_ids_and_encode(server: LiveServer, expected: list[np.ndarray]) -> None:
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": TEXTS[1]}).json()["tokens"]
    with server.client() as client:
        assert far(client.embeddings.create(model="", input=ids).data[0].embedding, expected[1]) < 1e-5
    reply = httpx.post(f"{server.url}/encode", json={"text": TEXTS[:2]}).json()
    assert [far(item["embedding"], vector) < 1e-5 for item, vector in zip(reply, expected, strict=False)] == [True] * 2
    assert httpx.get(f"{server.url}/model_info").json()["context_length"] == 256


def test_minilm_cuts_if_told(server: LiveServer) -> None:
    """[CLS], 254 words, [SEP]: as transformers truncates."""
    with server.client() as client:
        cut = client.embeddings.create(model="", input="word " * 300, extra_body={"truncate_prompt_tokens": -1})
        whole = client.embeddings.create(model="", input="word " * 254)
    assert cut.usage.prompt_tokens == whole.usage.prompt_tokens == 256
    assert cut.data[0].embedding == whole.data[0].embedding


def test_minilm_refuses(server: LiveServer) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError, match="input has 302 tokens; the model takes 256") as caught:
            client.embeddings.create(model="", input="word " * 300)
        assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
        with pytest.raises(openai.BadRequestError, match="gives embeddings, no text"):
            client.completions.create(model="", prompt="Hello")


def test_a_batch_of_embeddings(server: LiveServer, expected: list[np.ndarray]) -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings", "body": {"model": "", "input": text}}
        for i, text in enumerate(TEXTS)
    ]
    with server.client() as client:
        file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60, "the batch is done")
        output = client.batches.retrieve(batch.id).output_file_id
        assert output is not None
        answers = [json.loads(line) for line in client.files.content(output).text.splitlines()]
    found = {answer["custom_id"]: answer["response"]["body"]["data"][0]["embedding"] for answer in answers}
    assert len(found) == len(TEXTS)
    for i, vector in enumerate(expected):
        assert far(found[str(i)], vector) < 1e-5


def test_a_decoder_whole_in_chunks_and_cached(tmp_path: Path) -> None:
    """Prompts through the whole engine, in chunks of 16 tokens, three of them beginning alike."""
    model = tiny.build("qwen2").model
    folder = tiny.save(model, tmp_path)
    head = tiny.prompt(40)
    prompts = [head + tiny.prompt(n, seed=n) for n in (30, 21, 1)] + [tiny.prompt(n, seed=n) for n in (5, 64)]
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).last_hidden_state[0, -1].numpy() for ids in prompts]
    settings = {"dtype": "float32", "device": "cpu", "placement": "inline", "skip_tokenizer_init": True}
    for chunk in (0, 16):
        with actorserve.Engine.sync(folder, chunked_prefill_size=chunk, max_total_tokens=1024, **settings) as engine:
            first = engine.embed(prompts[0], normalize=False)
            found = [first, *engine.embed(prompts[1:], normalize=False)]
            again = engine.embed(prompts[0])
            for one, vector in zip(found, expected, strict=True):
                assert far(one.vector, vector) <= 1e-5 * vector.std()
            assert far(again.vector, expected[0] / np.linalg.norm(expected[0])) < 1e-6
            assert [one.cached_tokens for one in found] == [0, 40, 40, 0, 0]
            assert again.cached_tokens == 69, "the last token is always computed"
            with pytest.raises(RequestError, match="no text"):
                engine.generate(prompts[0])
            with pytest.raises(RequestError, match="dimensions"):
                engine.embed(prompts[0], dimensions=49)


def test_a_classification_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    config = transformers.LlamaConfig(**tiny.COMMON, **names, attn_implementation="eager")
    model = transformers.LlamaForSequenceClassification(config).eval()
    prompts = [tiny.prompt(n, seed=n) for n in (5, 40)]
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]
    settings = {"dtype": "float32", "device": "cpu", "placement": "inline", "skip_tokenizer_init": True}
    with actorserve.Engine.sync(tiny.save(model, tmp_path), max_total_tokens=1024, **settings) as engine:
        for one, logits in zip(engine.classify(prompts), expected, strict=True):
            assert far(one.logits, logits) <= 1e-5 * max(0.1, logits.std())
            assert one.label == ("bad", "good")[int(logits.argmax())]
            assert abs(one.probabilities.sum() - 1) < 1e-12
        with pytest.raises(RequestError, match="use classify"):
            engine.embed(prompts[0])


def test_a_cross_encoder_equals_transformers(minilm: str, tmp_path: Path) -> None:
    """MiniLM with a head of one label: pairs of texts, short, uneven and cut, by /v1/rerank and /v1/score."""
    torch.manual_seed(0)
    folder, running_in = tmp_path / "model", tmp_path / "server"
    model = transformers.BertForSequenceClassification.from_pretrained(minilm, num_labels=1, dtype=torch.float32).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    running_in.mkdir()

    def expected(first: str, second: str) -> float:
        with torch.no_grad():
            pair = tokenizer(first, second, truncation=True, max_length=100, return_tensors="pt")
            return float(torch.sigmoid(model(**pair).logits[0, 0]))

    flags = ["--model", str(folder), "--dtype", "float32", "--context-length", "100"]
    with live_server(running_in, *flags) as running:
        body = {"query": TEXTS[0], "documents": TEXTS, "truncate_prompt_tokens": -1}
        results = httpx.post(f"{running.url}/v1/rerank", json=body).json()["results"]
        scores = {one["index"]: one["relevance_score"] for one in results}
        for i, text in enumerate(TEXTS):
            assert abs(scores[i] - expected(TEXTS[0], text)) < 1e-5
        assert len(set(scores.values())) == len(TEXTS)
        body = {"text_1": TEXTS[3], "text_2": TEXTS, "truncate_prompt_tokens": -1}
        for one in httpx.post(f"{running.url}/v1/score", json=body).json()["data"]:
            assert abs(one["score"] - expected(TEXTS[3], TEXTS[one["index"]])) < 1e-5


def has_prefilled(running: LiveServer, before: float) -> bool:
    return running.metrics()["actorserve_prefilled_tokens_total"] > before


def test_every_vector_comes_though_actors_die(tmp_path: Path) -> None:
    """With the stub, whose vectors are a function of the whole prompt."""
    folder = stub_folder(tmp_path)
    flags = ["--model", folder, "--load-format", "stub", "--is-embedding", "--stub-step-ms", "10"]
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"hidden_size": 16}))
    with live_server(tmp_path, *flags, "--chunked-prefill-size", "64") as running:
        for round_, victim in enumerate(("exec.0", "sched", "text")):
            prompts = [[5 + i % 50, 3 + round_, *range(3, 40 + i % 7), 6 + i % 20] for i in range(100)]
            replies: list[httpx.Response] = []

            def ask(prompts: list[list[int]], replies: list[httpx.Response]) -> None:
                body = {"input_ids": prompts, "normalize": False}
                replies.append(httpx.post(f"{running.url}/encode", json=body, timeout=60))

            begun = partial(has_prefilled, running, running.metrics()["actorserve_prefilled_tokens_total"])
            asking = threading.Thread(target=ask, args=(prompts, replies))
            asking.start()
            wait_until(begun, 20, f"work has begun ({victim})")
            assert not replies
            os.kill(running.children()[victim], signal.SIGKILL)
            asking.join(60)
            assert [reply.status_code for reply in replies] == [200], replies[0].text
            for prompt, item in zip(prompts, replies[0].json(), strict=True):
                assert far(item["embedding"], vector_of(hash_of(prompt), 16)) == 0
            wait_until(running.is_ready, 20, "the engine is well again")
        running.assert_pages_add_up()
