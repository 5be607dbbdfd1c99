"""What grows while the engine serves for long: memory, descriptors and shared memory by process, and throughput.

    python -m actorserve.perf.soak [--minutes 30] [--clients 24] [--flags "--load-format stub"] [--json FILE]

Clients ask for mixed things one after another: texts and chats, streamed or not, long prompts with shared and with new
beginnings, several continuations, logprobs, stop strings, grammars, errors; one in ten leaves in the middle. What is
bounded by its size only, as the caches of prefixes and grammars, is full soon. Each minute three canaries, greedy, must
say what they said at the start. The first fifth of the time is warm-up.
Printed for each process: megabytes of its own (RssAnon and VmSwap) after warm-up and at the end, the slope in
MB an hour by least squares, descriptors when nothing runs, before and after; then tokens a second in the first and the
last tenth, and /dev/shm. At the end it is said which bounds were broken, if any, with exit code 1: a slope of
MB_PER_HOUR or more in any process, a last tenth below SHARE of the first, a descriptor or a name in /dev/shm more than
before, a canary that changed, an answer of 5xx but 503, a process that died, pages missing. Slope and share of a run
below LEAST_MINUTES are printed only: what fills once would pass for what grows. With --flags "" the real model serves.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from actorserve.models.embedded import embedded_model
from actorserve.perf.processes import children_of, launched, node_name

WORDS = "river stone light garden window morning letter market summer bridge paper music engine winter forest".split()
MB_PER_HOUR = 5.0
SHARE = 0.97
LEAST_MINUTES = 10.0
SAMPLE_SECONDS = 5.0
CANARY_SECONDS = 60.0


@dataclass
class Sample:
    """One look at the processes. `seconds` since the start."""

    seconds: float
    megabytes: dict[str, float]
    descriptors: dict[str, int]
    pids: dict[str, int]
    tokens: float
    """Generated so far."""


@dataclass
class Soak:
    """The load and what is seen of it."""

    url: str
    pid: int
    rng: random.Random
    rest: float
    seconds: float
    ends_at: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    idle: list[dict[str, int]] = field(default_factory=list)
    """Descriptors by process while nothing runs, before and after the load."""

    def words(self, count: int) -> str:
        return " ".join(self.rng.choices(WORDS, k=count))

    def body(self, number: int) -> tuple[str, dict[str, Any]]:
        """The next request."""
        rng = self.rng
        stem = " ".join(random.Random(number % 7).choices(WORDS, k=60))
        prompt = rng.choice([self.words(rng.randint(1, 400)), f"{stem} {self.words(10)}", stem])
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.choice([4, 16, 64, 128]), "seed": number}
        match number % 10:
            case 0:
                body |= {"n": 4, "logprobs": 3}
            case 1:
                body |= {"stop": ["river", "e"], "echo": True}
            case 2:
                body |= {"regex": f"({'|'.join(WORDS[number // 10 % 8 :])}| )*end"}
            case 3:
                body |= {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}, "max_tokens": 60}
            case 4:
                body |= {"ebnf": 'root ::= "(" root ")" | [a-z]+', "temperature": 0}
            case 5:
                return "/v1/chat/completions", {
                    "messages": [{"role": "user", "content": prompt}], "max_tokens": 32, "stream": rng.random() < 0.5,
                }  # fmt: skip
            case 6:
                body |= {"temperature": -1}
            case 7:
                body |= {"cache_salt": f"tenant {number % 50}", "presence_penalty": 0.5}
        return "/v1/completions", body | {"stream": rng.random() < 0.5}

    async def client(self, numbers: "itertools.count[int]") -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            while time.monotonic() < self.ends_at:
                path, body = self.body(next(numbers))
                leaves = self.rng.random() < 0.1
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.rng.uniform(0, 0.3) if leaves else 300):
                        reply = await http.post(path, json=body)
                        self.counts[str(reply.status_code)] += 1
                        if reply.status_code >= 500 and reply.status_code != 503:
                            self.wrong.append(f"{reply.status_code} for {json.dumps(body)[:200]}")
                self.counts["left"] += leaves
                await asyncio.sleep(self.rng.uniform(0, 2 * self.rest))

    async def canaries(self) -> None:
        first: list[str] = []
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            while time.monotonic() < self.ends_at:
                bodies = [{"prompt": f"canary {i}", "max_tokens": 32, "temperature": 0, "seed": i} for i in range(3)]
                said = [(await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] for body in bodies]
                first = first or said
                self.counts["canaries"] += 1
                if said != first:
                    self.wrong.append(f"a canary says {said}, not {first}")
                await asyncio.sleep(min(CANARY_SECONDS, max(1.0, self.ends_at - time.monotonic())))

    async def watch(self, began: float) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            while time.monotonic() < self.ends_at:
                metrics = samples_of((await http.get("/metrics")).text)
                tokens = metrics["actorserve_generated_tokens_total"]
                self.samples.append(Sample(time.monotonic() - began, *processes(self.pid), tokens))
                await asyncio.sleep(SAMPLE_SECONDS)

    async def first_of_each_kind(self) -> None:
        """What is opened once is opened now."""
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            for number in range(30):
                path, body = self.body(number)
                await http.post(path, json=body)

    async def look_at_idle(self) -> None:
        """When the server has seen that the connections are closed."""
        await asyncio.sleep(2)
        self.idle.append(processes(self.pid)[1])

    async def run(self, clients: int) -> None:
        await self.first_of_each_kind()
        await self.look_at_idle()
        began, numbers = time.monotonic(), itertools.count()
        self.ends_at = began + self.seconds
        await asyncio.gather(self.watch(began), self.canaries(), *(self.client(numbers) for _ in range(clients)))
        await self.look_at_idle()


def samples_of(text: str) -> dict[str, float]:
    """Metrics without labels."""
    lines = [line for line in text.splitlines() if line[:1] != "#" and "{" not in line]
    return {name: float(value) for name, value in (line.split(" ") for line in lines)}


def processes(root: int) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    """(megabytes of its own, descriptors, pid) of each process, by name; compilers of grammars have numbers."""
    pids, waiting = {"root": root}, [root]
    while waiting:
        for i, child in enumerate(children_of(waiting.pop())):
            waiting.append(child)
            pids[node_name(child) or f"compiler {i}"] = child
    megabytes, descriptors = {}, {}
    for name, pid in pids.items():
        with suppress(OSError):  # a compiler that was killed for its grammar
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            megabytes[name] = (int(lines["RssAnon"].split()[0]) + int(lines["VmSwap"].split()[0])) / 1024
            descriptors[name] = len(os.listdir(f"/proc/{pid}/fd"))
    return megabytes, descriptors, pids


def slope(points: list[tuple[float, float]]) -> float:
    """MB an hour of (seconds, MB), by least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    square = sum((x - mean_x) ** 2 for x, _ in points)
    return 3600 * sum((x - mean_x) * (y - mean_y) for x, y in points) / square if square else 0.0


