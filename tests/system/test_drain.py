"""Orderly ends: SIGINT is quick, SIGTERM lets streams end in their time, a second signal is the last word."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from live_load import Answer, LiveLoad
from live_server import LiveServer, alive, live_server, shared_memory, wait_until
from stub_model import stub_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stub_folder(tmp_path_factory.mktemp("stub"))


@contextmanager
def busy(tmp: Path, folder: str, tokens: int, *flags: str) -> Iterator[tuple[LiveServer, Future[Answer]]]:
    """A server in the middle of a stream. When it has ended, nothing of it is left."""
    before = shared_memory()
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    stub = ("--load-format", "stub", "--stub-step-ms", "10", "--max-total-tokens", "8192")
    with live_server(tmp, "--model", folder, *stub, *flags) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: LiveLoad(server.url, [body]).once()[0])
        wait_until(lambda: server.metrics()["actorserve_running_requests"] == 1, 30, "the stream runs")
        pids = list(server.children().values())
        yield server, answer
        assert not any(map(alive, pids)), "an orphan"
    assert shared_memory() == before


@pytest.mark.parametrize(("number", "flags"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--drain-timeout", "0.5"))])
def test_what_does_not_end_in_time_gets_an_error(
    tmp_path: Path, folder: str, number: signal.Signals, flags: tuple[str, ...]
) -> None:
    with busy(tmp_path, folder, 4000, *flags) as (server, answer):
        started = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(20) == 0
        print(f"\nended after {time.monotonic() - started:.2f} s")
        assert "shutting down" in (answer.result().error or "") and "[DONE]" not in answer.result().ends


@pytest.mark.parametrize("death", [False, True])
def test_sigterm_lets_streams_end(tmp_path: Path, folder: str, death: bool) -> None:
    """Also when an actor dies meanwhile. Time stands still until all is looked at."""
    with busy(tmp_path, folder, 300, "--drain-timeout", "120") as (server, answer):
        assert httpx.post(server.url + "/pause_generation", json={"mode": "in_place"}, timeout=30).status_code == 200
        pid = server.children()["sched"]
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/ready").status_code == 503, 30, "it is not ready")
        assert server.get("/ready").json()["status"] == "draining"
        if death:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: server.children().get("sched", pid) != pid, 30, "there is another scheduler")
            wait_until(lambda: server.get("/health").status_code == 200, 60, "it is well")
        late = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert not answer.done()
        assert httpx.post(server.url + "/continue_generation", json={}, timeout=30).status_code == 200
        assert server.process.wait(60) == 0
        said = answer.result()
        assert (said.error, said.ends) == (None, ["length", "[DONE]"]) and said.text


def test_a_second_signal_ends_it_at_once(tmp_path: Path, folder: str) -> None:
    with busy(tmp_path, folder, 4000, "--drain-timeout", "60") as (server, _):
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/ready").status_code == 503, 30, "it is not ready")
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM
        print(f"\nended after {time.monotonic() - started:.2f} s")
