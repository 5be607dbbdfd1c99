"""What the frontend language is worth: programs against the same calls made one by one, all over HTTP, in one run.

    python -m actorserve.perf.programs [--programs 8] [--rounds 2] [--model DIR] [--json FILE]

Programs are examples.essay_judge (branch, solve, merge: five judges of a long essay, a summary, a grade) and
examples.multi_choice (few-shot questions that share their examples). `lang` runs a batch of them by RuntimeEndpoint on
`actorserve run` with its defaults. `calls` are the same questions as requests to /v1/chat/completions, each sent when
the one before it has been answered, to a server without its prefix cache (--disable-radix-cache); grades and endings
are one request each, held to the choices by a grammar. `server` is as `lang`, but the programs are sent as data and run
beside the engine (`remote=True`). Temperature 0, prompts of random words; both servers are up, and the three ways take
turns. Printed: programs a second, CPU seconds of the server's processes, and HTTP calls and prefilled tokens as the
server counts them in /metrics.
"""

import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import msgspec

import actorserve.lang as sgl
from actorserve.examples import essay_judge, multi_choice
from actorserve.models.embedded import embedded_model
from actorserve.perf.prefix import prefilled
from actorserve.perf.processes import cpu_seconds, launched

DIMENSIONS = ("clarity", "originality", "evidence", "style", "relevance")
WORDS = (
    "river stone light garden window morning letter market summer bridge paper music engine winter forest kitchen "
    "station picture history doctor island mountain village teacher question answer colour travel number silver"
).split()
TOKENS = 16
"""New tokens of each `gen`."""
Work: TypeAlias = Callable[[list[dict[str, Any]]], object]


@dataclass
class Workload:
    """`run` gives a batch to the language (items, backend, remote); `ask` does a program by calls of its own."""

    name: str
    items: list[dict[str, Any]]
    run: Callable[[list[dict[str, Any]], Any, bool], object]
    ask: Callable[[dict[str, Any], "Chat"], object]


class Chat:
    """One call after another to /v1/chat/completions."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=600)

    def __call__(self, messages: list[dict[str, str]], **options: Any) -> str:
        body = {"messages": messages, "temperature": 0, **options}
        reply = self._client.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        return str(reply.json()["choices"][0]["message"]["content"])


def text_of(random_: random.Random, words: int) -> str:
    return " ".join(random_.choice(WORDS) for _ in range(words))


def judging(random_: random.Random, programs: int, words: int) -> Workload:
    """Branch, solve, merge."""
    program = essay_judge.judge.bind(dimensions=DIMENSIONS)

    def ask(item: dict[str, Any], chat: Chat) -> None:
        system = {"role": "system", "content": "You judge essays. Be fair and short."}
        essay = "Here is an essay:\n" + item["essay"] + "\n\n"

        def user(text: str) -> list[dict[str, str]]:
            return [system, {"role": "user", "content": essay + text}]

        limits = {"max_tokens": TOKENS, "stop": "\n"}
        said = [chat(user(f"Judge the {d} of this essay in one sentence."), **limits) for d in DIMENSIONS]
        judges = "".join(f"\n{d}: {text}" for d, text in zip(DIMENSIONS, said, strict=True))
        end = "\nSum up what they say in one sentence, and give a grade from A (best) to D."
        merged = user("Judges say about it:" + judges + end)
        summary = chat(merged, **limits)
        begun = {"role": "assistant", "content": summary + "\nGrade: "}
        go_on = {"continue_final_message": True, "add_generation_prompt": False}
        chat([*merged, begun], guided_choice=essay_judge.GRADES, **go_on)

    items = [{"essay": text_of(random_, words)} for _ in range(programs)]
    return Workload("branch-solve-merge", items, batch(program), ask)


def choosing(random_: random.Random, programs: int, words: int) -> Workload:
    """Few-shot questions; as a conversation where they are calls."""
    shots = "".join(text_of(random_, 20) + ".\n" for _ in range(words // 20))

    def ask(item: dict[str, Any], chat: Chat) -> None:
        chat([{"role": "user", "content": shots + item["begin"]}], guided_choice=item["endings"])

    items = [
        {"begin": text_of(random_, 6), "endings": tuple(f" {text_of(random_, 3)}." for _ in range(4))}
        for _ in range(programs)
    ]
    return Workload("few-shot select", items, batch(multi_choice.choose.bind(shots=shots)), ask)


def batch(program: Any) -> Callable[[list[dict[str, Any]], Any, bool], object]:
    def run(items: list[dict[str, Any]], backend: Any, remote: bool) -> None:
        states = program.run_batch(items, backend=backend, remote=remote, temperature=0, max_new_tokens=TOKENS)
        for state in states:
            state.text()  # raises what failed
            assert state.remote == remote, state.local_reason

    return run


@dataclass
class Server:
    url: str
    pid: int

    def counts(self) -> dict[str, float]:
        """So far: its CPU seconds, its answers to requests that are the model's, and the tokens it has prefilled."""
        text = httpx.get(self.url + "/metrics").text
        rows = re.findall(r'actorserve_http_requests_total\{route="([^"]+)",.*\} (.+)', text)
        calls = sum(float(count) for route, count in rows if route.startswith(("/generate", "/v1/")))
        return {"cpu": sum(cpu_seconds(self.pid).values()), "calls": calls, "tokens": prefilled(self.url)}


