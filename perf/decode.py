"""Decode steps and prefill on a GPU against the physical floor: the executor's stepper, without the engine around it.

`python -m actorserve.perf.decode [--shape qwen2-7b | --model FOLDER] [--batch 1 32 128 256] [--context 1024]
[--prefill 896] [--chunk 384] [--dtype float32] [--quantization none w4a16 fp8] [--tiles FILE] [--constrained]
[--no-graph] [--attention-backend triton] [--trace] [--json FILE]`. Dummy weights of the shape unless a folder is given;
with several kinds of --quantization they are measured one after another, and compared with the first at the end. A step
is forward, draw and advance, at temperature 1 unless said; floors are those of models/floors.py. With `--tp-size N` the
same on N GPUs, each rank a process; floors are of a rank's part, without what the ranks tell each other.
"""

import argparse
import contextlib
import gc
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.models.decoder import Decoder
from actorserve.models.flashinfer_build import when_compiled
from actorserve.models.floors import Limits, decode_seconds, prefill_seconds, visited
from actorserve.models.graphs import StepGraphs
from actorserve.models.group import DistributedGroup
from actorserve.models.kv_cache import KVCache, kv_dtype
from actorserve.models.ledger import quantized_bytes
from actorserve.models.moe import route
from actorserve.models.packed_tiles import PACKED
from actorserve.models.parallel import RankDrawer
from actorserve.models.quantization import quantization_of
from actorserve.models.runner import ChunkWork, Runner
from actorserve.models.shapes import write_shape
from actorserve.models.stepper import Stepper
from actorserve.models.weights import load_decoder, pick_device
from actorserve.perf.gemm import packed_table
from actorserve.perf.roofline import add_limit_flags, limits_of, told
from actorserve.sampler.drawer import Drawer
from actorserve.sampler.grammar import END, NONE
from actorserve.sampler.params import SamplingParams
from actorserve.sampler.state import SamplerState

PAGE = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT8 = {"weights": {"num_bits": 8, "strategy": "channel"}, "targets": ["Linear"]}
QUANTIZED: dict[str, dict[str, Any]] = {
    "none": {},
    "w4a16": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "w8a16": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"all": INT8}},
    "fp8": FP8,
    "fp8-block": FP8 | {"weight_block_size": [128, 128]},
}
"""quantization_config of each kind of dummy weights."""
FAR = 1 << 30
STATES, CLASSES = 512, 256
"""Of the grammar of constrained rows: those of a JSON schema with a dozen fields."""


