"""Where a step's time goes on a CPU with our C kernels, and how near the linear maps are to what a core can do.

    python -m actorserve.perf.cpu_parts [--rows 1 8 22 64] [--threads 1] [--steps 30] [--temperature 0]
        [--quantization none] [--dtype bfloat16] [--context 64] [--kv-cache-dtype auto float16]

First each kind of linear map alone, its weights in the cache: GFLOP/s, best of many, beside fused multiply-adds in
registers and nothing else (fma.c), twice as many for blocks, which are multiplied in integers. Then steps of so many
decoding rows as the executor makes them (runner, stepper and sampler, no actors), at contexts from 8 tokens more than
--context on: with all layers in one call, and by parts; for each dtype of the cache. With one thread times are the
thread's own, for busy machines.
Needs the embedded model.
"""

import argparse
import ctypes
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from actorserve.config import EngineConfig
from actorserve.models.c_library import load_library
from actorserve.models.cpu_decoder import maps_of
from actorserve.models.cpu_draw import cpu_race
from actorserve.models.cpu_kernels import kernels
from actorserve.models.decoder import Decoder
from actorserve.models.embedded import embedded_model
from actorserve.models.kv_cache import KVCache, kv_dtype
from actorserve.models.quantized import DENSE, ROUNDED, KernelLinear, QuantizedLinear
from actorserve.models.runner import ChunkWork, Runner
from actorserve.models.stepper import Stepper
from actorserve.models.weights import load_decoder
from actorserve.sampler.drawer import Drawer
from actorserve.sampler.params import SamplingParams
from actorserve.sampler.state import SamplerState

ROOM, PAGE = 192, 16
"""Tokens beside the prompt, of a page."""
NONE = np.empty(0, np.int64)
Clock = Callable[[], float]
PARTS = {
    "linear": "linear maps", "attend": "attention", "rms_norm": "other", "rotate_and_write": "other",
    "silu_mul": "other", "rotation_table": "other", "run_layers": "layers", "prepare": "slots", "advance": "slots",
}  # fmt: skip


def limits_library() -> ctypes.CDLL:
    """fma.c."""
    return load_library(Path(__file__).parent / "fma.c", Path(__file__).parent.parent / "models" / "cpu_kernels.h")


def most_flops() -> float:
    """GFLOP/s of one core, at best."""
    function = limits_library().fused_multiply_adds
    function.argtypes, function.restype = [ctypes.c_long, ctypes.c_void_p], ctypes.c_long
    numbers, best = torch.tensor([0.5, 1.0]), 0.0
    for _ in range(50):
        start = time.perf_counter()
        done = function(20000, numbers.data_ptr())
        best = max(best, done / (time.perf_counter() - start) / 1e9)
    return best


def most_bytes(threads: int) -> float:
    """GB/s of memory that so many threads read, at best."""
    function, count, best = limits_library().load_all, (1 << 26) // threads // 64 * 64, 0.0
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float
    memory = [torch.ones(count) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(lambda part: function(part.data_ptr(), count), memory))
            best = max(best, 4 * count * threads / (time.perf_counter() - start) / 1e9)
    return best


def limit_of(linear: KernelLinear, flops: float) -> float:
    """What a core can do at most of a map, where it does `flops` of float32: of blocks an instruction multiplies two
    inputs of each output, as four pairs of bytes or two of 16 bits, and not one, and of rounded numbers; matrix
    instructions 512 inputs in the time of 32, of each number that is not rounded three times."""
    if isinstance(linear, QuantizedLinear):
        return 2 * flops
    rounds, matrices = linear.map.kind == ROUNDED, kernels().matrices
    if matrices and (rounds or linear.map.kind == DENSE[torch.bfloat16]):
        return (16 if rounds else 16 / 3) * flops
    return 2 * flops if rounds and kernels().pairs else flops


def map_speed(linear: KernelLinear, rows: int, clock: Clock) -> float:
    """GFLOP/s, best of some tenths of a second."""
    x, best = torch.randn(rows, linear.inputs), float("inf")
    until = clock() + 0.2
    while clock() < until:
        start = clock()
        linear(x)
        best = min(best, clock() - start)
    return 2 * linear.outputs * linear.inputs * rows / best / 1e9


def watched(target: Any, name: str, part: str, spent: dict[str, float], clock: Clock) -> Callable[..., Any]:
    """Let calls of target.name add to a part's time; returns what it was."""
    function = getattr(target, name)

    def timed(*arguments: Any) -> Any:
        start = clock()
        result = function(*arguments)
        spent[part] += clock() - start
        return result

    setattr(target, name, timed)
    original: Callable[..., Any] = function
    return original


