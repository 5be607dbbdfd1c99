"""A load client for any server with OpenAI's API or SGLang's /generate, ours included.

    python -m actorserve.perf.serve --num-prompts 64 --max-concurrency 8        # closed loop: 8 users
    python -m actorserve.perf.serve --num-prompts 200 --request-rate 4          # open loop: Poisson arrivals

Field names and definitions are those of vLLM's `bench serve` (SGLang's agree but for e2el): TTFT is the first event
with visible output, from the start of the request; ITL the gap between two events with output (an event may bring
several tokens: see tokens_per_event); TPOT (e2el - ttft) / (output tokens - 1); e2el the last event of the choice.
Tokens are the server's own counts. A request with any error counts as failed and makes the exit code 1.
"""

import argparse
import asyncio
import gc
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import uvloop

from actorserve.perf.stream_client import Client, Record

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back parent face others level"
).split()
METRICS = ("ttft", "tpot", "itl", "e2el")


class Job(msgspec.Struct):
    """What one client process does. Times are seconds; `offsets` from the common start, one a body."""

    url: str
    headers: dict[str, str]
    indices: list[int]
    bodies: list[str]
    wanted: list[int]
    offsets: list[float]
    concurrency: int
    timeout: float


class Result(msgspec.Struct):
    records: list[Record]
    cpu_seconds: float


