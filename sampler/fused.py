"""FusedSampler: the sampler of GPUs, a few kernel launches for any batch. See reference.py for what is drawn.

Used by Drawer. Which launches a batch needs follows from host flags alone (`mode_of`), so steps can be captured in
CUDA graphs, one per mode: a scan over the logits and a finish always; edits and filters only if some row wants them,
and then rows that do not want them leave at once. Logprobs are plain torch on the untouched logits.
Invariant: nothing is waited for; what a draw returns lives until the next draw; rows do not depend on each other.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .reference import Sampled, most_likely
from .state import INTS, SamplerState

SPLITS: Final = 16
"""Programs that share a row in the scan."""
BLOCK: Final = 2048
"""Logits that a program looks at at once."""
MOST: Final = 4096
"""Candidates of a filtered row that are held in registers; rows with more are passed over again and again."""
TOP_NS: Final = (0, 5, 20)
"""Numbers of most likely tokens that are computed: the next one that is enough for the batch."""


@dataclass(frozen=True, slots=True)
class Mode:
    """Which launches a batch needs."""

    edited: bool
    random: bool
    filtered: bool
    top_n: int
    """-1: no logprobs."""


class FusedSampler:
    """Workspace for `max_rows` rows; `state` is static."""

    def __init__(self, state: SamplerState, max_rows: int) -> None:
        self.state = state
        device = state.device

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.best, self.largest = (numbers(max_rows, SPLITS, dtype=torch.float32) for _ in range(2))
        self.best_ids, self.bad = (numbers(max_rows, SPLITS) for _ in range(2))
        self.candidates, self.candidate_ids = numbers(max_rows, MOST, dtype=torch.float32), numbers(max_rows, MOST)
        self.counts, self.masses = numbers(max_rows), numbers(max_rows, dtype=torch.int64)
        self.drawn, self.ids = numbers(max_rows), numbers(max_rows)
        self.finish = numbers(max_rows, dtype=torch.uint8)

    def mode_of(self, host_slots: npt.NDArray[np.int64]) -> Mode:
        """Return the mode of a batch of these slots."""
        flags = self.state.flags.take(host_slots)
        most = int(flags.logprobs.max(initial=-1))
        return Mode(
            edited=bool(flags.penalty.any() or flags.bias.any() or (flags.min_until > 0).any()),
            random=not flags.greedy.all(),
            filtered=bool(flags.filtered.any()),
            top_n=-1 if most < 0 else next(n for n in TOP_NS if n >= most),
        )

    def draw(
        self, logits: Tensor, slots: Tensor, positions: Tensor, mode: Mode, bitmask: Tensor | None = None
    ) -> Sampled:
        """Draw a token per row and count it for the penalties; arguments as reference.sample's.

        `logits` [rows, vocab] are overwritten by edits. ids int32 [rows].
        """
        rows, vocab = logits.shape
        raw = logits
        if mode.top_n >= 0 and (mode.edited or bitmask is not None):
            logits = logits.clone()
        s, drawn = self.state, Sampled(self.ids[:rows], self.finish[:rows])
        if mode.edited:
            kernels.edit_few[(rows,)](
                logits, slots, positions, s.ints, s.bias_ids, s.bias_values, s.stop_ids, s.eos_ids, logits.stride(0),
                s.bias_ids.shape[1], s.stop_ids.shape[1], len(s.eos_ids), BLOCK=128, num_warps=4,
            )  # fmt: skip
        part = triton.cdiv(triton.cdiv(vocab, SPLITS), BLOCK) * BLOCK
        kernels.scan[(rows, SPLITS)](
            logits, slots, positions, s.ints, s.floats, s.marks, bitmask, self.best, self.best_ids, self.largest,
            self.bad, vocab, logits.stride(0), 0 if bitmask is None else bitmask.shape[1], part,
            EDITED=mode.edited or bitmask is not None, MASKED=bitmask is not None, RANDOM=mode.random, BLOCK=BLOCK,
            SPLITS=SPLITS, num_warps=8,
        )  # fmt: skip
        if mode.filtered:
            self._filter(logits, slots, positions)
        kernels.finish_rows[(rows,)](
            slots, s.ints, s.floats, self.best, self.best_ids, self.largest, self.bad, self.drawn, s.stop_ids, s.marks,
            drawn.ids, drawn.finish, vocab, s.stop_ids.shape[1], FILTERING=mode.filtered, EDITED=mode.edited,
            SPLITS=SPLITS, STOPS=triton.next_power_of_2(s.stop_ids.shape[1]), num_warps=1,
        )  # fmt: skip
        if mode.top_n >= 0:
            self._add_logprobs(drawn, raw, slots, mode.top_n)
        return drawn

    def _filter(self, logits: Tensor, slots: Tensor, positions: Tensor) -> None:
        (rows, vocab), s = logits.shape, self.state
        kernels.gather_candidates[(rows,)](
            logits, slots, s.ints, s.floats, self.largest, self.candidates, self.candidate_ids, self.counts,
            self.masses, vocab, logits.stride(0), MOST=MOST, BLOCK=BLOCK, SPLITS=SPLITS, num_warps=16,
        )  # fmt: skip
        kernels.draw_kept[(rows,)](
            logits, slots, positions, s.ints, s.floats, self.largest, self.candidates, self.candidate_ids, self.counts,
            self.masses, self.drawn, vocab, logits.stride(0), MOST=MOST, BLOCK=BLOCK, SPLITS=SPLITS, num_warps=16,
        )  # fmt: skip

    def _add_logprobs(self, drawn: Sampled, raw: Tensor, slots: Tensor, n: int) -> None:
        """Fill in logprobs of the raw distribution, NaN and -1 where a row did not ask."""
        asked = self.state.ints[:, INTS.index("logprobs")].index_select(0, slots)[:, None]
        logprobs = torch.log_softmax(raw, dim=-1, dtype=torch.float32)
        chosen = logprobs.gather(1, drawn.ids[:, None].to(torch.int64))
        drawn.logprobs = torch.where(asked >= 0, chosen, math.nan)[:, 0]
        drawn.top_n = n = min(n, raw.shape[1])
        if n:
            ids = most_likely(logprobs, n)
            beyond = torch.arange(n, device=raw.device) >= asked
            drawn.top_ids = ids.to(torch.int32).masked_fill(beyond, -1)
            drawn.top_logprobs = logprobs.gather(1, ids).masked_fill(beyond, math.nan)
