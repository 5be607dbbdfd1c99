"""What grammars of bad will do: how each is answered, and what the streams of others notice.

    python -m actorserve.perf.blowup [--flags "--model DIR --load-format dummy --attention-backend triton"]
        [--streams 2] [--seconds 10] [--rounds 3] [--json FILE]

A server, streams that decode steadily, and a client in a process of its own that sends one such grammar after another.
Quiet stretches and hostile ones take turns in one run, so that the machine's own noise falls on both; in a quiet one
the requests whose grammars can be had come too, at the same pace but without a grammar: another request in a step is
not what is measured. Figures: status and time of each grammar (targets: ANSWER_MS for what may be large, REFUSAL_MS for
what is plainly wrong), the most that one took beside streams, the gaps between tokens in both kinds of stretches, and
the most memory that a compiler took.
On a CPU the model leaves one core to the others (--cpu-threads). The client with the grammars, who stands for one on
another machine, has only what nobody else wants of this one's cores (SCHED_IDLE: a process that is merely nice keeps a
core for milliseconds once it has it). A GPU's engine captures graphs when it first idles, also those that masks need:
that is waited for.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from actorserve.perf.figures import statistics
from actorserve.perf.processes import launched

ANSWER_MS = 1500.0
REFUSAL_MS = 100.0
SETTLED = 20
"""Answers one after another that take no longer than others: nothing is captured any more."""
PAUSE = 0.1


def nested(depth: int, inner: str, around: str) -> str:
    """JSON text: `inner` inside `depth` times `around`, which has a %s for it."""
    before, after = around.split("%s")
    return before * depth + inner + after * depth


def doubling(count: int) -> dict[str, Any]:
    """Definitions of which each has the next one twice."""
    pairs = {
        f"n{i}": {"type": "array", "prefixItems": 2 * [{"$ref": f"#/$defs/n{i + 1}"}], "minItems": 2, "items": False}
        for i in range(count)
    }
    return {**pairs, f"n{count}": {"type": "null"}}


RULES = "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(25)), 'r25 ::= "a"'])
LARGE: dict[str, dict[str, Any]] = {
    "(a|b)*a(a|b){30}": {"regex": "(a|b)*a(a|b){30}"},
    "((a{1,100}){1,100}){1,100}": {"regex": "((a{1,100}){1,100}){1,100}"},
    "([a-z]{1,10} ?){0,40}x": {"regex": "([a-z]{1,10} ?){0,40}x"},
    ".{1,100000}": {"regex": ".{1,100000}"},
    "enum of 1 MB": {"json_schema": {"enum": [f"the value of number {i:,}" for i in range(33_000)]}},
    "choice of 1 MB": {"choice": [f"the value of number {i:,}" for i in range(33_000)]},
    "1,000 arrays deep": {"json_schema": nested(1000, '{"type":"null"}', '{"type":"array","items":%s}')},
    "1,000 groups deep": {"regex": "(" * 1000 + "a" + ")" * 1000},
    "anyOf in anyOf": {"json_schema": nested(20, '{"type":"null"}', '{"anyOf":[{"type":"integer"},%s]}')},
    "oneOf in oneOf": {"json_schema": nested(20, '{"type":"null"}', '{"oneOf":[{"type":"integer"},%s]}')},
    "recursive $ref": {"json_schema": {"type": "array", "items": {"$ref": "#"}}},
    "references that double": {"json_schema": {"$ref": "#/$defs/n0", "$defs": doubling(25)}},
    "rules that double": {"ebnf": RULES},
    r"(\w{1,40} ?){0,300}x": {"regex": r"(\w{1,40} ?){0,300}x"},
}  # fmt: skip
"""What may be too much: an answer or a 400 within ANSWER_MS."""
NO_INTEGER = {"type": "integer", "minimum": 3, "maximum": 2}
WRONG: dict[str, dict[str, Any]] = {
    "the empty language": {"regex": r"[^\s\S]"},
    "no tokens for it": {"regex": "\U00050000"},
    "look-ahead": {"regex": "a(?=b)"},
    "back-reference": {"regex": r"(a)\1"},
    "an open group": {"regex": "(a"},
    "no choices": {"choice": []},
    "minimum above maximum": {
        "json_schema": {"type": "object", "properties": {"n": NO_INTEGER}, "required": ["n"]},
    },
    "not": {"json_schema": {"type": "object", "properties": {"a": {"not": {}}}}},
    "no JSON": {"json_schema": "{"},
}  # fmt: skip
"""What can be refused at a glance: 400 within REFUSAL_MS, naming the field and the place."""


def answer(client: httpx.Client, fields: dict[str, Any]) -> tuple[str, float]:
    """(what came of it, milliseconds)"""
    body = json.dumps({"text": "The", "sampling_params": {"max_new_tokens": 1} | fields})
    started = time.perf_counter()
    reply = client.post("/generate", content=body, headers={"content-type": "application/json"})
    took = 1e3 * (time.perf_counter() - started)
    if reply.status_code == 200:
        return f"answered: {reply.json()['text']!r}", took
    error = reply.json()["error"]
    return f"{reply.status_code} {error['code']}, {error['param']}: {error['message']}", took


def settle(client: httpx.Client) -> None:
    """Wait until requests of all three kinds are answered as soon as they will be; a minute at most."""
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "tables": {"regex": "ready"},
        "masks": {"json_schema": {"type": "array", "items": {"$ref": "#"}}},
    }
    best = dict.fromkeys(kinds, float("inf"))
    row, end = 0, time.monotonic() + 60
    while row < SETTLED and time.monotonic() < end:
        for kind, fields in kinds.items():
            _, ms = answer(client, fields)
            row = row + 1 if ms < 2 * best[kind] + 5 else 0
            best[kind] = min(best[kind], ms)
            time.sleep(PAUSE)


class Streams:
    """Requests that decode all the time, in threads; `gaps` are the seconds between two tokens of one, newest last."""

    def __init__(self, url: str, count: int) -> None:
        self.gaps: list[float] = []
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        params = {"max_new_tokens": 400, "temperature": 1.0, "ignore_eos": True, "seed": number}
        body = {"text": f"Story {number}. Once upon a time", "stream": True, "sampling_params": params}
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._over.is_set():
                with client.stream("POST", "/generate", json=body) as reply:
                    self._read(reply.iter_lines())

    def _read(self, lines: Iterator[str]) -> None:
        """Note the gaps of a reply; the pause between two requests is none."""
        last = seen = 0.0
        for line in lines:
            if self._over.is_set():
                return
            if line.startswith("data: {"):
                now, count = time.perf_counter(), json.loads(line[6:])["meta_info"]["completion_tokens"]
                if seen and count > seen:
                    self.gaps += [(now - last) / (count - seen)] * (count - seen)
                last, seen = now, count


def compiler_memory() -> int:
    """The most bytes that one of the running compilers took."""
    most = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"--worker=fsm" in folder.joinpath("cmdline").read_bytes():
                status = folder.joinpath("status").read_text()
                most = max(most, 1024 * int(status.split("VmHWM:")[1].split()[0]))
        except (OSError, IndexError):  # it ended meanwhile
            continue
    return most


def all_of_them() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each grammar, again and again, never the same twice: answers are remembered."""
    for turn in range(1_000_000):
        for name, fields in LARGE.items():
            kind, value = next(iter(fields.items()))
            yield name, {kind: other(kind, value, turn)}


