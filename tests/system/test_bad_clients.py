"""Clients that leave, that do not read, that are too many: what they hold comes back, and others are served.

Against one server on the stub executor. CI takes a part, --thorough (`make fuzz`) thousands. Times are printed.
"""

import asyncio
import json
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_load import stream
from live_server import LiveServer, live_server, wait_until
from malformed import VALID
from stub_model import stub_folder

pytestmark = pytest.mark.timeout(1200)
SLOTS = 16
QUEUE = 128
TIMEOUT = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tmp = tmp_path_factory.mktemp("bad-clients")
    flags = ["--load-format", "stub", "--stub-step-ms", "2", "--max-running-requests", str(SLOTS)]
    flags += ["--max-queued-requests", str(QUEUE), "--client-timeout", str(TIMEOUT), "--max-restarts", "0"]
    with live_server(tmp, "--model", stub_folder(tmp / "model", context_length=8192), *flags) as running:
        yield running


def request(path: str, body: Any, more: str = "") -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n{more}\r\n".encode() + data


def address(server: LiveServer) -> tuple[str, int]:
    return "127.0.0.1", int(server.url.rpartition(":")[2])


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def own_megabytes(pid: int) -> float:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def test_disconnects(server: LiveServer, thorough: bool) -> None:
    """At random instants: amid the request, in the queue, in prefill, in the stream, at its end; by FIN and by RST."""
    count, rng = 5000 if thorough else 200, random.Random(5)
    generating = [(path, body) for method, path, body in VALID if method == "POST" and path in STREAMS]
    pids, front = server.children(), server.children()["front.0"]
    server.assert_pages_add_up()
    before = descriptors(front)
    left = 0

    async def one() -> None:
        nonlocal left
        path, body = rng.choice(generating)
        long = {"max_tokens": 200, "ignore_eos": True, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
        data = request(path, body | long | {"stream": rng.random() < 0.7})
        reader, writer = await asyncio.open_connection(*address(server))
        try:
            writer.write(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
            async with asyncio.timeout(rng.choice([0, 0.002, 0.02, 0.1, 0.1, 0.5, 3])):
                while await reader.read(rng.choice([1, 100, 10_000])):
                    pass
        except TimeoutError:
            left += 1
        except ConnectionError:
            pass
        if rng.random() < 0.5:  # RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async def all_of_them() -> None:
        waiting = iter(range(count))

        async def work() -> None:
            for _ in waiting:
                await one()

        await asyncio.gather(*(work() for _ in range(32)))

    asyncio.run(all_of_them())
    started = time.monotonic()
    wait_until(lambda: server.metrics()["actorserve_running_requests"] == 0, 10, "nobody is served")
    print(f"\n{left} of {count} left; idle {time.monotonic() - started:.2f} s after the last of them")
    server.assert_pages_add_up()
    assert server.children() == pids and left > count // 2
    wait_until(lambda: descriptors(front) <= before + 2, 10, "the front's descriptors are back")
    assert server.metrics()["actorserve_waiting_requests"] == 0


STREAMS = {"/v1/chat/completions", "/v1/completions", "/generate"} - {"/v1/chat/completions"}
"""The stub's model has no chat template."""


def test_readers_that_hardly_read_are_cut(server: LiveServer, thorough: bool) -> None:
    """One byte a second: what waits for them is bounded; after --client-timeout they are cut, and their pages back."""
    count, front = 100 if thorough else 12, server.children()["front.0"]
    body = {"prompt": "x", "max_tokens": 6000, "ignore_eos": True, "stream": True, "logprobs": 5, "temperature": 0}
    before, files = own_megabytes(front), descriptors(front)
    readers = []
    for _ in range(count):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(address(server))
        reader.sendall(request("/v1/completions", body))
        readers.append(reader)
    largest = 0.0

    def cut() -> bool:
        nonlocal largest
        largest = max(largest, own_megabytes(front) - before)
        for reader in readers:
            try:
                reader.recv(1, socket.MSG_DONTWAIT)
            except (BlockingIOError, ConnectionError):
                continue
        normal = httpx.post(server.url + "/v1/completions", json={"prompt": "y", "max_tokens": 2}, timeout=120)
        assert normal.status_code in (200, 429)
        time.sleep(0.2)
        metrics = server.metrics()
        return metrics["actorserve_running_requests"] + metrics["actorserve_waiting_requests"] == 0

    seconds = wait_until(cut, 120, "slow readers are cut")
    print(f"\n{len(readers)} readers cut within {seconds:.1f} s; the front had {largest:.1f} MB more at most")
    assert largest < 64
    server.assert_pages_add_up()
    wait_until(lambda: descriptors(front) <= files + 2, 10, "their descriptors are back")
    for reader in readers:
        reader.close()


def test_ten_times_too_many(server: LiveServer, thorough: bool) -> None:
    """What is accepted comes whole, what is not is told so at once; there is no less of it than without the crowd."""
    body = {"prompt": "z", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    seconds = 20.0 if thorough else 1.5

    async def load(clients: int) -> tuple[float, list[float], int]:
        """(answers a second, seconds of each refusal, answers)"""
        answered, refused = 0, []
        end = time.monotonic() + seconds

        async def client(number: int) -> None:
            nonlocal answered
            await asyncio.sleep(0.2 * random.random())  # they come one after another, as they do later
            connection = await asyncio.open_connection(*address(server))
            while time.monotonic() < end:
                started = time.monotonic()
                connection[1].write(request("/v1/completions", body | {"seed": number}))
                head = await connection[0].readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                reply = json.loads(await connection[0].readexactly(length))
                status = int(head[9:12])
                if status == 200:
                    answered += 1
                    assert reply["usage"]["completion_tokens"] == 40
                else:
                    refused.append(time.monotonic() - started)
                    assert status == 429 and b"retry-after: " in head, head
                    await asyncio.sleep(0.1 + 0.1 * random.random())  # as told, only sooner
            connection[1].close()

        await asyncio.gather(*(client(i) for i in range(clients)))
        return answered / seconds, refused, answered

    peak, none_refused, _ = asyncio.run(load(SLOTS + 8))
    goodput, refused, answered = asyncio.run(load(10 * (SLOTS + 8)))
    refused.sort()
    print(f"\n{peak:.1f} answers a second from {SLOTS + 8} clients,", end=" ")
    print(f"{goodput:.1f} ({goodput / peak:.2f}) from ten times as many;")
    if refused:
        middle, late = refused[len(refused) // 2], refused[len(refused) * 99 // 100]
        print(f"{len(refused)} refusals, in {1e3 * middle:.1f} ms in the middle, {1e3 * late:.1f} ms for 99 of 100")
    assert not none_refused and refused and answered
    server.assert_pages_add_up()
    whole = asyncio.run(stream(server.url, body | {"seed": 1}))
    assert whole.ends == ["length", "[DONE]"] and os.path.exists(f"/proc/{server.process.pid}")