def report(soak: Soak) -> dict[str, Any]:
    """Print what grew; return it."""
    end = soak.samples[-1].seconds
    judged = end >= 60 * LEAST_MINUTES - 2 * SAMPLE_SECONDS
    warm = [sample for sample in soak.samples if sample.seconds >= end / 5]
    figures: dict[str, Any] = {"requests": dict(soak.counts), "processes": {}}
    print(f"{end:.0f} s, of which {end / 5:.0f} warm-up; {dict(sorted(soak.counts.items()))}")
    print(f"{'process':>12} {'MB then':>9} {'MB at the end':>14} {'MB/h':>8} {'descriptors':>16}")
    for name in warm[0].megabytes:
        points = [(s.seconds, s.megabytes[name]) for s in warm if s.pids.get(name) == warm[0].pids[name]]
        points = points or [(0.0, 0.0)]
        files = [idle.get(name, 0) for idle in soak.idle]
        rate = slope(points)
        print(f"{name:>12} {points[0][1]:>9.1f} {points[-1][1]:>14.1f} {rate:>8.1f} {files[0]:>7} to {files[-1]:>5}")
        figures["processes"][name] = {"first": points[0][1], "last": points[-1][1], "mb_per_hour": rate, "files": files}
        if judged and rate >= MB_PER_HOUR:
            soak.wrong.append(f"{name} grows by {rate:.1f} MB an hour; less than {MB_PER_HOUR:g} is allowed")
        if not name.startswith("compiler") and files[-1] > files[0]:
            soak.wrong.append(f"{name} has {files[-1] - files[0]} descriptors more than before the load")
        if not name.startswith("compiler") and warm[-1].pids.get(name) != soak.samples[0].pids[name]:
            soak.wrong.append(f"{name} died")
    tenth = max(1, len(warm) // 10)
    rates = [rate_of(part) for part in (warm[: tenth + 1], warm[-tenth - 1 :])]
    print(f"tokens/s in the first tenth after warm-up {rates[0]:.0f}, in the last {rates[1]:.0f}", end="")
    print(f" ({rates[1] / rates[0]:.3f} of it)" if rates[0] else "")
    if judged and rates[1] < SHARE * rates[0]:
        soak.wrong.append(f"the last tenth's throughput is below {SHARE:g} of the first's")
    if not judged:
        print(f"slopes and throughput are judged from {LEAST_MINUTES:g} minutes on")
    return figures | {"tokens_per_second": rates}


def rate_of(samples: list[Sample]) -> float:
    first, last = samples[0], samples[-1]
    return (last.tokens - first.tokens) / (last.seconds - first.seconds) if last.seconds > first.seconds else 0.0


def pages_missing(url: str) -> float:
    """Pages that are neither free nor the tree's when nothing runs."""
    deadline = time.monotonic() + 30
    while True:
        m = samples_of(httpx.get(url + "/metrics", timeout=30).text)
        if not m["actorserve_running_requests"] + m["actorserve_waiting_requests"] or time.monotonic() > deadline:
            return m["actorserve_kv_pages"] - m["actorserve_kv_pages_free"] - m["actorserve_kv_pages_tree"]
        time.sleep(0.2)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=30.0)
    p.add_argument("--clients", type=int, default=24)
    p.add_argument("--rest", type=float, default=0.2, help="seconds between a client's requests, on average")
    p.add_argument(
        "--flags", default="--load-format stub --stub-step-ms 5 --max-total-tokens 32768", help="of the server"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    shared = set(os.listdir("/dev/shm"))
    with launched(f"--model {embedded_model()} --grammar-seconds 10 {a.flags}") as (url, pid, _):
        soak = Soak(url, pid, random.Random(a.seed), a.rest, 60 * a.minutes)
        asyncio.run(soak.run(a.clients))
        missing = pages_missing(url)
        figures = report(soak)
    left = set(os.listdir("/dev/shm")) - shared
    print(f"pages missing: {missing:.0f}; new in /dev/shm: {sorted(left) or 'nothing'}")
    if missing:
        soak.wrong.append(f"{missing:.0f} pages are missing")
    if left:
        soak.wrong.append(f"/dev/shm has {sorted(left)}")
    print(*(f"BROKEN: {what}" for what in soak.wrong or ()), "" if soak.wrong else "all bounds hold", sep="\n")
    if a.json:
        a.json.write_text(json.dumps(figures))
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
