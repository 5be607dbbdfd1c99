"""Floors of a model on one GPU, from our own Spec; the reference that every GPU benchmark is printed beside.

    python -m actorserve.perf.roofline qwen2-7b                  # or another known shape, or a folder with config.json
    python -m actorserve.perf.roofline DIR --batch 1 32 --context 1024 --bandwidth 4.3 --tflops 790

The formulas are models/floors.py's; the limits are those of the GPU at hand, measured on the spot (limits.py), where
the flags do not say others. `workload_seconds` is the floor of a whole run: continuous batching that wastes nothing.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actorserve.errors import StartupError
from actorserve.models.families import spec_of
from actorserve.models.floors import (
    Limits,
    attention_seconds,
    decode_seconds,
    matmul_seconds,
    matmuls,
    prefill_flops,
    prefill_seconds,
    windows,
)
from actorserve.models.shapes import KNOWN
from actorserve.models.spec import Spec
from actorserve.perf.limits import measured


def spec_of_model(name: str) -> Spec:
    """The Spec of a known shape, or of a folder or config.json. Raises SystemExit for what is neither."""
    try:
        if name in KNOWN:
            return spec_of(KNOWN[name])
        path = Path(name)
        return spec_of(json.loads((path / "config.json" if path.is_dir() else path).read_bytes()))
    except (OSError, ValueError, StartupError) as error:
        raise SystemExit(f"{name}: neither a known shape ({', '.join(KNOWN)}) nor a config.json: {error}") from None


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Add --bandwidth, --tflops and --kv-bytes."""
    group = parser.add_argument_group("the GPU's limits", "measured where they are not given")
    group.add_argument("--bandwidth", type=float, metavar="TB/S", help="device memory")
    group.add_argument("--tflops", type=float, help="dense 16-bit matrix multiplication")
    group.add_argument("--kv-bytes", type=float, default=2.0, help="bytes of a key or value: 1 with an fp8 KV cache")


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits that the flags say, measured where they say nothing."""
    found = Limits(0, 0) if args.bandwidth and args.tflops else measured()[1]
    return Limits((args.bandwidth or 0) * 1e12 or found.bandwidth, (args.tflops or 0) * 1e12 or found.peak)


def told(limits: Limits) -> str:
    """The limits for people."""
    return f"limits: {limits.bandwidth / 1e12:.2f} TB/s, {limits.peak / 1e12:.0f} TFLOP/s"


def workload_seconds(
    spec: Spec, lengths: Sequence[tuple[int, int]], running: int, limits: Limits, kv_bytes: float = 2.0
) -> float:
    """Floor of serving requests of (prompt, output) tokens in turn, at most `running` at once.

    A request's prefill brings its first token; then each step is a decode of all that run, and who ends makes room
    for the next at once. Prefill and decode run one after another (`floors`).
    """
    waiting = deque(lengths)
    context, left = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    layers, matmul, seconds = windows(spec), dict[int, float](), 0.0
    while waiting or len(left):
        while waiting and len(left) < running:
            tokens, output = waiting.popleft()
            seconds += prefill_seconds(spec, tokens, limits)
            if output > 1:
                context, left = np.append(context, tokens), np.append(left, output - 1)
        if not len(left):
            continue
        context += 1
        left -= 1
        batch = len(left)
        if batch not in matmul:
            matmul[batch] = matmul_seconds(spec, batch, limits)
        visible = sum(n * int((context if w is None else np.minimum(context, w)).sum()) for w, n in layers.items())
        seconds += matmul[batch] + attention_seconds(spec, visible, limits, kv_bytes)
        if not left.all():
            context, left = context[left > 0], left[left > 0]
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="known shape, folder, or config.json")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    p.add_argument("--context", type=int, nargs="+", default=[512, 1024, 2048])
    p.add_argument("--prompt", type=int, nargs="+", default=[896, 1024, 8192])
    p.add_argument("--json", action="store_true")
    add_limit_flags(p)
    a = p.parse_args(arguments)
    spec, limits = spec_of_model(a.model), limits_of(a)
    decode = [
        {"batch": b, "context": c, "ms": 1e3 * decode_seconds(spec, b, c, limits, kv_bytes=a.kv_bytes)}
        for c in a.context
        for b in a.batch
    ]
    prefill = [
        {"tokens": n, "ms": 1e3 * prefill_seconds(spec, n, limits), "tflop": prefill_flops(spec, n) / 1e12}
        for n in a.prompt
    ]
    if a.json:
        json.dump({"decode": decode, "prefill": prefill}, sys.stdout)
        print()
        return
    read = 2 * sum(weights * times for weights, times in matmuls(spec)) / 1e9
    kv = spec.layers * spec.kv_parts * spec.kv_heads * spec.head_dim * a.kv_bytes / 1024
    print(f"{a.model}: {read:.2f} GB of weights read a step, {kv:.0f} KiB of KV a token; {told(limits)}")
    print(f"{'batch':>6} {'context':>8} {'ms/step':>8} {'tok/s':>9}")
    for row in decode:
        print(f"{row['batch']:>6} {row['context']:>8} {row['ms']:>8.3f} {1e3 * row['batch'] / row['ms']:>9,.0f}")
    for row in prefill:
        rate = 1e3 * row["tokens"] / row["ms"]
        print(f"prefill of {row['tokens']:,} tokens: {row['ms']:.2f} ms, {row['tflop']:.2f} TFLOP, {rate:,.0f} tok/s")


if __name__ == "__main__":
    main()
