"""Stepper: one step of the batch from launch to host results: forward, draw, advance, copy out.

Used by the executor, the same on CPU and GPU: `launch` hands back a Step, whose rows can be read once it is `ready`.
On a CPU that is at once. On a GPU nothing is waited for: decode steps are CUDA graph replays, results come by copies
into pinned memory behind an event, so that any number of steps can be launched ahead.
Invariant: steps are ready in the order of their launches; the pinned memory of a step belongs to it alone.
"""

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampler.reference import Sampled
from .graphs import StepGraphs
from .pooler import Pooler
from .runner import ChunkWork, Runner, StepLogits

MOST_SCORED: Final = 128
"""Tokens that are scored at once: their logits take 80 MB with a vocabulary of 150,000."""


class Drawer(Protocol):
    """The sampler, as a step uses it."""

    def mode(self, host_slots: np.ndarray) -> Hashable:
        """Return which work the slots' parameters need: what a CUDA graph must be captured for."""

    def draw(
        self, logits: Tensor, slots: Tensor, positions: Tensor, mode: Hashable, host_slots: np.ndarray | None
    ) -> Sampled:
        """Draw a token per row. With host_slots None it is being captured."""

    def score(self, logits: Tensor, host_slots: np.ndarray, ids: np.ndarray) -> Sampled:
        """Return the logprobs of given tokens, ids [rows] of the slots [rows]."""


@dataclass(slots=True)
class StepRows:
    """A step's results on the host; arrays [rows] in the order of `Step.slots`, without rows that were done before."""

    slots: np.ndarray
    ids: np.ndarray
    """int32"""
    finish: np.ndarray
    """uint8"""
    logprobs: np.ndarray | None
    top_n: int
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    listed: np.ndarray | None
    live: np.ndarray
    """bool [launched rows]: which of them these are."""
    scores: Sampled | None
    """Of the chunks' targets, on the host."""


class Step:
    """A launched step. `done_ns` (CLOCK_MONOTONIC-like perf_counter) is set once it is ready."""

    __slots__ = ("_event", "_out", "_sampled", "_vectors", "done_ns", "scores", "slots")

    def __init__(
        self,
        slots: np.ndarray,
        out: Tensor | None,
        sampled: Sampled | None,
        event: torch.cuda.Event | None,
        scores: Sampled | None = None,
        vectors: Tensor | None = None,
    ) -> None:
        self.slots = slots
        self.scores = scores
        self._vectors = vectors
        self._out = out
        self._sampled = sampled
        self._event = event
        self.done_ns = 0 if event is not None else time.perf_counter_ns()

    @property
    def ready(self) -> bool:
        """Whether the results are on the host."""
        return self.done_ns != 0

    def wait(self) -> None:
        """Block this thread until the results are there. Raises what the device's work raised."""
        if self._event is not None:
            self._event.synchronize()
            self.done_ns = time.perf_counter_ns()

    def vectors(self) -> np.ndarray | None:
        """Return what the prompts were pooled to, float32 [len(slots), width]; None where none was to be."""
        return None if self._vectors is None else self._vectors.numpy()

    def rows(self) -> StepRows | None:
        """Return the results; None for a step that drew nothing."""
        if self._out is None or self._sampled is None:
            return None
        ids, finish = self._out.numpy()
        live = ids >= 0
        s = self._sampled

        def part(t: Tensor | None, width: int | None = None) -> np.ndarray | None:
            return (
                None if t is None else t.numpy()[: len(live), :width][live] if width else t.numpy()[: len(live)][live]
            )

        return StepRows(
            slots=self.slots[live],
            ids=ids[live],
            finish=finish[live].astype(np.uint8),
            logprobs=part(s.logprobs),
            top_n=s.top_n,
            top_ids=part(s.top_ids) if s.top_n else None,
            top_logprobs=part(s.top_logprobs) if s.top_n else None,
            listed=part(s.listed),
            live=live,
            scores=self.scores,
        )


