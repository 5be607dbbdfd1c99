"""A whole server without a model (--load-format stub): what concerns all of its processes and none of the numbers."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, live_server, wait_until
from stub_model import stub_folder

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True, "seed": 5}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("stub")
    for name in ("weights/a", "weights/b"):
        stub_folder(folder / name)
    flags = ["--model", stub_folder(folder / "model"), "--load-format", "stub", "--http-workers", "2"]
    with live_server(
        folder, *flags, "--weights-root", str(folder / "weights"), "--data-dir", str(folder / "data")
    ) as s:
        yield s


def post(server: LiveServer, path: str, body: dict[str, Any]) -> httpx.Response:
    """On a connection of its own, so that any front may get it."""
    return httpx.post(server.url + path, json=body, timeout=60, headers={"connection": "close"})


def text(server: LiveServer) -> str:
    reply = post(server, "/v1/completions", BODY)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_timelines_of_all_fronts(stub: LiveServer) -> None:
    body = BODY | {"stream": True, "n": 2, "timeline": True}
    lines = post(stub, "/v1/completions", body).text.splitlines()
    last = json.loads([line for line in lines if line.startswith("data: {")][-1][6:])
    assert last["choices"] == [] and [one["index"] for one in last["timeline"]] == [0, 1]
    names = ("tokenized", "queued", "admitted", "prefill_start", "prefill_end", "first_token", "finished")
    for one in last["timeline"]:
        times = [one[name] for name in names]
        assert times == sorted(times) and times[0] > 0 and times[-1] < 60
        ends = [w["end"] for w in one["windows"] if w["end"] is not None]  # the last one may be on its way
        assert ends == sorted(ends) and sum(w["k"] for w in one["windows"]) >= 40
    for _ in range(6):  # whichever front it was, and whichever is asked
        found = stub.get(f"/v1/requests/{last['id']}/timeline").json()
        for one, other in zip(found["choices"], last["timeline"], strict=True):
            assert [one[name] for name in names] == [other[name] for name in names]


def test_metrics_of_all_fronts(stub: LiveServer) -> None:
    def completions() -> float:
        rows = [x for x in stub.get("/metrics").text.splitlines() if x.startswith("actorserve_http_requests_total")]
        return sum(float(x.rpartition(" ")[2]) for x in rows if 'route="/v1/completions",status="200"' in x)

    before = completions()
    for _ in range(12):
        text(stub)
    assert completions() == before + 12
    assert set(stub.children()) >= {"front.0", "front.1"}


def test_aborts_reach_requests_of_all_fronts(stub: LiveServer) -> None:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}, "rid": "mine"}
    for _ in range(4):
        with httpx.stream("POST", stub.url + "/generate", json=body | {"stream": True}, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            post(stub, "/abort_request", {"rid": "mine"})
            last = [line for line in lines if line.startswith("data: {")][-1]
        assert json.loads(last[6:])["meta_info"]["finish_reason"]["type"] == "abort"


def test_weights_outlive_their_executor(stub: LiveServer) -> None:
    """Other weights say other things; an executor that comes back has those of the last update, not of the start."""
    texts = [text(stub)]
    for name in ("a", "b"):
        reply = post(stub, "/update_weights_from_disk", {"model_path": name})
        assert reply.status_code == 200 and reply.json()["success"], reply.text
        texts.append(text(stub))
    second = texts[-1]
    assert len(set(texts)) == 3 and text(stub) == second
    os.kill(stub.children()["exec.0"], signal.SIGKILL)
    assert text(stub) == second
    os.kill(stub.children()["sched"], signal.SIGKILL)
    wait_until(stub.is_ready, 30, "the scheduler is back")
    assert text(stub) == second
    (state,) = stub.get("/server_info").json()["internal_states"]
    assert state["weights"].endswith("/weights/b")
    stub.assert_pages_add_up()


def test_what_a_stub_cannot_do(stub: LiveServer) -> None:
    reply = post(stub, "/start_profile", {})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_value")
    assert post(stub, "/update_weights_from_disk", {"model_path": "../model"}).status_code == 400


def test_files_of_all_fronts(stub: LiveServer, tmp_path: Path) -> None:
    with stub.client() as client:
        made = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    for _ in range(6):
        assert stub.get(f"/v1/files/{made.id}").status_code == 200
