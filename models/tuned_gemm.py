"""The GPU library's GEMMs, each by the algorithm that is fastest here: cuBLASLt's candidates, measured once.

Used by gemm.py for the products of a prefill. torch runs the first candidate of the library's heuristic, which at 8,192
rows of Qwen2-7B's gate-up product takes 3.40 ms on an H200 where the fastest takes 3.19. Products are measured while
the executor idles; what won is kept in the cache folder by GPU and library, so that the next start has it and results
stay the same. In decode steps another than torch's runs only where torch's clears memory before its kernel. Tried and
not kept: measuring for decode steps. What is fastest alone at 256 rows (gate-up: 108 us instead of 114) made whole
steps 5 % slower, and at 128 rows none of the six fastest of each product made them faster; a GPU at its limit of power
is another one (perf/decode.py).
Invariant: any other product, and one that torch multiplies as fast, is torch's.
"""

import contextlib
import json
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import cache_folder
from .cublaslt import KERNEL, MEMSET, Algorithm, CublasLt, Plan, Product

WORKSPACE: Final = 32 << 20
FEWEST: Final = 768
"""Rows from which products are measured: no decode step has as many."""
DECODED: Final = range(72, 257, 8)
"""Rows of steps that are graphs, at which an algorithm is avoided that clears memory first.

Gate and up of Qwen2-7B at 256 rows: 5 us between kernels, and so many nodes that launching steps waits for the device.
"""
COLD_BYTES: Final = 128 << 20
"""Weights that are multiplied in turn when a product is measured: more than the L2 cache holds."""
MOST_WEIGHTS: Final = 8
ROUNDS: Final = 5
FINALISTS: Final = 4
GAIN: Final = 0.99
"""Of torch's time that a candidate may take at most to be chosen."""
PLANS: Final = 1024
"""Descriptions of products that are kept."""
Weights = list[tuple[Tensor, Tensor | None]]
"""Weights and biases."""


def bucket(rows: int) -> int:
    """The number of rows whose choice `rows` share: the power of two that is nearest in ratio."""
    below = 1 << (rows.bit_length() - 1)
    return below if rows * rows < 2 * below * below else 2 * below


