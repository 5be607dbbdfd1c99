"""What the parts of a decode step cost in joules: at its limit of power a GPU is as fast as its work is cheap.

`python -m actorserve.perf.energy [--shape qwen2-7b] [--batch 256] [--context 1024] [--prefill 896] [--seconds 1.5]
[--json FILE]`. Each part is a CUDA graph of its launches in all layers, kept busy so long: a whole step, attention, and
each linear map with what ends it; a copy of 4 GiB beside them, which only reads and writes. With --prefill also a
forward of so long prompts, kernel by kernel. Keys, values and inputs are normally distributed, since bits that flip
cost, too. Printed: milliseconds and joules by NVML's counter, watts, and joules by TFLOP or by byte moved.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from ctypes import byref, c_ulonglong, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.models.decoder import Decoder
from actorserve.models.flashinfer_build import when_compiled
from actorserve.models.layers import DenseMlp
from actorserve.models.runner import ChunkWork
from actorserve.models.shapes import KNOWN
from actorserve.models.tuned_gemm import captured
from actorserve.perf.decode import Bench
from actorserve.perf.shapes import dummy_decoder
from actorserve.sampler.params import SamplingParams

COPIED = 2 << 30
"""Bytes."""


@dataclass
class Part:
    """What one run of a part costs."""

    name: str
    ms: float
    joules: float
    flops: float = 0.0
    bytes: float = 0.0
    """What it reads and writes at least."""

    def line(self) -> str:
        """For the table."""
        each = f"{1e12 * self.joules / self.flops:8.2f} J/TFLOP" if self.flops else f"{'':16}"
        if self.bytes:
            each += f"{1e12 * self.joules / self.bytes:8.0f} pJ/byte"
        return f"{self.name:<12}{self.ms:>9.3f} ms{self.joules:>9.3f} J{1e3 * self.joules / self.ms:>7.0f} W{each}"


class Meter:
    """NVML's counter of one GPU's energy. Raises OSError where there is no NVML, RuntimeError where it fails."""

    def __init__(self, device: torch.device) -> None:
        self.lib, self.handle = ctypes.CDLL("libnvidia-ml.so.1"), c_void_p()
        self._call("nvmlInit_v2")
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._call("nvmlDeviceGetHandleByUUID", name.encode(), byref(self.handle))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.lib, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: status {status}")

    def joules(self) -> float:
        """Since the driver was loaded."""
        millijoules = c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.handle, byref(millijoules))
        return millijoules.value / 1e3


def busy(run: Callable[[], object], meter: Meter, seconds: float, warm: float = 0.3) -> tuple[float, float]:
    """(milliseconds, joules) of a run, of as many as keep the device busy for `seconds`, and warm before."""
    for wanted in (warm, seconds):  # the counter moves a few times a second
        torch.cuda.synchronize()
        start, before, runs = time.perf_counter(), meter.joules(), 0
        while time.perf_counter() - start < wanted:
            for _ in range(8):
                run()
            runs += 8
            torch.cuda.synchronize()
        took, used = time.perf_counter() - start, meter.joules() - before
    return 1e3 * took / runs, used / runs


def copy(meter: Meter, device: torch.device, seconds: float) -> Part:
    """Reading and writing alone."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return Part("copy", *busy(lambda: target.copy_(source), meter, seconds), bytes=2 * COPIED)


def products(decoder: Decoder, batch: int) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, a run of it in all layers, numbers in its weights) of each linear map."""
    spec, ops, layers = decoder.spec, decoder.ops, decoder.weights.layers
    h, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def given(width: int) -> Tensor:
        return torch.randn(batch, width, device=decoder.device, dtype=decoder.dtype)

    hidden, heads, inner = given(h), given(q), given(spec.inter)
    mlps = [layer.mlp for layer in layers if isinstance(layer.mlp, DenseMlp)]
    count = spec.layers * h
    yield "qkv", lambda: [layer.qkv(hidden) for layer in layers], count * (q + 2 * kv)
    yield "o", lambda: [layer.o(heads) for layer in layers], count * q
    if mlps:
        numbers = len(mlps) * h * spec.inter
        yield "gate, up", lambda: [ops.gated(mlp.gate_up, hidden, spec.act) for mlp in mlps], 2 * numbers
        yield "down", lambda: [mlp.down(inner) for mlp in mlps], numbers


@torch.inference_mode()
def measure(decoder: Decoder, config: EngineConfig, args: argparse.Namespace) -> Iterator[Part]:
    """The parts, one after another."""
    spec, meter, params = decoder.spec, Meter(decoder.device), SamplingParams(max_new_tokens=None, ignore_eos=True)
    prompts = max(1, 8192 // args.prefill) if args.prefill else 0
    bench = Bench(decoder, config, max(args.batch, prompts), max(args.context + 2, args.prefill), graphs=True)
    bench.runner.kv.storage.normal_()
    yield copy(meter, decoder.device, args.seconds)
    rows = bench.seat(args.batch, args.context, params)
    lengths = bench.runner.slots.length[: args.batch].clone()

    def step() -> None:
        bench.runner.slots.length[: args.batch] = lengths  # or the context would grow meanwhile
        bench.stepper.launch(rows, [])

    size, cached = decoder.dtype.itemsize, args.batch * args.context * spec.layers * 2 * spec.kv_heads * spec.head_dim
    yield Part("step", *busy(step, meter, args.seconds))
    runner, every = bench.runner, bench.runner.upload_rows(rows)
    plan = decoder.attention.plan(runner.decode_batch(every, runner.slots.prepare(every)), runner.kv, spec)
    q = torch.randn(args.batch, spec.heads, spec.head_dim, device=decoder.device, dtype=decoder.dtype)
    attention = captured(lambda: [plan.run(i, q) for i in range(spec.layers)])
    yield Part("attention", *busy(attention.replay, meter, args.seconds), bytes=cached * size)
    for name, run, weights in products(decoder, args.batch):
        graph = captured(run)
        flops = 2.0 * args.batch * weights
        yield Part(name, *busy(graph.replay, meter, args.seconds), flops=flops, bytes=weights * size)
    if prompts:
        ids = np.random.default_rng(1).integers(0, spec.vocab, (prompts, args.prefill)).astype(np.int32)
        none = np.empty(0, dtype=np.int64)
        when_compiled(decoder.attention)

        def prefill() -> None:
            bench.seat(prompts, 0, params)
            bench.stepper.launch(none, [ChunkWork(i, 0, ids[i], True) for i in range(prompts)])

        yield Part("prefill", *busy(prefill, meter, args.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=KNOWN, default="qwen2-7b")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=0, help="also prompts of this many tokens")
    parser.add_argument("--seconds", type=float, default=1.5, help="that each part is kept busy")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    decoder, config = dummy_decoder(args.shape)
    print(f"{torch.cuda.get_device_name(decoder.device)}, {args.shape}, {args.batch} rows of {args.context} tokens")
    found = []
    for part in measure(decoder, config, args):
        print(part.line(), flush=True)
        found.append(part)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(part) for part in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
