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
from stub_model import stub_folder

MANY, FEW, LATE = 1000, 200, 11
LATE_OF_STUB = 600
"""Many of the slow steps that the first server makes, so that the half is not the whole before the kill."""
ROUTE = 'actorserve_http_requests_total{route="/v1/completions",status="200"}'


def tokens(i: int, late: int) -> int:
    """Of line i: some end early, some late; of every second one, `late`."""
    return late if i % 2 else 2 + i % 40 // 4


def line(i: int, late: int) -> dict[str, Any]:
    """Those with `late` tokens have their turn after the others: lines are taken in the order of their bodies."""
    body = {"prompt": f"{'Later' if i % 2 else 'Count'} from {i}:", "max_tokens": tokens(i, late), "ignore_eos": True}
    return {"custom_id": f"n{i}", "method": "POST", "url": "/v1/completions", "body": body}


def start(client: openai.OpenAI, lines: int, late: int) -> str:
    content = "".join(json.dumps(line(i, late)) + "\n" for i in range(lines)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
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
    """Completions that this front has answered."""
    found = [x.rpartition(" ")[2] for x in server.get("/metrics").text.splitlines() if x.startswith(ROUTE)]
    return int(float(found[0])) if found else 0


def check_output(server: LiveServer, name: str, lines: int, late: int) -> None:
    with server.client() as client:
        wait_until(lambda: client.batches.retrieve(name).status == "completed", 60, "the batch is complete")
        batch = client.batches.retrieve(name)
        assert batch.error_file_id is None and batch.output_file_id is not None
        output = [json.loads(x) for x in client.files.content(batch.output_file_id).text.splitlines()]
    assert [x["custom_id"] for x in output] == [f"n{i}" for i in range(lines)]
    assert len({x["id"] for x in output}) == lines
    counts = [x["response"]["body"]["usage"]["completion_tokens"] for x in output]
    assert counts == [tokens(i, late) for i in range(lines)]


def test_a_batch_survives_the_death_of_the_front(server: LiveServer) -> None:
    with server.client() as client:
        name = start(client, 40, LATE)
        before = wait_for(client, name, 20, 240).request_counts
        os.kill(server.children()["front.0"], signal.SIGKILL)
        wait_until(server.is_ready, 120, "the front is back")
    with server.client() as client:
        wait_for(client, name, 40, 240)
    check_output(server, name, 40, LATE)
    assert before is not None and answered_by(server) <= 40 - before.completed


def test_a_thousand_lines_are_answered_once_over_kill_9(smollm: str, tmp_path: Path, thorough: bool) -> None:
    if not thorough:
        pytest.skip("two servers of the real model; --thorough")
    flags = ["--model", smollm, "--max-total-tokens", "32768"]
    killed_at_half(tmp_path, MANY, LATE, flags, flags)


def test_lines_are_answered_once_over_kill_9(tmp_path: Path, thorough: bool) -> None:
    """The same without a model, and of two fronts, one of which does the lines."""
    flags = ["--model", stub_folder(tmp_path / "model"), "--load-format", "stub", "--http-workers", "2"]
    slow, quick = [*flags, "--stub-step-ms", "50"], [*flags, "--stub-step-ms", "1"]
    killed_at_half(tmp_path, MANY if thorough else FEW, LATE_OF_STUB, slow, quick)


def killed_at_half(tmp_path: Path, lines: int, late: int, flags: list[str], next_flags: list[str]) -> None:
    """Kill the whole server when half of the lines have their answers; another one does the rest, and no more."""
    data = ["--data-dir", str(tmp_path / "data")]
    with live_server(tmp_path, *flags, *data) as first, first.client() as client:
        name = start(client, lines, late)
        wait_for(client, name, lines // 2, 600)
        children = first.children().values()
        first.process.kill()
        first.process.wait()
        wait_until(lambda: not any(map(alive, children)), 10, "its processes are gone")
    with sqlite3.connect(tmp_path / "data" / "actorserve.sqlite") as db:
        (before,) = db.execute("SELECT count(*) FROM lines WHERE answer IS NOT NULL").fetchone()
    db.close()
    assert lines // 2 <= before < lines
    with live_server(tmp_path, *next_flags, *data) as second:
        with second.client() as client:
            wait_for(client, name, lines, 600)
        check_output(second, name, lines, late)
        assert answered_by(second) == lines - before
