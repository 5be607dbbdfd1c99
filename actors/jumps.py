"""Jumping ahead: forced tokens are computed as a chunk in one forward instead of being drawn one by one.

Used by schedule.py while it plans a window. A row can jump when its state is known, or will be: when all tokens that
windows in flight draw for it are forced themselves. Nothing is requeued or encoded again: KV is appended in place.
Invariant: the tokens of a jump are those that the sampler would draw, since it allows no other in forced states
(fsm/canonical.py); so output is the same with jumps and without.

What the sampler would know of a token that it drew, it is told: of penalties' counts by GrammarStates, and of logprobs
the forward has the logits, since a jump's chunk asks for all of its rows.
"""

from typing import Final

import numpy as np

from .request import Request
from .slot_table import SlotTable
from .window import JumpChunk, Landed, PrefillChunk, Window

LONGEST: Final = 64
"""Most of one jump; the rest follows in the next window."""
MOST_STEPS: Final = 4
"""k while rows may jump: at most three forced tokens are then drawn before the next look."""
MOST_SCORED: Final = 128
"""Tokens of a window's jumps for which logprobs are wanted: their logits take 80 MB with a vocabulary of 150,000."""
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


def fold(request: Request) -> None:
    """Give a waiting request the tokens that its grammar forces now: its prefill computes them with the rest.

    Not one with logprobs: a prefill has the logits of its last token alone.
    """
    constraint, params = request.constraint, request.params
    if constraint is None or params.logprobs is not None:
        return
    most = request.limit - len(request.tokens) - 1  # the last token of all is drawn, never forced
    forced, _ = constraint.run(constraint.state, most, params.stop_token_ids)
    for token in forced:
        request.append(token)
    request.unsent += len(forced)


def landed(chunks: list[PrefillChunk], jumping: list[JumpChunk], row: int = 0) -> list[Landed]:
    """What to tell of forced tokens whose KV was computed; they become the requests', wherever those are meanwhile.

    row: of the first jump in the step's Scores.
    """
    found = []
    for request in (c.request for c in chunks if c.draws and c.request.unsent):
        found.append(Landed(request, request.tokens[-request.unsent :].tolist(), request.matches))
        request.unsent = 0
    for jump in jumping:
        for token in jump.tokens[1:]:
            jump.request.append(token)
        found.append(Landed(jump.request, list(jump.tokens[1:]), jump.request.matches, row if jump.scored else None))
        row += jump.scored
    return found


def worth_waiting(rows: np.ndarray, slots: SlotTable, step_us: float) -> bool:
    """Whether the next window should be planned only when those in flight are reported: some rows may jump then.

    The executor idles for a moment. That is worth while where all rows may jump, and where half of them may and the
    moment is short beside a step; the others are hardly slower for it.
    """
    jumping = rows[slots.jumps[rows]]
    if not len(jumping) or (len(jumping) < len(rows) and (2 * len(jumping) < len(rows) or step_us <= LONG_STEP_US)):
        return False
    requests = (slots.requests[row] for row in jumping.tolist())
    return any(request is not None and foreseen(request, slots) is None for request in requests)


def room_for(request: Request, window: Window) -> int:
    """Tokens that a jump of the request may have in the window."""
    if request.params.logprobs is None:
        return window.budget
    return min(window.budget, MOST_SCORED - sum(len(jump.tokens) for jump in window.jumps if jump.scored))


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
    return ([last, *forced], after) if forced else None


def closing(request: Request, slots: SlotTable) -> tuple[list[int], int] | None:
    """(the tokens that are left, the one that ends the output) if the grammar leaves nothing else.

    Then no forward is needed: what comes behind the output is another request's prompt, which computes these tokens
    with its own. What windows in flight draw for it is the same, and nobody's. Not with logprobs: forwards tell those.
    """
    constraint, params = request.constraint, request.params
    if constraint is None or params.logprobs is not None or not slots.jumps[request.slot]:
        return None
    left = request.limit - len(request.tokens) - 1
    forced, state = constraint.run(constraint.state, left, params.stop_token_ids)
    end = constraint.grammar.ending(state)
    if end < 0 or request.generated + len(forced) < params.min_new_tokens:
        return None
    return forced, end


def most_steps(k: int, rows: np.ndarray, slots: SlotTable, step_us: float, adaptive: bool) -> int:
    """k, or less of it where rows may jump."""
    if not slots.jumps[rows].any():
        return k
    if adaptive and step_us > LONG_STEP_US:
        return 1
    return min(k, MOST_STEPS)
