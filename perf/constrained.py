"""What jumping over forced tokens is worth: the paper's character pattern, on a CPU with the real model.

    python -m actorserve.perf.constrained [--model DIR] [--batch 8 1] [--rounds 2] [--quantization none]
        [--dtype bfloat16] [--json FILE]

So many requests at once, four ways in one run on the same machine: jumps on, jumps off (each token drawn under its
mask), with llguidance's masks from the host (--grammar-backend llguidance), and the same number of tokens without a
grammar. Rounds take turns, and the best of each way counts, so that a busy moment of the machine hits none alone.
Outputs with jumps on and off are compared token by token. Beside a step's time are what its forward took and, on our C
kernels, its floor: its linear maps alone, each reading its weights at the memory's full rate while it multiplies at the
cores' full rate. On a GPU a forward is only launched in that time. Target: jumps on are TARGET times as fast as both
others.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actorserve import Engine, SamplingParams
from actorserve.models.decoder import Decoder
from actorserve.models.embedded import embedded_model
from actorserve.models.quantized import KernelLinear
from actorserve.models.runner import ChunkWork
from actorserve.models.stepper import Step, Stepper
from actorserve.models.weights import linear_maps
from actorserve.perf.cpu_parts import limit_of, most_bytes, most_flops

WORDS = "[a-zA-Z0-9_ ]{1,16}"
CHARACTER = (
    r"\{\n"
    rf'    "name": "{WORDS}",\n'
    r'    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",\n'
    r'    "blood status": "(Pure-blood|Half-blood|Muggle-born)",\n'
    r'    "occupation": "(student|teacher|auror|ministry of magic|death eater|order of the phoenix)",\n'
    r'    "wand": \{\n'
    rf'        "wood": "{WORDS}",\n'
    rf'        "core": "{WORDS}",\n'
    r'        "length": [0-9]{1,2}\.[0-9]{0,2}\n'
    r"    \},\n"
    r'    "alive": "(Alive|Deceased)",\n'
    rf'    "patronus": "{WORDS}",\n'
    rf'    "bogart": "{WORDS}"\n'
    r"\}"
)
"""The regular expression of SGLang's first measurements (arXiv 2312.07104 and its repository), with ASCII words."""
NAMES = ("Harry Potter", "Hermione Granger", "Ron Weasley", "Draco Malfoy", "Luna Lovegood", "Severus Snape")
MAX_NEW_TOKENS = 300
TARGET = 2.5


class Watch:
    """What the executors' steps were since `clear`. They run in this process: placement is inline."""

    def __init__(self) -> None:
        self.decoder: Decoder | None = None
        self.rows: list[tuple[int, int]] = []
        """Of each step: tokens that went through the layers, and those of them that went through the head."""
        self.seconds = 0.0
        """Of all steps, from launch to results."""
        self.limits: tuple[float, float] | None = None
        """FLOP/s of float32, and bytes/s, of all threads."""

    def clear(self) -> None:
        self.rows, self.seconds = [], 0.0

    def launch(self, stepper: Stepper, decoding: np.ndarray, chunks: list[ChunkWork]) -> Step:
        start = time.perf_counter()
        step = LAUNCH(stepper, decoding, chunks)
        self.seconds += time.perf_counter() - start
        self.decoder = stepper.runner.decoder
        drawn = len(decoding) + sum(chunk.draws for chunk in chunks)
        self.rows.append((len(decoding) + sum(len(chunk.ids) for chunk in chunks), drawn))
        return step

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        """Let all steppers launch through this."""
        Stepper.launch = lambda *arguments: self.launch(*arguments)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            Stepper.launch = LAUNCH  # type: ignore[method-assign]

    def floor(self) -> float | None:
        """Seconds that the linear maps of the steps would take if each read its weights at the memory's full rate while
        it multiplied at the cores' full rate. None where they are not our C kernels'."""
        assert self.decoder is not None
        every = list(linear_maps(self.decoder.weights))
        maps = [linear for linear in every if isinstance(linear, KernelLinear)]
        if len(maps) < len(every):
            return None
        if self.limits is None:
            threads = torch.get_num_threads()
            self.limits = (most_flops() * 1e9 * threads, most_bytes(threads) * 1e9)
        weights = np.array([linear.outputs * linear.inputs for linear in maps])
        read = np.array([linear.weight.nbytes for linear in maps]) / self.limits[1]
        rows = np.array([[layers] * (len(maps) - 1) + [head] for layers, head in self.rows])
        flops = np.array([limit_of(linear, self.limits[0]) for linear in maps])
        return float(np.maximum(read, 2 * rows * weights / flops).sum())


LAUNCH = Stepper.launch


def prompts(batch: int) -> list[str]:
    """Return one question a request."""
    return [f"{NAMES[i % len(NAMES)]} is a character in Harry Potter. Facts about them:\n" for i in range(batch)]


