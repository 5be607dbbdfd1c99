"""SamplerState: what the sampler keeps per slot of the batch; Flags: what the host must know of it.

Owned by the sampler actor, read by `reference.sample` and by the kernels. The parameters live on the device as rows
of small tensors; a copy of the few facts that decide which work a batch needs (is anything penalised, is all of it
greedy?) lives on the host, so that no step waits for the device to find out.
Invariant: a slot's state is a function of its last `admit` and of the tokens drawn since. After a retraction `admit`
with the tokens so far restores it exactly. Big tables exist only once a request needs them.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grammar import NONE, Grammars, Int16Array, Int32Array, UInt16Array
from .params import MAX_BIASES, MAX_LISTED, MAX_STOP_IDS, SamplingParams
from .philox import row_keys
from .race import id_terms
from .upload import upload

WEIGHT_BITS: Final = 40
"""Weights of tokens are integers in units of 2**-40 of the most likely token's (see reference.py)."""
SHARE_BITS: Final = 24
"""top_p is an integer in units of 2**-24."""
LEAST_REPETITION: Final = 1e-30
"""Of repetition penalties: a logit that is divided by less is no float32 any more, nor one times 0."""
NO_ID: Final = -1
AHEAD: Final = 64
"""Keys of draws are computed for this many positions at once: one call costs as much as for one."""

INTS: Final = ("seed", "top_k", "top_p", "min_weight", "min_until", "needs", "logprobs")
FLOATS: Final = ("inverse_temperature", "repetition", "frequency", "presence")

GREEDY: Final = 1
PENALTY: Final = 2
BIAS: Final = 4
FILTERED: Final = 8
"""Bits of `needs`."""
IN_PROMPT: Final = 1 << 14
"""Bit of a mark; those below count the token in the output."""


@dataclass(slots=True)
class Flags:
    """Which work each row needs; host arrays [rows], or [slots] in SamplerState."""

    greedy: npt.NDArray[np.bool_]
    penalty: npt.NDArray[np.bool_]
    bias: npt.NDArray[np.bool_]
    filtered: npt.NDArray[np.bool_]
    """top_k, top_p or min_p cut something off."""
    ranked: npt.NDArray[np.bool_]
    """There is a top_k."""
    min_until: npt.NDArray[np.int64]
    """No stop token may be drawn at positions below this."""
    constrained: npt.NDArray[np.bool_]
    """The output follows a grammar."""
    masked: npt.NDArray[np.bool_]
    """Each draw has a mask from the host."""
    logprobs: npt.NDArray[np.int64]
    """-1: none wanted; n: the chosen token's and the n most likely ones'."""
    listed: npt.NDArray[np.int64]
    """How many tokens the request named whose logprobs it wants; 0 without logprobs."""

    @classmethod
    def empty(cls, slots: int) -> "Flags":
        """Return the flags of slots that were never admitted: greedy, nothing else."""
        return cls(
            greedy=np.ones(slots, np.bool_),
            penalty=np.zeros(slots, np.bool_),
            bias=np.zeros(slots, np.bool_),
            filtered=np.zeros(slots, np.bool_),
            ranked=np.zeros(slots, np.bool_),
            min_until=np.zeros(slots, np.int64),
            constrained=np.zeros(slots, np.bool_),
            masked=np.zeros(slots, np.bool_),
            logprobs=np.full(slots, -1, np.int64),
            listed=np.zeros(slots, np.int64),
        )

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "Flags":
        """Return the flags of some rows, by index or by mask."""
        return Flags(
            self.greedy[rows],
            self.penalty[rows],
            self.bias[rows],
            self.filtered[rows],
            self.ranked[rows],
            self.min_until[rows],
            self.constrained[rows],
            self.masked[rows],
            self.logprobs[rows],
            self.listed[rows],
        )