class Bench:
    """A stepper with `slots` slots of `tokens` tokens each."""

    def __init__(self, decoder: Decoder, config: EngineConfig, slots: int, tokens: int, graphs: bool) -> None:
        self.decoder = decoder
        self.pages = -(-tokens // PAGE)
        dtype = kv_dtype(config, decoder.dtype)
        kv = KVCache(decoder.spec, slots * self.pages + 1, PAGE, decoder.device, dtype, decoder.dtype)
        kv.storage.view(torch.uint8).random_(0, 32)  # small numbers, not zeros, which run faster
        self.runner = Runner(decoder, kv, slots, self.pages)
        vocab, group = decoder.whole.vocab, decoder.group
        self.state = SamplerState(slots, vocab, (), decoder.device)
        drawer: Drawer | RankDrawer = Drawer(self.state, slots)
        if group is not None:
            drawer = RankDrawer(drawer if group.rank == 0 else None, group)
        self.graphs = StepGraphs(self.runner, drawer, slots) if graphs else None
        self.stepper = Stepper(self.runner, drawer, self.graphs)
        self.eager = Stepper(self.runner, drawer, None)
        self.order = np.random.default_rng(0).permutation(slots * self.pages).astype(np.int32)
        self.state.load_grammar(0, *endless_grammar(vocab))

    @torch.inference_mode()
    def seat(self, batch: int, length: int, params: SamplingParams, grammar: int = NONE) -> np.ndarray:
        """Seat `batch` sequences of `length` tokens in random pages, which follow a grammar; returns their slots."""
        none = np.empty(0, dtype=np.int32)
        for slot in range(batch):
            self.runner.admit(slot, self.order[slot * self.pages : (slot + 1) * self.pages], length, FAR)
            own = replace(params, seed=slot)  # rows that draw the same tokens would visit the same experts
            self.state.admit(slot, own, none, none, length, 0, grammar)
        self.runner.slots.flush()
        return np.arange(batch)

    def decode(
        self, batch: int, context: int, steps: int, params: SamplingParams, chunk: int = 0, grammar: int = NONE
    ) -> dict[str, float]:
        """Time `steps` steps around `context`, each beside a prompt of `chunk` tokens if that is not 0.

        Returns milliseconds on the device and on the host.
        """
        rows = self.seat(batch + bool(chunk), context - steps // 2, params, grammar)[:batch]
        chunks = [ChunkWork(batch, 0, np.arange(chunk), True)] if chunk else []
        for _ in range(3):
            self.stepper.launch(rows, chunks)
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        start = time.perf_counter()
        for _ in range(steps):
            self.stepper.launch(rows, chunks)
        host = time.perf_counter() - start
        last.record()
        torch.cuda.synchronize()
        return {"step_ms": first.elapsed_time(last) / steps, "host_ms": 1e3 * host / steps}

    def visited(self, batch: int, context: int, params: SamplingParams) -> float:
        """Experts of a layer that `batch` rows visit in a step, on average; 0 without experts."""
        ops, moe, counts = self.decoder.ops, self.decoder.spec.moe, []
        if moe is None:
            return 0.0
        experts = ops.experts

        def counting(x: Tensor, router: Tensor, bias: Tensor | None, *rest: Any) -> Tensor | None:
            counts.append(len(route(F.linear(x.float(), router), bias, moe)[1].unique()))
            return experts(x, router, bias, *rest)

        rows = self.seat(batch, context, params)
        for _ in range(3):
            self.stepper.launch(rows, [])
        ops.experts = counting  # type: ignore[method-assign]
        try:
            self.eager.launch(rows, [])
        finally:
            ops.experts = experts  # type: ignore[method-assign]
        return float(np.mean(counts))

    def prefill(self, prompt: int, prompts: int, times: int, params: SamplingParams) -> float:
        """Seconds of one forward over `prompts` prompts of `prompt` tokens, on an executor that had time to prepare."""
        while self.decoder.ops.tune_ahead():
            pass
        when_compiled(self.decoder.attention)
        ids = np.random.default_rng(1).integers(0, self.decoder.whole.vocab, (prompts, prompt)).astype(np.int32)
        seconds = []
        for _ in range(times + 1):
            self.seat(prompts, 0, params)
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.stepper.launch(np.empty(0, dtype=np.int64), [ChunkWork(i, 0, ids[i], True) for i in range(prompts)])
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[1:]))


