"""What the frontend language is worth: programs against the same calls made one by one, all over HTTP, in one run.

    python -m actorserve.perf.programs [--programs 8] [--model DIR] [--json FILE]

Programs are examples.essay_judge (branch, solve, merge: five judges of a long essay, a summary, a grade) and
examples.multi_choice (few-shot questions that share their examples). `lang` runs a batch of them by RuntimeEndpoint on
`actorserve run` with its defaults. `calls` are the same questions as requests to /v1/chat/completions, each sent when
the one before it has been answered, to a server without its prefix cache (--disable-radix-cache); grades and endings
are one request each, held to the choices by a grammar. `server` is as `lang`, but the programs are sent as data and run
beside the engine (`remote=True`). Temperature 0, prompts of random words. Printed: programs a second, HTTP calls and
prefilled tokens, as the server counts them in /metrics.
"""

import argparse
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

import actorserve.lang as sgl
from actorserve.examples import essay_judge, multi_choice
from actorserve.models.embedded import embedded_model
from actorserve.perf.engines import our_server
from actorserve.perf.prefix import prefilled

DIMENSIONS = ("clarity", "originality", "evidence", "style", "relevance")
WORDS = (
    "river stone light garden window morning letter market summer bridge paper music engine winter forest kitchen "
    "station picture history doctor island mountain village teacher question answer colour travel number silver"
).split()
TOKENS = 16
"""New tokens of each `gen`."""
GRAMMARS = ("--grammar-seconds", "30")
"""So that a busy machine measures slow, not refused."""


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


def answered(url: str) -> float:
    """HTTP requests to the model that have been answered."""
    found = re.findall(r'actorserve_http_requests_total\{route="([^"]+)",.*\} (.+)', httpx.get(url + "/metrics").text)
    return sum(float(count) for route, count in found if route.startswith(("/generate", "/v1/")))


def measure(url: str, items: list[dict[str, Any]], work: Callable[[list[dict[str, Any]]], object]) -> dict[str, float]:
    """The first item warms up; then all the others, from an empty cache."""
    work(items[:1])
    httpx.post(url + "/flush_cache").raise_for_status()
    calls, tokens, begin = answered(url), prefilled(url), time.perf_counter()
    work(items[1:])
    seconds, count = time.perf_counter() - begin, len(items) - 1
    time.sleep(0.5)  # the scheduler reports a few times a second
    return {
        "programs_per_second": count / seconds,
        "calls": (answered(url) - calls) / count,
        "prefilled_tokens": (prefilled(url) - tokens) / count,
    }


def by_language(model: str, workloads: list[Workload]) -> dict[str, list[dict[str, float]]]:
    """Here, and on the server."""
    with our_server(model, *GRAMMARS) as url:
        backend = sgl.RuntimeEndpoint(url)

        def measured(remote: bool) -> list[dict[str, float]]:
            return [measure(url, w.items, lambda items, w=w: w.run(items, backend, remote)) for w in workloads]

        return {"lang": measured(False), "server": measured(True)}


def by_calls(model: str, workloads: list[Workload]) -> list[dict[str, float]]:
    with our_server(model, "--disable-radix-cache", *GRAMMARS) as url:
        chat = Chat(url)
        return [measure(url, w.items, lambda items, w=w: [w.ask(item, chat) for item in items]) for w in workloads]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--programs", type=int, default=8, help="of each kind")
    p.add_argument("--words", type=int, default=600, help="of an essay, and of the examples before a question")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    random_ = random.Random(a.seed)
    workloads = [make(random_, a.programs + 1, a.words) for make in (judging, choosing)]
    model = a.model or embedded_model()
    results = by_language(model, workloads) | {"calls": by_calls(model, workloads)}
    print(f"{'':>30} {'programs/s':>11} {'calls/program':>14} {'prefilled/program':>18}")
    for i, workload in enumerate(workloads):
        for name, rows in results.items():
            r = rows[i]
            print(
                f"{workload.name:>20} {name:>9} {r['programs_per_second']:>11.2f} {r['calls']:>14.1f} "
                f"{r['prefilled_tokens']:>18.0f}"
            )
        lang, server, calls = (results[name][i]["programs_per_second"] for name in ("lang", "server", "calls"))
        saved = results["lang"][i]["calls"] - results["server"][i]["calls"]
        print(f"{workload.name:>20} lang is {lang / calls:.1f} times as fast as calls;", end=" ")
        print(f"on the server {server / lang:.2f} times as fast as here, {saved:.1f} round trips a program saved")
    if a.json:
        a.json.write_bytes(msgspec.json.encode(results))


if __name__ == "__main__":
    main()
