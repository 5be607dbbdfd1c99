"""Logprobs of tokens that were given, not drawn, between messages: what an executor is to score, and whom it concerns.

Used by the scheduler actor. Invariant: rows of Scores are in the order of Plan.score_ids: the chunks' of prompts, then
the jumps'. All that is passed on is copied, since a lane's memory is reused after the handler.
"""

from array import array
from collections.abc import Iterator

import numpy as np

from .messages import NOTHING, PromptLogprobs, Scores
from .request import Request
from .window import Scored, Window


def scored_fields(window: Window) -> dict[str, memoryview]:
    """Return the fields of its Plan that say which tokens are scored; none where there are none."""
    counts = [c.scored for c in window.chunks] + [j.scored for j in window.jumps]
    if not any(counts):
        return {}
    starts = [c.score_from - c.start for c in window.chunks] + [0] * len(window.jumps)
    ids = array("i")
    for c in window.chunks:
        ids += c.request.tokens[c.score_from + 1 : c.score_from + 1 + c.scored]
    for j in window.jumps:
        ids.extend(j.tokens[1 : 1 + j.scored])
    arrays = (array("i", counts), array("i", starts), ids)
    return dict(zip(("chunk_scored", "score_starts", "score_ids"), map(_raw, arrays), strict=True))


def scored_rows(scores: Scores, rows: np.ndarray) -> Scores:
    """Return some rows of the scores; row -1: nobody asked."""
    asked = rows >= 0

    def pick(view: memoryview, dtype: type[np.generic], width: int, absent: float) -> memoryview:
        if not width:
            return NOTHING
        found = np.full((len(rows), width), absent, dtype)
        found[asked] = np.frombuffer(view, dtype).reshape(-1, width)[rows[asked]]
        return memoryview(found.tobytes())

    return Scores(
        logprobs=pick(scores.logprobs, np.float32, 1, np.nan),
        top_n=scores.top_n,
        top_ids=pick(scores.top_ids, np.int32, scores.top_n, -1),
        top_logprobs=pick(scores.top_logprobs, np.float32, scores.top_n, np.nan),
        listed=pick(scores.listed, np.float32, len(scores.listed) // max(1, len(scores.logprobs)), np.nan),
    )


def columns_of(scores: Scores) -> np.ndarray:
    """Return the scores as PromptScores.values has them: float32 [rows, 1 + 2 top_n]."""
    n = scores.top_n
    columns = np.empty((len(scores.logprobs) // 4, 1 + 2 * n), np.float32)
    columns[:, 0] = np.frombuffer(scores.logprobs, np.float32)
    if n:
        columns[:, 1::2] = np.frombuffer(scores.top_logprobs, np.float32).reshape(-1, n)
        columns[:, 2::2] = np.frombuffer(scores.top_ids, np.int32).reshape(-1, n)
    return columns


def computed_logprobs(item: Scored, scores: Scores) -> PromptLogprobs:
    """Return the message about tokens of a prompt that a chunk scored."""
    s = scored_rows(scores, np.arange(item.row, item.row + item.count))
    ids = item.request.tokens[item.start : item.start + item.count]
    return PromptLogprobs(item.request.rid, _raw(ids), s.logprobs, s.top_n, s.top_ids, s.top_logprobs, s.listed)


def known_logprobs(request: Request) -> Iterator[PromptLogprobs]:
    """Yield the messages about tokens of its prompt that the cache knew."""
    while request.scores is not None and (news := request.scores.untold()) is not None:
        start, values = news
        ids = request.tokens[start : start + len(values)]
        own, top, top_ids = values[:, 0], values[:, 1::2], values[:, 2::2].astype(np.int32)
        arrays = (memoryview(part.tobytes()) for part in (own, top_ids, top))
        logprobs, tops, top_logprobs = arrays
        yield PromptLogprobs(request.rid, _raw(ids), logprobs, top.shape[1], tops, top_logprobs, NOTHING)


def _raw(values: "array[int]") -> memoryview:
    return memoryview(values.tobytes())
