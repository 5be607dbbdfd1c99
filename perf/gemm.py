"""The GEMMs of decode steps, each with what follows it: our tiles against cuBLAS and a kernel, on weights from memory.

`python -m actorserve.perf.gemm [--shapes qwen2-0.5b:1,8,64 qwen2-7b:1,32,128,256] [--only gate_up down] [--seconds 240]
[--quantization w4a16] [--json FILE]`. Each figure is a CUDA graph of launches over rotating weights: QKV with rotation
and KV write, output and down projection with residual and norm, gate-up with the activation, the head with float32
logits. Prints the best tile of each beside cuBLAS (or what else multiplies quantized weights) and the same tile with
kernels, then the table for models/gemm.py or packed_tiles.py; perf/layer.py takes the JSON. A tile that fails or is
wrong is reported and left out. Shapes are measured in their order, until time is over.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actorserve.models.families import spec_of
from actorserve.models.gemm import Choice, Choices, Tile, TritonLinear, Unscaled
from actorserve.models.layers import LinearMap
from actorserve.models.packed_gemm import Packed, Scratch, pack_part
from actorserve.models.quantization import Scheme
from actorserve.models.rope import inverse_frequencies
from actorserve.models.shapes import KNOWN
from actorserve.models.stream_gemm import Stream
from actorserve.models.triton_ops import TritonOps, pdl_rows
from actorserve.models.unpack import random_part
from actorserve.perf.gemm_tiles import Case, candidates, cases, packed_candidates, streams
from actorserve.perf.replay import median_milliseconds

ROTATED = 256 << 20
"""Bytes of weights that a graph goes through: several times the L2."""
GAIN = 0.98
"""A tile enters the table when it takes at most this share of cuBLAS's time."""
SHAPES = ("qwen2-0.5b:1,8,64", "qwen2-7b:256,1,32,128")
EPS = 1e-6
SCHEMES = {
    "w4a16": Scheme("awq", 4, 128, symmetric=False),
    "w8a16": Scheme("int8", 8),
    "fp8": Scheme("fp8", 8, inputs="dynamic"),
    "fp8-block": Scheme("fp8", 8, 128, 128, inputs="dynamic"),
}
"""What --quantization makes of the weights; the head stays as it is."""


@dataclass
class Inputs:
    """What the calls of a case read besides the weight."""

    x: Tensor
    half: Unscaled
    """x as the GEMM before would leave it."""
    residual: Tensor
    gain: Tensor
    table: Tensor
    slots: Tensor
    cache: Tensor


