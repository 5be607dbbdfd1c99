"""What grammars of bad will do: how each is answered, and what the streams of others notice.

    python -m actorserve.perf.blowup [--model DIR] [--load-format dummy] [--attention-backend triton]
        [--streams 2] [--seconds 10] [--rounds 3] [--json FILE]

A whole engine, each actor in its process. Streams decode steadily; quiet stretches and stretches in which one such
grammar follows another take turns in one run, so that the machine's own noise falls on both. In a quiet stretch the
requests whose grammars can be had come too, at the same pace but without a grammar: another request in a step is not
what is measured. Figures: status and time of each grammar (targets: ANSWER_MS for what may be large, REFUSAL_MS for
what is plainly wrong), the most that one took beside streams, the gaps between tokens in both kinds of stretches, and
the most memory that a compiler took.
On a CPU the engine is left with one thread; where no core is free, compilers and streams share what there is, and the
figures say little. A GPU's engine captures graphs when it first idles, also those that masks need: that is waited for.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import trio

from actorserve import Engine, SamplingParams
from actorserve.errors import RequestError
from actorserve.models.embedded import embedded_model
from actorserve.perf.figures import statistics

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


async def answer(engine: Any, fields: dict[str, Any]) -> tuple[str, float]:
    """(what came of it, milliseconds)"""
    started = time.perf_counter()
    try:
        output = await engine.generate("The", SamplingParams(max_new_tokens=1), **fields)
        came = f"answered: {output.text!r}"
    except RequestError as error:
        came = f"{error.status} {error.code}, {error.param}: {error.message}"
    return came, 1e3 * (time.perf_counter() - started)


async def settle(engine: Any) -> None:
    """Wait until requests of all three kinds are answered as soon as they will be; a minute at most."""
    kinds = {
        "none": {},
        "tables": {"regex": "ready"},
        "masks": {"json_schema": {"type": "array", "items": {"$ref": "#"}}},
    }
    best = dict.fromkeys(kinds, float("inf"))
    row = 0
    with trio.move_on_after(60):
        while row < SETTLED:
            for kind, fields in kinds.items():
                _, ms = await answer(engine, fields)
                row = row + 1 if ms < 2 * best[kind] + 5 else 0
                best[kind] = min(best[kind], ms)
                await trio.sleep(PAUSE)


class Streams:
    """Requests that decode all the time; `gaps` are the seconds between two tokens of one, newest last."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.gaps: list[float] = []

    async def run(self, number: int) -> None:
        """Decode until cancelled; the pause between two requests is no gap."""
        params = SamplingParams(max_new_tokens=400, temperature=1.0, ignore_eos=True, seed=number)
        while True:
            last = None
            async for delta in self.engine.stream(f"Story {number}. Once upon a time", params):
                now = time.perf_counter()
                if last is not None:
                    self.gaps += [(now - last) / len(delta.ids)] * len(delta.ids)
                last = now


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


async def plain_ones(engine: Any, figures: dict[str, dict[str, Any]]) -> None:
    """The same requests at the same pace, without the grammars; those that are refused are not sent."""
    for name in itertools.cycle(LARGE):
        seconds = figures[name]["ms"] / 1e3
        began = time.perf_counter()
        if figures[name]["came"].startswith("answered"):
            await answer(engine, {})
        await trio.sleep(max(0.0, seconds - (time.perf_counter() - began)))


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    figures: dict[str, Any] = {"grammars": {}}
    options = {"load_format": args.load_format, "attention_backend": args.attention_backend}
    options |= {"placement": "process", "max_total_tokens": 8192, "cpu_threads": 1}
    async with Engine(args.model or embedded_model(), **options) as engine:
        await settle(engine)
        for name, fields in (LARGE | WRONG).items():
            came, ms = await answer(engine, fields)
            figures["grammars"][name] = {"came": came[:100], "ms": ms, "target_ms": limit(name)}
        figures["compiler_bytes"] = compiler_memory()
        found = Streams(engine)
        kinds: dict[str, list[float]] = {"quiet": [], "hostile": []}
        async with trio.open_nursery() as nursery:
            for number in range(args.streams):
                nursery.start_soon(found.run, number)
            await trio.sleep(args.seconds / 4)
            hostile, beside = all_of_them(), [(0.0, "")]
            for _ in range(args.rounds):
                for kind, values in kinds.items():
                    found.gaps = []
                    with trio.move_on_after(args.seconds):
                        while kind == "hostile":
                            name, fields = next(hostile)
                            beside.append(((await answer(engine, fields))[1], name))
                        await plain_ones(engine, figures["grammars"])
                    values += found.gaps
            nursery.cancel_scope.cancel()
    figures["slowest_beside_ms"], figures["slowest_beside"] = max(beside)
    for kind, values in kinds.items():
        figures |= statistics(kind, values)
    figures["p99_ratio"] = figures["p99_hostile_ms"] / figures["p99_quiet_ms"]
    figures["median_ratio"] = float(np.median(kinds["hostile"]) / np.median(kinds["quiet"]))
    return figures


def limit(name: str) -> float:
    """Milliseconds within which a grammar should be answered."""
    return ANSWER_MS if name in LARGE else REFUSAL_MS


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--attention-backend", default="auto", help="FlashInfer may compile its kernels for minutes")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = trio.run(run, args)
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
