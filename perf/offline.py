"""Throughput of the whole engine without HTTP: requests of random token ids through the embedded Engine.

    python -m actorserve.perf.offline --model qwen2-7b --num-prompts 512 --input-len 1024 --output-len 512 \\
        --max-running-requests 256

Takes the flags of `actorserve run` as well. --model may be a known shape, which gets dummy weights. All requests are
submitted at once and go on to their full length; the engine is in processes of its own (--placement inline: a thread).
Warm-up first: prompts as in a run, then batches of every size, so that kernels are compiled and graphs captured; then a
pause until the executor has prepared all that it does while it idles. Field names are those of vLLM's
`bench throughput`. The floor is perf.roofline's `workload_seconds` with the same lengths and the same most running.
"""

import argparse
import asyncio
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from actorserve import Engine
from actorserve.actors.memory import batch_slots
from actorserve.config import EngineConfig
from actorserve.flags import Formatter, Parser, add_config_flags, config_from
from actorserve.models.ledger import SLOTS
from actorserve.models.shapes import KNOWN
from actorserve.models.shard import sharded
from actorserve.models.weights import pick_device
from actorserve.perf.processes import CpuShares
from actorserve.perf.roofline import add_limit_flags, limits_of, spec_of_model, workload_seconds
from actorserve.perf.shapes import model_folder
from actorserve.sampler.params import SamplingParams

