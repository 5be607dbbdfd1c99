"""The ledger's estimates beside what a GPU really takes: where the constants of models/ledger.py come from.

`python -m actorserve.perf.memory [--shape qwen2-7b] [--max-running-requests 256] [--chunked-prefill-size 8192]`.
Each row is measured as free memory of the device lost by one stage: CUDA and libraries, weights, the largest forward
(its peak, and what it leaves: kernels, workspaces), and all CUDA graphs of the commonest sampler mode.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from actorserve.actors.memory import largest_forward, measure_activation_peak
from actorserve.config import EngineConfig
from actorserve.models import ledger
from actorserve.models.floors import GIB
from actorserve.models.shapes import KNOWN, write_shape
from actorserve.models.weights import load_decoder
from actorserve.perf.decode import Bench

CONTEXT = 2048
"""Tokens of a slot in the pool that graphs are captured on."""


def used() -> int:
    """Bytes in use on the device, without what the allocator holds for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(config: EngineConfig, folder: str, slots: int) -> dict[str, tuple[int, int]]:
    """(estimated, measured) bytes by row."""
    before = used()
    torch.zeros(1, device="cuda")
    context = used() - before if before < 64 * ledger.MIB else used()
    decoder = load_decoder(folder, config, lambda fraction: None)
    weights = used() - before - context
    demand = ledger.demand_of(decoder.spec, config, str(decoder.dtype).removeprefix("torch."), CONTEXT)
    estimated = {row.name: row.bytes for row in ledger.estimate(demand)}
    at = used()
    peak = measure_activation_peak(largest_forward(config, decoder, slots), decoder.device)
    kept = used() - at
    bench = Bench(decoder, config, slots, CONTEXT, graphs=True)
    assert bench.graphs is not None
    at = used()
    while bench.graphs.capture_next():
        pass
    graphs = used() - at
    libraries = "CUDA context, libraries"
    return {
        libraries: (estimated[libraries], context + kept),
        "weights": (estimated["weights"], weights),
        "activations, logits": (estimated["activations"] + estimated["logits"], peak),
        "CUDA graphs, workspace": (estimated["CUDA graphs"] + estimated["attention workspace"], graphs),
    }


def main() -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="qwen2-7b", choices=KNOWN)
    p.add_argument("--max-running-requests", type=int, default=ledger.SLOTS["cuda"])
    p.add_argument("--chunked-prefill-size", type=int, default=ledger.CHUNK["cuda"])
    p.add_argument("--attention-backend", default="auto")
    a = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("perf.memory needs a GPU")
    config = EngineConfig(
        load_format="dummy", max_running_requests=a.max_running_requests, chunked_prefill_size=a.chunked_prefill_size,
        attention_backend=a.attention_backend,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(config, str(write_shape(a.shape, Path(scratch))), a.max_running_requests)
    total = torch.cuda.mem_get_info()[1]
    print(f"{a.shape}; the device has {total / GIB:.2f} GiB\n{'MiB':<24}{'estimated':>12}{'measured':>12}")
    for name, (estimate, measured) in rows.items():
        print(f"{name:<24}{estimate / ledger.MIB:>12,.0f}{measured / ledger.MIB:>12,.0f}")


if __name__ == "__main__":
    main()
