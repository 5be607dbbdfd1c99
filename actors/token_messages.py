"""What the text actor is told of results: tokens drawn, forced or missing, and vectors.

Used by the scheduler actor. Invariant: a message's arrays are its own, as the lane that brought them is reused.
"""

from array import array

import numpy as np
from msgspec.structs import replace

from .messages import NOTHING, Finish, Pooled, Scores, StepOut, Tokens
from .request import Request
from .score_rows import scored_rows
from .window import Closed, Landed
from .window_messages import int32


def tokens_of(m: StepOut, complete: list[int]) -> Tokens:
    """Return the step's rows for the text actor, of which `complete` may be the last of their outputs.

    All of it is copied, since the lane's memory is reused after the handler.
    """

    def copy(array: memoryview) -> memoryview:
        return memoryview(bytes(array))

    return Tokens(
        rids=copy(m.rids),
        ids=copy(m.ids),
        finish=copy(m.finish),
        logprobs=copy(m.logprobs),
        top_n=m.top_n,
        top_ids=copy(m.top_ids),
        top_logprobs=copy(m.top_logprobs),
        complete=int32(complete),
        listed=copy(m.listed),
    )


def forced_tokens_of(landed: list[Landed], scores: Scores | None) -> Tokens:
    """Return the rows of the tokens that were not drawn, with the logprobs of those that `scores` has."""
    rids = array("q", [item.request.rid for item in landed for _ in item.tokens])
    ids = int32([token for item in landed for token in item.tokens])
    finish = memoryview(bytes(len(rids)))
    ends = np.cumsum([len(item.tokens) for item in landed]) - 1
    complete = [int(end) for end, item in zip(ends, landed, strict=True) if item.complete]
    plain = Tokens(memoryview(rids.tobytes()), ids, finish, NOTHING, 0, NOTHING, NOTHING, True, int32(complete))
    if scores is None:
        return plain
    rows = [-1 if item.scored is None else item.scored + i for item in landed for i in range(len(item.tokens))]
    found = scored_rows(scores, np.array(rows))
    return replace(
        plain,
        logprobs=found.logprobs,
        top_n=found.top_n,
        top_ids=found.top_ids,
        top_logprobs=found.top_logprobs,
        listed=found.listed,
    )


def closed_tokens(closed: Closed) -> list[Tokens]:
    """Return the rows of a request that ended without a draw: what was forced, then the end."""
    rid = memoryview(array("q", [closed.request.rid]).tobytes())
    finish = memoryview(bytes([Finish.STOP]))
    end = Tokens(rid, int32([closed.end]), finish, NOTHING, 0, NOTHING, NOTHING, complete=int32([0]))
    if not closed.forced:
        return [end]
    return [forced_tokens_of([Landed(closed.request, closed.forced, closed.request.matches)], None), end]


def final_without_token(request: Request) -> Tokens:
    """max_new_tokens 0: the final row has the token id -1."""
    rid = memoryview(array("q", [request.rid]).tobytes())
    finish = memoryview(bytes([Finish.LENGTH]))
    return Tokens(rid, int32([-1]), finish, NOTHING, 0, NOTHING, NOTHING)


def pooled_of(m: Pooled, complete: set[int]) -> Pooled | None:
    """Return the vectors of these requests, if any: one that was retracted meanwhile is computed again."""
    rids = np.frombuffer(m.rids, dtype=np.int64)
    rows = [row for row, rid in enumerate(rids.tolist()) if rid in complete]
    if not rows:
        return None
    vectors = np.frombuffer(m.vectors, dtype=np.float32).reshape(len(rids), -1)
    return Pooled(memoryview(rids[rows].tobytes()), memoryview(vectors[rows].tobytes()))
