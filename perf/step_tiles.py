"""Tiles and launches of a model's decode step, chosen in the step itself: what is fastest alone need not be so in it.

`python -m actorserve.perf.step_tiles [--shape qwen2-0.5b] [--batch 64] [--context 1024] [--seconds 90] [--workers 8]
[--fields num_hidden_layers=4]`. The whole step (perf/decode.py) is timed with one kernel of the layers changed at a
time, and the fastest kept; then again with each kernel's best few. Prints how a layer's time is spent before and after,
each kernel's best, and what to write into the tables. Other processes compile meanwhile.
"""

import argparse
import contextlib
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.models import gemm
from actorserve.models.decoder import LayerWeights
from actorserve.models.gemm import TritonLinear, choose
from actorserve.models.graphs import StepGraphs
from actorserve.models.layers import DenseMlp
from actorserve.models.triton_attention import Launch, TritonAttention, launch_for
from actorserve.models.weights import load_decoder
from actorserve.perf.decode import Bench
from actorserve.perf.gemm import short
from actorserve.perf.shapes import shape_folder
from actorserve.perf.step_candidates import CANDIDATES
from actorserve.sampler.params import SamplingParams

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=None, seed=0, ignore_eos=True)
STEPS = 24
KINDS: Final = ("qkv", "attention", "o", "gate_up", "down")
"""The kernels of a layer in their order."""
OF_LAYERS: Final = ("linear_kernel", "whole_kernel", "gated_kernel", "split_kernel", "decode")
"""What these are called; the head's is one of them."""
LIMIT: Final = 0.05
"""Largest relative difference of the logits to those of the first configuration; bfloat16 gives up to about 0.02."""
Choice = gemm.Choice | Launch


@dataclass
class Step:
    """A model's step, any kernel of which can be changed."""

    bench: Bench
    batch: int
    context: int
    now: dict[str, Choice] = field(default_factory=dict)
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        spec = self.bench.decoder.spec
        self.now["attention"] = launch_for(spec.head_dim, self.batch * spec.kv_heads)
        for kind, linears in self.linears().items():
            tile = choose(linears[0].choices, self.batch)
            assert tile is not None, f"no tile for {kind} at {self.batch} rows in the table"
            self.now[kind] = tile

    def linears(self) -> dict[str, list[TritonLinear]]:
        """The products of all layers, and the head's."""
        found: dict[str, list[TritonLinear]] = defaultdict(list)
        for layer in self.bench.decoder.weights.layers:
            for kind, linear in of_layer(layer).items():
                assert isinstance(linear, TritonLinear)
                found[kind].append(linear)
        head = self.bench.decoder.weights.head
        assert head is not None and isinstance(head.product, TritonLinear)
        return found | {"head": [head.product]}

    def use(self, kind: str, choice: Choice) -> None:
        """Run the step with this from now on."""
        self.now[kind] = choice
        if isinstance(choice, Launch):
            assert isinstance(self.bench.decoder.attention, TritonAttention)
            self.bench.decoder.attention._launch = choice
        else:
            for linear in self.linears()[kind]:
                linear.choices = ((self.batch, choice),)
        if self.bench.graphs is not None:
            stepper = self.bench.stepper
            self.bench.graphs = stepper.graphs = StepGraphs(stepper.runner, stepper.drawer, self.batch)

    def eager(self) -> Tensor:
        """One forward without a graph; its logits. Tokens, keys and values are the same each time, and not small."""
        rows, runner = self.bench.seat(self.batch, self.context, PARAMS), self.bench.runner
        torch.manual_seed(0)
        runner.kv.storage.normal_()
        runner.slots.last.copy_(torch.arange(len(runner.slots.last)))
        with torch.inference_mode():
            logits = runner.decode(runner.upload_rows(rows), None).logits
        runner.kv.storage.view(torch.uint8).random_(0, 32)
        return logits

    def wrong(self) -> str:
        """Why the logits are no good, or an empty string."""
        logits = self.eager()
        if self.logits is None:
            self.logits = logits.clone()
        off = ((logits - self.logits).norm() / self.logits.norm()).item()
        return "" if off < LIMIT else f"off by {off:.3f}"

    def microseconds(self, repeat: int = 3) -> float:
        runs = [self.bench.decode(self.batch, self.context, STEPS, PARAMS)["step_ms"] for _ in range(repeat)]
        return 1e3 * min(runs)


def of_layer(layer: LayerWeights) -> dict[str, Any]:
    assert isinstance(layer.mlp, DenseMlp)
    return {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.mlp.gate_up, "down": layer.mlp.down}


def spent(step: Step) -> str:
    """From one kernel's end to the next one's, by kind: the medians over layers and steps, in microseconds."""
    rows = step.bench.seat(step.batch, step.context, PARAMS)
    for _ in range(3):
        step.bench.stepper.launch(rows, [])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            step.bench.stepper.launch(rows, [])
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type.name == "CUDA"]
    events.sort(key=lambda e: e.time_range.end)
    layers, found = step.bench.decoder.spec.layers, defaultdict[str, list[float]](list)
    others: dict[str, float] = defaultdict(float)
    number = 0
    for before, event in zip([events[0], *events], events, strict=False):
        took = max(0.0, event.time_range.end - before.time_range.end)
        if event.name in OF_LAYERS:
            place = number % (len(KINDS) * layers + 1)
            found["head" if place == len(KINDS) * layers else KINDS[place % len(KINDS)]].append(took)
            number += 1
        else:
            others[event.name] += took / 4
    text = "  ".join(f"{kind} {statistics.median(times):.2f}" for kind, times in found.items())
    layer = sum(statistics.mean(found[kind]) for kind in KINDS)
    rest = ", ".join(f"{name[:28]} {us:.1f}" for name, us in sorted(others.items(), key=lambda i: -i[1])[:9])
    return f"layer {layer:.2f}: {text}\n    rest: {rest}"


