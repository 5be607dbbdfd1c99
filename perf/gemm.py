"""The GEMMs of decode steps: our kernel's tiles against cuBLAS, on weights that come from memory, not from the L2.

`python -m actorserve.perf.gemm [--model qwen2-7b qwen2-0.5b smollm2-135m] [--rows 1 8 32 64 128 256] [--seconds 240]
[--json FILE]`. Each figure is a CUDA graph of launches over rotating weights. Prints the best tile of each shape and
number of rows beside cuBLAS, then the table for models/gemm.py; perf/layer.py takes the JSON. A tile that fails or is
wrong is reported and left out.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actorserve.models.families import spec_of
from actorserve.models.gemm import MAX_TILES, Choices, Tile, arrivals, fits, linear
from actorserve.models.shapes import KNOWN
from actorserve.models.triton_ops import PDL_ROWS, TritonOps

ROTATED = 256 << 20
"""Bytes of weights that a graph goes through: several times the L2."""
SHARED = 227 << 10
"""Bytes of shared memory that a program may have."""
GAIN = 0.98
"""A tile enters the table when it takes at most this share of cuBLAS's time."""
ROWS = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    """A weight of a model; `wide` for float32 results (the head)."""

    model: str
    name: str
    outputs: int
    inputs: int
    wide: bool = False

    @property
    def weight_bytes(self) -> int:
        return 2 * self.outputs * self.inputs


def cases(model: str) -> list[Case]:
    spec = spec_of(KNOWN[model])
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return [
        Case(model, "qkv", q + 2 * kv, spec.hidden),
        Case(model, "o", spec.hidden, q),
        Case(model, "gate_up", 2 * spec.inter, spec.hidden),
        Case(model, "down", spec.hidden, spec.inter),
        Case(model, "head", spec.vocab, spec.hidden, wide=True),
    ]


# ---------------------------------------------------------------------- candidates


def bases(rows: int) -> list[Tile]:
    """Tiles worth trying at this many rows, before splitting: (rows, outputs, depth, split, warps, stages, ...)."""
    if rows <= 16:
        return [
            Tile(16, 64, 128, 1, 4, 4),
            Tile(16, 128, 64, 1, 4, 6),
            Tile(16, 64, 128, 1, 4, 5, tma=True),
            Tile(16, 64, 256, 1, 4, 3),
            Tile(16, 32, 256, 1, 4, 4),
            Tile(16, 16, 256, 1, 2, 5),
        ]
    if rows <= 32:
        return [
            Tile(32, 64, 128, 1, 4, 4),
            Tile(32, 128, 64, 1, 4, 5),
            Tile(32, 64, 128, 1, 4, 4, tma=True),
            Tile(32, 64, 256, 1, 4, 3),
            Tile(32, 32, 128, 1, 2, 5),
        ]
    if rows <= 64:
        return [
            Tile(64, 128, 64, 1, 4, 4),
            Tile(64, 128, 64, 1, 4, 5, tma=True),
            Tile(64, 256, 64, 1, 8, 5, tma=True),
            Tile(64, 64, 128, 1, 4, 3),
            Tile(64, 128, 128, 1, 4, 4, swap=False, tma=True),
        ]
    if rows <= 128:
        return [
            Tile(128, 128, 64, 1, 8, 6, swap=False, tma=True),
            Tile(128, 256, 64, 1, 8, 4, swap=False, tma=True),
            Tile(128, 128, 64, 1, 8, 4, swap=False),
            Tile(128, 64, 128, 1, 4, 4, swap=False, tma=True),
        ]
    return [Tile(128, 256, 64, 1, 8, 4, swap=False, tma=True), Tile(256, 128, 64, 1, 8, 4, swap=False, tma=True)]


def shared_bytes(tile: Tile) -> int:
    return 2 * tile.stages * tile.depth * (tile.rows + tile.outputs)


