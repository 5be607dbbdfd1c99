"""The fused sampler on a GPU beside FlashInfer's, torch's argmax and torch's sort, and beside the floor.

`python -m actorserve.perf.sampler [--batch 128] [--vocab 152064] [--step-ms 6.7] [--only REGEX]`. Each figure is a CUDA
graph of launches over logits that rotate, so that they come from memory and not from the L2. The floor reads the
logits once. Ours is measured on bfloat16 and on float32 logits (the engine's); FlashInfer takes float32. Logits are
normal with a spread of 2.5, which is about a model's; `flat` are those of random weights, the worst case of filters.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actorserve.perf.layer import milliseconds
from actorserve.perf.roofline import add_limit_flags, limits_of, told
from actorserve.sampler.fused import FusedSampler
from actorserve.sampler.params import SamplingParams
from actorserve.sampler.state import SamplerState

ROTATED = 512 << 20
"""Bytes of logits that a graph goes through: several times the L2."""
SPREAD = {"peaked": 2.5, "flat": 0.02}
WORKLOADS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-k, top-p, min-p, penalties": {
        "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "presence_penalty": 0.1,
    },
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "with 5 logprobs": {"temperature": 0.8, "logprobs": 5},
}  # fmt: skip


class Bench:
    """Logits [copies, batch, vocab] of a dtype, and what to run over them."""

    def __init__(self, batch: int, vocab: int, dtype: torch.dtype, spread: float, repeat: int) -> None:
        self.batch, self.vocab, self.repeat = batch, vocab, repeat
        device = torch.device("cuda")
        copies = max(2, -(-ROTATED // (batch * vocab * dtype.itemsize)))
        self.logits = [(torch.randn(batch, vocab, device=device) * spread).to(dtype) for _ in range(copies)]

    def microseconds(self, run: Callable[[Tensor], object]) -> float:
        """Median time of `run` on one batch of logits."""

        def all_of_them() -> None:
            for logits in self.logits:
                run(logits)

        return 1e3 * milliseconds(all_of_them, self.repeat) / len(self.logits)

    def ours(self, **settings: Any) -> float:
        """The fused sampler with every row's parameters `settings`."""
        device = self.logits[0].device
        state = SamplerState(self.batch, self.vocab, (2,), device)
        fused = FusedSampler(state, self.batch)
        chance = np.random.default_rng(0)
        for slot in range(self.batch):
            prompt = chance.integers(0, self.vocab, 1024).astype(np.int32)
            output = chance.integers(0, self.vocab, 128).astype(np.int32)
            params = SamplingParams(seed=slot, max_new_tokens=None, **settings)
            state.admit(slot, params, prompt, output, len(prompt), len(output))
        slots = torch.arange(self.batch, dtype=torch.int32, device=device)
        mode = fused.mode_of(np.arange(self.batch))
        return self.microseconds(lambda logits: fused.draw(logits, slots, slots, mode))

    def theirs(self, run: Callable[[Tensor], object]) -> float | None:
        """A reference's time; None where it is not installed or does not take the dtype."""
        try:
            return self.microseconds(run)
        except (ImportError, RuntimeError, TypeError, ValueError):
            torch.cuda.synchronize()
            return None


def flashinfer_from_logits(logits: Tensor) -> Tensor:
    """One fused kernel, seeds from torch's generator."""
    import flashinfer.sampling as theirs

    return theirs.sampling_from_logits(logits)


def flashinfer_filtered(logits: Tensor) -> Tensor:
    """Softmax, then sampling by rejection."""
    import flashinfer.sampling as theirs

    return theirs.top_k_top_p_sampling_from_probs(torch.softmax(logits, -1), 50, 0.9)


REFERENCES: dict[str, Callable[[Tensor], object]] = {
    "torch argmax": lambda logits: logits.argmax(-1),
    "torch softmax + sort": lambda logits: torch.softmax(logits, -1).sort(-1, descending=True),
    "FlashInfer from logits": flashinfer_from_logits,
    "FlashInfer softmax, top-k, top-p": flashinfer_filtered,
}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table, printed as they come."""
    limits, rows = limits_of(args), []
    print(f"{torch.cuda.get_device_name()}, {told(limits)}; batch {args.batch}, vocabulary {args.vocab:,}")
    print(f"{'logits':<20}{'':<34}{'us':>8}{'floor':>8}{'of a step':>11}")
    for kind, spread in SPREAD.items():
        for dtype in (torch.bfloat16, torch.float32):
            title = f"{kind}, {str(dtype).removeprefix('torch.')}"
            names = [f"ours: {name}" for name in WORKLOADS] + ([*REFERENCES] if kind == "peaked" else [])
            names = [name for name in names if re.search(args.only, f"{title} {name}")]
            if not names:
                continue
            bench = Bench(args.batch, args.vocab, dtype, spread, args.repeat)
            floor = 1e6 * bench.logits[0].nbytes / limits.bandwidth
            for name in names:
                run = REFERENCES.get(name)
                if run is None:
                    us = bench.ours(**WORKLOADS[name.removeprefix("ours: ")])
                elif (us := bench.theirs(run)) is None:
                    continue
                share = us / (1e3 * args.step_ms)
                print(f"{title:<20}{name:<34}{us:>8.1f}{floor:>8.1f}{share:>10.2%}", flush=True)
                rows.append({"logits": title, "name": name, "us": us, "floor_us": floor})
            del bench
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--step-ms", type=float, default=6.7, help="a decode step of this batch, for the share of it")
    parser.add_argument("--only", default="", help="regular expression: which rows of the table")
    parser.add_argument("--json", help="write the figures to this file")
    add_limit_flags(parser)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("perf.sampler needs a GPU; perf.text measures the CPU's")
    with torch.inference_mode():
        rows = measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
