"""The two limits of the GPU at hand, measured: what its memory moves and what its tensor cores multiply.

`python -m actorserve.perf.limits [--json]`. Device copy of 4 GiB (bytes read plus written) and cuBLAS on random
bfloat16 matrices (8,192 cubed), the best of several. Benchmarks call `measured`, which runs this in a process of its
own, so that no CUDA context of theirs lies beside the engine's. Every share that they print is of these two figures.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable

from actorserve.models.floors import GPUS, Limits


@functools.cache
def measured() -> tuple[str, Limits]:
    """(the card's name, its limits); without a GPU those of an H200, so that formulas can be looked at."""
    command = [sys.executable, "-m", "actorserve.perf.limits", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["name"], Limits(found["bandwidth"], found["peak"])


def measure() -> tuple[str, Limits]:
    """`measured`, in this process."""
    import torch

    if not torch.cuda.is_available():
        limits = GPUS["h200"].limits
        assert limits is not None
        return "H200, as measured before", limits
    device = torch.device("cuda")
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    n = 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product = _seconds(lambda: torch.mm(a, b, out=out))
    return torch.cuda.get_device_name(device), Limits(2 * source.nbytes / copy, 2 * n**3 / product)


def _seconds(run: Callable[[], object]) -> float:
    """The best time of `run`, each over several launches."""
    import torch

    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 5e3)
    return min(times)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    name, limits = measure()
    if as_json:
        print(json.dumps({"name": name, "bandwidth": limits.bandwidth, "peak": limits.peak}))
    else:
        print(f"{name}: {limits.bandwidth / 1e12:.2f} TB/s, {limits.peak / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
