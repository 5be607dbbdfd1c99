"""How many of their allowed new tokens running requests are expected to use, as SGLang estimates it.

Reserving every request's max_new_tokens would leave the GPU half empty, reserving nothing would retract all the
time. The ratio starts high, decays with every step that needs no retraction, and jumps up at one.
"""

from typing import Final

INITIAL: Final = 0.7
MINIMUM_SHARE: Final = 0.14
DECAY_STEPS: Final = 600
RETRACT_STEPS: Final = 20


class NewTokenRatio:
    """`value` in [0, 1]: expected new tokens / allowed new tokens."""

    def __init__(self, conservativeness: float) -> None:
        self.initial = min(INITIAL * conservativeness, 1.0)
        self.minimum = self.initial * MINIMUM_SHARE
        self.value = self.initial

    def decay(self) -> None:
        """A step went well."""
        self.value = max(self.value - (self.initial - self.minimum) / DECAY_STEPS, self.minimum)

    def retracted(self, generated: int, allowed: int, running: int) -> None:
        """Pages ran out: expect what the remaining requests have used so far, and RETRACT_STEPS more each."""
        if allowed > 0:
            self.value = min(1.0, max(self.value, (generated + RETRACT_STEPS * running) / allowed))
