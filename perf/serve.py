"""A load client for any server with OpenAI's API or SGLang's /generate, ours included.

    python -m actorserve.perf.serve --num-prompts 64 --max-concurrency 8        # closed loop: 8 users
    python -m actorserve.perf.serve --num-prompts 200 --request-rate 4          # open loop: Poisson arrivals
    python -m actorserve.perf.serve --join --max-concurrency 127                # others join running streams
    python -m actorserve.perf.serve --launch "" --shape qwen2-7b --clients 4    # starts our server, dummy weights

Flags are those of vLLM's `bench serve` and SGLang's `bench_serving` where they exist; figures.py has the definitions.
With --shape prompts and outputs are token ids (a server without a tokenizer is enough) and floors are printed.
A request with any error counts as failed and makes the exit code 1.
"""

import argparse
import contextlib
import json
import random
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from actorserve.flags import Formatter, Parser
from actorserve.models.shapes import KNOWN
from actorserve.perf.clients import Job, split, work, work_in_processes
from actorserve.perf.figures import add_floors, report, summarize
from actorserve.perf.join import add_join_flags, report_join, run_join
from actorserve.perf.processes import CpuShares, launched
from actorserve.perf.roofline import add_limit_flags, limits_of, spec_of_model
from actorserve.perf.shapes import model_folder

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
BACKENDS = {
    "openai": "completions",
    "openai-chat": "chat",
    "vllm": "completions",
    "vllm-chat": "chat",
    "sglang": "generate",
    "sglang-oai": "completions",
    "native": "generate",
} | {api: api for api in PATHS}
"""The peers' names of protocols, and ours."""
EXAMPLES = """examples:
  {prog} --num-prompts 64 --max-concurrency 8        8 users, each with one request after another
  {prog} --num-prompts 200 --request-rate 4          4 requests a second, at random moments
  {prog} --shared-prefix-len 512                     what the prefix cache is worth
"""
OUTPUT = 128
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back parent face others level"
).split()