def measure(server: Server, items: list[dict[str, Any]], work: Work) -> dict[str, float]:
    """What a batch of programs took, from an empty cache: seconds, CPU seconds of the server, calls, tokens."""
    httpx.post(server.url + "/flush_cache").raise_for_status()
    before, begin = server.counts(), time.perf_counter()
    work(items)
    seconds = time.perf_counter() - begin
    time.sleep(0.5)  # the scheduler reports a few times a second
    counts = {name: value - before[name] for name, value in server.counts().items()}
    return {"programs": len(items), "seconds": seconds, **counts}


def compared(workloads: list[Workload], cached: Server, plain: Server, rounds: int) -> list[dict[str, Counter[str]]]:
    """Of each workload the sums of all rounds, by way; the ways take turns, so that a busy machine hurts all alike."""
    backend, chat = sgl.RuntimeEndpoint(cached.url), Chat(plain.url)
    found = []
    for w in workloads:
        ways: dict[str, tuple[Server, Work]] = {
            "lang": (cached, lambda items, w=w: w.run(items, backend, False)),
            "server": (cached, lambda items, w=w: w.run(items, backend, True)),
            "calls": (plain, lambda items, w=w: [w.ask(item, chat) for item in items]),
        }
        sums = {way: Counter[str]() for way in ways}
        for server, work in ways.values():  # warm-up
            measure(server, w.items[:1], work)
        for _ in range(rounds):
            for way, (server, work) in ways.items():
                sums[way].update(measure(server, w.items[1:], work))
        found.append(sums)
    return found


def show(workload: Workload, sums: dict[str, Counter[str]]) -> None:
    rates = {way: s["programs"] / s["seconds"] for way, s in sums.items()}
    each = {way: {name: s[name] / s["programs"] for name in ("cpu", "calls", "tokens")} for way, s in sums.items()}
    for way, e in each.items():
        row = f"{rates[way]:>11.3f} {e['cpu']:>12.2f} {e['calls']:>14.1f} {e['tokens']:>18.0f}"
        print(f"{workload.name:>20} {way:>7} {row}")
    lang, server, calls = (rates[way] for way in ("lang", "server", "calls"))
    cpu = each["calls"]["cpu"] / each["lang"]["cpu"]
    print(
        f"{workload.name:>20}: lang is {lang / calls:.1f} times as fast as calls, with {cpu:.1f} times less CPU;",
        end=" ",
    )
    saved = each["lang"]["calls"] - each["server"]["calls"]
    print(f"on the server {server / lang:.2f} times as fast as here, {saved:.1f} round trips a program saved")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--programs", type=int, default=8, help="of branch-solve-merge; of few-shot select twice as many")
    p.add_argument("--words", type=int, default=600, help="of an essay, and of the examples before a question")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    random_ = random.Random(a.seed)
    workloads = [judging(random_, a.programs + 1, a.words), choosing(random_, 2 * a.programs + 1, a.words)]
    flags = f"--model {a.model or embedded_model()} --grammar-seconds 30"  # a busy machine measures slow, not refused
    with launched(flags) as (url, pid, _), launched(flags + " --disable-radix-cache") as (plain_url, plain_pid, _):
        found = compared(workloads, Server(url, pid), Server(plain_url, plain_pid), a.rounds)
    print(f"{'':>28} {'programs/s':>11} {'CPU s/program':>12} {'calls/program':>14} {'prefilled/program':>18}")
    for workload, sums in zip(workloads, found, strict=True):
        show(workload, sums)
    if a.json:
        rows = {w.name: {way: dict(s) for way, s in sums.items()} for w, sums in zip(workloads, found, strict=True)}
        a.json.write_bytes(msgspec.json.encode(rows))


if __name__ == "__main__":
    main()
