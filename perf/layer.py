"""What a decode step's GEMMs and small kernels take together, attention left out, in one CUDA graph.

`python -m actorserve.perf.layer [--model qwen2-7b] [--rows 1 32 128 256] [--gemm FILE] [--json FILE]`. All layers and
the head of a dummy model, with the decoder's calls; a copy of the queries stands for attention. Variants: plain torch,
our kernels, with our GEMMs (of models/gemm.py or perf.gemm's JSON), with the work between them in their epilogues, with
PDL at all of these rows; and what a decoder does. The floor is that of the weights (models/floors.py).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actorserve.models.families import spec_of
from actorserve.models.floors import matmul_seconds
from actorserve.models.gemm import GEMMS, Choices
from actorserve.models.layers import Ops, TorchOps
from actorserve.models.rope import inverse_frequencies
from actorserve.models.shapes import KNOWN
from actorserve.models.spec import Spec
from actorserve.models.triton_ops import TritonOps, pdl_rows
from actorserve.perf import limits
from actorserve.perf.gemm import read_table
from actorserve.perf.replay import median_milliseconds


@dataclass
class Layer:
    """Weights of a layer, [out, in] each."""

    qkv: Tensor
    bias: Tensor | None
    o: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor


@dataclass
class Variant:
    """How to run; `make` builds the Ops."""

    name: str
    make: Callable[[], Ops]


@dataclass
class Model:
    """Dummy weights, and the inputs of a step of `rows` tokens."""

    spec: Spec
    device: torch.device
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec = self.spec
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        for _ in range(spec.layers):
            bias = self.random(q + 2 * kv) if spec.qkv_bias else None
            shapes = ((q + 2 * kv, spec.hidden), (spec.hidden, q), (2 * spec.inter, spec.hidden))
            qkv, o, gate_up = (self.random(*shape) for shape in shapes)
            down, norm = self.random(spec.hidden, spec.inter), self.random(spec.hidden)
            self.layers.append(Layer(qkv, bias, o, gate_up, down, norm))
        self.head = self.random(spec.vocab, spec.hidden)
        self.cache = torch.zeros(4096, 2, spec.kv_heads, spec.head_dim, dtype=torch.bfloat16, device=self.device)
        assert spec.rope is not None
        self.frequencies = inverse_frequencies(spec.rope).to(self.device)

    def random(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, 0.02)

    def step(self, rows: int, variant: Variant) -> Callable[[], Tensor]:
        """The step as a function without arguments."""
        spec, ops, eps = self.spec, variant.make(), self.spec.norm.eps
        maps = [tuple(ops.linear(w, b) for w, b in _maps(layer)) for layer in self.layers]
        head = ops.head(self.head)
        start = self.random(rows, spec.hidden)
        positions = torch.arange(rows, device=self.device) + 1000
        slots = torch.arange(rows, device=self.device)

        def run() -> Tensor:
            table = ops.rotation(positions, self.frequencies, spec.rope, torch.bfloat16)
            residual = start
            hidden = ops.rms_norm(residual, self.layers[0].norm, eps)
            for i, (layer, (qkv, o, gate_up, down)) in enumerate(zip(self.layers, maps, strict=True)):
                queries = ops.heads(qkv, hidden, None, 0.0, table, spec, slots, self.cache)
                x = queries.clone(memory_format=torch.contiguous_format).view(rows, -1)
                hidden, residual = ops.add_norm(o, x, residual, 1.0, layer.norm, eps, gate_up)
                x = ops.gated(gate_up, hidden, spec.act)
                into = maps[i + 1][0] if i + 1 < len(maps) else head
                hidden, residual = ops.add_norm(down, x, residual, 1.0, layer.norm, eps, into)
            return head(hidden)

        return run


def _maps(layer: Layer) -> tuple[tuple[Tensor, Tensor | None], ...]:
    return (layer.qkv, layer.bias), (layer.o, None), (layer.gate_up, None), (layer.down, None)


def variants(device: torch.device, gemms: dict[tuple[int, int], Choices], most: int, spec: Spec) -> list[Variant]:
    """What to compare, first each with one thing more than the one before; PDL up to `most` rows."""
    return [
        Variant("plain torch", TorchOps),
        Variant("our kernels", lambda: TritonOps(device, 0, {})),
        Variant("+ our GEMMs", lambda: TritonOps(device, 0, gemms, fuse=False)),
        Variant("+ epilogues", lambda: TritonOps(device, 0, gemms)),
        Variant("+ PDL", lambda: TritonOps(device, most, gemms)),
        Variant("PDL without epilogues", lambda: TritonOps(device, most, gemms, fuse=False)),
        Variant("as a decoder", lambda: TritonOps(device, pdl_rows(spec), gemms)),
    ]


def milliseconds(run: Callable[[], Any], repeat: int) -> float:
    """Median time of run() as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_milliseconds(graph, repeat, warm=2)


def measure(model: Model, rows: int, todo: list[Variant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all variants at this many rows, and print them; outputs must agree with the first's."""
    floor = 1e3 * matmul_seconds(model.spec, rows, limits.measured()[1])
    print(f"{args.model}, {rows} rows: floor of the weights {floor:.3f} ms", flush=True)
    found: list[dict[str, Any]] = []
    exact: Tensor | None = None
    for variant in todo:
        result: dict[str, Any] = {"rows": rows, "variant": variant.name, "floor_ms": floor}
        try:
            torch.manual_seed(rows)
            run = model.step(rows, variant)
            logits = run().float()
            exact = logits if exact is None else exact
            result["difference"] = ((logits - exact).norm() / exact.norm()).item()
            result["ms"] = milliseconds(run, args.repeat)
            result["share"] = floor / result["ms"]
            per_layer = 1e3 * (result["ms"] - floor) / model.spec.layers
            print(
                f"  {variant.name:44} {result['ms']:7.3f} ms  {result['share']:.3f} of the floor  "
                f"{per_layer:6.1f} us lost a layer  differs by {result['difference']:.1e}",
                flush=True,
            )
        except Exception as error:
            result["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  {variant.name:44} failed: {result['failed']}", flush=True)
        found.append(result)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2-7b", choices=sorted(KNOWN))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--gemm", help="JSON of perf.gemm: its tiles instead of those in models/gemm.py")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=180, help="start no further number of rows after this long")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("perf.layer needs a GPU")
    started = time.monotonic()
    device = torch.device("cuda")
    gemms = read_table(args.gemm) if args.gemm else GEMMS
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        model = Model(spec_of(KNOWN[args.model]), device)
        todo = variants(device, gemms, max(args.rows), model.spec)
        for rows in args.rows:
            if time.monotonic() - started < args.seconds:
                results += measure(model, rows, todo, args)
                if args.json:
                    Path(args.json).write_text(json.dumps({"model": args.model, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