class Bench:
    """Operands of one case at a time, and the time of functions over them."""

    def __init__(self, device: torch.device, pdl: int | None, scheme: Scheme | None = None) -> None:
        self.device = device
        self.pdl = pdl
        self.scheme = scheme
        self.scratch = Scratch(device)
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.weights: list[Tensor | Packed] = []

    def random(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, std)

    def load(self, case: Case) -> None:
        """Make the weights of a case."""
        self.weights.clear()
        torch.cuda.empty_cache()
        first = self.weight(case)
        count = max(2, min(256, -(-ROTATED // first.nbytes)))
        self.weights += [first, *(self.weight(case) for _ in range(count - 1))]

    def weight(self, case: Case) -> Tensor | Packed:
        """A weight of a case, quantized but for the head's."""
        if self.scheme is None or case.follows == "logits":
            return self.random(case.outputs, case.inputs, std=case.inputs**-0.5)
        generator = torch.Generator(self.device).manual_seed(0)
        part = random_part(self.scheme, case.outputs, case.inputs, case.inputs**-0.5, generator)
        packed = pack_part(part, torch.bfloat16, self.scratch, True)
        assert packed is not None
        return packed

    def candidates(self, case: Case, rows: int) -> list[Choice]:
        """Tiles and streams to try."""
        if self.scheme is None or case.follows == "logits":
            return [*candidates(case, rows, self.sms), *streams(case, rows, self.sms)]
        kind = "fp8" if self.scheme.is_float else "int4" if self.scheme.bits == 4 else "int8"
        return packed_candidates(case, rows, self.sms, kind, self.scheme.group)

    def inputs(self, case: Case, rows: int) -> Inputs:
        spec = spec_of(KNOWN[case.model])
        assert spec.rope is not None
        x, gain = self.random(rows, case.inputs), torch.ones(spec.hidden, dtype=torch.bfloat16, device=self.device)
        squares = torch.full((rows, -(-case.inputs // 64)), 64.0, device=self.device)
        slots = torch.arange(rows, device=self.device)
        cache = torch.zeros(rows, 2, spec.kv_heads, spec.head_dim, dtype=torch.bfloat16, device=self.device)
        frequencies = inverse_frequencies(spec.rope).to(self.device)
        table = TritonOps(self.device).rotation(slots + 1000, frequencies, spec.rope, torch.bfloat16)
        return Inputs(x, Unscaled(x, squares, EPS), self.random(rows, spec.hidden), gain, table, slots, cache)

    def ops(self, case: Case, rows: int, tile: Choice | None, fuse: bool = True, pdl: bool | None = None) -> TritonOps:
        """Ops that multiply this case's weights with `tile`."""
        spec = spec_of(KNOWN[case.model])
        gemms = {} if tile is None else {(case.outputs, case.inputs): ((rows, tile),)}
        most = (self.pdl if self.pdl is not None else pdl_rows(spec)) if pdl is None else rows if pdl else 0
        return TritonOps(self.device, most, gemms, fuse)

    def call(self, case: Case, ops: TritonOps, inputs: Inputs) -> Callable[[LinearMap], Any]:
        """What a decoder calls for a weight of this case; a function of the linear map that returns what it made."""
        spec = spec_of(KNOWN[case.model])
        fused = bool(ops.gemms) and ops.fuse
        x: Any = inputs.half if fused and case.normed else inputs.x
        first = self.weights[0] if self.weights else None
        float8 = fused and isinstance(first, Packed) and first.takes_float8(len(inputs.x))
        if float8 and isinstance(first, Packed):  # as the norm before leaves it
            x = first.quantised(inputs.x)
        if case.follows == "heads":
            i = inputs
            return lambda linear: ops.heads(linear, x, None, 0.0, i.table, spec, i.slots, i.cache)
        if case.follows == "gated":
            return lambda linear: ops.gated(linear, x, spec.act)
        if case.follows == "add":
            residual, gain = inputs.residual, inputs.gain
            return lambda linear: ops.add_norm(linear, x, residual, 1.0, gain, EPS, None if float8 else linear)[1]
        return lambda linear: linear(x)

    def maps(self, case: Case, ops: TritonOps, weights: list[Tensor | Packed]) -> list[LinearMap]:
        def one(weight: Tensor | Packed) -> LinearMap:
            if isinstance(weight, Packed):
                choices = ops.gemms.get((case.outputs, case.inputs), ())
                return TritonLinear(weight, None, ops.arrived, ops.pdl_rows, choices=choices)
            return ops.head(weight) if case.follows == "logits" else ops.linear(weight, None)

        return [one(weight) for weight in weights]

    def wrong(self, case: Case, rows: int, tile: Choice, inputs: Inputs) -> str:
        """Run once; why the result is no good, or an empty string."""
        made = []
        for ops in (self.ops(case, rows, None), self.ops(case, rows, tile)):
            (linear,) = self.maps(case, ops, self.weights[:1])
            made.append(self.call(case, ops, inputs)(linear).float())
        error = (made[0] - made[1]).abs().max().item()
        return "" if error <= 2**-5 * made[0].abs().max().item() else f"off by {error:.3g}"

    def microseconds(self, case: Case, ops: TritonOps, inputs: Inputs) -> float:
        """Time of a call, one launch after another through the weights, in a CUDA graph."""
        run = self.call(case, ops, inputs)
        maps = self.maps(case, ops, self.weights * -(-16 // len(self.weights)))
        run(maps[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for linear in maps:
                run(linear)
        return 1e3 * median_milliseconds(graph, 5) / len(maps)


Work = list[tuple[Case, int, Choice]]


def compile_all(bench: Bench, work: Work, threads: int, deadline: float) -> None:
    """Compile the kernels of all candidates side by side; failures show up later."""
    weights = {case: bench.weight(case) for case in dict.fromkeys(case for case, *_ in work)}
    inputs = {(case, rows): bench.inputs(case, rows) for case, rows, _ in work}

    def one(item: tuple[Case, int, Choice]) -> None:
        case, rows, tile = item
        if time.monotonic() > deadline:
            return
        try:
            with torch.inference_mode():
                ops = bench.ops(case, rows, tile)
                (linear,) = bench.maps(case, ops, [weights[case]])
                bench.call(case, ops, inputs[case, rows])(linear)
        except Exception:  # said by `measure`, where it belongs to a figure
            return

    started = time.perf_counter()
    one(work[0])  # alone: it makes what all share
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, work[1:]))
    torch.cuda.synchronize()
    print(f"{len(work)} kernels compiled in {time.perf_counter() - started:.1f} s", flush=True)


def measure(bench: Bench, case: Case, rows: int, deadline: float) -> dict[str, Any]:
    """Time cuBLAS and the candidates of one case; microseconds."""
    inputs = bench.inputs(case, rows)
    first = bench.weights[0]
    kind = first.kind if isinstance(first, Packed) else ""
    result: dict[str, Any] = asdict(case) | {"rows": rows, "failed": [], "bytes": first.nbytes, "kind": kind}
    plain = bench.ops(case, rows, None)
    result["cublas_us"] = bench.microseconds(case, plain, inputs)
    if rows > 128:  # another library may choose kernels that need no memset before them
        result["cublaslt_us"] = with_cublaslt(lambda: bench.microseconds(case, plain, inputs))
    figures: list[tuple[float, Choice]] = []
    for tile in bench.candidates(case, rows):
        if time.monotonic() > deadline:
            result["cut_short"] = True
            break
        try:
            problem = bench.wrong(case, rows, tile, inputs)
            if not problem:
                figures.append((bench.microseconds(case, bench.ops(case, rows, tile), inputs), tile))
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        if problem:
            result["failed"].append({"tile": asdict(tile), "why": problem})
    figures.sort(key=lambda item: item[0])
    result["tiles"] = [{"us": us, "tile": asdict(tile)} for us, tile in figures]
    if figures:
        best, pdl = figures[0][1], plain.pdl_rows >= rows
        result["pdl"] = pdl
        result["other_pdl_us"] = bench.microseconds(case, bench.ops(case, rows, best, pdl=not pdl), inputs)
        result["not_fused_us"] = bench.microseconds(case, bench.ops(case, rows, best, fuse=False), inputs)
    return result


def with_cublaslt(run: Callable[[], float]) -> float:
    """run() while torch multiplies with cuBLASLt."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        return run()
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def line(result: dict[str, Any]) -> str:
    """A result for people."""
    size = result["bytes"]
    cublas = result["cublas_us"]
    text = f"{result['name']:8} {result['rows']:4} rows  cuBLAS {cublas:6.1f} us {size / cublas / 1e6:5.2f} TB/s"
    if "cublaslt_us" in result:
        text += f" (Lt {result['cublaslt_us']:.1f})"
    if result["tiles"]:
        best = result["tiles"][0]
        tile = tile_of(best["tile"])
        text += f"  ours {best['us']:6.1f} us {size / best['us'] / 1e6:5.2f} TB/s  x{cublas / best['us']:.2f}"
        other = "no PDL" if result["pdl"] else "PDL"
        text += f"  ({other} {result['other_pdl_us']:.1f}, not fused {result['not_fused_us']:.1f})  {short(tile)}"
        for second in result["tiles"][1:4]:
            text += f"\n{'':14}then {second['us']:6.1f} us  {short(tile_of(second['tile']))}"
    for failure in result["failed"]:
        text += f"\n    failed: {short(tile_of(failure['tile']))}: {failure['why']}"
    return text


def tile_of(facts: dict[str, Any]) -> Choice:
    """A tile or stream of its fields."""
    return Stream(**facts) if "programs" in facts else Tile(**facts)


def short(choice: Any) -> str:
    """A choice as it is written in a table: the fields that are not what they are by themselves."""
    shown = []
    for field in fields(choice):
        value = getattr(choice, field.name)
        if field.name != "plain" and value != field.default:
            shown.append(repr(value) if field.default is MISSING else f"{field.name}={value!r}")
    return f"{type(choice).__name__}({', '.join(shown)})"


# ---------------------------------------------------------------------- the table


def table(results: list[dict[str, Any]]) -> dict[tuple[int, int], Choices]:
    """GEMMS of models/gemm.py from results: at each number of rows the best tile where it beats cuBLAS."""
    found: dict[tuple[int, int], Choices] = {}
    for result in sorted(results, key=lambda r: r["rows"]):
        best = result["tiles"][0] if result["tiles"] else None
        wins = best is not None and best["us"] <= GAIN * result["cublas_us"]
        choice = tile_of(best["tile"]) if best is not None and wins else None
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


def packed_table(results: list[dict[str, Any]]) -> dict[tuple[Any, int, int], Choices]:
    """PACKED of models/packed_tiles.py from results with quantized weights."""
    found: dict[tuple[Any, int, int], Choices] = {}
    for kind in {result["kind"] for result in results if result.get("kind")}:
        own = [result for result in results if result.get("kind") == kind]
        found |= {(kind, *key): choices for key, choices in table(own).items()}
    return found


def source(gemms: Mapping[Any, Choices]) -> Iterator[str]:
    """The table as Python."""
    for key, choices in gemms.items():
        inner = ", ".join(f"({most}, {'None' if tile is None else short(tile)})" for most, tile in choices)
        yield f"    {key}: ({inner},),"


def read_table(path: str) -> dict[tuple[int, int], Choices]:
    """The table of a JSON that this benchmark wrote."""
    results = json.loads(Path(path).read_text())["results"]
    return table([result for result in results if not result.get("kind")])


def chosen(shapes: list[str], only: list[str] | None) -> list[tuple[Case, list[int]]]:
    """Cases and their numbers of rows, of shapes like "qwen2-7b:1,8"."""
    found = []
    for shape in shapes:
        model, _, rows = shape.partition(":")
        for case in cases(model):
            if not only or case.name in only:
                found.append((case, [int(n) for n in rows.split(",")]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="MODEL:ROWS,ROWS")
    parser.add_argument("--only", nargs="+", help="names of cases: gate_up down qkv o head")
    parser.add_argument("--seconds", type=float, default=240, help="stop measuring after this long")
    parser.add_argument("--threads", type=int, default=12, help="compile this many kernels at once")
    parser.add_argument("--pdl-rows", type=int, help="PDL up to this many rows, instead of what a decoder does")
    parser.add_argument(
        "--quantization", choices=SCHEMES, help="measure quantized weights; cuBLAS is what else they do"
    )
    parser.add_argument("--json", help="write all figures to this file, after every case")
    args = parser.parse_args()
    todo = chosen(args.shapes, args.only)
    if not torch.cuda.is_available():
        sys.exit("perf.gemm needs a GPU")
    deadline = time.monotonic() + args.seconds
    gc.freeze()  # every capture may collect garbage
    bench = Bench(torch.device("cuda"), args.pdl_rows, SCHEMES.get(args.quantization))
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in args.shapes:
            here = [(case, rows) for case, rows in todo if case.model == shape.partition(":")[0]]
            if time.monotonic() > deadline:
                print(f"no time left for {shape}")
                continue
            work = [(case, n, tile) for case, rows in here for n in rows for tile in bench.candidates(case, n)]
            compile_all(bench, work, args.threads, deadline)
            for case, rows in here:
                if time.monotonic() > deadline:
                    print(f"no time left for {case.model} {case.name}")
                    continue
                print(f"{case.model} {case.name} [{case.outputs}, {case.inputs}] and {case.follows}")
                bench.load(case)
                for n in rows:
                    results.append(measure(bench, case, n, deadline))
                    print("  " + line(results[-1]), flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps({"results": results}, indent=1) + "\n")
    print("GEMMS = {", *source(table([result for result in results if not result["kind"]])), "}", sep="\n")
    print("PACKED = {", *source(packed_table(results)), "}", sep="\n")


if __name__ == "__main__":
    main()