def other(kind: str, value: Any, turn: int) -> Any:
    """A grammar of the same size that is not the same."""
    match kind, value:
        case "regex", _:
            return f"{value}{turn}"
        case "choice", _:
            return [*value, f"choice {turn}"]
        case "json_schema", dict():
            return {**value, "title": f"schema {turn}"}
        case "json_schema", _:
            return value.replace("{", f'{{"title":"schema {turn}",', 1)
        case _:
            return f'{value}\nr{turn + 26} ::= "b"'


def hostile(client: httpx.Client, _: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """Send grammars until killed: (milliseconds, name) of each."""
    for name, fields in all_of_them():
        yield answer(client, fields)[1], name


def quiet(client: httpx.Client, grammars: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """The same requests at the same pace, without the grammars; those that are refused are not sent."""
    for name in itertools.cycle(LARGE):
        began, ms = time.perf_counter(), 0.0
        if grammars[name]["came"].startswith("answered"):
            ms = answer(client, {})[1]
        time.sleep(max(0.0, grammars[name]["ms"] / 1e3 - (time.perf_counter() - began)))
        yield ms, name


KINDS = {"quiet": quiet, "hostile": hostile}


def call(kind: str, url: str) -> None:
    """The client of a stretch: what the grammars came to is read from stdin, and what it did is said on stdout."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with httpx.Client(base_url=url, timeout=60) as client:
        for ms, name in KINDS[kind](client, json.loads(sys.stdin.readline())):
            print(json.dumps([ms, name]), flush=True)


@contextlib.contextmanager
def caller(kind: str, url: str, grammars: dict[str, Any]) -> Iterator[list[tuple[float, str]]]:
    """Have such a client for the block, from its first request on; what it did is in the list afterwards."""
    command = [sys.executable, "-m", "actorserve.perf.blowup", "--call", kind, url]
    did: list[tuple[float, str]] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(grammars) + "\n")
        process.stdin.flush()
        process.stdout.readline()
        try:
            yield did
        finally:
            process.kill()
            did += [tuple(json.loads(line)) for line in process.stdout.read().split("\n")[:-1]]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    figures: dict[str, Any] = {"grammars": {}}
    grammars, gaps, beside = figures["grammars"], {kind: [] for kind in KINDS}, [(0.0, "")]
    with launched(f"--max-total-tokens 8192 --cpu-threads {threads} {args.flags}") as (url, _, _):
        with httpx.Client(base_url=url, timeout=60) as client:
            settle(client)
            for name, fields in (LARGE | WRONG).items():
                came, ms = answer(client, fields)
                grammars[name] = {"came": came[:100], "ms": ms, "target_ms": limit(name)}
        figures["compiler_bytes"] = compiler_memory()
        with Streams(url, args.streams) as streams:
            time.sleep(args.seconds / 4)
            for kind in list(KINDS) * args.rounds:
                with caller(kind, url, grammars) as did:
                    streams.gaps = []
                    time.sleep(args.seconds)
                    gaps[kind] += streams.gaps
                beside += did if kind == "hostile" else []
    figures["slowest_beside_ms"], figures["slowest_beside"] = max(beside)
    for kind, values in gaps.items():
        figures |= statistics(kind, values)
    figures["p99_ratio"] = figures["p99_hostile_ms"] / figures["p99_quiet_ms"]
    figures["median_ratio"] = float(np.median(gaps["hostile"]) / np.median(gaps["quiet"]))
    return figures


def limit(name: str) -> float:
    """Milliseconds within which a grammar should be answered."""
    return ANSWER_MS if name in LARGE else REFUSAL_MS


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", default="", help="of the server; default: the embedded model")
    parser.add_argument("--call", nargs=2, metavar=("KIND", "URL"), help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.call:
        return call(*args.call)
    figures = run(args)
    for name, found in figures["grammars"].items():
        late = "" if found["ms"] <= found["target_ms"] else "  LATE"
        print(f"{name:28}{found['ms']:8.0f} ms{late}  {found['came']}")
    print(f"beside streams at most {figures['slowest_beside_ms']:.0f} ms: {figures['slowest_beside']}")
    print(f"a compiler took at most {figures['compiler_bytes'] / 2**20:.0f} MiB")
    for kind in ("quiet", "hostile"):
        row = "  ".join(f"{q} {figures[f'{q}_{kind}_ms']:7.1f}" for q in ("p50", "p90", "p99"))
        print(f"ms between tokens, {kind:8} {row}")
    print(f"hostile / quiet: {figures['median_ratio']:.3f} at the median, {figures['p99_ratio']:.3f} at p99")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
