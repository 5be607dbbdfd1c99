"""Decode attention alone, over ways to launch it, beside the floor and FlashInfer where that can be imported.

`python -m actorserve.perf.attention [--shapes qwen2-0.5b:1,64 qwen2-7b:1,32,128,256] [--context 1024] [--seconds 120]
[--json FILE]`. Each figure is a CUDA graph of launches over rotating layers of a cache that the L2 does not hold, its
pages in random order. Prints the best launches of each batch beside what the table in models/triton_attention.py says,
then lines for that table. FlashInfer's is the time of its kernel; what its plan costs on the host is not in it.
"""

import argparse
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actorserve.models.attention import AttentionBackend, AttentionPlan
from actorserve.models.batch import Batch
from actorserve.models.families import spec_of
from actorserve.models.floors import attention_seconds
from actorserve.models.kv_cache import KVCache
from actorserve.models.shapes import KNOWN
from actorserve.models.spec import Spec
from actorserve.models.triton_attention import MOST_PROGRAMS, Launch, TritonAttention, launch_for, splits_for
from actorserve.perf import limits
from actorserve.perf.replay import median_milliseconds

SHAPES = ("qwen2-0.5b:1,64", "qwen2-7b:256,1,32,128")
PAGE = 16
ROTATED = 256 << 20
"""Bytes of keys and values that a graph goes through: several times the L2."""
SMS = 132


@dataclass
class Inputs:
    """A batch of sequences of the same length, and its queries."""

    spec: Spec
    batch: Batch
    kv: KVCache
    q: Tensor


