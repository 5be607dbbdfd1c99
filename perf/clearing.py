"""Decode steps with and without the memory that the GPU library clears before some of its GEMMs, in turns.

`python -m actorserve.perf.clearing [--shape qwen2-7b] [--batch 192 256] [--context 1024] [--rounds 12] [--json FILE]`.
Where the library's first choice of an algorithm clears counters of its workspace before its kernel, steps run its first
choice that does not. Here they run beside those with the first choice, of which graphs hold the kernel alone, if it was
seen to leave the counters clear (models/tuned_gemm.py). Printed: the products of which that is so, and milliseconds.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from actorserve.models.shapes import KNOWN
from actorserve.models.triton_ops import TritonOps
from actorserve.perf.decode import PAGE, Bench
from actorserve.perf.shapes import dummy_decoder
from actorserve.sampler.params import SamplingParams

STEPS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=KNOWN, default="qwen2-7b")
    parser.add_argument("--batch", type=int, nargs="*", default=[192, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    decoder, config = dummy_decoder(args.shape)
    assert isinstance(decoder.ops, TritonOps) and decoder.ops.tuned is not None
    tuned, params, found = decoder.ops.tuned, SamplingParams(max_new_tokens=None, seed=0, ignore_eos=True), []
    for batch in args.batch:
        benches, times = {}, {}
        for name in ("as it is", "alone"):
            tuned.alone = name == "alone"
            tuned.forget()
            benches[name] = Bench(decoder, config, batch, args.context + STEPS + PAGE, graphs=True)
            benches[name].decode(batch, args.context, STEPS, params)  # captures
            times[name] = []
        print(f"{batch} rows, alone: {', '.join(tuned.running_alone()) or 'none'}", flush=True)
        for _ in range(args.rounds):
            for name, bench in benches.items():
                times[name].append(bench.decode(batch, args.context, STEPS, params))
        row = {name: statistics.median(t["step_ms"] for t in of_name) for name, of_name in times.items()}
        host = {name: statistics.median(t["host_ms"] for t in of_name) for name, of_name in times.items()}
        print(", ".join(f"{name} {row[name]:.3f} ms ({host[name]:.2f} on the host)" for name in row))
        print(f"of the time: {row['alone'] / row['as it is']:.4f}", flush=True)
        found.append({"batch": batch, "step_ms": row, "host_ms": host, "alone": tuned.running_alone()})
        del benches, bench
        torch.cuda.empty_cache()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
