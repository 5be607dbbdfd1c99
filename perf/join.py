"""A request joins while others decode: its time to first token, and what the others notice. `perf.serve --join`.

N streams decode steadily; after a while one request comes every --join-every seconds. The streams run in client
processes of their own and are dropped at the end. Figures: the joiners' TTFT; the streams' ITL (gap between two
events) in the quiet time before and while requests join.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from actorserve.models.floors import prefill_seconds
from actorserve.perf.clients import Job, Result, split, work_in_processes
from actorserve.perf.figures import gaps, statistics
from actorserve.perf.roofline import limits_of, spec_of_model
from actorserve.perf.stream_client import Record

STREAMS = 127
OUTPUT = 8192
TAIL = 0.5
"""Seconds for which the streams go on after the last joiner's turn."""


def add_join_flags(parser: argparse.ArgumentParser) -> None:
    """Add --join and what belongs to it."""
    group = parser.add_argument_group("--join", "one request after another joins --max-concurrency running streams")
    group.add_argument("--join", action="store_true", help=f"measure that (default: {STREAMS} streams)")
    group.add_argument("--join-input-len", type=int, default=1024, help="prompt tokens of one that joins")
    group.add_argument("--join-output-len", type=int, default=16)
    group.add_argument("--join-count", type=int, default=10)
    group.add_argument("--join-every", type=float, default=1.0, help="seconds between two")
    group.add_argument("--join-settle", type=float, default=5.0, help="seconds before the first")


def workloads(args: argparse.Namespace) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The flags of the streams and those of the joiners, each as of a run of its own."""
    streams = args.max_concurrency or STREAMS
    common = {"request_rate": None, "shared_prefix_len": 0, "random_range_ratio": 1.0}
    output = OUTPUT if args.random_output_len is None else args.random_output_len
    many = common | {"num_prompts": streams, "max_concurrency": streams, "random_output_len": output}
    few = common | {"num_prompts": args.join_count, "max_concurrency": args.join_count, "seed": args.seed + 7}
    few |= {"random_input_len": args.join_input_len, "random_output_len": args.join_output_len}
    given = vars(args)
    return argparse.Namespace(**given | many), argparse.Namespace(**given | few)


def run_join(args: argparse.Namespace, model: str, plan: Callable[[argparse.Namespace, str], Job]) -> dict[str, Any]:
    """Run it and return the figures. Raises SystemExit when the streams were not all decoding throughout."""
    many, few = workloads(args)
    first, last = args.join_settle, args.join_settle + args.join_every * args.join_count
    streams = msgspec.structs.replace(plan(many, model), stop=last + TAIL)
    offsets = [first + i * args.join_every for i in range(args.join_count)]
    joiners = msgspec.structs.replace(plan(few, model), offsets=offsets)
    results = work_in_processes([*split(streams, args.client_processes), joiners])
    return summarize_join(results[:-1], results[-1], args)


def summarize_join(streams: Sequence[Result], joiners: Result, args: argparse.Namespace) -> dict[str, Any]:
    """All figures; times are seconds on the common clock."""
    running = [r for result in streams for r in result.records]
    joined = sorted(joiners.records, key=lambda r: r.start)
    errors = sorted({str(r.error) for r in [*running, *joined] if r.error is not None})
    begin, end = joined[0].start, max(r.end for r in joined)
    _check(running, begin, end, errors)
    since = max(r.times[0] for r in running)
    figures: dict[str, Any] = {
        "streams": len(running),
        "joined": len(joined),
        "join_input_len": args.join_input_len,
        "stream_context": sum(r.prompt_tokens + _count(r) for r in running) / len(running),
        "errors": errors,
        "failed": sum(r.error is not None for r in joined),
        "client_cpu_share": max(r.cpu_seconds for r in [*streams, joiners]) / (end - min(r.start for r in running)),
    }
    good = [r for r in joined if r.error is None]
    figures |= statistics("join_ttft", [r.times[0] - r.start for r in good])
    figures |= statistics("quiet_itl", [gap for r in running for gap in gaps(r, since, begin)])
    figures |= statistics("joining_itl", [gap for r in running for gap in gaps(r, begin, end)])
    if "p99_joining_itl_ms" in figures:
        figures["itl_p99_over_p50"] = figures["p99_joining_itl_ms"] / figures["p50_joining_itl_ms"]
    if args.shape:
        floor = prefill_seconds(spec_of_model(args.shape), args.join_input_len, limits_of(args))
        figures["join_prefill_floor_ms"] = 1e3 * floor
    return figures


def _count(record: Record) -> int:
    return record.counts[-1] if record.counts else len(record.times)


def _check(running: Sequence[Record], begin: float, end: float, errors: Sequence[str]) -> None:
    """Complain about streams that were not there all the time."""
    why = f" ({errors[0]})" if errors else ""
    silent = sum(not r.times or r.times[0] > begin for r in running)
    if silent:
        raise SystemExit(f"streams without a token when the first request joined: {silent}; raise --join-settle{why}")
    over = sum(r.times[-1] < end for r in running)
    if over:
        raise SystemExit(f"streams that ended before the last joiner: {over}; raise --random-output-len{why}")


def report_join(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    lines = [
        f"{figures['joined']} requests of {figures['join_input_len']:,} tokens joined {figures['streams']} streams, "
        f"whose context was {figures['stream_context']:,.0f} at the end",
        f"{'ms':<26}" + "".join(f"{c:>12}" for c in ("mean", "p50", "p90", "p99")),
    ]
    titles = {"join_ttft": "TTFT of who joins", "quiet_itl": "ITL before", "joining_itl": "ITL while they join"}
    for name, title in titles.items():
        if f"mean_{name}_ms" in figures:
            values = [figures[f"{c}_{name}_ms"] for c in ("mean", "p50", "p90", "p99")]
            lines.append(f"{title:<26}" + "".join(f"{value:>12,.2f}" for value in values))
    if "itl_p99_over_p50" in figures:
        lines.append(f"ITL p99 / p50 while they join: {figures['itl_p99_over_p50']:.2f}")
    if "join_prefill_floor_ms" in figures:
        lines.append(f"floor of their prefill: {figures['join_prefill_floor_ms']:.2f} ms")
    lines += [f"ERROR {error}" for error in figures["errors"]]
    if figures["client_cpu_share"] > 0.6:
        lines.append(f"NOTE a client process used {figures['client_cpu_share']:.0%} of a core: raise --clients")
    return "\n".join(lines)