def inputs(model: str, rows: int, context: int, device: torch.device) -> Inputs:
    """Random keys and values for `rows` sequences, in as many layers as make ROTATED bytes."""
    base = spec_of(KNOWN[model])
    per_layer = rows * context * 2 * base.kv_heads * base.head_dim * 2
    spec = replace(base, layers=max(2, min(256, -(-ROTATED // per_layer))), windows=())
    pages = -(-context // PAGE)
    kv = KVCache(spec, rows * pages, PAGE, device, torch.bfloat16)
    kv.storage.normal_()
    tables = torch.randperm(rows * pages, device=device, dtype=torch.int32).view(rows, pages)
    lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
    empty = torch.zeros(rows, dtype=torch.int32, device=device)
    batch = Batch(empty, empty, empty, tables, lengths, context, None, decode_lengths_host=lengths.cpu().long().numpy())
    q = torch.randn(rows, spec.heads, spec.head_dim, device=device, dtype=torch.bfloat16)
    return Inputs(spec, batch, kv, q)


def launches(problems: int, head_dim: int) -> list[Launch]:
    """Ways to launch so many (row, KV head) pairs: block, warps, stages, programs as they make different splits, and
    blocks ahead.

    A block's keys are found through the page table, itself a load, so two stages are one block under way: 2 to 4 stages
    have one, 5 and 6 two, 7 three.
    """
    shapes = [
        (64, 4, 2), (64, 4, 5), (64, 8, 3), (64, 8, 5), (64, 4, 3), (128, 8, 2), (128, 4, 2), (32, 4, 5), (64, 4, 7),
        (128, 8, 5), (32, 4, 7), (64, 8, 7), (64, 8, 2), (32, 4, 3), (64, 2, 5), (128, 4, 5), (32, 2, 7), (64, 4, 1),
    ]  # fmt: skip
    found, seen = [], set()
    for programs, most in ((4, 16), (2, 16), (8, 16), (1, 16), (8, 32), (8, 64)):
        for block, warps, stages in shapes:
            for ahead in (0, 1, 2) if stages <= 3 else (0,):
                launch = Launch(block, warps, stages, min(MOST_PROGRAMS, programs * SMS), most, ahead)
                key = (block, warps, stages, splits_for(problems, launch), ahead)
                if key not in seen and 2 * block * head_dim * (stages + 2 * ahead + 1) <= 200 << 10:
                    seen.add(key)
                    found.append(launch)
    return found


def microseconds(plan: AttentionPlan, case: Inputs) -> float:
    """Time of a layer's attention, in a CUDA graph of launches over the layers."""
    layers = [i % case.spec.layers for i in range(max(24, case.spec.layers))]
    plan.run(0, case.q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            plan.run(layer, case.q)
    return 1e3 * median_milliseconds(graph, 5) / len(layers)


def attempt(run: Callable[[], float]) -> tuple[float | None, str]:
    """run()'s result, or why there is none."""
    try:
        return run(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[:200]}"


def compile_all(case: Inputs, todo: list[Launch], threads: int) -> None:
    """Compile the kernels of all launches side by side; failures show up later."""

    def one(launch: Launch) -> None:
        with torch.inference_mode():
            attempt(lambda: float(TritonAttention(launch).plan(case.batch, case.kv, case.spec).run(0, case.q)[0, 0]))

    one(todo[0])
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, todo[1:]))
    torch.cuda.synchronize()


def backend_of_flashinfer(device: torch.device) -> AttentionBackend | None:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    from actorserve.models.flashinfer_attention import FlashInferAttention

    return FlashInferAttention(device)


def measure(model: str, rows: int, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Time the table's launch, FlashInfer and the others; microseconds of a layer."""
    device = torch.device("cuda")
    case = inputs(model, rows, args.context, device)
    spec = case.spec
    problems = rows * spec.kv_heads
    floor = 1e6 * attention_seconds(spec, rows * args.context, limits.measured()[1])
    result: dict[str, Any] = {"model": model, "rows": rows, "context": args.context, "floor_us": floor, "failed": []}
    other = backend_of_flashinfer(device)
    if other is not None:
        result["flashinfer_us"], why = attempt(lambda: microseconds(other.plan(case.batch, case.kv, spec), case))
        result["failed"] += [["flashinfer", why]] if why else []
    now = launch_for(spec.head_dim, problems)
    plain = TritonAttention(now).plan(case.batch, case.kv, spec)
    expected = plain.run(0, case.q).float()
    result["now"] = {"us": microseconds(plain, case), "launch": asdict(now)}
    todo = launches(problems, spec.head_dim)
    compile_all(case, todo, args.threads)
    figures = []
    for launch in todo:
        if time.monotonic() > deadline:
            result["cut_short"] = True
            break
        plan = TritonAttention(launch).plan(case.batch, case.kv, spec)
        us, why = attempt(lambda plan=plan: microseconds(plan, case))  # type: ignore[misc]
        if us is not None and (plan.run(0, case.q).float() - expected).norm() > 1e-2 * expected.norm():
            us, why = None, "another result"
        if us is not None:
            figures.append((us, launch))
        else:
            result["failed"].append([str(launch), why])
    figures.sort(key=lambda item: item[0])
    result["launches"] = [{"us": us, "launch": asdict(launch)} for us, launch in figures]
    return result


def short(launch: Launch, problems: int) -> str:
    of = f"Launch({launch.block}, {launch.warps}, {launch.stages}, 132 * {launch.programs // SMS}, {launch.most}"
    of += f", {launch.ahead})"
    return f"{of} in {splits_for(problems, launch)}"


def tell(result: dict[str, Any]) -> None:
    """Print a result."""
    spec = spec_of(KNOWN[result["model"]])
    problems, floor, now = result["rows"] * spec.kv_heads, result["floor_us"], result["now"]
    flashinfer = f"  FlashInfer {result['flashinfer_us']:.1f} us" if result.get("flashinfer_us") else ""
    print(
        f"{result['model']} {result['rows']:4} rows x {result['context']}: floor {floor:.1f} us{flashinfer}  "
        f"now {now['us']:.2f} us ({floor / now['us']:.2f})  {short(Launch(**now['launch']), problems)}"
    )
    for figure in result["launches"][:6]:
        launch = Launch(**figure["launch"])
        print(f"    {figure['us']:7.2f} us  {floor / figure['us']:.2f}  {short(launch, problems)}")
    for what, why in result["failed"]:
        print(f"    failed: {what}: {why}")
    if result["launches"]:
        print(f"    head_dim {spec.head_dim}: ({problems}, {short(launch_of(result), problems).partition(' in ')[0]}),")
    sys.stdout.flush()


def launch_of(result: dict[str, Any]) -> Launch:
    """The best launch of a result."""
    return Launch(**result["launches"][0]["launch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="MODEL:ROWS,ROWS")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=120, help="stop measuring after this long")
    parser.add_argument("--threads", type=int, default=12, help="compile this many kernels at once")
    parser.add_argument("--json", help="write all figures to this file, after every case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("perf.attention needs a GPU")
    limits.measured()
    deadline = time.monotonic() + args.seconds
    gc.freeze()  # every capture may collect garbage
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in args.shapes:
            model, _, rows = shape.partition(":")
            for n in map(int, rows.split(",")):
                if time.monotonic() > deadline:
                    print(f"no time left for {model} {n}")
                    continue
                results.append(measure(model, n, args, deadline))
                tell(results[-1])
                torch.cuda.empty_cache()
                if args.json:
                    Path(args.json).write_text(json.dumps({"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
