"""The jump planner: the tokens that follow a state whatever the model says.

Used at the end of a window of decode steps: these tokens are appended to the output in one forward instead of being
drawn one by one. Invariant: they are what the sampler would draw, since the masks of the states on the way allow
nothing else (canonical.py); so output is the same with jumps and without.
"""

from dataclasses import dataclass

from .canonical import NONE
from .token_table import TokenTable


@dataclass(frozen=True, slots=True)
class Jump:
    """`tokens` follow, and lead to `state`."""

    tokens: tuple[int, ...]
    state: int


def plan_jump(table: TokenTable, state: int, limit: int) -> Jump:
    """Return the forced tokens after `state`, at most `limit` of them; none if the model has a choice."""
    tokens: list[int] = []
    while len(tokens) < limit and (token := int(table.canonical[state])) != NONE:
        tokens.append(token)
        state = int(table.transitions[state, table.token_class[token]])
    return Jump(tuple(tokens), state)
