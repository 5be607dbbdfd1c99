"""FusedSampler: the sampler of GPUs, a few kernel launches for any batch. See reference.py for what is drawn.

Used by Drawer. Which launches a batch needs follows from host flags alone (`mode_of`), so steps can be captured in
CUDA graphs, one per mode, of which there are few: a scan over the logits and a finish always; edits and filters only if
some row wants them, and then rows that do not want them leave at once. Logprobs are those of the untouched logits.
Invariant: nothing is waited for; what a draw returns lives until the next draw; rows do not depend on each other.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from . import logprob_kernels, race_kernels, rank_kernels
from . import scan_kernels as kernels
from .params import MAX_LISTED
from .reference import Sampled
from .state import SamplerState

BLOCK: Final = 1024
"""Logits that a program looks at at once."""
WARPS: Final = 8
"""Warps of a program, but for finish_rows' one.

Measured on an H100, 128 rows of 152,064 logits, greedy / at a temperature, in microseconds: 32 / 36 (float32) and
20 / 36 (bfloat16); with blocks of 2,048 34 / 42 and 21 / 39; of 4,096 42 / 69.
"""
MOST_SPLITS: Final = 64
PROGRAMS: Final = 2048
"""A row is split so that a pass has about this many programs: twice what is resident at once on an H100."""
GROUPS: Final = 64
"""Groups of lanes whose largest logits a program of the scan leaves for top_k."""
FEW: Final = 256
MOST: Final = 4096
"""Candidates of a row with top_k: usual and most; a row with more is passed over again and again."""
ROUNDS: Final = 2
"""Further rounds of the race that all programs take part in, for rows whose winner was filtered out."""
TOP_NS: Final = (0, 5, 20)
"""Numbers of most likely tokens that are computed: the next one that is enough for the batch."""
LISTED: Final = (0, 8, MAX_LISTED)
"""The same of tokens that requests named."""
MOST_MODES: Final = 8
"""Modes that a batch may have to itself. There are hundreds of combinations, and each that is used has CUDA graphs of
all sizes: some hundred MB of a driver's memory, which nobody has set aside."""