def measure(engine: Any, watch: Watch, batch: int, seed: int, tokens: int | None) -> dict[str, Any]:
    """Run the batch; tokens: without a grammar, so many from each request."""
    watch.clear()
    before, started = engine.stats(), time.perf_counter()
    if tokens is None:
        params = SamplingParams(temperature=0.7, seed=seed, max_new_tokens=MAX_NEW_TOKENS)
        outputs = engine.generate(prompts(batch), params, regex=CHARACTER)
        assert all(re.fullmatch(CHARACTER, o.text) for o in outputs)
    else:
        params = SamplingParams(temperature=0.7, seed=seed, max_new_tokens=tokens, ignore_eos=True)
        outputs = engine.generate(prompts(batch), params)
    seconds = time.perf_counter() - started
    rows, forward = sum(layers for layers, _ in watch.rows), watch.seconds
    time.sleep(0.6)  # the scheduler's last report comes a few times a second
    total = sum(len(o.ids) for o in outputs)
    return {
        "tokens_per_s": total / seconds,
        "tokens": total,
        "forced_tokens": sum(o.forced_tokens for o in outputs),
        "jumps": sum(o.jumps for o in outputs),
        "steps": engine.stats().steps - before.steps,
        "rows": rows,
        "forward_s": forward,
        "floor_s": watch.floor(),
        "ids": [o.ids for o in outputs],
    }


def run(
    model: str, batches: list[int], rounds: int, quantization: str, dtype: str
) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the best round of each way, by batch."""
    options: dict[str, Any] = {
        "placement": "inline", "max_total_tokens": 16384, "grammar_seconds": 20.0, "quantization": quantization,
        "dtype": dtype,
    }  # fmt: skip
    with (
        Engine.sync(model, **options) as jumping,
        Engine.sync(model, **options, disable_jump_forward=True) as still,
        Engine.sync(model, **options, grammar_backend="llguidance") as guided,
        Watch().watching() as watch,
    ):
        return {batch: compare(jumping, still, guided, watch, batch, rounds) for batch in batches}


def compare(jumping: Any, still: Any, guided: Any, watch: Watch, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the best round of each way: engines with jumps, without, and with masks from the host."""
    best: dict[str, dict[str, Any]] = {}
    for engine in (jumping, still, guided):  # compiles, and fills the prefix cache
        measure(engine, watch, batch, 0, None)
    for number in range(rounds):
        results = {
            "jump on": measure(jumping, watch, batch, number, None),
            "jump off": measure(still, watch, batch, number, None),
            "llguidance": measure(guided, watch, batch, number, None),
        }
        results["free"] = measure(still, watch, batch, number, results["jump off"]["tokens"] // batch)
        plain = results["jump off"]["ids"]
        for result in results.values():
            result["same_ids"] = result.pop("ids") == plain
        for way, result in results.items():
            if way not in best or result["tokens_per_s"] > best[way]["tokens_per_s"]:
                best[way] = result
    return best


def show(batch: int, best: dict[str, dict[str, Any]]) -> None:
    """Print the figures of a batch."""
    print(f"batch {batch:4} {'tokens/s':>9} {'tokens':>7} {'forced':>7} {'jumps':>6} {'steps':>6} {'rows':>6} "
          f"{'ms a step':>10} {'forward':>8} {'floor':>6}")  # fmt: skip
    for way, r in best.items():
        times = [1e3 * s / r["steps"] for s in (r["tokens"] / r["tokens_per_s"], r["forward_s"], r["floor_s"] or 0.0)]
        counts = f"{r['tokens']:7} {r['forced_tokens']:7} {r['jumps']:6} {r['steps']:6} {r['rows']:6}"
        print(f"{way:10} {r['tokens_per_s']:9.1f} {counts} {times[0]:10.1f} {times[1]:8.1f} {times[2]:6.1f}")
    for way in ("jump off", "llguidance"):
        on, other = best["jump on"], best[way]
        parts = [f"{on['tokens_per_s'] / other['tokens_per_s']:.2f}x (target {TARGET:g})"]
        parts.append(f"fewer steps {other['steps'] / on['steps']:.2f}x")
        if on["floor_s"]:
            parts.append(f"by the floors {other['floor_s'] * on['tokens'] / on['floor_s'] / other['tokens']:.2f}x")
        print(f"jump on / {way}: {', '.join(parts)}")
    same = ", ".join(f"{way} {best[way]['same_ids']}" for way in ("jump on", "llguidance"))
    print(f"the ids of jump off: {same}", flush=True)


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quantization", default="auto", help="the engine's; none: weights in bfloat16 or float32")
    parser.add_argument("--dtype", default="auto", help="the engine's; bfloat16: inputs of products, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = run(args.model or embedded_model(), args.batch, args.rounds, args.quantization, args.dtype)
    for batch, best in found.items():
        show(batch, best)
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