def endless_grammar(vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tables (sampler/grammar.py) in which each state allows half the tokens and none ends the output."""
    rng = np.random.default_rng(2)
    token_class = rng.integers(END + 1, CLASSES, vocab).astype(np.uint16)
    transitions = rng.integers(0, STATES, (STATES, CLASSES)).astype(np.int16)
    transitions[rng.random(transitions.shape) < 0.5] = -1
    transitions[:, : END + 1] = -1
    return token_class, transitions, np.full(STATES, -1, np.int32)


def trace(
    bench: Bench, batch: int, context: int, steps: int, params: SamplingParams, grammar: int = NONE
) -> list[tuple[str, float, float]]:
    """Return (kernel, launches a step, microseconds a step) of a steady window, and the idle time between kernels."""
    rows = bench.seat(batch, context - steps // 2, params, grammar)
    for _ in range(3):
        bench.stepper.launch(rows, [])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            bench.stepper.launch(rows, [])
        torch.cuda.synchronize()
    events = sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        sums[event.name][0] += 1 / steps
        sums[event.name][1] += event.time_range.elapsed_us() / steps
    span = (max(e.time_range.end for e in events) - events[0].time_range.start) / steps
    busy, reach = 0.0, 0.0
    for e in events:  # overlapping kernels count once
        busy += max(0.0, e.time_range.end - max(e.time_range.start, reach))
        reach = max(reach, e.time_range.end)
    table = [(name, count, us) for name, (count, us) in sorted(sums.items(), key=lambda item: -item[1][1])]
    return [*table, ("(between kernels)", 0.0, span - busy / steps), ("(step)", 1.0, span)]


@contextlib.contextmanager
def ranks(args: argparse.Namespace) -> Iterator[DistributedGroup | None]:
    """The group of --tp-size processes that do the same, started by the first; None for one."""
    if args.tp_size == 1:
        yield None
        return
    device = pick_device("cuda", args.rank, args.tp_size)
    torch.cuda.set_device(device)
    if args.rank:
        yield DistributedGroup(args.meeting, args.rank, args.tp_size, device)
        return
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as meeting:
        place = meeting.fileno()
        for rank in range(1, args.tp_size):
            command = [sys.executable, "-m", "actorserve.perf.decode", *sys.argv[1:], "--rank", str(rank)]
            command += ["--meeting", str(place), "--bandwidth", "1", "--tflops", "1"]  # it prints nothing
            follower = subprocess.Popen(command, pass_fds=[place], stdout=subprocess.DEVNULL)
            stack.callback(follower.kill)
        yield DistributedGroup(place, 0, args.tp_size, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-7b")
    parser.add_argument("--model", help="folder with config.json and weights instead of a dummy shape")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=0, help="also time prompts of this many tokens")
    parser.add_argument("--chunk", type=int, default=0, help="also time steps beside a prompt of this many tokens")
    parser.add_argument("--constrained", action="store_true", help="also time steps whose rows all follow a grammar")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="tokens in one forward")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", nargs="+", choices=QUANTIZED, default=["none"], help="of dummy weights")
    parser.add_argument("--tiles", nargs="*", default=[], help="tiles for quantized weights: JSONs of perf.gemm")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--trace", action="store_true", help="print what a step is made of")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--tp-size", "--tp", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=int, help=argparse.SUPPRESS)
    add_limit_flags(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("perf.decode needs a GPU; perf.cpu is the CPU's")
    if args.rank:
        torch.cuda.set_device(args.rank)
    limits = limits_of(args)
    print(f"{torch.cuda.get_device_name()}, {told(limits)}")
    for path in args.tiles:
        PACKED.update(packed_table(json.loads(Path(path).read_text())["results"]))
    results = []
    with ranks(args) as group:
        for kind in args.quantization:
            results.append({"quantization": kind} | one_kind(kind, limits, args, group))
            gc.collect()
            torch.cuda.empty_cache()
    for result in results[1:]:
        print(compared(results[0], result))
    if args.json and not args.rank:
        Path(args.json).write_text(json.dumps(results[0] if len(results) == 1 else results, indent=1) + "\n")


def one_kind(kind: str, limits: Limits, args: argparse.Namespace, group: DistributedGroup | None) -> dict[str, Any]:
    """Load a model, or a rank's part of it, and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(args.model or write_shape(args.shape, Path(folder)))
        facts = json.loads((model / "config.json").read_text())
        if QUANTIZED[kind] and not args.model:
            facts["quantization_config"] = QUANTIZED[kind]
            (model / "config.json").write_text(json.dumps(facts))
        config = EngineConfig(
            model=str(model), load_format="auto" if args.model else "dummy", attention_backend=args.attention_backend,
            dtype=args.dtype, kv_cache_dtype=args.kv_cache_dtype, tp_size=args.tp_size,
        )  # fmt: skip
        started = time.perf_counter()
        decoder = load_decoder(str(model), config, lambda _: None, None, group, None if group is None else group.device)
        torch.cuda.synchronize()
        seconds, size = time.perf_counter() - started, torch.cuda.memory_allocated() / 2**30
        print(f"{args.shape}, quantization {kind}: {size:.1f} GiB of weights in {seconds:.1f} s")
    rules = quantization_of(facts)
    return measure(decoder, config, limits, args, quantized_bytes(decoder.spec, rules and rules.usual))


def compared(first: dict[str, Any], other: dict[str, Any]) -> str:
    """How many times as fast as the first another kind is."""
    steps = zip(first["decode"], other["decode"], strict=True)
    text = [f"batch {a['batch']}: {a['step_ms'] / b['step_ms']:.2f}x" for a, b in steps]
    prefills = zip(first["prefill"], other["prefill"], strict=True)
    text += [f"prefill: {a['seconds'] / b['seconds']:.2f}x" for a, b in prefills]
    return f"{other['quantization']} against {first['quantization']}: {', '.join(text)}"


def measure(
    decoder: Decoder, config: EngineConfig, limits: Limits, args: argparse.Namespace, quantized: float | None
) -> dict[str, Any]:
    """All figures of a model; `quantized`: bytes of a weight of its layers, None: as many as of the others."""
    params = SamplingParams(temperature=args.temperature, max_new_tokens=None, seed=0, ignore_eos=True)
    spec, results = (
        decoder.spec,
        {"shape": args.shape, "context": args.context, "limits": told(limits), "decode": [], "prefill": []},
    )
    tokens = args.context + 2 * args.steps + 16
    prompts = max(1, args.prefill_tokens // args.prefill) if args.prefill else 0
    slots = max([*(batch + bool(args.chunk) for batch in args.batch), prompts])
    bench = Bench(decoder, config, slots, max(tokens, args.prefill), not args.no_graph)
    weight_bytes, kv_bytes = (float(t.dtype.itemsize) for t in (decoder.weights.embed, bench.runner.kv.storage))
    if args.prefill:
        seconds = bench.prefill(args.prefill, prompts, 4, params)
        floor = prompts * prefill_seconds(spec, args.prefill, limits)
        print(
            f"prefill of {prompts} x {args.prefill} tokens: {1e3 * seconds:.1f} ms, "
            f"{prompts * args.prefill / seconds:.0f} tok/s, {floor / seconds:.3f} of the limit"
        )
        results["prefill"] = [
            {"prompt": args.prefill, "prompts": prompts, "seconds": seconds, "share": floor / seconds}
        ]
    print(f"{'batch':>6} {'step ms':>8} {'host ms':>8} {'floor ms':>9} {'share':>6} {'tok/s':>9}")
    for batch in args.batch:
        runs = [bench.decode(batch, args.context, args.steps, params) for _ in range(args.repeat)]
        best = sorted(runs, key=lambda run: run["step_ms"])[len(runs) // 2]
        floor = 1e3 * decode_seconds(spec, batch, args.context, limits, weight_bytes, kv_bytes, quantized)
        share = floor / best["step_ms"]
        print(
            f"{batch:>6} {best['step_ms']:>8.3f} {best['host_ms']:>8.3f} {floor:>9.3f} {share:>6.3f} "
            f"{1e3 * batch / best['step_ms']:>9.0f}"
        )
        if spec.moe is not None:
            visits = bench.visited(batch, args.context, params)
            print(f"  {visits:.1f} of {spec.moe.experts} experts visited, {visited(spec.moe, batch):.1f} in the floor")
        results["decode"].append({"batch": batch, "floor_ms": floor, "share": share, **best})
        if args.chunk:
            beside = bench.decode(batch, args.context, args.steps, params, args.chunk)
            times = beside["step_ms"] / best["step_ms"]
            print(
                f"  beside {args.chunk} prompt tokens: {beside['step_ms']:.3f} ms, "
                f"{beside['host_ms']:.3f} on the host, {times:.2f} of a step"
            )
            results["decode"][-1]["beside_chunk"] = {"tokens": args.chunk, **beside}
        if args.constrained:
            results["decode"][-1]["constrained"] = constrained(bench, batch, args, params)
        if args.trace:
            for name, count, us in trace(bench, batch, args.context, 8, params)[:24]:
                print(f"    {us:>9.1f} us {count:>6.1f} x  {name[:90]}")
    return results


def constrained(bench: Bench, batch: int, args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """Time steps with and without a grammar in turn; count the copies of each."""
    runs: dict[int, list[float]] = {NONE: [], 0: []}
    for _ in range(2 * args.repeat + 1):
        for grammar, times in runs.items():
            times.append(bench.decode(batch, args.context, args.steps, params, grammar=grammar)["step_ms"])
    free, bound = (float(np.median(times)) for times in runs.values())
    copies = [
        sum(count for name, count, _ in trace(bench, batch, args.context, 8, params, grammar) if "Memcpy" in name)
        for grammar in runs
    ]
    print(
        f"  constrained: {bound:.3f} ms, {bound / free:.4f} of a free step ({free:.3f} ms); copies a step: "
        f"{copies[1]:.1f}, free {copies[0]:.1f}"
    )
    return {"step_ms": bound, "free_ms": free, "copies": copies[1], "free_copies": copies[0]}


if __name__ == "__main__":
    main()