def make_prompts(args: argparse.Namespace) -> list[str | list[int]]:
    """Return the prompts: random words (about a token each), or random ids if --vocab-size is given.

    The first --shared-prefix-len of each are the same; --random-input-len more are its own.
    """
    rng = random.Random(args.seed)
    if args.vocab_size and args.api == "chat":
        raise SystemExit("chat takes text: leave --vocab-size out")

    def draw(count: int) -> list[Any]:
        if args.vocab_size:  # the lowest ids are often special tokens
            return [rng.randrange(min(256, args.vocab_size // 2), args.vocab_size) for _ in range(count)]
        return rng.choices(WORDS, k=count)

    prefix = draw(args.shared_prefix_len)
    prompts = [prefix + draw(_length(rng, args.random_input_len, args)) for _ in range(args.num_prompts)]
    return prompts if args.vocab_size else [" ".join(prompt) for prompt in prompts]


def _length(rng: random.Random, longest: int, args: argparse.Namespace) -> int:
    return rng.randint(max(1, int(longest * args.random_range_ratio)), longest)


def make_body(prompt: str | list[int], tokens: int, args: argparse.Namespace, model: str) -> str:
    """Return the JSON of one request for `tokens` output tokens."""
    if args.api == "generate":
        sampling = {"max_new_tokens": tokens, "temperature": args.temperature, "ignore_eos": args.ignore_eos}
        field = "text" if isinstance(prompt, str) else "input_ids"
        return json.dumps({field: prompt, "sampling_params": sampling, "stream": True})
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": args.temperature, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if args.ignore_eos:
        body["ignore_eos"] = True
    if args.api == "chat":
        return json.dumps(body | {"messages": [{"role": "user", "content": prompt}]})
    return json.dumps(body | {"prompt": prompt})


def arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    """Return the start of each request in seconds: a Poisson process of `rate` per second, or all at once."""
    if rate is None:
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(t) for t in np.cumsum(gaps) - gaps[0]]


def plan(args: argparse.Namespace, model: str) -> Job:
    """Return the whole run as one job."""
    prompts = make_prompts(args)
    rng = random.Random(args.seed + 1)
    wanted = [_length(rng, args.random_output_len, args) for _ in prompts]
    return Job(
        url=args.base_url.rstrip("/") + PATHS[args.api],
        headers={"authorization": f"Bearer {args.api_key}"} if args.api_key else {},
        indices=list(range(len(prompts))),
        bodies=[make_body(prompt, tokens, args, model) for prompt, tokens in zip(prompts, wanted, strict=True)],
        wanted=wanted,
        offsets=arrivals(len(prompts), args.request_rate, args.seed),
        concurrency=args.max_concurrency or len(prompts),
        timeout=args.timeout,
    )


def split(job: Job, processes: int) -> list[Job]:
    """Share a job among client processes: every n-th request, and their share of the concurrency."""
    processes = min(processes, job.concurrency, len(job.bodies))
    return [
        msgspec.structs.replace(
            job,
            **{name: getattr(job, name)[i::processes] for name in ("indices", "bodies", "wanted", "offsets")},
            concurrency=job.concurrency // processes + (i < job.concurrency % processes),
        )
        for i in range(processes)
    ]


async def run_job(job: Job, begin: float) -> list[Record]:
    """Send a job's requests from the clock time `begin` (CLOCK_MONOTONIC seconds) on."""
    client = Client(job.url, job.headers)
    free = asyncio.Semaphore(job.concurrency)
    records = []

    async def one(record: Record, body: bytes) -> None:
        await client.stream(body, record, job.timeout)
        free.release()

    async with asyncio.TaskGroup() as tasks:
        for index, body, wanted, offset in zip(job.indices, job.bodies, job.wanted, job.offsets, strict=True):
            record = Record(index, planned=begin + offset, wanted_tokens=wanted)
            records.append(record)
            if (wait := record.planned - client.clock()) > 0:
                await asyncio.sleep(wait)
            await free.acquire()
            tasks.create_task(one(record, body.encode()))
    client.close()
    await asyncio.sleep(0)  # lets the connections end before the loop does
    return records


def work(job: Job, begin: float) -> Result:
    """run_job in this process, without pauses of the garbage collector."""
    gc.collect()
    gc.freeze()
    before = time.process_time()
    try:
        records = uvloop.run(run_job(job, begin))
    finally:
        gc.unfreeze()
    return Result(records, time.process_time() - before)


def work_in_processes(jobs: list[Job]) -> list[Result]:
    """Run each job in a fresh interpreter; all start at the same time. Raises RuntimeError if one fails."""
    command = [sys.executable, "-m", "actorserve.perf.serve", "--worker"]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in jobs]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            _stream(worker.stdin).write(msgspec.json.encode(job) + b"\n")
            _stream(worker.stdin).flush()
        if any(_stream(worker.stdout).readline() != b"ready\n" for worker in workers):
            raise RuntimeError("a client process did not start")
        begin = time.monotonic() + 0.1
        outputs = []
        for worker in workers:
            _stream(worker.stdin).write(b"%r\n" % begin)
            _stream(worker.stdin).flush()
        for worker in workers:
            outputs.append(_stream(worker.stdout).read())
            if worker.wait():
                raise RuntimeError("a client process failed")
        return [msgspec.json.decode(output, type=Result) for output in outputs]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _stream(pipe: Any) -> Any:
    assert pipe is not None
    return pipe


def worker_main() -> None:
    """A client process: job in, `ready` out, start time in, result out."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    print("ready", flush=True)
    result = work(job, float(sys.stdin.buffer.readline()))
    with open(1, "wb", closefd=False) as out:  # under PYTHONUNBUFFERED sys.stdout may write only a part
        out.write(msgspec.json.encode(result))


def peak_concurrency(records: Sequence[Record]) -> int:
    """Return the most requests that were under way at one time; one that ends as another starts does not count."""
    edges = sorted(edge for r in records for edge in ((r.start, 1), (r.end, -1)))
    return int(np.cumsum([step for _, step in edges]).max(initial=0))


def statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return {mean,median,std,p50,p90,p99}_`name`_ms; empty without samples."""
    if not len(seconds):
        return {}
    ms = np.asarray(seconds) * 1e3
    values = {"mean": ms.mean(), "median": np.median(ms), "std": ms.std()}
    values |= {f"p{q}": np.percentile(ms, q) for q in (50, 90, 99)}
    return {f"{key}_{name}_ms": float(value) for key, value in values.items()}


def summarize(records: Sequence[Record], goodput: dict[str, float] | None = None) -> dict[str, Any]:
    """Return all figures of a run. `goodput`: the most milliseconds of ttft, tpot, e2el that a good request takes."""
    good = [r for r in records if r.error is None]
    failed = [r for r in records if r.error is not None]
    duration = max(r.end for r in records) - min(r.start for r in records)
    ttft = [r.times[0] - r.start for r in good]
    e2el = [r.end - r.start for r in good]
    tpot = [
        (total - first) / (r.completion_tokens - 1) if r.completion_tokens > 1 else 0.0
        for r, total, first in zip(good, e2el, ttft, strict=True)
    ]
    tokens_in, tokens_out = sum(r.prompt_tokens for r in good), sum(r.completion_tokens for r in good)
    events = sum(len(r.times) for r in good)
    figures: dict[str, Any] = {
        "completed": len(good),
        "failed": len(failed),
        "duration": duration,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "total_cached_tokens": sum(r.cached_tokens for r in good),
        "request_throughput": len(good) / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_concurrent_requests": peak_concurrency(records),
        "concurrency": sum(e2el) / duration,
        "tokens_per_event": tokens_out / events if events else 0.0,
        "short_outputs": sum(r.completion_tokens != r.wanted_tokens for r in good),
        "errors": sorted({str(r.error) for r in failed})[:10],
    }
    samples = {
        "ttft": ttft,
        "tpot": [t for t, r in zip(tpot, good, strict=True) if r.completion_tokens > 1],
        "itl": [later - earlier for r in good for earlier, later in zip(r.times, r.times[1:], strict=False)],
        "e2el": e2el,
    }
    for name in METRICS:
        figures |= statistics(name, samples[name])
    if goodput:
        values = {"ttft": ttft, "tpot": tpot, "e2el": e2el}
        met = np.all([np.asarray(values[name]) * 1e3 <= limit for name, limit in goodput.items()], axis=0)
        figures["request_goodput"] = float(met.sum()) / duration
    return figures


def report(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    plain = [k for k, v in figures.items() if isinstance(v, (int, float)) and not k.endswith("_ms")]
    lines = [f"{name:<26}{figures[name]:>14,.2f}".removesuffix(".00") for name in plain]
    columns = ("mean", "p50", "p90", "p99")
    lines.append(f"{'ms':<26}" + "".join(f"{c:>12}" for c in columns))
    for name in METRICS:
        if f"mean_{name}_ms" in figures:
            lines.append(f"{name:<26}" + "".join(f"{figures[f'{c}_{name}_ms']:>12,.2f}" for c in columns))
    lines += [f"ERROR {error}" for error in figures["errors"]]
    if figures["short_outputs"]:
        lines.append(f"NOTE {figures['short_outputs']} replies have another length than asked")
    if figures["client_cpu_share"] > 0.7:
        lines.append(f"NOTE the client used {figures['client_cpu_share']:.0%} of a core: raise --client-processes")
    return "\n".join(lines)


def served_model(args: argparse.Namespace) -> str:
    """Return --model, or the first that the server lists. Raises SystemExit if there is no server."""
    if args.model or args.api == "generate":
        return args.model or ""
    request = urllib.request.Request(args.base_url.rstrip("/") + "/v1/models")
    if args.api_key:
        request.add_header("authorization", f"Bearer {args.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"cannot read {request.full_url}: {error}; is the server up? (or give --model)") from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Warm up, run, and return the figures."""
    model = served_model(args)
    if args.warmup_requests:
        warm = argparse.Namespace(**vars(args) | {"num_prompts": args.warmup_requests, "seed": args.seed + 1_000_003})
        warm.request_rate, warm.max_concurrency, warm.random_output_len = None, 1, min(args.random_output_len, 16)
        bad = [r.error for r in work(plan(warm, model), time.monotonic()).records if r.error]
        if bad:
            raise SystemExit(f"the warm-up request failed: {bad[0]}")
    job = plan(args, model)
    parts = split(job, args.client_processes)
    results = [work(job, time.monotonic())] if len(parts) == 1 else work_in_processes(parts)
    records = sorted((r for result in results for r in result.records), key=lambda r: r.index)
    figures = summarize(records, args.goodput)
    figures["client_cpu_share"] = max(result.cpu_seconds for result in results) / figures["duration"]
    if args.request_rate:
        figures["max_start_lag_ms"] = 1e3 * max(r.start - r.planned for r in records)
    return figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line; raises SystemExit for a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m actorserve.perf.serve", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:30000")
    add("--api", choices=sorted(PATHS), default="completions")
    add("--model", help="default: the first of /v1/models")
    add("--api-key")
    add("--dataset", choices=["random"], default="random", help="random words, or ids below --vocab-size")
    add("--vocab-size", type=int, help="send token ids below this instead of text (completions, generate)")
    add("--num-prompts", type=int, default=64)
    add("--random-input-len", type=int, default=256, help="tokens (words) of a prompt, beside the shared prefix")
    add("--random-output-len", type=int, default=128)
    add("--random-range-ratio", type=float, default=1.0, help="lengths are uniform in [ratio * len, len]")
    add("--shared-prefix-len", type=int, default=0, help="tokens (words) with which all prompts begin")
    add("--max-concurrency", type=int, help="requests under way at a time")
    add("--request-rate", type=float, help="Poisson arrivals per second; default: as fast as concurrency allows")
    add("--temperature", type=float, default=0.0)
    add("--disable-ignore-eos", dest="ignore_eos", action="store_false", help="let the model end (or a strict server)")
    add("--goodput", nargs="+", type=_limit, help="like ttft:200 tpot:50 e2el:5000, milliseconds")
    add("--warmup-requests", type=int, default=1)
    add("--client-processes", type=int, default=1)
    add("--timeout", type=float, default=600.0, help="seconds until a request counts as failed")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args(arguments)
    if args.num_prompts < 1 or (args.request_rate is not None and args.request_rate <= 0):
        parser.error("--num-prompts and --request-rate must be above 0")
    args.goodput = dict(args.goodput) if args.goodput else None
    return args


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{text}: ttft, tpot or e2el, a colon, and milliseconds")
    return name, float(value)


def main() -> None:
    """The command."""
    if sys.argv[1:] == ["--worker"]:
        worker_main()
        return
    args = parse()
    figures = run(args)
    print(report(figures))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": {k: v for k, v in vars(args).items() if k != "api_key"}, **figures}, file, indent=1)
    if figures["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