class TunedGemms:
    """The choices of one device. For one thread and one stream."""

    def __init__(self, device: torch.device, prefill_rows: tuple[int, ...] = (), folder: Path | None = None) -> None:
        """`prefill_rows`: what `tune_ahead` measures, in this order; `folder`: instead of the cache's.

        Raises OSError or RuntimeError if the library cannot be had.
        """
        self.library = CublasLt(device, WORKSPACE)
        self.prefill_rows = [rows for rows in dict.fromkeys(bucket(r) for r in prefill_rows) if rows >= FEWEST]
        self.device = device
        name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
        self._file = (folder or cache_folder() / "gemms") / f"{name}-{self.library.version}.json"
        self._chosen = read_choices(self._file)
        self._weights: dict[Product, Weights] = {}
        """By product with no rows."""
        self._plans: OrderedDict[Product, tuple[Plan, Algorithm] | None] = OrderedDict()
        """None: torch's."""
        self._measured = False

    def register(self, weight: Tensor, bias: Tensor | None, result: torch.dtype) -> None:
        """Tell of a weight that will be multiplied."""
        alike = self._weights.setdefault(product_of(0, weight, bias, result), [])
        if len(alike) < MOST_WEIGHTS:
            alike.append((weight, bias))
        self._measured = False

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, result: torch.dtype) -> Tensor | None:
        """x [rows, inputs] @ weight.T + bias in dtype `result`, or None where torch is to do it."""
        rows = len(x)
        if (rows < FEWEST and rows not in DECODED) or not x.is_contiguous() or x.data_ptr() % 16:
            return None
        product = product_of(rows, weight, bias, result)
        if product not in self._plans and rows < FEWEST:
            self._keep(product, self._plain(product, x, weight, bias))
        chosen = self._plan(product)
        if chosen is None:
            return None
        plan, algorithm = chosen
        out = torch.empty(rows, product.outputs, dtype=result, device=x.device)
        plan.run(algorithm, x, weight, bias, out)
        return out

    def tune_ahead(self) -> bool:
        """Measure one more product of a prefill, for about a second at most; False when all were."""
        for rows in () if self._measured else self.prefill_rows:
            for kind, weights in self._weights.items():
                product = replace(kind, rows=rows)
                # The head, whose result is wider, multiplies one row of each prompt.
                if product.result == product.dtype and key_of(product) not in self._chosen:
                    self._tune(product, weights[: max(1, -(-COLD_BYTES // weights[0][0].nbytes))])
                    write_choices(self._file, self._chosen)
                    return True
        self._measured = True
        return False

    # ------------------------------------------------------------------ measuring

    def _tune(self, product: Product, weights: Weights) -> None:
        """Choose for a product and those that share its choice."""
        key = key_of(product)
        plan = Plan(self.library, product)
        try:
            x = torch.randn(product.rows, product.inputs, dtype=product.dtype, device=self.device)
            out = torch.empty(product.rows, product.outputs, dtype=product.result, device=self.device)
            runs = {b"": partial(torch_all, x, weights, product.result)}
            for candidate in self._candidates(plan):
                algorithm = plan.algorithm(candidate)
                if algorithm is not None:
                    runs[candidate] = partial(run_all, plan, algorithm, x, weights, out)
            self._chosen[key] = fastest(runs)
        except torch.OutOfMemoryError:
            self._chosen[key] = b""
        finally:
            torch.cuda.synchronize(self.device)
            plan.close()
        self._forget(key)

    def _candidates(self, plan: Plan) -> list[bytes]:
        """The library's, for this many rows and for numbers around."""
        product = plan.product
        found = plan.candidates()
        for rows in (product.rows // 2, product.rows * 3 // 4, product.rows * 4 // 3, product.rows * 2):
            near = Plan(self.library, replace(product, rows=max(1, rows)))
            try:
                found += near.candidates()
            finally:
                near.close()
        return list(dict.fromkeys(found))

    # ------------------------------------------------------------------ plans

    def _plan(self, product: Product) -> tuple[Plan, Algorithm] | None:
        if product not in self._plans:
            self._keep(product, self._new_plan(product))
        return self._plans[product]

    def _keep(self, product: Product, planned: tuple[Plan, Algorithm] | None) -> None:
        self._plans[product] = planned
        if len(self._plans) > PLANS:
            self._close(self._plans.popitem(last=False)[1])

    def _plain(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Plan, Algorithm] | None:
        """Where the library would clear memory before its kernel: its first candidate that is one kernel, no more."""
        out = torch.empty(product.rows, product.outputs, dtype=product.result, device=x.device)
        plan = Plan(self.library, product)
        for number, candidate in enumerate(plan.candidates()):
            algorithm = plan.algorithm(candidate)
            nodes = [] if algorithm is None else plan.nodes(algorithm, x, weight, bias, out)
            if number == 0 and MEMSET not in nodes:
                break
            if algorithm is not None and nodes == [KERNEL]:
                return plan, algorithm
        plan.close()
        return None

    def _new_plan(self, product: Product) -> tuple[Plan, Algorithm] | None:
        chosen = self._chosen.get(key_of(product), b"")
        if not chosen:
            return None
        plan = Plan(self.library, product)
        algorithm = plan.algorithm(chosen)
        if algorithm is None:
            plan.close()
            return None
        return plan, algorithm

    @staticmethod
    def _close(planned: tuple[Plan, Algorithm] | None) -> None:
        if planned is not None:
            planned[0].close()

    def _forget(self, key: str) -> None:
        """Plans of a choice that is new are made anew."""
        for product in [p for p in self._plans if key_of(p) == key]:
            self._close(self._plans.pop(product))


def product_of(rows: int, weight: Tensor, bias: Tensor | None, result: torch.dtype) -> Product:
    """Return the product of `rows` rows with a weight."""
    outputs, inputs = weight.shape
    return Product(outputs, inputs, rows, bias is not None, weight.dtype, result)


def torch_all(x: Tensor, weights: Weights, result: torch.dtype) -> None:
    """Multiply x with all weights as torch does."""
    for weight, bias in weights:
        by_torch(x, weight, bias, result)


def run_all(plan: Plan, algorithm: Algorithm, x: Tensor, weights: Weights, out: Tensor) -> None:
    """Multiply x with all weights by an algorithm."""
    for weight, bias in weights:
        plan.run(algorithm, x, weight, bias, out)


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, result: torch.dtype) -> Tensor:
    """The product as torch has the library compute it."""
    if result == x.dtype:
        return F.linear(x, weight, bias)
    y = torch.mm(x, weight.t(), out_dtype=result)
    return y if bias is None else y + bias


def fastest(runs: Mapping[bytes, Callable[[], None]]) -> bytes:
    """Whose run takes the shortest time; b"" (torch's) unless another is faster by more than noise.

    All are timed once; the best of these then in turns, so that a clock that falls meanwhile falls for all.
    """
    graphs = {name: captured(run) for name, run in runs.items()}
    once = {name: milliseconds(graph) for name, graph in graphs.items()}
    finalists = dict.fromkeys([b"", *sorted(once, key=lambda name: once[name])[:FINALISTS]])
    times: dict[bytes, list[float]] = {name: [] for name in finalists}
    for _ in range(ROUNDS):
        for name, of_name in times.items():
            of_name.append(milliseconds(graphs[name]))
    medians = {name: statistics.median(of_name) for name, of_name in times.items()}
    best = min(medians, key=lambda name: medians[name])
    return best if medians[best] < GAIN * medians[b""] else b""


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The run as a graph, after one run outside of it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The default mode would forbid the thread that waits for earlier steps to go on.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    graph.replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


# ------------------------------------------------------------------ what is kept


def key_of(product: Product) -> str:
    """The name of a product's choice."""
    names = (str(product.dtype).removeprefix("torch."), str(product.result).removeprefix("torch."))
    sizes = f"{product.outputs}x{product.inputs}x{bucket(product.rows)}"
    return " ".join((sizes, *names, *(["bias"] if product.bias else [])))


def read_choices(file: Path) -> dict[str, bytes]:
    """Return the choices of a file; none if it is missing or no such file."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, str])
        return {key: bytes.fromhex(value) for key, value in found.items()}
    except (OSError, ValueError):
        return {}


def write_choices(file: Path, choices: dict[str, bytes]) -> None:
    """Write them in one piece, if that is possible: they can be measured again."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.partial")
        unfinished.write_text(json.dumps({key: value.hex() for key, value in choices.items()}, indent=1) + "\n")
        unfinished.rename(file)
