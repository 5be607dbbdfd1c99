"""Jumping ahead: forced tokens are computed as a chunk in one forward instead of being drawn one by one.

Used by schedule.py while it plans a window. A row can jump when its state is known, or will be: when all tokens that
windows in flight draw for it are forced themselves. Nothing is requeued or encoded again: KV is appended in place.
Invariant: the tokens of a jump are those that the sampler would draw, since it allows no other in forced states
(fsm/canonical.py); so output is the same with jumps and without.

Requests with logprobs or penalties do not jump: the one wants the logits of every token, for the other the sampler
counts the tokens that it draws.
"""

from typing import Final

import numpy as np

from .request import Request
from .slot_table import SlotTable

SHORTEST: Final = 2
"""Forced tokens that are worth a chunk: one alone is drawn just as fast."""
LONGEST: Final = 64
"""Most of one jump; the rest follows in the next window."""
MOST_STEPS: Final = 4
"""k while rows may jump: at most three forced tokens are then drawn before the next look."""
LONG_STEP_US: Final = 2000.0
"""Above this a window of one step costs little more than its step, and no jump is missed."""


def foreseen(request: Request, slots: SlotTable) -> tuple[int, int] | None:
    """(state, last token) of a row once all windows in flight have run, None if the model has a choice until then."""
    assert request.constraint is not None
    coming = int(slots.horizon[request.slot]) - (len(request.tokens) - 1)
    known = request.constraint.foresee(coming, request.params.stop_token_ids)
    if known is None or coming:
        return known
    return known[0], request.tokens[-1]


def all_jump(rows: np.ndarray, slots: SlotTable) -> bool:
    """Whether every decoding row may jump: only then is it worth while to wait for the results of a window."""
    return bool(len(rows)) and bool(slots.jumps[rows].all())


def unknown_rows(rows: np.ndarray, slots: SlotTable) -> bool:
    """Whether the state of some row is known only when the windows in flight are reported."""
    requests = (slots.requests[row] for row in rows.tolist())
    return any(request is not None and foreseen(request, slots) is None for request in requests)


def planned(request: Request, slots: SlotTable, room: int) -> tuple[list[int], int] | None:
    """(tokens of the chunk, state after it) for a row that should jump: its last token, and the forced ones.

    room: tokens that the chunk may have.
    """
    assert request.constraint is not None
    known = foreseen(request, slots)
    if known is None:
        return None
    state, last = known
    left = int(slots.cap[request.slot] - slots.horizon[request.slot])  # the last token of all is drawn, never forced
    forced, after = request.constraint.run(state, min(LONGEST, room - 1, left - 1), request.params.stop_token_ids)
    return ([last, *forced], after) if len(forced) >= SHORTEST else None


def most_steps(k: int, rows: np.ndarray, slots: SlotTable, step_us: float, adaptive: bool) -> int:
    """k, or less of it where rows may jump."""
    if not slots.jumps[rows].any():
        return k
    if adaptive and all_jump(rows, slots) and step_us > LONG_STEP_US:
        return 1
    return min(k, MOST_STEPS)