class Stepper:
    """`graphs` replay the steps that fit in one, where there are any; all else runs eagerly. With a `pooler` nothing is
    drawn: steps are of chunks only, and end in vectors."""

    def __init__(self, runner: Runner, drawer: Drawer, graphs: StepGraphs | None, pooler: Pooler | None = None) -> None:
        self.runner = runner
        self.drawer = drawer
        self.graphs = graphs
        self.pooler = pooler
        self.device = runner.device
        self.exact = runner.exact
        self._on_launch: Callable[[Step], None] | None = None

    def on_launch(self, callback: Callable[[Step], None]) -> None:
        """Call `callback` with each step that is not ready when launched: who waits for it."""
        self._on_launch = callback

    @torch.inference_mode()
    def launch(self, decoding: np.ndarray, chunks: list[ChunkWork]) -> Step:
        """Start one step over the decoding slots (distinct, int) and the chunks; deltas were flushed before."""
        if self.pooler is not None:
            return self._pool(self.pooler, chunks)
        drawing = [c.slot for c in chunks if c.draws]
        slots = np.concatenate([decoding, np.array(drawing, dtype=np.int64)]).astype(np.int64)
        if not len(slots) and not chunks:
            return Step(slots, None, None, None)
        mode = self.drawer.mode(slots) if len(slots) else None
        if self.graphs is not None and len(slots):
            replayed = self.graphs.replay(decoding, chunks, mode)
            if replayed is not None:
                return self._collect(slots, replayed[0][:, : len(slots)], replayed[1])
        forward = self._forward(decoding, chunks)
        scores = None if forward.scored is None else self._score(forward.scored, chunks)
        if not len(slots):
            return self._collect(slots, None, None, scores)
        sampled = self.drawer.draw(forward.logits, forward.slots, forward.positions, mode, slots)
        out = torch.empty(2, len(slots), dtype=torch.int32, device=self.device)
        self.runner.slots.advance(forward.slots, forward.positions, sampled.ids, sampled.finish, out)
        return self._collect(slots, out, sampled, scores)

    def _pool(self, pooler: Pooler, chunks: list[ChunkWork]) -> Step:
        """Compute prompt chunks; the step's slots are those whose prompts end."""
        slots = np.array([c.slot for c in chunks if c.ends], dtype=np.int64)
        if not chunks:
            return Step(slots, None, None, None)
        vectors = pooler.vectors(self.runner.states(chunks, pooler.rows(chunks)), chunks)
        return self._collect(slots, None, None, vectors=vectors if len(slots) else None)

    def _score(self, hidden: Tensor, chunks: list[ChunkWork]) -> Sampled:
        """The logprobs of the chunks' targets, some at a time; hidden [targets, hidden]."""
        slots = np.repeat([c.slot for c in chunks], [len(c.targets) for c in chunks])
        targets = np.concatenate([c.targets for c in chunks])
        parts = []
        for at in range(0, len(targets), MOST_SCORED):
            part = slice(at, at + MOST_SCORED)
            parts.append(self.drawer.score(self.runner.decoder.logits(hidden[part]), slots[part], targets[part]))
        return parts[0] if len(parts) == 1 else joined(parts)

    def _forward(self, decoding: np.ndarray, chunks: list[ChunkWork]) -> StepLogits:
        if chunks:
            return self.runner.mixed(decoding, chunks, self.exact)
        return self.runner.decode(self.runner.upload_rows(decoding), decoding if self.exact else None)

    def _collect(
        self,
        slots: np.ndarray,
        out: Tensor | None,
        sampled: Sampled | None,
        scores: Sampled | None = None,
        vectors: Tensor | None = None,
    ) -> Step:
        """Start the copies to the host."""
        if self.device.type == "cpu":
            return Step(slots, out, sampled, None, scores, vectors)
        if sampled is not None:
            sampled = logprobs_to_host(sampled, len(slots))
        if scores is not None:
            scores = logprobs_to_host(scores, None)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        step = Step(slots, to_host(out), sampled, event, scores, to_host(vectors))
        event.record()
        if self.exact:
            step.wait()
        elif self._on_launch is not None:
            self._on_launch(step)
        return step

    def prepare_ahead(self) -> bool:
        """While there is time measure a product of prefills or capture a graph; False when all is done."""
        if self.runner.decoder.ops.tune_ahead():
            return True
        return self.graphs is not None and self.graphs.capture_next()


def joined(parts: list[Sampled]) -> Sampled:
    """Return the scores of some rows after another, each as wide as the widest."""
    top_n = max(part.top_n for part in parts)

    def rows(tensors: list[Tensor | None], absent: float) -> Tensor | None:
        there = [t for t in tensors if t is not None]
        if not there:
            return None
        if there[0].dim() == 1:
            return torch.cat(there)
        width = max(t.shape[1] for t in there)
        given = (there[0].new_empty(len(p.ids), 0) if t is None else t for p, t in zip(parts, tensors, strict=True))
        return torch.cat([F.pad(t, (0, width - t.shape[1]), value=absent) for t in given])

    return Sampled(
        torch.cat([part.ids for part in parts]), torch.cat([part.finish for part in parts]),
        rows([part.logprobs for part in parts], math.nan), top_n, rows([part.top_ids for part in parts], -1),
        rows([part.top_logprobs for part in parts], math.nan), rows([part.listed for part in parts], math.nan),
    )  # fmt: skip


def logprobs_to_host(sampled: Sampled, rows: int | None) -> Sampled:
    """Start the copies of the logprobs of the first rows, or of all, into pinned memory; ids stay where they are."""
    return Sampled(
        sampled.ids, sampled.finish,
        to_host(sampled.logprobs, rows), sampled.top_n, to_host(sampled.top_ids, rows),
        to_host(sampled.top_logprobs, rows), to_host(sampled.listed, rows),
    )  # fmt: skip


def to_host(tensor: Tensor | None, rows: int | None = None) -> Tensor | None:
    """Start the copy of a tensor, or of its first rows, into pinned memory."""
    if tensor is None:
        return None
    part = tensor if rows is None else tensor[:rows]
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