class Steps:
    """A batch that decodes."""

    def __init__(self, decoder: Decoder, rows: int, config: EngineConfig, args: argparse.Namespace) -> None:
        room = args.context + ROOM
        pages = -(-room // PAGE)
        dtype = kv_dtype(config, decoder.dtype)
        kv = KVCache(decoder.spec, rows * pages + 1, PAGE, decoder.device, dtype, decoder.dtype)
        state = SamplerState(rows, decoder.spec.vocab, (2,), decoder.device)
        runner = Runner(decoder, kv, rows, pages)
        self.drawer = Drawer(state, rows, cpu_race())
        self.stepper = Stepper(runner, self.drawer, None)
        self.rows = np.arange(rows)
        ids = np.random.default_rng(0).integers(100, 40000, (rows, args.context)).astype(np.int32)
        none = np.empty(0, np.int32)
        for row in range(rows):
            params = SamplingParams(temperature=args.temperature, seed=row, max_new_tokens=room, ignore_eos=True)
            runner.admit(row, np.arange(row * pages, row * pages + pages, dtype=np.int32), 0, room)
            state.admit(row, params, none, none, args.context, 0)
        runner.slots.flush()
        for row in range(rows):
            self.stepper.launch(NONE, [ChunkWork(row, 0, ids[row], True)])

    def run(self, count: int, clock: Clock) -> float:
        """Seconds a step, on average."""
        start = clock()
        for _ in range(count):
            self.stepper.launch(self.rows, []).rows()
        return (clock() - start) / count


def by_parts(
    decoder: Decoder, rows: int, config: EngineConfig, args: argparse.Namespace, clock: Clock
) -> dict[str, float]:
    """Milliseconds a step: whole, and of its parts, made one by one."""
    steps = Steps(decoder, rows, config, args)
    steps.run(8, clock)
    whole = steps.run(args.steps, clock)
    spent: dict[str, float] = defaultdict(float)
    compiled, layers, decoder.layers = kernels(), decoder.layers, None
    kept = {name: watched(compiled, name, part, spent, clock) for name, part in PARTS.items()}
    maps = [linear for layer in decoder.weights.layers for linear in maps_of(layer)]
    for linear in maps:
        linear.linear = compiled.linear
    assert decoder.weights.head is not None and isinstance(decoder.weights.head.product, KernelLinear)
    head = decoder.weights.head.product
    kept_head = watched(head, "linear", "head", spent, clock)
    watched(steps.drawer, "draw", "draw", spent, clock)
    try:
        apart = steps.run(args.steps, clock)
    finally:
        for name, function in kept.items():
            setattr(compiled, name, function)
        for linear in maps:
            linear.linear = compiled.linear
        head.linear, decoder.layers = kept_head, layers
    parts = {name: seconds / args.steps for name, seconds in spent.items()}
    parts["Python"] = apart - sum(parts.values())
    return {name: 1e3 * seconds for name, seconds in {"one call": whole, "by parts": apart, **parts}.items()}


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 22, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--quantization", default="auto", help="the engine's; none: weights in float32")
    parser.add_argument("--dtype", default="auto", help="the engine's; bfloat16: inputs of products, too")
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    config = EngineConfig(device="cpu", quantization=args.quantization, dtype=args.dtype)
    decoder = load_decoder(embedded_model(), config, lambda fraction: None)
    limit, memory = most_flops(), most_bytes(args.threads)
    print(f"{args.threads} threads; a core's limit {limit:.1f} GFLOP/s of float32, the memory's {memory:.1f} GB/s")
    print(f"share of the core's limit by rows {args.rows}")
    for name, linear in zip(("qkv", "o", "gate and up", "down"), maps_of(decoder.weights.layers[0]), strict=True):
        most = limit_of(linear, limit) * args.threads
        shares = [map_speed(linear, rows, clock) / most for rows in args.rows]
        print(f"{name:12} {linear.outputs:6} x {linear.inputs:5}: " + " ".join(f"{share:6.2f}" for share in shares))
    for rows, cache in product(args.rows, args.kv_cache_dtype):
        parts = by_parts(decoder, rows, replace(config, kv_cache_dtype=cache), args, clock)
        rate = 1e3 * rows / parts["one call"]
        shown = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
        print(f"{rows:4} rows, cache {cache}: {rate:7.1f} tokens/s; ms a step: {shown}", flush=True)


if __name__ == "__main__":
    main()