def splits(tile: Tile, case: Case, rows: int, sms: int) -> list[int]:
    """Numbers of parts that make about as many programs as are resident at once."""
    tiles = -(-case.outputs // tile.outputs) * -(-rows // tile.rows)
    if tiles >= 2 * sms or tiles > MAX_TILES:
        return [1]
    resident = sms * max(1, min(SHARED // shared_bytes(tile), 12 // tile.warps))
    allowed = [s for s in (1, 2, 3, 4, 6, 8) if s == 1 or s <= case.inputs // tile.depth // 2]
    filling = [s for s in allowed if s * tiles <= resident] or [1]
    return filling[-2:] if len(filling) > 1 else filling


def candidates(case: Case, rows: int, sms: int) -> list[Tile]:
    """Tiles to try for a case; the wide ones, where there is less to gain, get the first few only."""
    found = []
    for base in bases(rows)[: 3 if case.wide else None]:
        if case.inputs % base.depth:
            base = replace(base, depth=64, stages=min(6, 2 * base.stages))
        if shared_bytes(base) <= SHARED:
            found += [replace(base, split=s) for s in splits(base, case, rows, sms)]
    return [t for t in dict.fromkeys(found) if fits(t, case.outputs, case.inputs, rows)]


# ---------------------------------------------------------------------- measurement


class Bench:
    """Operands of one case at a time, and the time of functions over them."""

    def __init__(self, device: torch.device, pdl_rows: int) -> None:
        self.device = device
        self.pdl_rows = TritonOps(device, pdl_rows).pdl_rows
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.arrived = arrivals(device)
        self.weights: list[Tensor] = []

    def load(self, case: Case) -> None:
        """Make the weights of a case."""
        self.weights.clear()
        torch.cuda.empty_cache()
        count = max(2, min(256, -(-ROTATED // case.weight_bytes)))
        for _ in range(count):
            weight = torch.empty(case.outputs, case.inputs, dtype=torch.bfloat16, device=self.device)
            self.weights.append(weight.normal_(0, case.inputs**-0.5))

    def plain(self, case: Case, x: Tensor, weight: Tensor) -> Tensor:
        """What a decoder does without our GEMM."""
        if case.wide:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return F.linear(x, weight)

    def ours(self, case: Case, tile: Tile, x: Tensor, weight: Tensor, pdl: bool | None = None) -> Tensor:
        dtype = torch.float32 if case.wide else None
        return linear(x, weight, None, tile, self.arrived, len(x) <= self.pdl_rows if pdl is None else pdl, dtype)

    def wrong(self, case: Case, tile: Tile, x: Tensor) -> str:
        """Run once; why the result is no good, or an empty string."""
        weight = self.weights[0]
        exact = F.linear(x.float(), weight.float())
        got = self.ours(case, tile, x, weight).float()
        error = (got - exact).abs().max().item()
        return "" if error <= 2**-7 * exact.abs().max().item() else f"off by {error:.3g}"

    def microseconds(self, run: Callable[[Tensor], Any]) -> float:
        """Time of run(weight), one launch after another through the weights, in a CUDA graph."""
        weights = self.weights * -(-16 // len(self.weights))
        run(weights[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights:
                run(weight)
        graph.replay()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / len(weights))
        return sorted(times)[len(times) // 2]


def compile_all(bench: Bench, work: list[tuple[Case, int, Tile]], threads: int) -> None:
    """Compile the kernels of all candidates side by side, on operands of a few rows; failures show up later."""
    unique: dict[tuple[Any, ...], tuple[Case, int, Tile]] = {}
    for case, rows, tile in work:
        unique.setdefault((tile, case.wide, rows <= bench.pdl_rows), (case, rows, tile))

    def one(item: tuple[Case, int, Tile]) -> None:
        case, rows, tile = item
        outputs, inputs = 256, max(1024, 2 * tile.depth * tile.split)
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=bench.device)
        x = torch.empty(rows, inputs, dtype=torch.bfloat16, device=bench.device)
        dtype = torch.float32 if case.wide else None
        try:
            linear(x, weight, None, tile, arrivals(bench.device), rows <= bench.pdl_rows, dtype)
        except Exception:  # said by `measure`, where it belongs to a figure
            return

    started = time.perf_counter()
    first, *others = unique.values()
    one(first)  # alone: it makes what all share
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, others))
    torch.cuda.synchronize()
    print(f"{len(unique)} kernels compiled in {time.perf_counter() - started:.1f} s", flush=True)


def measure(bench: Bench, case: Case, rows: int, deadline: float) -> dict[str, Any]:
    """Time cuBLAS and the candidates of one case; microseconds."""
    x = torch.randn(rows, case.inputs, device=bench.device, dtype=torch.bfloat16)
    result: dict[str, Any] = asdict(case) | {"rows": rows, "failed": []}
    result["cublas_us"] = bench.microseconds(lambda w: bench.plain(case, x, w))
    figures: list[tuple[float, Tile]] = []
    for tile in candidates(case, rows, bench.sms):
        if time.monotonic() > deadline:
            result["cut_short"] = True
            break
        try:
            problem = bench.wrong(case, tile, x)
            if not problem:
                figures.append((bench.microseconds(lambda w, t=tile: bench.ours(case, t, x, w)), tile))
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        if problem:
            result["failed"].append({"tile": asdict(tile), "why": problem})
    figures.sort(key=lambda item: item[0])
    result["tiles"] = [{"us": us, "tile": asdict(tile)} for us, tile in figures]
    if figures and rows <= bench.pdl_rows:
        best = figures[0][1]
        result["best_without_pdl_us"] = bench.microseconds(lambda w: bench.ours(case, best, x, w, False))
    return result


def line(result: dict[str, Any]) -> str:
    """A result for people."""
    size = 2 * result["outputs"] * result["inputs"]
    cublas = result["cublas_us"]
    text = f"{result['name']:12} {result['rows']:4} rows  cuBLAS {cublas:7.1f} us {size / cublas / 1e6:5.2f} TB/s"
    if result["tiles"]:
        best = result["tiles"][0]
        tile = Tile(**best["tile"])
        text += f"  ours {best['us']:7.1f} us {size / best['us'] / 1e6:5.2f} TB/s  x{cublas / best['us']:.2f}"
        if "best_without_pdl_us" in result:
            text += f"  (no PDL {result['best_without_pdl_us']:.1f})"
        text += f"  {short(tile)}"
    for failure in result["failed"]:
        text += f"\n    failed: {short(Tile(**failure['tile']))}: {failure['why']}"
    return text


def short(tile: Tile) -> str:
    flags = ("" if tile.swap else ", swap=False") + (", tma=True" if tile.tma else "")
    return f"Tile({tile.rows}, {tile.outputs}, {tile.depth}, {tile.split}, {tile.warps}, {tile.stages}{flags})"


# ---------------------------------------------------------------------- the table


def table(results: list[dict[str, Any]]) -> dict[tuple[int, int], Choices]:
    """GEMMS of models/gemm.py from results: at each number of rows the best tile where it beats cuBLAS."""
    found: dict[tuple[int, int], Choices] = {}
    for result in sorted(results, key=lambda r: r["rows"]):
        best = result["tiles"][0] if result["tiles"] else None
        wins = best is not None and best["us"] <= GAIN * result["cublas_us"]
        choice = Tile(**best["tile"]) if best is not None and wins else None
        key = (result["outputs"], result["inputs"])
        before = found.get(key, ())
        if before and before[-1][1] == choice:
            before = before[:-1]
        found[key] = (*before, (result["rows"], choice))
    for key, choices in list(found.items()):
        while choices and choices[-1][1] is None:
            choices = choices[:-1]
        found[key] = choices
        if not choices:
            del found[key]
    return found


def source(gemms: dict[tuple[int, int], Choices]) -> Iterator[str]:
    """The table as Python."""
    for key, choices in gemms.items():
        inner = ", ".join(f"({most}, {'None' if tile is None else short(tile)})" for most, tile in choices)
        yield f"    {key}: ({inner},),"


def read_table(path: str) -> dict[tuple[int, int], Choices]:
    """The table of a JSON that this benchmark wrote."""
    return table(json.loads(Path(path).read_text())["results"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen2-7b", "qwen2-0.5b", "smollm2-135m"], choices=sorted(KNOWN))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--only", nargs="+", help="names of cases: qkv o gate_up down head")
    parser.add_argument("--seconds", type=float, default=240, help="stop measuring after this long")
    parser.add_argument("--threads", type=int, default=8, help="compile this many kernels at once")
    parser.add_argument("--pdl-rows", type=int, default=PDL_ROWS, help="PDL up to this many rows")
    parser.add_argument("--json", help="write all figures to this file, after every case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("perf.gemm needs a GPU")
    deadline = time.monotonic() + args.seconds
    gc.freeze()  # every capture may collect garbage
    bench = Bench(torch.device("cuda"), args.pdl_rows)
    results: list[dict[str, Any]] = []
    for model in args.model:
        todo = [case for case in cases(model) if not args.only or case.name in args.only]
        if time.monotonic() < deadline:
            work = [(c, rows, tile) for c in todo for rows in args.rows for tile in candidates(c, rows, bench.sms)]
            compile_all(bench, work, args.threads)
        for case in todo:
            if time.monotonic() > deadline:
                print(f"no time left for {model} {case.name}")
                continue
            print(f"{model} {case.name} [{case.outputs}, {case.inputs}]")
            bench.load(case)
            for rows in args.rows:
                results.append(measure(bench, case, rows, deadline))
                print("  " + line(results[-1]), flush=True)
            if args.json:
                figures = {"pdl_rows": bench.pdl_rows, "results": results}
                Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    print("GEMMS = {", *source(table(results)), "}", sep="\n")


if __name__ == "__main__":
    main()
