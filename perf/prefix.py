"""What the radix cache saves: requests that share a long prefix, with the cache and without, in one run.

    python -m actorserve.perf.prefix [--requests 64] [--prefix 1000] [--model DIR] [--json FILE]

All requests are sent at once. Printed: time to first token, prefilled tokens (from /metrics) beside the number of
different tokens there are, which is the least that any cache can prefill.
"""

import argparse
import os
from pathlib import Path

import httpx
import msgspec

from actorserve.models.embedded import embedded_model
from actorserve.perf.engines import load, our_server


def prefilled(url: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("actorserve_prefilled_tokens_total ")))


def measure(model: str, a: argparse.Namespace, scratch: Path, *flags: str) -> dict[str, float]:
    with our_server(model, *flags) as url:
        load(url, 1, 4, 8, scratch)
        before = prefilled(url)
        shared = ("--shared-prefix-len", str(a.prefix), "--vocab-size", "40000", "--num-prompts", str(a.requests))
        shared += ("--warmup-requests", "0")
        result = load(url, a.requests, a.tokens, a.unique, scratch, *shared)
        return {**result, "prefilled_tokens": prefilled(url) - before}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--prefix", type=int, default=1000)
    p.add_argument("--unique", type=int, default=16)
    p.add_argument("--tokens", type=int, default=4)
    p.add_argument("--model")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    model = a.model or embedded_model()
    scratch = Path(f"/tmp/actorserve-perf-{os.getpid()}.json")
    try:
        on = measure(model, a, scratch)
        off = measure(model, a, scratch, "--disable-radix-cache")
    finally:
        scratch.unlink(missing_ok=True)
    least = a.prefix + a.requests * a.unique
    print(f"{a.requests} requests at once, {a.prefix} shared and {a.unique} own prompt tokens each")
    print(f"{'':>12} {'TTFT p50 ms':>12} {'TTFT p99 ms':>12} {'prefilled':>10} {'/ different tokens':>19}")
    for name, r in (("cache", on), ("no cache", off)):
        print(
            f"{name:>12} {r['median_ttft_ms']:>12.0f} {r['p99_ttft_ms']:>12.0f} {r['prefilled_tokens']:>10.0f} "
            f"{r['prefilled_tokens'] / least:>19.3f}"
        )
    print(f"TTFT p50 is {off['median_ttft_ms'] / on['median_ttft_ms']:.1f} times better with the cache")
    if a.json:
        a.json.write_bytes(msgspec.json.encode({"cache": on, "no_cache": off}))


if __name__ == "__main__":
    main()