def splits_for(rows: int, vocab: int) -> int:
    """Programs that share a row: a power of two, as many as there are blocks at most."""
    wanted = min(MOST_SPLITS, max(1, PROGRAMS // max(1, rows)), -(-vocab // BLOCK))
    return 1 << (wanted.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Mode:
    """Which launches a batch needs."""

    edited: bool
    random: bool
    ranked: bool
    """Some row has top_k."""
    raced: bool
    """Some row has top_p or min_p, but no top_k."""
    constrained: bool
    """Some row follows a grammar."""
    masked: bool
    """Some row has a mask from the host."""
    top_n: int
    """-1: no logprobs."""
    listed: int
    """Tokens that requests named, at most."""

    def widened(self) -> "Mode":
        """One of three that do all that any batch needs, without logprobs, or without those of named tokens, if this
        has none: they alone cost something where no row wants them."""
        top_n, listed = TOP_NS[-1] if self.top_n >= 0 else -1, LISTED[-1] if self.listed else 0
        return Mode(True, True, True, True, True, True, top_n, listed)


class FusedSampler:
    """Workspace for `max_rows` rows; `state` is static."""

    def __init__(self, state: SamplerState, max_rows: int) -> None:
        self.state = state
        device = state.device

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        splits = max(n * splits_for(n, state.vocab_size) for n in range(1, max_rows + 1))  # of all rows together
        self.best, self.largest = (numbers(splits, dtype=torch.float32) for _ in range(2))
        self.best_ids = numbers(splits)
        self.group_tops, self.chosen = numbers(splits * GROUPS, dtype=torch.float32), numbers(splits * GROUPS)
        self.candidates, self.candidate_ids = numbers(max_rows, MOST, dtype=torch.float32), numbers(max_rows, MOST)
        # Of each round of the race among filtered rows: the winner, its weight, the mass above it.
        self.wins = [numbers(max_rows) for _ in range(ROUNDS + 1)]
        self.win_weights = [numbers(max_rows, dtype=torch.float32) for _ in range(ROUNDS + 1)]
        self.aboves = [numbers(splits, dtype=torch.int64) for _ in range(ROUNDS + 1)]
        self.totals = numbers(splits, dtype=torch.int64)
        # Of logprobs: each split's most likely tokens, its largest logit, and the sum of exp(logit - largest).
        self.tops = numbers(splits * triton.next_power_of_2(TOP_NS[-1]), dtype=torch.int64)
        self.peaks, self.masses = (numbers(splits, dtype=torch.float32) for _ in range(2))
        self.drawn, self.ids = numbers(max_rows), numbers(max_rows)
        self.finish = numbers(max_rows, dtype=torch.uint8)
        self.modes: set[Mode] = set()
        """Those that batches had to themselves; MOST_MODES at most."""

    def mode_of(self, host_slots: npt.NDArray[np.int64]) -> Mode:
        """Return the mode of a batch of these slots: what it needs, or more where there are too many modes."""
        flags = self.state.flags.take(host_slots)
        most = int(flags.logprobs.max(initial=-1))
        mode = Mode(
            edited=bool(flags.penalty.any() or flags.bias.any() or (flags.min_until > 0).any()),
            random=not flags.greedy.all(),
            ranked=bool((flags.filtered & flags.ranked).any()),
            raced=bool((flags.filtered & ~flags.ranked).any()),
            constrained=bool(flags.constrained.any()),
            masked=bool(flags.masked.any()),
            top_n=-1 if most < 0 else next(n for n in TOP_NS if n >= most),
            listed=next(n for n in LISTED if n >= flags.listed.max(initial=0)),
        )
        if mode not in self.modes and len(self.modes) == MOST_MODES:
            return mode.widened()
        self.modes.add(mode)
        return mode

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, mode: Mode) -> Sampled:
        """Draw a token per row and count it for the penalties; arguments as reference.sample's.

        `logits` [rows, vocab] are overwritten by edits. ids int32 [rows].
        """
        rows, vocab = logits.shape
        raw = logits
        if mode.top_n >= 0 and (mode.edited or mode.constrained or mode.masked):
            logits = logits.clone()
        s, drawn = self.state, Sampled(self.ids[:rows], self.finish[:rows])
        grammars = (s.grammars.bound, s.grammars.state, s.grammars.directory)
        if mode.edited:
            kernels.edit_few[(rows,)](
                logits, slots, positions, s.ints, s.bias_ids, s.bias_values, s.stop_ids, s.eos_ids, logits.stride(0),
                s.bias_ids.shape[1], s.stop_ids.shape[1], len(s.eos_ids), BLOCK=128, num_warps=4,
            )  # fmt: skip
        splits, fast = splits_for(rows, vocab), logits.device.type == "cuda"
        part = triton.cdiv(triton.cdiv(vocab, splits), BLOCK) * BLOCK
        kernels.scan[(rows, splits)](
            logits, slots, positions, s.ints, s.floats, s.marks, s.grammars.masks, *grammars, self.best, self.best_ids,
            self.largest, self.group_tops, vocab, logits.stride(0), s.grammars.masks.shape[1], part,
            EDITED=mode.edited or mode.masked, MASKED=mode.masked, CONSTRAINED=mode.constrained,
            RANDOM=mode.random, RANKED=mode.ranked, FAST=fast, BLOCK=BLOCK, GROUPS=GROUPS, num_warps=WARPS,
        )  # fmt: skip
        filtering = mode.ranked or mode.raced
        if filtering:
            self._filter(logits, slots, positions, mode, splits, part, fast)
        kernels.finish_rows[(rows,)](
            slots, s.ints, self.best, self.best_ids, self.largest, self.drawn, s.stop_ids, s.marks, *grammars,
            drawn.ids, drawn.finish, vocab, s.stop_ids.shape[1], FILTERING=filtering, EDITED=mode.edited,
            CONSTRAINED=mode.constrained, MASKED=mode.masked, SPLITS=splits,
            STOPS=triton.next_power_of_2(s.stop_ids.shape[1]), num_warps=1,
        )  # fmt: skip
        if mode.top_n >= 0:
            self._add_logprobs(drawn, raw, slots, mode, splits, part)
        return drawn

    def _filter(
        self, logits: Tensor, slots: Tensor, positions: Tensor, mode: Mode, splits: int, part: int, fast: bool
    ) -> None:
        """Leave in `drawn` what filtered rows draw."""
        (rows, vocab), s, stride = logits.shape, self.state, logits.stride(0)
        if mode.ranked:
            rank_kernels.settle_ranked[(rows,)](
                logits, slots, positions, s.ints, s.floats, self.largest, self.group_tops, self.chosen,
                self.candidates, self.candidate_ids, self.drawn, vocab, stride, part, FAST=fast, FEW=FEW, MOST=MOST,
                BLOCK=BLOCK, SPLITS=splits, GROUPS=GROUPS, num_warps=WARPS,
            )  # fmt: skip
        if not mode.raced:
            return
        wins, weights, aboves = self.wins, self.win_weights, self.aboves
        for end in range(ROUNDS + 1):
            now = max(0, end - 1)
            if end:
                race_kernels.race_pass[(rows, splits)](
                    logits, slots, positions, s.ints, s.floats, self.largest, weights[now], self.totals, aboves[now],
                    self.best, self.best_ids, vocab, stride, part, FAST=fast, BLOCK=BLOCK, SPLITS=splits,
                    num_warps=WARPS,
                )  # fmt: skip
            race_kernels.mass_pass[(rows, splits)](
                logits, slots, s.ints, s.floats, self.largest, wins[now], weights[now], self.totals, aboves[now],
                self.best, self.best_ids, wins[end], weights[end], aboves[end], vocab, stride, part, FIRST=end == 0,
                BLOCK=BLOCK, SPLITS=splits, num_warps=WARPS,
            )  # fmt: skip
        race_kernels.settle_raced[(rows,)](
            logits, slots, positions, s.ints, s.floats, self.largest, wins[ROUNDS], weights[ROUNDS], self.totals,
            aboves[ROUNDS], self.drawn, vocab, stride, FAST=fast, BLOCK=BLOCK, SPLITS=splits, num_warps=WARPS,
        )  # fmt: skip

    def _add_logprobs(self, drawn: Sampled, raw: Tensor, slots: Tensor, mode: Mode, splits: int, part: int) -> None:
        """Fill in logprobs of the raw distribution, NaN and -1 where a row did not ask."""
        (rows, vocab), s, device = raw.shape, self.state, raw.device
        drawn.top_n = n = min(mode.top_n, vocab)
        drawn.logprobs = torch.empty(rows, dtype=torch.float32, device=device)
        if n:
            drawn.top_ids = torch.empty(rows, n, dtype=torch.int32, device=device)
            drawn.top_logprobs = torch.empty(rows, n, dtype=torch.float32, device=device)
        named = min(mode.listed, s.listed_ids.shape[1])
        if named:
            drawn.listed = torch.empty(rows, named, dtype=torch.float32, device=device)
        top = triton.next_power_of_2(n) if n else 0
        logprob_kernels.top_pass[(rows, splits)](
            raw, slots, s.ints, self.tops, self.peaks, self.masses, vocab, raw.stride(0), part,
            TOP=top, COLUMN=triton.next_power_of_2(part // BLOCK), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        logprob_kernels.settle_logprobs[(rows,)](
            raw, slots, s.ints, drawn.ids, self.tops, self.peaks, self.masses, s.listed_ids, drawn.logprobs,
            drawn.top_ids, drawn.top_logprobs, drawn.listed, raw.stride(0), n, named, s.listed_ids.shape[1],
            TOP=top, NAMED=triton.next_power_of_2(named) if named else 0, SPLITS=splits, num_warps=4,
        )  # fmt: skip
