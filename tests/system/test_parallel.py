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
LONG = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny.build("llama", max_position_embeddings=4096)
    return tiny.save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ["--model", folder, "--skip-tokenizer-init", "--device", "cpu", "--dtype", "float32", "--tp-size", "2"]
    with live_server(tmp_path_factory.mktemp("server"), *flags, "--max-total-tokens", "16384") as s:
        yield s


def body(tokens: int) -> dict[str, object]:
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": PROMPT, "sampling_params": params}


def generate(server: LiveServer, tokens: int) -> list[int]:
    reply = httpx.post(server.url + "/generate", json=body(tokens), timeout=60)
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["output_ids"]
    return ids


def greedy(folder: str, tokens: int) -> list[int]:
    """What one rank with the whole model continues with, token by token."""
    torch.set_num_threads(1)
    driver = tiny.Driver.of(tiny.load(folder), num_pages=16)
    request = driver.request(PROMPT, room=tokens)
    while len(request.ids) < request.goal:
        logits = driver.forward([(request, len(request.ids) - request.done)])
        request.ids.append(int(logits[-1].argmax()))
    return request.ids[len(PROMPT) :]


class Stream(threading.Thread):
    """A client that reads a long answer."""

    def __init__(self, server: LiveServer) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.ids: list[int] = []

    def run(self) -> None:
        asked = body(LONG) | {"stream": True}
        with httpx.stream("POST", self.server.url + "/generate", json=asked, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    self.ids = json.loads(line[6:])["output_ids"]


def test_two_ranks_say_what_one_does(server: LiveServer, folder: str) -> None:
    assert {"exec.0", "exec.1"} <= server.children().keys()
    assert generate(server, 64) == greedy(folder, 64)
    assert server.get("/get_server_info").json()["tp_size"] == 2
    server.assert_pages_add_up()


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_rank_takes_the_others_along_and_no_stream(server: LiveServer, rank: int) -> None:
    expected = generate(server, LONG)
    stream = Stream(server)
    stream.start()
    wait_until(lambda: len(stream.ids) > 3 or not stream.is_alive(), 30, "the stream runs")
    before = server.children()
    os.kill(before[f"exec.{rank}"], signal.SIGKILL)
    wait_until(lambda: not before.items() & {k: v for k, v in server.children().items() if "exec" in k}.items(), 30,
               "both ranks are new")  # fmt: skip
    stream.join(60)
    assert stream.ids == expected
    server.assert_pages_add_up()


def test_the_schedulers_death_leaves_the_ranks_alone(server: LiveServer) -> None:
    expected = generate(server, LONG)
    stream = Stream(server)
    stream.start()
    wait_until(lambda: len(stream.ids) > 3 or not stream.is_alive(), 30, "the stream runs")
    before = server.children()
    os.kill(before["sched"], signal.SIGKILL)
    stream.join(60)
    assert stream.ids == expected
    after = server.children()
    assert after["sched"] != before["sched"]
    assert (after["exec.0"], after["exec.1"]) == (before["exec.0"], before["exec.1"])
