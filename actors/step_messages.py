"""A step's results as messages. Used by executor.py."""

from dataclasses import dataclass

import numpy as np

from ..models.stepper import Step, StepRows
from ..sampler.reference import Sampled
from .messages import NOTHING, Pooled, Scores, StepOut


@dataclass(slots=True)
class Launched:
    """A step on its way: which one it is, and the request of each of its rows."""

    window: int
    number: int
    rids: np.ndarray
    """int64 [rows]"""
    step: Step
    launched_ns: int


def raw(array: np.ndarray | None) -> memoryview:
    """Return an array as messages have it; empty for None."""
    return NOTHING if array is None else memoryview(array.tobytes())


def step_out(item: Launched, rids: np.ndarray, rows: StepRows, took_ns: int) -> StepOut:
    """Return the message for a step's rows."""
    return StepOut(
        window=item.window,
        step=item.number,
        rids=raw(rids),
        ids=raw(rows.ids.astype(np.int32)),
        finish=raw(rows.finish),
        logprobs=raw(rows.logprobs),
        top_n=rows.top_n,
        top_ids=raw(rows.top_ids),
        top_logprobs=raw(rows.top_logprobs),
        step_ns=took_ns,
        scores=scores_of(rows.scores),
        listed=raw(rows.listed),
    )


def pooled_of(item: Launched) -> Pooled | None:
    """Return a step's vectors as a message has them."""
    vectors = item.step.vectors()
    return None if vectors is None else Pooled(raw(item.rids), raw(vectors))


def scores_of(given: Sampled | None) -> Scores | None:
    """Return the logprobs of a step's given tokens as a message has them."""
    if given is None or given.logprobs is None or given.top_ids is None or given.top_logprobs is None:
        return None
    arrays = (given.logprobs, given.top_ids, given.top_logprobs, given.listed)
    logprobs, top_ids, top_logprobs, listed = (raw(None if t is None else t.numpy()) for t in arrays)
    return Scores(logprobs, given.top_n, top_ids, top_logprobs, listed)