def make_prompts(args: argparse.Namespace) -> list[str | list[int]]:
    """Return the prompts: random words (about a token each), or random ids if --vocab-size is given.

    The first --shared-prefix-len of each are the same; --random-input-len more are its own.
    """
    rng = random.Random(args.seed)
    if args.vocab_size and args.api == "chat":
        raise SystemExit("chat takes text: leave --vocab-size and --shape out")

    def draw(count: int) -> list[Any]:
        if args.vocab_size:  # the lowest ids are often special tokens
            return rng.choices(range(min(256, args.vocab_size // 2), args.vocab_size), k=count)
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
    if args.return_token_ids:
        body["return_token_ids"] = True
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
    longest = OUTPUT if args.random_output_len is None else args.random_output_len
    wanted = [_length(rng, longest, args) for _ in prompts]
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


def warm_up(args: argparse.Namespace, model: str) -> None:
    """Send --warmup-requests: one for the path, many for every batch size, since they end one after another.

    Raises SystemExit if one fails.
    """
    count = args.warmup_requests
    if not count:
        return
    least = min(16, args.random_output_len or OUTPUT)
    changed = {"num_prompts": count, "seed": args.seed + 1_000_003, "request_rate": None, "random_output_len": least}
    changed["max_concurrency"] = min(count, args.max_concurrency or count)
    warm = argparse.Namespace(**vars(args) | changed)
    job = plan(warm, model)
    job.wanted = [wanted + i for i, wanted in enumerate(job.wanted)]
    prompts = make_prompts(warm)
    job.bodies = [make_body(prompt, n, args, model) for prompt, n in zip(prompts, job.wanted, strict=True)]
    bad = [r.error for r in work(job, time.monotonic()).records if r.error]
    if bad:
        raise SystemExit(f"the warm-up request failed: {bad[0]}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Warm up, run, and return the figures."""
    if args.shape:
        limits_of(args)  # measured while the GPU is free, and remembered
    with server_of(args) as started:
        model = served_model(args)
        warm_up(args, model)
        with CpuShares(started.pop("pid", None)) as cpu:
            figures = run_join(args, model, plan) if args.join else measure(args, model)
    return figures | started | ({"cpu_shares": cpu.shares} if cpu.shares else {})


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """One run of the workload; returns its figures."""
    job = plan(args, model)
    parts = split(job, args.client_processes)
    results = [work(job, time.monotonic())] if len(parts) == 1 else work_in_processes(parts)
    records = sorted((r for result in results for r in result.records), key=lambda r: r.index)
    figures = summarize(records, args.goodput)
    figures["client_cpu_share"] = max(result.cpu_seconds for result in results) / figures["duration"]
    if args.request_rate:
        figures["max_start_lag_ms"] = 1e3 * max(r.start - r.planned for r in records)
    if args.shape:
        add_floors(figures, records, spec_of_model(args.shape), limits_of(args), args.kv_bytes)
    return figures


@contextlib.contextmanager
def server_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """With --launch run our server for the block, and say how long its start took and which process it is."""
    if args.launch is None:
        yield {}
        return
    with contextlib.ExitStack() as stack:
        flags = args.launch
        if args.shape and "--model" not in flags:
            folder = stack.enter_context(model_folder(args.shape))
            flags += f" --model {folder} --load-format dummy --skip-tokenizer-init"
        began = time.monotonic()
        url, pid, seconds = stack.enter_context(launched(flags))
        args.base_url = url
        single = {"num_prompts": 1, "random_output_len": 1, "random_input_len": 16, "seed": args.seed + 2_000_003}
        first = argparse.Namespace(**vars(args) | single)
        (record,) = work(plan(first, served_model(first)), began).records
        if record.error:
            raise SystemExit(f"the first request failed: {record.error}")
        yield {"pid": pid, "startup_seconds": seconds, "first_token_seconds": record.times[0] - began}


def parse(arguments: Sequence[str] | None = None, prog: str = "python -m actorserve.perf.serve") -> argparse.Namespace:
    """Return the command line; raises SystemExit for a wrong one."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description="Put load on a server with OpenAI's API or SGLang's /generate, ours or another, and measure it.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    _add_server_flags(parser)
    _add_load_flags(parser)
    add_join_flags(parser)
    add_limit_flags(parser)
    args = parser.parse_args(arguments)
    if min(args.num_prompts, args.client_processes, args.join_count) < 1 or not args.request_rate > 0:
        parser.error("--num-prompts, --clients, --join-count and --request-rate must be above 0")
    if args.shape and not args.vocab_size:
        args.vocab_size = spec_of_model(args.shape).vocab
    args.api = BACKENDS[args.api or ("generate" if args.shape else "completions")]
    args.request_rate = None if args.request_rate == float("inf") else args.request_rate
    args.goodput = dict(args.goodput) if args.goodput else None
    return args


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-url", "--url", metavar="URL", default="http://127.0.0.1:30000", help="default: %(default)s")
    add("--launch", metavar="FLAGS", help="run `actorserve run FLAGS` for this; a model of --shape unless FLAGS say")
    add(
        "--backend",
        "--api",
        dest="api",
        choices=sorted(BACKENDS),
        metavar="API",
        help=f"protocol: {', '.join(sorted(BACKENDS))} (default: completions, native for ids)",
    )
    add("--model", metavar="NAME", help="default: the first of /v1/models")
    add("--api-key", metavar="KEY")


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    whole: Any = {"type": int, "metavar": "N"}
    real: Any = {"type": float, "metavar": "X"}
    add(
        "--dataset-name",
        "--dataset",
        choices=["random"],
        metavar="random",
        default="random",
        help="random words, or ids",
    )
    add("--vocab-size", **whole, help="send token ids below this instead of text (completions, native)")
    add("--shape", metavar="NAME", help=f"the served model, for ids and floors: {', '.join(KNOWN)}, or a folder")
    add("--num-prompts", **whole, default=64, help="requests (default: %(default)s)")
    add(
        "--random-input-len",
        type=int,
        metavar="N",
        default=256,
        help="tokens (words) of a prompt, beside the shared prefix",
    )
    add("--random-output-len", **whole, help=f"default: {OUTPUT}")
    add(
        "--random-range-ratio",
        type=float,
        metavar="X",
        default=1.0,
        help="lengths are uniform in [ratio * len, len], as in SGLang",
    )
    add("--return-token-ids", action="store_true", help="ask for ids (vLLM: a server without a tokenizer has no text)")
    add("--shared-prefix-len", **whole, default=0, help="tokens (words) with which all prompts begin")
    add("--max-concurrency", **whole, help="requests under way at a time")
    add(
        "--request-rate",
        type=float,
        metavar="X",
        default=float("inf"),
        help="Poisson arrivals per second; inf: all at once",
    )
    add("--temperature", **real, default=0.0)
    add("--ignore-eos", action="store_true", default=True, help="go on to the full length (the default)")
    add("--disable-ignore-eos", dest="ignore_eos", action="store_false", help="let the model end (or a strict server)")
    add("--goodput", nargs="+", type=_limit, help="like ttft:200 tpot:50 e2el:5000, milliseconds")
    add("--warmup-requests", "--num-warmups", **whole, default=1)
    add("--client-processes", "--clients", **whole, default=1)
    add("--timeout", **real, default=600.0, help="seconds until a request counts as failed")
    add("--seed", **whole, default=0)
    add("--json", metavar="FILE", help="write the figures there too")


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{text}: ttft, tpot or e2el, a colon, and milliseconds")
    return name, float(value)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m actorserve.perf.serve") -> None:
    """The command, also that of `actorserve bench`. Raises SystemExit where a request failed, or it cannot run."""
    args = parse(arguments, prog)
    figures = run(args)
    print(report_join(figures) if args.join else report(figures))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": {k: v for k, v in vars(args).items() if k != "api_key"}, **figures}, file, indent=1)
    if figures["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
