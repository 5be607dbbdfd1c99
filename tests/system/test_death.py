"""kill -9 of each process: what clients see, who comes back, what is left behind. At random: test_chaos.py."""

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_tokenizers
from live_server import LiveServer, alive, live_server, shared_memory, wait_until

from actorserve.perf.constrained import CHARACTER, WORDS
from actorserve.perf.engines import free_port
from actorserve.perf.shapes import shape_folder

TEXT = "Once upon a time"


class Stream(threading.Thread):
    """A client in the middle of a long answer; `events` are its SSE payloads, `error` how its connection broke."""

    def __init__(self, server: LiveServer, new_tokens: int) -> None:
        super().__init__(daemon=True)
        self.server, self.new_tokens = server, new_tokens
        self.events: list[str] = []
        self.error: Exception | None = None

    def run(self) -> None:
        params = {"temperature": 0, "max_new_tokens": self.new_tokens, "ignore_eos": True}
        body = {"text": TEXT, "sampling_params": params, "stream": True}
        try:
            with httpx.stream("POST", self.server.url + "/generate", json=body, timeout=60) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line[6:])
        except httpx.HTTPError as e:
            self.error = e


@pytest.fixture(scope="module")
def server(smollm: str, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    flags = ("--model", smollm, "--max-total-tokens", "16384", "--grammar-seconds", "60")
    with live_server(tmp_path_factory.mktemp("death"), *flags) as s:
        yield s


def kill_in_mid_stream(server: LiveServer, node: str, new_tokens: int = 3000) -> Stream:
    """Kill a node under a running stream and wait until it is back; return the stream."""
    stream = Stream(server, new_tokens)
    stream.start()
    wait_until(lambda: len(stream.events) > 3 or not stream.is_alive(), 30, "the stream runs")
    assert stream.is_alive(), stream.events
    pid = server.children()[node]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.children().get(node, pid) != pid, 30, f"{node} is started again")
    wait_until(server.is_ready, 60, "the server is ready again")
    return stream


def kill(server: LiveServer, node: str = "fsm") -> None:
    """And wait until it is back."""
    pid = server.children()[node]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.children().get(node, pid) != pid, 30, f"{node} is started again")


def constrained(server: LiveServer, grammar: str, tokens: int, field: str = "regex") -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": tokens, field: grammar}
    reply = httpx.post(server.url + "/generate", json={"text": TEXT, "sampling_params": params}, timeout=120)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def test_constrained_streams_go_on_without_the_fsm_actor(server: LiveServer) -> None:
    pattern = "([a-z]{1,9}, and then )*the end"
    undisturbed = constrained(server, pattern, 200)
    assert undisturbed["meta_info"]["forced_tokens"] > 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(constrained, server, pattern, 200)
        wait_until(lambda: server.metrics()["actorserve_running_requests"] == 1 or answer.done(), 30, "it runs")
        kill(server)
        assert answer.result()["text"] == undisturbed["text"]
    assert constrained(server, "after it [a-z]+", 8)["text"].startswith("after it ")


def test_guided_streams_continue_after_the_fsm_actors_death_and_an_executors(server: LiveServer) -> None:
    """Their matchers die with the fsm actor, and are made again from the tokens."""
    ebnf = 'root ::= "(" root ")" | word root | word\nword ::= [a-z]+ " "'

    def disturbed(node: str) -> str:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(constrained, server, ebnf, 40, "ebnf")
            wait_until(lambda: server.metrics()["actorserve_running_requests"] == 1 or answer.done(), 30, "it runs")
            kill(server, node)
            return str(answer.result()["text"])

    undisturbed = constrained(server, ebnf, 40, "ebnf")["text"]
    assert disturbed("fsm") == disturbed("exec.0") == undisturbed


def test_a_grammar_is_compiled_again_when_the_fsm_actor_is_back(server: LiveServer) -> None:
    """Words of all of Unicode make it take some seconds."""
    pattern = CHARACTER.replace(WORDS, r"[\w\d\s]{1,16}")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(constrained, server, pattern, 6)
        wait_until(lambda: server.metrics()["actorserve_waiting_requests"] == 1 or answer.done(), 30, "it waits")
        kill(server)
        others = constrained(server, "yes|no", 4)
        assert others["text"] in ("yes", "no")
        assert answer.result()["text"].startswith("{\n")


def test_a_dead_front_drops_its_connections_and_comes_back(server: LiveServer) -> None:
    stream = kill_in_mid_stream(server, "front.0")
    stream.join(30)
    assert stream.error is not None
    server.assert_pages_add_up()


@pytest.fixture(scope="module")
def short_lived(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a server that starts soon: its model is small, and its answers last for many seconds."""
    folder = tmp_path_factory.mktemp("small")
    fields = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 416, "max_position_embeddings": 100_000,
    }  # fmt: skip
    shape_folder("smollm2-135m", folder, [f"{name}={value}" for name, value in fields.items()])
    tiny_tokenizers.byte_level(folder)
    return ["--model", str(folder), "--load-format", "dummy", "--device", "cpu", "--max-total-tokens", "65536"]


def test_a_dead_root_takes_all_with_it(short_lived: list[str], tmp_path: Path) -> None:
    before = shared_memory()
    with live_server(tmp_path, *short_lived) as server:
        pids = list(server.children().values())
        assert len(pids) == 5
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(map(alive, pids)), 30, "no orphans")
    assert shared_memory() == before


def test_a_taken_port_is_one_line(short_lived: list[str]) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "actorserve", "run", *short_lived, "--port", port]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 2
    assert len(out.stderr.strip().splitlines()) == 1 and port in out.stderr