def attempt(step: Step, kind: str, choice: Choice) -> tuple[float, str]:
    """(microseconds of the step with this choice, why it is no good)."""
    try:
        step.use(kind, choice)
        problem = step.wrong()
        return (float("inf"), problem) if problem else (step.microseconds(), "")
    except Exception as error:
        return float("inf"), f"{type(error).__name__}: {str(error)[:90]}"


def descend(step: Step, tried: dict[str, list[tuple[float, Choice]]], kinds: list[str], until: float) -> None:
    """Try each kind's candidates in turn and keep the fastest; `tried` gets what was measured."""
    for kind in kinds:
        before = step.now[kind]
        best, fastest = before, step.microseconds(5)
        first, done = fastest, [(fastest, before)]
        todo: list[Choice] = [c for _, c in tried[kind][:5]] if tried.get(kind) else [*CANDIDATES[kind]]
        for choice in todo:
            if choice == before or time.monotonic() > until:
                continue
            us, problem = attempt(step, kind, choice)
            if problem:
                print(f"    {kind} {short(choice)}: {problem}")
                continue
            done.append((us, choice))
            if us < fastest:
                best, fastest = choice, us
        step.use(kind, best)
        again = step.microseconds(5)
        if again > first:
            step.use(kind, before)
        tried[kind] = sorted(done, key=lambda item: item[0])
        print(f"{kind}: was {first:.1f} us, now {min(first, again):.1f}; {len(done)} tried", flush=True)
        for us, choice in tried[kind][:6]:
            print(f"    {us:7.1f}  {short(choice)}")
        print(f"    {spent(step).splitlines()[0]}", flush=True)


@contextlib.contextmanager
def compiling(args: argparse.Namespace) -> Iterator[None]:
    """Other processes that compile all candidates, which this one then finds in Triton's cache."""
    command = [sys.executable, "-m", "actorserve.perf.step_tiles", *sys.argv[1:], "--worker"]
    with contextlib.ExitStack() as stack:
        workers = []
        for i in range(args.workers):
            workers.append(subprocess.Popen([*command, str(i)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            stack.callback(workers[-1].kill)
        yield
        until = time.monotonic() + args.compile_seconds
        codes = []
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                codes.append(worker.wait(max(0.1, until - time.monotonic())))
        print(f"{codes.count(0)} of {len(workers)} compilers are done", flush=True)


def compile_share(step: Step, args: argparse.Namespace) -> None:
    """A worker's candidates."""
    work = [(kind, choice) for kind in args.only or CANDIDATES for choice in CANDIDATES[kind]]
    for kind, choice in work[args.worker :: args.workers]:
        before = step.now[kind]
        with contextlib.suppress(Exception):
            step.use(kind, choice)
            step.eager()
        step.use(kind, before)
    torch.cuda.synchronize()


def same_norms() -> None:
    """One kernel for whatever number of parts the sums of squares come in, so that kernels can be compiled ahead."""
    constants = gemm._epilogue_constants

    def padded(*arguments: Any) -> dict[str, Any]:
        found = constants(*arguments)
        return found | {"SQUARES": max(64, found["SQUARES"]) if found["SQUARES"] else 0}

    gemm._epilogue_constants = padded


def make(args: argparse.Namespace, folder: str) -> Step:
    """The model with dummy weights, a worker's with one layer."""
    fields = ["num_hidden_layers=1"] if args.worker is not None else args.fields
    model = shape_folder(args.shape, Path(folder), fields)
    config = EngineConfig(model=str(model), load_format="dummy", attention_backend="triton")
    decoder = load_decoder(str(model), config, lambda _: None)
    bench = Bench(decoder, config, args.batch, args.context + 2 * STEPS + 16, args.worker is None)
    return Step(bench, args.batch, args.context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--compile-seconds", type=float, default=45)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, help="kernels to change")
    parser.add_argument("--fields", nargs="*", default=[], help="KEY=JSON of config.json to change")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("perf.step_tiles needs a GPU")
    until = time.monotonic() + args.seconds
    same_norms()
    with contextlib.nullcontext() if args.worker is not None else compiling(args):
        with tempfile.TemporaryDirectory() as folder:
            step = make(args, folder)
        if args.worker is not None:
            compile_share(step, args)
            return
        step.wrong()
        step.microseconds()
        gc.freeze()
    print(f"first: {step.microseconds(5):.1f} us a step; {spent(step)}", flush=True)
    print(f"{until - time.monotonic():.0f} s left after compiling", flush=True)
    tried: dict[str, list[tuple[float, Choice]]] = {}
    kinds = args.only or list(CANDIDATES)
    for _ in range(2):
        descend(step, tried, kinds, until)
    print(f"last: {step.microseconds(5):.1f} us a step; {spent(step)}")
    for kind, choice in step.now.items():
        print(f"    {kind}: {short(choice)}")


if __name__ == "__main__":
    main()