class SamplerState:
    """Sampling parameters, token counts and biases of every slot, and of one more, `max_slots`, that is never admitted:
    the padding of CUDA graphs' batches, greedy.

    `ints` int64 [slots, 7] and `floats` float32 [slots, 4] have a column for each name in INTS and FLOATS:
    seed; top_k (0: off); top_p in units of 2**-24 (2**24: off); min_weight, min_p in units of 2**-40; min_until, the
    position from which stop tokens are allowed; needs, bits; logprobs, how many, -1 none. `stop_ids` int64 [slots, n]:
    tokens that end the request, padded with -1. `id_terms` int32 [vocab]: race.id_terms. On first use: `output_counts`
    int32 and `seen` (in prompt or output) bool [slots, vocab]; `bias_ids` int64 and `bias_values` float32 [slots, n],
    padded with id 0 and value 0; `listed_ids` int64 [slots, n], tokens whose logprobs are wanted, padded with -1.
    `static` (a GPU's): all tables are there from the start, at their full width and fixed addresses, for kernels in
    CUDA graphs; bias_ids are padded with -1, and in the place of counts and seen is `marks` int16 [slots, vocab]:
    IN_PROMPT and the count in the output.
    """

    def __init__(
        self,
        max_slots: int,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        device: torch.device,
        static: bool | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.static = device.type == "cuda" if static is None else static
        self._eos = tuple(i for i in eos_ids if i < vocab_size)  # others are never drawn
        self.eos_ids = torch.tensor(self._eos, dtype=torch.int64, device=device)
        rows, biases, listed = max_slots + 1, *((MAX_BIASES, MAX_LISTED) if self.static else (0, 0))
        self.ints = torch.zeros(rows, len(INTS), dtype=torch.int64, device=device)
        self.ints[:, INTS.index("needs")] = GREEDY
        self.floats = torch.ones(rows, len(FLOATS), dtype=torch.float32, device=device)
        stops = MAX_STOP_IDS + len(self._eos) if self.static else max(1, len(eos_ids))
        self.stop_ids = torch.full((rows, stops), NO_ID, dtype=torch.int64, device=device)
        self.bias_ids = torch.full((rows, biases), NO_ID if self.static else 0, dtype=torch.int64, device=device)
        self.bias_values = torch.zeros(rows, biases, dtype=torch.float32, device=device)
        self.listed_ids = torch.full((rows, listed), NO_ID, dtype=torch.int64, device=device)
        self.marks = torch.zeros(rows, vocab_size if self.static else 0, dtype=torch.int16, device=device)
        self.output_counts: Tensor | None = None
        self.seen: Tensor | None = None
        self.id_terms = id_terms(vocab_size, device)
        self.grammars = Grammars(rows, vocab_size, device)
        # The keys of a block of positions, and the block's number in the last column.
        self._ahead = torch.full((rows, AHEAD + 1), -1, dtype=torch.int64, device=device)
        self.flags = Flags.empty(rows)
        self.plain = np.ones(rows, np.bool_)
        """Whether a slot's draws need nothing but its temperature and its stop tokens; on the host."""

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: npt.NDArray[np.int32],
        output_ids: npt.NDArray[np.int32],
        prompt_length: int,
        output_length: int,
        grammar: int = NONE,
        grammar_state: int = 0,
    ) -> None:
        """Set everything of a slot for a request that comes (or comes back, with the tokens it has generated).

        grammar: the handle of a loaded one, which the output follows from `grammar_state` on.
        The token arrays may be empty unless the parameters have a penalty. Raises ValueError if then they do not
        hold the whole sequence, or if the seed is not resolved.
        """
        if params.seed is None:
            raise ValueError("the seed must be resolved before sampling")
        if params.has_penalty and (len(prompt_ids), len(output_ids)) != (prompt_length, output_length):
            raise ValueError("penalties need all prompt and output tokens")
        self._set_numbers(slot, params, prompt_length)
        stops = params.stop_token_ids if params.ignore_eos else (*self._eos, *params.stop_token_ids)
        self.stop_ids = _set_padded(self.stop_ids, slot, list(stops), NO_ID)
        if params.logit_bias:
            self.bias_ids = _set_padded(self.bias_ids, slot, list(params.logit_bias), NO_ID if self.static else 0)
            self.bias_values = _set_padded(self.bias_values, slot, list(params.logit_bias.values()), 0.0)
        if params.has_penalty:
            self._set_counts(slot, prompt_ids, output_ids)
        self.grammars.bind(slot, grammar, grammar_state)
        self.flags.constrained[slot] = grammar != NONE
        if self.flags.masked[slot]:
            self.grammars.unmask(slot)
            self.flags.masked[slot] = False
        more = params.has_penalty or params.logit_bias or params.min_new_tokens or params.logprobs is not None
        self.plain[slot] = not (more or self.flags.filtered[slot] or grammar != NONE)

    def load_grammar(
        self, handle: int, token_class: UInt16Array, transitions: Int16Array, canonical: Int32Array
    ) -> None:
        """See Grammars.load."""
        self.grammars.load(handle, token_class, transitions, canonical)

    def drop_grammar(self, handle: int) -> None:
        """See Grammars.drop."""
        self.grammars.drop(handle)

    def set_grammar_state(self, slot: int, state: int) -> None:
        """See Grammars.set_state."""
        self.grammars.set_state(slot, state)

    def set_masks(self, slots: Int32Array, masks: Int32Array) -> None:
        """See Grammars.set_masks. They hold until the next ones, or until the slot is admitted again."""
        self.grammars.set_masks(slots, masks)
        self.flags.masked[slots] = True
        self.plain[slots] = False

    def _set_numbers(self, slot: int, params: SamplingParams, prompt_length: int) -> None:
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else 0
        top_p = round(params.top_p * (1 << SHARE_BITS))
        min_until = prompt_length + params.min_new_tokens if params.min_new_tokens else 0
        flags = self.flags
        flags.greedy[slot] = params.greedy
        flags.penalty[slot] = params.has_penalty
        flags.bias[slot] = bool(params.logit_bias)
        flags.filtered[slot] = not params.greedy and bool(top_k or params.top_p < 1 or params.min_p > 0)
        flags.ranked[slot] = top_k > 0
        flags.min_until[slot] = min_until
        flags.logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        named = [] if params.logprobs is None else list(params.token_ids_logprob)
        if named or flags.listed[slot]:
            self.listed_ids = _set_padded(self.listed_ids, slot, named, NO_ID)
        flags.listed[slot] = len(named)
        needs = GREEDY * params.greedy + PENALTY * params.has_penalty + BIAS * bool(params.logit_bias)
        needs += FILTERED * bool(flags.filtered[slot])
        min_weight = int(params.min_p * (1 << WEIGHT_BITS))
        ints = (params.seed, top_k, top_p, min_weight, min_until, needs, int(flags.logprobs[slot]))
        temperature = 1.0 if params.greedy else params.temperature
        repetition = max(params.repetition_penalty, LEAST_REPETITION)
        floats = (1 / temperature, repetition, params.frequency_penalty, params.presence_penalty)
        self.ints[slot] = upload(np.array(ints, dtype=np.int64), self.device)
        self.floats[slot] = upload(np.array(floats, dtype=np.float32), self.device)
        self._ahead[slot, AHEAD] = -1  # those were another seed's

    def _set_counts(self, slot: int, prompt_ids: npt.NDArray[np.int32], output_ids: npt.NDArray[np.int32]) -> None:
        if self.static:
            self._set_marks(slot, prompt_ids, output_ids)
            return
        counts, seen = self._tables()
        output = torch.from_numpy(output_ids.astype(np.int64))  # a copy: the caller's array may alias a ring
        prompt = torch.from_numpy(prompt_ids.astype(np.int64))
        counts[slot] = torch.bincount(output, minlength=self.vocab_size).to(self.device, torch.int32)
        seen[slot] = False
        seen[slot, torch.cat((prompt, output)).to(self.device)] = True

    def _set_marks(self, slot: int, prompt_ids: npt.NDArray[np.int32], output_ids: npt.NDArray[np.int32]) -> None:
        drawn, counts = np.unique(output_ids, return_counts=True)
        ids = np.union1d(prompt_ids, drawn).astype(np.int64)
        marks = np.where(np.isin(ids, prompt_ids), IN_PROMPT, 0)
        marks[np.searchsorted(ids, drawn)] += np.minimum(counts, IN_PROMPT - 1)
        row = self.marks[slot]
        row.zero_()
        row.index_copy_(0, upload(ids, self.device), upload(marks.astype(np.int16), self.device))

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self.output_counts is None or self.seen is None:
            shape = (len(self.flags.greedy), self.vocab_size)
            self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return self.output_counts, self.seen

    def count(self, slots: Tensor, ids: Tensor) -> None:
        """Note that `ids` were drawn for `slots` (int64 [rows] each, slots distinct, all with a penalty)."""
        counts, seen = self._tables()
        counts[slots, ids] += 1
        seen[slots, ids] = True

    def count_given(self, slot: int, ids: npt.NDArray[np.int32]) -> None:
        """Note that these tokens [n] came for a slot with a penalty, without a draw; a token may be there twice."""
        if self.static:
            self._add_marks(slot, ids)
            return
        given = upload(ids.astype(np.int64), self.device)
        counts, seen = self._tables()
        counts[slot].index_add_(0, given, torch.ones_like(given, dtype=torch.int32))
        seen[slot, given] = True

    def _add_marks(self, slot: int, ids: npt.NDArray[np.int32]) -> None:
        """Counts stay where they are full, as the kernels leave them: one more would be taken for IN_PROMPT."""
        given, counts = np.unique(ids, return_counts=True)
        at, full = upload(given.astype(np.int64), self.device), IN_PROMPT - 1
        more = upload(np.minimum(counts, full).astype(np.int16), self.device)
        marks = self.marks[slot].index_select(0, at)
        self.marks[slot].index_copy_(0, at, ((marks & full) + more).clamp_(max=full) | (marks & IN_PROMPT))

    def seen_tokens(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all tokens of prompts and outputs: index into `slots`, token id, and count in the output; [n] each."""
        counts, seen = self._tables()
        row, token = seen.index_select(0, slots).nonzero(as_tuple=True)
        return row, token, counts[slots.index_select(0, row), token]

    def listed(self, slots: Tensor, counts: npt.NDArray[np.int64]) -> Tensor:
        """Return the tokens that the requests of `slots` [rows] named, int64 [rows, widest], padded with -1.

        counts [rows]: Flags.listed of them.
        """
        return self.listed_ids[:, : int(counts.max(initial=0))].index_select(0, slots)

    def row_keys(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Return philox.row_keys(seed of the slot, position), int64 [rows]; slots and positions int64 [rows]."""
        block, offset = positions // AHEAD, positions % AHEAD
        rows = self._ahead.index_select(0, slots)
        missing = (rows[:, AHEAD] != block).nonzero()[:, 0]
        if len(missing):
            at, new = slots.index_select(0, missing), block.index_select(0, missing)[:, None]
            ahead = new * AHEAD + torch.arange(AHEAD, device=self.device)
            keys = row_keys(self.integers("seed", at)[:, None], ahead)
            rows[missing] = self._ahead[at] = torch.cat((keys, new), dim=1)
        return rows.gather(1, offset[:, None])[:, 0]

    def integers(self, name: str, slots: Tensor) -> Tensor:
        """Return column `name` of INTS for `slots`, int64 [rows]."""
        return self.ints[:, INTS.index(name)].index_select(0, slots)

    def numbers(self, name: str, slots: Tensor) -> Tensor:
        """Return column `name` of FLOATS for `slots`, float32 [rows, 1]."""
        return self.floats[:, FLOATS.index(name), None].index_select(0, slots)


def _set_padded(table: Tensor, slot: int, values: list[int] | list[float], padding: float) -> Tensor:
    """Write `values` into row `slot`, padded; return the table, widened if they did not fit."""
    missing = len(values) - table.shape[1]
    if missing > 0:
        table = torch.cat((table, table.new_full((len(table), missing), padding)), dim=1)
    row = [*values, *[padding] * (table.shape[1] - len(values))]
    table[slot] = upload(np.array(row, dtype=np.int64 if table.dtype == torch.int64 else np.float32), table.device)
    return table
