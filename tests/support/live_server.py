"""A real `actorserve run` as a child process, and what tests ask about it: its processes, its pages, its health."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from actorserve.perf.engines import free_port


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for a condition; return the seconds it took. Raises AssertionError after `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


@dataclass
class LiveServer:
    process: "subprocess.Popen[str]"
    url: str
    log: Path

    def get(self, path: str) -> httpx.Response:
        # To load the system's certificates would take 20 ms each time, of the cores that what is waited for needs.
        return httpx.get(self.url + path, timeout=30, verify=False)

    def is_ready(self) -> bool:
        try:
            return self.get("/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def client(self) -> openai.OpenAI:
        plain = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=120, http_client=plain)

    def chat(self, text: str, **options: object) -> openai.types.chat.ChatCompletion:
        messages = [{"role": "user", "content": text}]
        with self.client() as client:
            return client.chat.completions.create(model="", messages=messages, **options)  # type: ignore[call-overload,no-any-return]

    def metrics(self) -> dict[str, float]:
        """Samples without labels, by name; those of several replicas are summed."""
        found: Counter[str] = Counter()
        for line in re.sub(r'\{dp_rank="\d+"\}', "", self.get("/metrics").text).splitlines():
            if line[:1] != "#" and "{" not in line:
                name, _, value = line.partition(" ")
                found[name] += float(value)  # type: ignore[assignment]
        return dict(found)

    def children(self) -> dict[str, int]:
        """Pids of the engine's processes, by node name."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                name = node_name(int(pid))
                if name:
                    found[name] = int(pid)
        return found

    def assert_pages_add_up(self) -> None:
        """Idle: nothing runs, and free + tree = total."""

        def idle() -> bool:
            m = self.metrics()
            total = m["actorserve_kv_pages"]
            kept = m["actorserve_kv_pages_free"] + m["actorserve_kv_pages_tree"] + m["actorserve_kv_pages_running"]
            assert total == 0 or kept == total, m
            return total > 0 and m["actorserve_running_requests"] == 0 and m["actorserve_kv_pages_running"] == 0

        wait_until(idle, 20, "the engine is idle")


def node_name(pid: int) -> str | None:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((a.decode()[len("--node=") :] for a in arguments if a.startswith(b"--node=")), None)


@contextmanager
def live_server(tmp: Path, *flags: str) -> Iterator[LiveServer]:
    """Run the server with these flags until the block ends, then stop it with SIGTERM."""
    port, log = free_port(), tmp / "server.log"
    command = [sys.executable, "-m", "actorserve", "run", "--port", str(port), *flags]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)
    server = LiveServer(process, f"http://127.0.0.1:{port}", log)
    try:

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            return server.is_ready()

        wait_until(up, 240, "the server is ready")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def alive(pid: int) -> bool:
    """Whether a process exists and one of its threads is no zombie: one that writes to a disk dies last."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False
    return any(stat.rsplit(")", 1)[1].split()[0] not in "ZX" for stat in stats)


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm"))
