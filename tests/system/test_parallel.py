"""Two tensor parallel ranks as processes over gloo: the text of one rank, and what clients see when one is killed."""

import json
import os
import signal
import threading
from collections.abc import Iterator

import httpx
import pytest
import tiny
import torch
from live_server import LiveServer, live_server, wait_until

PROMPT = [5, 17, 3, 99, 42, 8]
LONG = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny.build("llama", max_position_embeddings=4096)
    return tiny.save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ["--model", folder, "--skip-tokenizer-init", "--device", "cpu", "--dtype", "float32", "--tp-size", "2"]
    with live_server(tmp_path_factory.mktemp("server"), *flags, "--max-total-tokens", "16384") as s:
        yield s


def body() -> dict[str, object]:
    params = {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True}
    return {"input_ids": PROMPT, "sampling_params": params}


class Stream(threading.Thread):
    """A client that reads a long answer."""

    def __init__(self, server: LiveServer) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.ids: list[int] = []

    def run(self) -> None:
        asked = body() | {"stream": True}
        with httpx.stream("POST", self.server.url + "/generate", json=asked, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    self.ids = json.loads(line[6:])["output_ids"]


def started(server: LiveServer) -> Stream:
    """A stream in the middle of its answer."""
    stream = Stream(server)
    stream.start()
    wait_until(lambda: len(stream.ids) > 3 or not stream.is_alive(), 30, "the stream runs")
    assert stream.is_alive() and len(stream.ids) < LONG
    return stream


@pytest.fixture(scope="module")
def expected(folder: str) -> list[int]:
    """What one rank with the whole model continues with, token by token."""
    torch.set_num_threads(1)
    driver = tiny.Driver.of(tiny.load(folder))
    request = driver.request(PROMPT, room=LONG)
    while len(request.ids) < request.goal:
        logits = driver.forward([(request, len(request.ids) - request.done)])
        request.ids.append(int(logits[-1].argmax()))
    return request.ids[len(PROMPT) :]


def test_two_ranks_say_what_one_does(server: LiveServer, expected: list[int]) -> None:
    assert {"exec.0", "exec.1"} <= server.children().keys()
    reply = httpx.post(server.url + "/generate", json=body(), timeout=60)
    assert reply.json()["output_ids"] == expected
    assert server.get("/get_server_info").json()["tp_size"] == 2
    server.assert_pages_add_up()


def test_a_killed_rank_takes_the_others_along_and_no_stream(
    server: LiveServer, expected: list[int], thorough: bool
) -> None:
    for rank in (1, 0) if thorough else (1,):
        stream = started(server)
        before = server.children()
        os.kill(before[f"exec.{rank}"], signal.SIGKILL)
        stream.join(60)
        after = server.children()
        assert stream.ids == expected
        assert not {before["exec.0"], before["exec.1"]} & {after["exec.0"], after["exec.1"]}
        server.assert_pages_add_up()


def test_the_schedulers_death_leaves_the_ranks_alone(server: LiveServer, expected: list[int]) -> None:
    stream = started(server)
    before = server.children()
    os.kill(before["sched"], signal.SIGKILL)
    stream.join(60)
    assert stream.ids == expected
    after = server.children()
    assert after["sched"] != before["sched"]
    assert (after["exec.0"], after["exec.1"]) == (before["exec.0"], before["exec.1"])
