"""Steps as CUDA graphs (prepare, forward, draw, advance), at a ladder of sizes: decode steps, and mixed ones.

Used by the stepper. A batch runs in the next larger graph, the rest of its rows being the padding slot. Graphs are
captured on first need, so the server answers at once, and one by one while the executor idles.
Invariant: a graph reads the slot arrays, the sampler's state and its own inputs, all at fixed addresses, and nothing
from the host; its intermediates lie in a pool that all graphs share, since they run one after another.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..sampler.reference import Sampled
from ..sampler.upload import upload
from .ledger import ladder, mixed_ladder
from .mixed_step import Bucket, MixedStep, fits
from .runner import ChunkWork, Runner, StepLogits

if TYPE_CHECKING:
    from .stepper import Drawer

Drawn = tuple[Tensor, Sampled]
"""(out int32 [2, rows]: see SlotArrays.advance, what was drawn)"""


class Capturer:
    """Captures steps into graphs that share a pool."""

    def __init__(self, runner: Runner, drawer: "Drawer") -> None:
        self.runner = runner
        self.drawer = drawer
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(runner.device)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def capture(self, forward: Callable[[], StepLogits], mode: Hashable) -> "Captured":
        """Run the step once, on whatever its inputs are, so that everything is compiled, then capture it."""
        group = self.runner.decoder.group
        with nullcontext() if group is None else group.muted():  # other ranks may have this graph already
            self._step(forward, mode)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # The default mode would forbid the thread that waits for earlier steps to go on.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out, sampled = self._step(forward, mode)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return Captured(graph, out, sampled)

    def _step(self, forward: Callable[[], StepLogits], mode: Hashable) -> Drawn:
        f = forward()
        sampled = self.drawer.draw(f.logits, f.slots, f.positions, mode, None)
        out = torch.empty(2, len(f.slots), dtype=torch.int32, device=self.runner.device)
        self.runner.slots.advance(f.slots, f.positions, sampled.ids, sampled.finish, out)
        return out, sampled


@dataclass(slots=True)
class Captured:
    """A graph and what it leaves."""

    graph: torch.cuda.CUDAGraph
    out: Tensor
    sampled: Sampled

    def replay(self) -> Drawn:
        """Launch it; what it returns is valid until the next replay of any graph."""
        self.graph.replay()
        return self.out, self.sampled


B = TypeVar("B", bound=Hashable)
"""The size of a step."""


class Ladder(ABC, Generic[B]):
    """Graphs by (bucket, sampler mode), captured at need or ahead."""

    def __init__(self, capturer: Capturer, buckets: list[B]) -> None:
        self.capturer = capturer
        self.runner = capturer.runner
        self.buckets = buckets
        self._graphs: dict[tuple[B, Hashable], Captured] = {}

    def modes(self) -> list[Hashable]:
        """The sampler modes that were needed."""
        return list(dict.fromkeys(mode for _, mode in self._graphs))

    def capture_next(self, modes: list[Hashable]) -> bool:
        """Capture the smallest bucket that lacks one of these modes; False when none does."""
        for mode in modes:
            for bucket in self.buckets:
                if (bucket, mode) not in self._graphs:
                    self._graph(bucket, mode)
                    return True
        return False

    def _graph(self, bucket: B, mode: Hashable) -> Captured:
        captured = self._graphs.get((bucket, mode))
        if captured is None:
            captured = self._graphs[bucket, mode] = self.capturer.capture(self._padded(bucket), mode)
        return captured

    @abstractmethod
    def _padded(self, bucket: B) -> Callable[[], StepLogits]:
        """Fill the bucket's inputs with padding; returns the forward that reads them."""


class DecodeGraphs(Ladder[int]):
    """Decode steps; a bucket is its rows."""

    def __init__(self, capturer: Capturer, max_batch: int) -> None:
        super().__init__(capturer, ladder(max_batch))
        self.max_batch = max_batch
        self.padding = self.runner.slots.padding
        self.rows = torch.full((max_batch,), self.padding, dtype=torch.int32, device=self.runner.device)
        self._host_rows = np.full(max_batch, self.padding, dtype=np.int32)

    def replay(self, host_rows: np.ndarray, mode: Hashable) -> Drawn | None:
        """Launch one step of the slots [B]; None if no graph is that large."""
        if len(host_rows) > self.max_batch:
            return None
        bucket = next(b for b in self.buckets if b >= len(host_rows))
        captured = self._graph(bucket, mode)
        wanted = self._host_rows.copy()
        wanted[: len(host_rows)] = host_rows
        wanted[len(host_rows) :] = self.padding
        if not np.array_equal(wanted, self._host_rows):
            self._host_rows = wanted
            self.rows.copy_(upload(wanted, self.runner.device))
        return captured.replay()

    def _padded(self, bucket: int) -> Callable[[], StepLogits]:
        self.rows.fill_(self.padding)
        self._host_rows[:] = self.padding
        rows = self.rows[:bucket]
        return lambda: self.runner.decode(rows, None)


class MixedGraphs(Ladder[Bucket]):
    """Decode rows beside small prefill chunks."""

    def __init__(self, capturer: Capturer, max_batch: int) -> None:
        super().__init__(capturer, [Bucket(rows, tokens) for rows, tokens in mixed_ladder(max_batch)])
        self._steps: dict[Bucket, MixedStep] = {}

    def replay(self, decoding: np.ndarray, chunks: list[ChunkWork], mode: Hashable) -> Drawn | None:
        """Launch one step of the slots `decoding` and the chunks; None if that does not fit."""
        bucket = next((b for b in self.buckets if fits(decoding, chunks, b)), None)
        if bucket is None:
            return None
        captured = self._graph(bucket, mode)
        self._steps[bucket].fill(decoding, chunks)
        return captured.replay()

    def _padded(self, bucket: Bucket) -> Callable[[], StepLogits]:
        step = self._steps.get(bucket)
        if step is None:
            step = self._steps[bucket] = MixedStep(self.runner, bucket)
        step.clear()
        return step.forward


class StepGraphs:
    """All of them. `max_batch`: rows of the largest graph."""

    def __init__(self, runner: Runner, drawer: "Drawer", max_batch: int) -> None:
        self.drawer = drawer
        capturer = Capturer(runner, drawer)
        self.decode = DecodeGraphs(capturer, max_batch)
        self.mixed = MixedGraphs(capturer, max_batch)

    def replay(self, decoding: np.ndarray, chunks: list[ChunkWork], mode: Hashable) -> Drawn | None:
        """Launch a step that draws; None where it must run eagerly."""
        return self.mixed.replay(decoding, chunks, mode) if chunks else self.decode.replay(decoding, mode)

    def capture_next(self) -> bool:
        """Capture one more graph of the commonest modes; False when all are there."""
        common = self.drawer.mode(np.array([self.decode.padding]))
        modes = list(dict.fromkeys([common, *self.decode.modes()]))
        return self.decode.capture_next(modes) or self.mixed.capture_next(modes)