SETTLE_SECONDS = 60.0
"""Default of the longest pause after the warm-up, in which an idle executor captures the CUDA graphs that it did not
need yet, and measures products. Else that is in the first runs, as kernels are that the warm-up lacks: on an H200 that
had never served Qwen2-7B they took 25.8, 23.0 and 22.6 s."""
RESTS = 0.05
"""Of a core: an executor that uses less in half a second has nothing more to prepare."""
UNSEEN = 10.0
"""Seconds."""
WAVE = 32
"""Steps in which 256 prompts of a thousand tokens are prefilled."""
FIRST_ID = 256
"""The lowest ids are often special tokens."""


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, EngineConfig]:
    """The benchmark's own flags, and the engine's settings."""
    p = Parser(prog="python -m actorserve.perf.offline", description=__doc__, formatter_class=Formatter)
    group = p.add_argument_group("workload")
    group.add_argument("--num-prompts", type=int, default=512)
    group.add_argument("--input-len", type=int, default=1024)
    group.add_argument("--output-len", type=int, default=512)
    group.add_argument("--random-range-ratio", type=float, default=1.0, help="lengths uniform in [ratio * len, len]")
    group.add_argument("--temperature", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--repeat", type=int, default=1, help="runs after the warm-up; the median is reported")
    group.add_argument("--no-warmup", action="store_true")
    group.add_argument("--settle", type=float, default=SETTLE_SECONDS, help="most seconds from the warm-up to the runs")
    group.add_argument("--json", metavar="FILE", help="write the figures there too")
    add_limit_flags(p)
    add_config_flags(p)
    args = p.parse_args(arguments)
    if min(args.num_prompts, args.input_len, args.output_len, args.repeat) < 1 or not 0 <= args.random_range_ratio <= 1:
        p.error("counts and lengths must be above 0, the range ratio between 0 and 1")
    return args, config_from(args, p)


def settings_of(args: argparse.Namespace, config: EngineConfig, folder: str) -> dict[str, Any]:
    """The Engine's keyword arguments: those given, and what a run on random token ids needs."""
    given = {name: getattr(config, name) for name in EngineConfig.__struct_fields__ if hasattr(args, name)}
    if config.model is None or config.model in KNOWN:
        given |= {"load_format": "dummy", "skip_tokenizer_init": True}
    most = max(args.num_prompts, SLOTS["cuda"], config.max_running_requests or 0)
    given["max_queued_requests"] = max(config.max_queued_requests, most)
    return {"log_level": "warning"} | given | {"model": folder}


def most_running(config: EngineConfig) -> int:
    """How many requests the engine runs at once, by default fewer on a CPU."""
    return batch_slots(config, "cuda" if config.load_format == "stub" else pick_device(config.device).type)


def lengths_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each request."""
    rng = random.Random(args.seed)

    def draw(longest: int) -> int:
        return rng.randint(max(1, int(longest * args.random_range_ratio)), longest)

    return [(draw(args.input_len), draw(args.output_len)) for _ in range(args.num_prompts)]


Request = tuple[list[int], SamplingParams]


def requests_of(engine: Engine, lengths: Sequence[tuple[int, int]], temperature: float, seed: int) -> Sequence[Request]:
    """One request of random ids per length. No text, no stop at EOS."""
    rng = random.Random(seed)
    size = engine.model.vocab_size
    ids = range(min(FIRST_ID, size // 2), size)

    def params(output: int) -> SamplingParams:
        draw = rng.getrandbits(32)
        return SamplingParams(max_new_tokens=output, ignore_eos=True, temperature=temperature, seed=draw)

    return [(rng.choices(ids, k=tokens), params(output)) for tokens, output in lengths]


async def serve_all(engine: Engine, requests: Sequence[Request]) -> list[int]:
    """Run them all at once; returns the output tokens of each."""

    async def one(ids: list[int], params: SamplingParams) -> int:
        return len((await engine.generate(ids, params)).ids)

    return await asyncio.gather(*(one(ids, params) for ids, params in requests))


def warmup_lengths(args: argparse.Namespace, running: int) -> list[tuple[int, int]]:
    """As many requests as run at once, the first ones with the longest outputs: prompts beside decoding rows, as in a
    run, and then a batch of every size. None is longer than a run's."""
    count = min(running, args.num_prompts)
    outputs = [WAVE + count - i - i * WAVE // count for i in range(count)]
    return [(args.input_len, min(tokens, args.output_len)) for tokens in outputs]


async def measure(args: argparse.Namespace, config: EngineConfig, folder: str) -> dict[str, Any]:
    """Start the engine, warm up, run; returns the figures without floors."""
    lengths = lengths_of(args)
    began = time.perf_counter()
    async with Engine(**settings_of(args, config, folder)) as engine:
        startup = time.perf_counter() - began
        first = await engine.generate([FIRST_ID], SamplingParams(max_new_tokens=1, ignore_eos=True))
        assert len(first.ids) == 1
        first_token = time.perf_counter() - began
        running = most_running(config)
        tell(f"ready after {startup:.1f} s, first token after {first_token:.1f} s")
        if not args.no_warmup:
            warmup = warmup_lengths(args, running)
            await serve_all(engine, requests_of(engine, warmup, args.temperature, args.seed + 1_000_003))
            tell(f"warm after {time.perf_counter() - began:.1f} s")
            if torch.cuda.is_available():
                await settle(engine, args.settle)
                tell(f"at rest after {time.perf_counter() - began:.1f} s")
        runs = []
        for run in range(args.repeat):
            runs.append(await timed(engine, args, lengths, args.seed + run))
            tell(f"run {run + 1}: {runs[-1]['elapsed_time']:.2f} s")
    middle = sorted(runs, key=lambda run: run["elapsed_time"])[len(runs) // 2]
    seconds = middle["elapsed_time"]
    prompt_tokens, output_tokens = sum(i for i, _ in lengths), sum(o for _, o in lengths)
    return {
        **middle,
        "all_elapsed_times": [run["elapsed_time"] for run in runs],
        "num_requests": len(lengths),
        "max_running_requests": running,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": len(lengths) / seconds,
        "output_throughput": output_tokens / seconds,
        "tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "startup_seconds": startup,
        "first_token_seconds": first_token,
    }


def tell(news: str) -> None:
    """A line on stderr while it runs: what was known when somebody stops it."""
    print(news, file=sys.stderr, flush=True)


def root_of(engine: Engine) -> int | None:
    """The process above the engine's; None where the engine is in this one."""
    return engine._root.pid if engine._root is not None else None


async def settle(engine: Engine, most: float) -> None:
    """Wait until the executors rest, so many seconds at most, or UNSEEN where they are in this process."""
    root = root_of(engine)
    until = time.monotonic() + (most if root is not None else min(most, UNSEEN))
    while time.monotonic() < until:
        with CpuShares(root) as cpu:
            await asyncio.sleep(min(0.5, most))
        executors = [share for name, share in cpu.shares.items() if name.startswith("exec")]
        if executors and max(executors) < RESTS:
            return


async def timed(engine: Engine, args: argparse.Namespace, lengths: list[tuple[int, int]], seed: int) -> dict[str, Any]:
    """One run. Raises SystemExit if an output has not its full length."""
    requests = requests_of(engine, lengths, args.temperature, seed)
    used = _own_cpu()
    with CpuShares(root_of(engine)) as cpu:
        began = time.perf_counter()
        counts = await serve_all(engine, requests)
        seconds = time.perf_counter() - began
    if counts != [output for _, output in lengths]:
        raise SystemExit("some outputs have another length than asked")
    return {"elapsed_time": seconds, "cpu_shares": {"client": (_own_cpu() - used) / seconds, **cpu.shares}}


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def add_floor(figures: dict[str, Any], args: argparse.Namespace, model: str, ranks: int) -> None:
    """Add the floor of the same workload, of a rank's part without what ranks tell each other, and the share of it
    that was reached."""
    running, spec = figures["max_running_requests"], sharded(spec_of_model(model), ranks)
    floor = workload_seconds(spec, lengths_of(args), running, limits_of(args), args.kv_bytes)
    figures["floor_seconds"] = floor
    figures["share_of_floor"] = floor / figures["elapsed_time"]


def report(figures: dict[str, Any]) -> str:
    """The figures for people."""
    rows = [
        ("requests", "num_requests", ",.0f"),
        ("at most running", "max_running_requests", ",.0f"),
        ("seconds", "elapsed_time", ",.2f"),
        ("requests/s", "requests_per_second", ",.2f"),
        ("output tokens/s", "output_throughput", ",.0f"),
        ("total tokens/s", "tokens_per_second", ",.0f"),
        ("floor, seconds", "floor_seconds", ",.2f"),
        ("share of the floor", "share_of_floor", ".3f"),
        ("start, seconds", "startup_seconds", ",.1f"),
        ("start to first token", "first_token_seconds", ",.1f"),
    ]
    lines = [f"{title:<22}{figures[key]:>12{form}}" for title, key, form in rows]
    if len(figures["all_elapsed_times"]) > 1:
        lines.append("all runs, seconds     " + "  ".join(f"{s:.2f}" for s in figures["all_elapsed_times"]))
    shares = "  ".join(f"{name} {share:.2f}" for name, share in figures["cpu_shares"].items())
    return "\n".join([*lines, f"cores used: {shares}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args, config = parse(arguments)
    limits_of(args)  # measured while the GPU is free, and remembered
    with model_folder(config.model or "smollm2-135m") as folder:
        figures = asyncio.run(measure(args, config, folder))
        add_floor(figures, args, folder, config.tp_size)
    print(report(figures))
    if args.json:
        told = {"arguments": sys.argv[1:] if arguments is None else list(arguments), **figures}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(msgspec.to_builtins(told), file, indent=1)


if __name__ == "__main__":
    main()
