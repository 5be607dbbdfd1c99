"""From the records of a load to its figures, under the names of the peers' benchmark clients. Used by serve.py.

Definitions are those of vLLM's `bench serve` (SGLang's agree): TTFT is the first event with visible output, from the
start of the request; ITL the gap between two events with output (an event may bring several tokens: see
tokens_per_event); TPOT (e2el - ttft) / (output tokens - 1); e2el the last event of the choice. Latencies also bear
SGLang's name e2e_latency. Tokens are the server's own counts.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from actorserve.models.floors import Limits, decode_seconds
from actorserve.models.spec import Spec
from actorserve.perf.roofline import workload_seconds
from actorserve.perf.stream_client import Record

METRICS = ("ttft", "tpot", "itl", "e2el")


def peak_concurrency(records: Sequence[Record]) -> int:
    """Return the most requests that were under way at one time; one that ends as another starts does not count."""
    edges = sorted(edge for r in records for edge in ((r.start, 1), (r.end, -1)))
    return int(np.cumsum([step for _, step in edges]).max(initial=0))


def statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return {mean,median,std,p50,p90,p95,p99}_`name`_ms; empty without samples."""
    if not len(seconds):
        return {}
    ms = np.asarray(seconds) * 1e3
    values = {"mean": ms.mean(), "median": np.median(ms), "std": ms.std()}
    values |= {f"p{q}": np.percentile(ms, q) for q in (50, 90, 95, 99)}
    return {f"{key}_{name}_ms": float(value) for key, value in values.items()}


def tokens_by(record: Record, time: float) -> float:
    """Output tokens of a request that had arrived by `time`; evenly over its events where the server gave no counts."""
    events = bisect_right(record.times, time)
    if not events:
        return 0.0
    if record.counts:
        return record.counts[events - 1]
    return record.completion_tokens * events / len(record.times)


def gaps(record: Record, since: float = 0.0, until: float = float("inf")) -> list[float]:
    """Seconds between a request's events with output, of those that lie between two times."""
    times = [t for t in record.times if since <= t <= until]
    return [later - earlier for earlier, later in pairwise(times)]


def most_per_second(records: Sequence[Record], begin: float, duration: float) -> float:
    """The most output tokens that arrived in one second of the run."""
    times = [t - begin for r in records for t in r.times]
    tokens: list[float] = []
    for r in records:
        counts: Sequence[float] = r.counts or np.linspace(0, r.completion_tokens, len(r.times) + 1)[1:]
        tokens += np.diff(counts, prepend=0).tolist()
    histogram, _ = np.histogram(times, bins=np.arange(0, int(duration) + 2), weights=tokens)
    return float(histogram.max(initial=0))


def steady(records: Sequence[Record]) -> dict[str, float]:
    """The time in which every request was decoding, from the last first token to the first end; empty if none is.

    Only a run that starts all its requests at once has it. The context is the mean over requests and that time.
    """
    if not records:
        return {}
    begin, end = max(r.times[0] for r in records), min(r.times[-1] for r in records)
    before, after = (sum(tokens_by(r, t) for r in records) for t in (begin, end))
    if end <= begin or after <= before:
        return {}
    seconds, streams = end - begin, len(records)
    return {
        "steady_seconds": seconds,
        "steady_streams": streams,
        "steady_output_throughput": (after - before) / seconds,
        "steady_step_ms": 1e3 * seconds * streams / (after - before),
        "steady_context": (sum(r.prompt_tokens for r in records) + (before + after) / 2) / streams,
    }


def summarize(records: Sequence[Record], goodput: dict[str, float] | None = None) -> dict[str, Any]:
    """Return all figures of a run. `goodput`: the most milliseconds of ttft, tpot, e2el that a good request takes."""
    good = [r for r in records if r.error is None]
    failed = [r for r in records if r.error is not None]
    begin = min(r.start for r in records)
    duration = max(r.end for r in records) - begin
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
        "input_throughput": tokens_in / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": most_per_second(good, begin, duration),
        "max_concurrent_requests": peak_concurrency(records),
        "concurrency": sum(e2el) / duration,
        "tokens_per_event": tokens_out / events if events else 0.0,
        "short_outputs": sum(r.completion_tokens != r.wanted_tokens for r in good),
        "errors": sorted({str(r.error) for r in failed})[:10],
    }
    figures |= steady(good)
    samples = {
        "ttft": ttft,
        "tpot": [t for t, r in zip(tpot, good, strict=True) if r.completion_tokens > 1],
        "itl": [gap for r in good for gap in gaps(r)],
        "e2el": e2el,
    }
    for name in METRICS:
        figures |= statistics(name, samples[name])
    figures |= statistics("e2e_latency", e2el)
    if goodput:
        values = {"ttft": ttft, "tpot": tpot, "e2el": e2el}
        met = np.all([np.asarray(values[name]) * 1e3 <= limit for name, limit in goodput.items()], axis=0)
        figures["request_goodput"] = float(met.sum()) / duration
    return figures


def add_floors(figures: dict[str, Any], records: Sequence[Record], spec: Spec, limits: Limits, kv_bytes: float) -> None:
    """Add the floors of the same run: of all of it, with as many running as there were, and of its steady steps."""
    lengths = [(r.prompt_tokens, r.completion_tokens) for r in records if r.error is None]
    floor = workload_seconds(spec, lengths, max(1, figures["max_concurrent_requests"]), limits, kv_bytes)
    figures |= {"floor_seconds": floor, "share_of_floor": floor / figures["duration"]}
    if "steady_step_ms" in figures:
        streams, context = int(figures["steady_streams"]), round(figures["steady_context"])
        ms = 1e3 * decode_seconds(spec, streams, context, limits, kv_bytes=kv_bytes)
        figures |= {"steady_floor_step_ms": ms, "steady_share_of_floor": ms / figures["steady_step_ms"]}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    latencies = tuple(f"_{name}_ms" for name in (*METRICS, "e2e_latency"))
    plain = [k for k, v in figures.items() if isinstance(v, int | float) and not k.endswith(latencies)]
    lines = [f"{name:<26}{figures[name]:>14,.3f}".removesuffix(".000") for name in plain]
    columns = ("mean", "p50", "p90", "p99")
    lines.append(f"{'ms':<26}" + "".join(f"{c:>12}" for c in columns))
    for name in METRICS:
        if f"mean_{name}_ms" in figures:
            lines.append(f"{name:<26}" + "".join(f"{figures[f'{c}_{name}_ms']:>12,.2f}" for c in columns))
    if figures.get("cpu_shares"):
        shares = "  ".join(f"{name} {share:.2f}" for name, share in figures["cpu_shares"].items())
        lines.append(f"cores used by the server: {shares}")
    lines += [f"ERROR {error}" for error in figures["errors"]]
    if figures["short_outputs"]:
        lines.append(f"NOTE {figures['short_outputs']} replies have another length than asked")
    if figures["client_cpu_share"] > 0.6:
        lines.append(f"NOTE a client process used {figures['client_cpu_share']:.0%} of a core: raise --clients")
    return "\n".join(lines)
