"""DecodeGraphs: whole decode steps (prepare, forward, draw, advance) as CUDA graphs, at a ladder of batch sizes.

Used by the stepper. A batch runs in the next larger graph, the rest of its rows being the padding slot. Graphs are
captured on first need, so the server answers at once, and one by one while the executor idles.
Invariant: a graph reads the slot arrays, the sampler's state and `rows`, all at fixed addresses, and nothing from the
host; its intermediates lie in a pool that all graphs share, since they run one after another.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..sampler.reference import Sampled
from ..sampler.upload import upload
from .ledger import ladder
from .runner import Runner

if TYPE_CHECKING:
    from .stepper import Drawer


@dataclass(slots=True)
class Captured:
    """A graph and what it leaves."""

    graph: torch.cuda.CUDAGraph
    out: Tensor
    """int32 [2, bucket]: see SlotArrays.advance."""
    sampled: Sampled


class DecodeGraphs:
    """Graphs by (bucket, sampler mode)."""

    def __init__(self, runner: Runner, drawer: "Drawer", max_batch: int) -> None:
        self.runner = runner
        self.drawer = drawer
        self.buckets = ladder(max_batch)
        self.max_batch = max_batch
        self.padding = runner.slots.padding
        self.rows = torch.full((max_batch,), self.padding, dtype=torch.int32, device=runner.device)
        self._host_rows = np.full(max_batch, self.padding, dtype=np.int32)
        self._graphs: dict[tuple[int, Hashable], Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(runner.device)  # type: ignore[no-untyped-call]

    def covers(self, batch: int) -> bool:
        """Whether a batch of this size runs as a graph."""
        return 0 < batch <= self.max_batch

    def replay(self, host_rows: np.ndarray, mode: Hashable) -> tuple[Tensor, Sampled]:
        """Launch one step of the slots [B]; returns (out [2, bucket], sampled), valid until the next replay."""
        bucket = next(b for b in self.buckets if b >= len(host_rows))
        captured = self._graphs.get((bucket, mode)) or self._capture(bucket, mode)
        wanted = self._host_rows.copy()
        wanted[: len(host_rows)] = host_rows
        wanted[len(host_rows) :] = self.padding
        if not np.array_equal(wanted, self._host_rows):
            self._host_rows = wanted
            self.rows.copy_(upload(wanted, self.runner.device))
        captured.graph.replay()
        return captured.out, captured.sampled

    def capture_next(self) -> bool:
        """Capture the smallest bucket that lacks the commonest modes; False when none does."""
        for mode in dict.fromkeys([self.drawer.mode(np.array([self.padding])), *(m for _, m in self._graphs)]):
            for bucket in self.buckets:
                if (bucket, mode) not in self._graphs:
                    self._capture(bucket, mode)
                    return True
        return False

    @torch.inference_mode()
    def _capture(self, bucket: int, mode: Hashable) -> Captured:
        """Run the step once on padding rows, so that everything is compiled, then capture it."""
        self.rows.fill_(self.padding)
        self._host_rows[:] = self.padding
        self._step(bucket, mode)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # The default mode would forbid the thread that waits for earlier steps to go on.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out, sampled = self._step(bucket, mode)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        captured = self._graphs[bucket, mode] = Captured(graph, out, sampled)
        return captured

    def _step(self, bucket: int, mode: Hashable) -> tuple[Tensor, Sampled]:
        rows = self.rows[:bucket]
        forward = self.runner.decode(rows, None)
        sampled = self.drawer.draw(forward.logits, forward.slots, forward.positions, mode, None)
        out = torch.empty(2, bucket, dtype=torch.int32, device=self.runner.device)
        self.runner.slots.advance(rows, forward.positions, sampled.ids, sampled.finish, out)
        return out, sampled
