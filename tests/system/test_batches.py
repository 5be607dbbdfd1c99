"""Batches on the real server: what was answered stays answered when the front, or all of it, is killed."""

import json
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import LiveServer, alive, live_server, wait_until

ROUTE = 'actorserve_http_requests_total{route="/v1/chat/completions",status="200"}'


def line(i: int) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": f"Count from {i}."}], "max_tokens": 8, "ignore_eos": True}
    return {"custom_id": f"n{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def start(client: openai.OpenAI, lines: int) -> str:
    content = "".join(json.dumps(line(i)) + "\n" for i in range(lines)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id  # fmt: skip


def wait_for(client: openai.OpenAI, name: str, completed: int, seconds: float) -> openai.types.Batch:
    """The batch, once it has that many answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(name)
        assert batch.request_counts is not None
        if batch.request_counts.completed >= completed:
            return batch
        time.sleep(0.02)
    raise AssertionError(f"not {completed} answers within {seconds} s")


def answered_by(server: LiveServer) -> int:
    """Chats that this front has answered."""
    found = [x.rpartition(" ")[2] for x in server.get("/metrics").text.splitlines() if x.startswith(ROUTE)]
    return int(float(found[0])) if found else 0


def check_output(server: LiveServer, name: str, lines: int) -> None:
    with server.client() as client:
        wait_until(lambda: client.batches.retrieve(name).status == "completed", 30, "the batch is complete")
        batch = client.batches.retrieve(name)
        assert batch.error_file_id is None and batch.output_file_id is not None
        output = [json.loads(x) for x in client.files.content(batch.output_file_id).text.splitlines()]
    assert [x["custom_id"] for x in output] == [f"n{i}" for i in range(lines)]
    assert len({x["id"] for x in output}) == lines
    assert all(x["response"]["body"]["usage"]["completion_tokens"] == 8 for x in output)


def test_a_batch_survives_the_death_of_the_front(server: LiveServer) -> None:
    with server.client() as client:
        name = start(client, 40)
        before = wait_for(client, name, 20, 60).request_counts
        os.kill(server.children()["front.0"], signal.SIGKILL)
        wait_until(server.is_ready, 30, "the front is back")
    with server.client() as client:
        wait_for(client, name, 40, 60)
    check_output(server, name, 40)
    assert before is not None and answered_by(server) <= 40 - before.completed


def test_a_thousand_lines_are_answered_once_over_kill_9(smollm: str, tmp_path: Path, thorough: bool) -> None:
    if not thorough:
        pytest.skip("two servers; --thorough")
    flags = ["--model", smollm, "--max-total-tokens", "32768", "--data-dir", str(tmp_path / "data")]
    with live_server(tmp_path, *flags) as first, first.client() as client:
        name = start(client, 1000)
        wait_for(client, name, 500, 600)
        children = first.children().values()
        first.process.kill()
        first.process.wait()
        wait_until(lambda: not any(map(alive, children)), 10, "its processes are gone")
    with sqlite3.connect(tmp_path / "data" / "actorserve.sqlite") as db:
        (before,) = db.execute("SELECT count(*) FROM lines WHERE answer IS NOT NULL").fetchone()
    db.close()
    assert 500 <= before < 1000
    with live_server(tmp_path, *flags) as second:
        with second.client() as client:
            wait_for(client, name, 1000, 600)
        check_output(second, name, 1000)
        assert answered_by(second) == 1000 - before
