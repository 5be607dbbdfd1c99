"""Drawer: the sampler as a step of the engine uses it, the reference on a CPU and the fused kernels on a GPU.

Used by the sampler actor and by perf. Invariant: both draw the same tokens (fused.py says how nearly).
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .reference import Race, Sampled, sample, score
from .state import SamplerState
from .upload import upload

if TYPE_CHECKING:
    from .fused import Mode


class Drawer:
    """Draws for the slots of `state`, at most `max_rows` at once; on a CPU by the kernel `race` where there is one."""

    def __init__(self, state: SamplerState, max_rows: int, race: Race | None = None) -> None:
        self.state = state
        self.race = race
        self.fused = None
        if state.device.type == "cuda":
            from .fused import FusedSampler

            self.fused = FusedSampler(state, max_rows)

    def mode(self, host_slots: npt.NDArray[np.int64]) -> Hashable:
        """Return which work the slots' parameters need: what a CUDA graph must be captured for."""
        return None if self.fused is None else self.fused.mode_of(host_slots)

    def draw(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        mode: Hashable,
        host_slots: npt.NDArray[np.int64] | None = None,
    ) -> Sampled:
        """Draw a token per row: logits [rows, vocab], slots and positions [rows], `mode` of these slots.

        On a CPU `host_slots` is needed. On a GPU nothing is waited for, and the result lives until the next draw.
        """
        if self.fused is None:
            return sample(logits, slots, positions, self.state, host_slots=host_slots, kernel=self.race)
        return self.fused.draw(logits, slots, positions, cast("Mode", mode))

    def score(self, logits: Tensor, host_slots: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> Sampled:
        """Return given tokens, ids [rows] of the slots [rows], with the logprobs that their requests want."""
        return score(logits, upload(ids, self.state.device), self.state, host_slots)
