"""Budget: how much one compilation may take.

Handed through all stages from pattern text to token table; each asks it in its loops. Invariant: no stage allocates or
computes much more than its budget before it notices, so the blow-up patterns of regular expressions end in a
BudgetError, soon.
"""

import time
from dataclasses import dataclass, field
from typing import Final

from .errors import BudgetError

STARVED: Final = 3
"""Time is charged at most so many times what was had of a core."""
PATIENCE: Final = 5
"""But this part of it in any case."""


def charged(passed: float, used: float) -> float:
    """The seconds that count of those that passed, `used` of them on a core: all, if that was a third of them.

    So what has to wait, where all cores are busy, is not taken for what takes long.
    """
    return min(passed, max(STARVED * used, passed / PATIENCE))


@dataclass(slots=True)
class Budget:
    """Limits of one compilation; the clock starts when it is made, in the thread that computes."""

    pattern: int = 1 << 16
    """Characters of a regular expression."""
    nfa_states: int = 100_000
    """Characters and classes after unrolling counted repeats."""
    dfa_states: int = 32_000
    """States of an automaton, over characters and over bytes alike; at most 32,767, for states are int16."""
    classes: int = 32_000
    """Of tokens, in a table; at most 32,767, for samplers have them as int16, too, and thoughts before a grammar add
    some (thoughts.py)."""
    table_bytes: int = 64 << 20
    """Of a token table's transitions."""
    seconds: float = 5.0
    """See charged."""
    _began: float = field(init=False)
    _used: float = field(init=False)

    def __post_init__(self) -> None:
        for name, number in (("dfa_states", self.dfa_states), ("classes", self.classes)):
            if not 0 < number < 1 << 15:
                raise ValueError(f"{name} must be from 1 to 32767, not {number}")
        self._began, self._used = time.monotonic(), time.thread_time()

    def spent(self) -> float:
        """Seconds so far."""
        return charged(time.monotonic() - self._began, time.thread_time() - self._used)

    def check(self) -> None:
        """Raises BudgetError when the time is up."""
        if self.spent() > self.seconds:
            raise BudgetError("seconds", self.seconds)

    def need_pattern(self, length: int) -> None:
        if length > self.pattern:
            raise BudgetError("characters of pattern", self.pattern)

    def need_nfa_states(self, number: int) -> None:
        if number > self.nfa_states:
            raise BudgetError("nfa states", self.nfa_states)

    def need_dfa_states(self, number: int) -> None:
        if number > self.dfa_states:
            raise BudgetError("dfa states", self.dfa_states)

    def need_classes(self, number: int) -> None:
        if number > self.classes:
            raise BudgetError("classes of tokens", self.classes)

    def need_table_bytes(self, number: int) -> None:
        if number > self.table_bytes:
            raise BudgetError("bytes of transitions", self.table_bytes)
