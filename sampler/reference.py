"""Drawing tokens, in plain torch: the semantics of sampling, and the sampler that CPUs run.

Used by the sampler actor; every kernel must draw what this draws (philox.py says how nearly). Invariant: a row's
result is a function of its logits, its slot's state and its position. It never depends on the other rows. Runs on any
device, but looks at results on the host in a few places, for which a GPU waits.

In this order, on the row's logits in float32 (V: vocabulary size):
 1. bitmask: a token whose bit is 0 gets -inf; so does one that the state of the slot's grammar does not allow, or the
    slot's mask.
 2. logit_bias is added.
 3. repetition penalty r, tokens of prompt or output: x / r if x > 0, else x * r. Then, output tokens only (count c):
    x - frequency * c, then - presence if c > 0. (As OpenAI, vLLM and SGLang define them.)
 4. min_new_tokens: while fewer tokens were generated, EOS and stop_token_ids get -inf.
 5. Greedy rows (temperature 0 or top_k 1) take the largest value, the lowest id among equals, and are done.
 6. z = (x - max x) * (1 / temperature), in float32. Rows with top_k, top_p or min_p: weight q = trunc(2**40 * exp(z)),
    computed in float32 and held in int64.
 7. top_k: keep tokens with q >= the k-th largest q, so that all ties with it stay.
    top_p, on what top_k left (sum S): keep a token if the sum of all q strictly above its own is < max(1, floor(p S)):
    the smallest set of the most likely tokens that reaches p, and all ties with its last.
    min_p: keep tokens with q >= floor(min_p * 2**40), that is with at least min_p times the largest probability.
    Each of the three is a threshold on q, so together they are their largest: no sorted order, no ties to break.
 8. Draw by an exponential race (Gumbel-max): the kept id i with the largest s_i = z_i - log E_i, the lowest among
    equals. E_i = -log1p(-v_i), v_i = min((h_i + 0.5) * 2**-32, 1 - 2**-24), each operation in float32; h_i are 32 bits,
    race.hashes of the row's key (philox.row_keys of seed and position) and the id.
(Step 7 is in weights.py, step 8 in race.py.)

Why a race: logits never come out the same to the last bit, for a prefill in one chunk or after a cache hit, in another
batch, on another device. A draw by inversion compares a sum over the vocabulary with one number: rounding of 1e-7 in
49,000 logits moved it past that number for up to 0.5 % of the tokens, and a seeded text went another way. A race
changes its winner only if the best two scores are as close as the rounding, about 1e-6 of the draws. For the same
reason it needs no sum and no order: a kernel may split the vocabulary as it likes.
v is at least 2**-33, so -log E is at most 22.9, and at least -2.9 for the most likely token: one with less than
e**-25.7 (7e-12) of its probability is never drawn, and near that limit the steps of v show.

Why integers in 6: which ids are kept is then exact, and sums of integers are the same in any order. 40 bits:
V < 2**22 weights of at most 2**40 and sums stay below 2**62; what is cut off could not be drawn anyway.

Poison (finish 3, id 0): NaN or +inf anywhere in the row, or no token left with a finite value. Where a grammar leaves
none (finish 4, id 0), as when min_new_tokens forbids the end that is all it allows, that is not the model's fault.
A grammar advances by the drawn token, and its end tokens stop the request whatever ignore_eos says.
Logprobs are of the model's raw distribution: log_softmax of the unmodified logits in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grammar import unpack_bits
from .race import BLOCK, race
from .state import Flags, SamplerState
from .upload import upload
from .weights import race_kept

STOP: Final = 1
POISON: Final = 3
DEAD: Final = 4

Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Sampled:
    """One drawn token per row."""

    ids: Tensor
    """int64 [rows]."""
    finish: Tensor
    """uint8 [rows]: 0 none, 1 the token stops the request, 3 poison, 4 a grammar without a way (messages.Finish)."""
    logprobs: Tensor | None = None
    """float32 [rows], NaN where not asked; None if no row asked."""
    top_n: int = 0
    top_ids: Tensor | None = None
    """int32 [rows, top_n], most likely first, the lower id first among equals; -1 beyond what the row asked."""
    top_logprobs: Tensor | None = None
    """float32 [rows, top_n], NaN beyond what the row asked."""
    listed: Tensor | None = None
    """float32 [rows, widest]: of the tokens that the row's request named, in its order; NaN beyond."""


class Race(Protocol):
    """A CPU's kernel for steps 1, 5, 6 and 8."""

    def __call__(
        self, logits: Tensor, bitmask: Tensor | None, slots: Tensor, positions: Tensor, state: SamplerState
    ) -> tuple[Tensor, Tensor]:
        """Return ids int64 [rows] and finish uint8 [rows]: POISON, and then the id is 0, STOP, or 0.

        logits float32 [rows, vocab], bitmask int32 [rows, words] or None, slots and positions int64 [rows], all on the
        CPU, the logits contiguous.
        """


@dataclass(slots=True)
class _Rows:
    """Some rows of the batch on their way to a token. `x` is ours to change once `own` made it float32."""

    x: Tensor
    slots: Tensor
    positions: Tensor
    bitmask: Tensor | None
    flags: Flags
    active_min: Mask

    def pick(self, chosen: Mask) -> "_Rows":
        """Return the chosen rows (copies); self if that is all of them."""
        if chosen.all():
            return self
        index = _index(chosen, self.x.device)
        return _Rows(
            self.x.index_select(0, index),
            self.slots.index_select(0, index),
            self.positions.index_select(0, index),
            None if self.bitmask is None else self.bitmask.index_select(0, index),
            self.flags.take(chosen),
            self.active_min[chosen],
        )


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    state: SamplerState,
    bitmask: Tensor | None = None,
    host_slots: npt.NDArray[np.int64] | None = None,
    kernel: Race | None = None,
) -> Sampled:
    """Draw one token per row and count it for the penalties; by a kernel, if there is one and it takes the logits.

    logits [rows, vocab] float32, bfloat16 or float16, not modified. slots int64 [rows], distinct. positions int64
    [rows]: the absolute position of the token being drawn (prompt_length for a request's first). bitmask int32
    [rows, ceil(vocab / 32)], bit i of word w for token 32 w + i, 1 = allowed. host_slots: slots on the host; without
    it a GPU is waited for.
    """
    at = slots.cpu().numpy() if host_slots is None else host_slots
    taken = (logits, torch.float32), (slots, torch.int64), (positions, torch.int64)
    if kernel is not None and not all(t.dtype == dtype and t.is_contiguous() for t, dtype in taken):
        kernel = None
    if kernel is not None and state.plain[at].all():
        return Sampled(*kernel(logits, bitmask, slots, positions, state))
    flags = state.flags.take(at)
    active_min = flags.min_until > 0
    if positions.device.type == "cpu" and active_min.any():
        active_min &= positions.numpy() < flags.min_until
    guided = flags.constrained | flags.masked
    if guided.any():
        bitmask = state.grammars.mask(at, bitmask)
    rows = _Rows(logits, slots, positions, bitmask, flags, active_min)
    ids, finish = _draw_and_end(rows, state) if kernel is None else _draw_by(kernel, rows, state)
    if guided.any():
        _follow(ids, finish, logits, at, state)
    if flags.penalty.any():
        chosen = _index(flags.penalty, logits.device)
        state.count(slots.index_select(0, chosen), ids.index_select(0, chosen))
    drawn = Sampled(ids, finish)
    if (flags.logprobs >= 0).any():
        _add_logprobs(drawn, logits, flags.logprobs, state.listed(slots, flags.listed))
    return drawn


def score(logits: Tensor, ids: Tensor, state: SamplerState, host_slots: npt.NDArray[np.int64]) -> Sampled:
    """Return given tokens, ids int64 [rows], with the logprobs that the requests of the slots [rows] want.

    logits [rows, vocab] as in `sample`, on any device.
    """
    given = Sampled(ids, torch.zeros(len(ids), dtype=torch.uint8, device=ids.device))
    flags = state.flags.take(host_slots)
    listed = state.listed(upload(host_slots, state.device), flags.listed)
    _add_logprobs(given, logits, flags.logprobs, listed)
    return given


def _follow(ids: Tensor, finish: Tensor, logits: Tensor, at: npt.NDArray[np.int64], state: SamplerState) -> None:
    """Advance the grammars of the rows that have one, and say in `finish` which of them end, or cannot go on."""
    bound = state.flags.constrained[at]
    poison = (finish == POISON).numpy()
    for row in np.flatnonzero((bound | state.flags.masked[at]) & poison).tolist():
        if bool(logits[row].amax().isfinite()):
            finish[row] = DEAD
    rows = np.flatnonzero(bound & ~poison)
    ended = state.grammars.advance(at[rows], ids[torch.from_numpy(rows)])
    finish[torch.from_numpy(rows[ended])] = STOP


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the largest value (the lowest among equals) int64 [rows] and whether it is not finite.

    x [rows, vocab]. NaN counts as largest, so one look at the winner finds NaN and +inf anywhere in the row. In two
    levels because torch's argmax of a long bfloat16 row on a CPU is 4 to 6 times slower than amax.
    """
    blocks = x.reshape(len(x), -1, math.gcd(x.shape[1], BLOCK))
    block = blocks.amax(-1).argmax(-1)
    rows = torch.arange(len(x), device=x.device)
    part = blocks[rows, block]
    within = part.argmax(-1)
    return block * blocks.shape[2] + within, ~part[rows, within].isfinite()


def _draw_by(kernel: Race, rows: _Rows, state: SamplerState) -> tuple[Tensor, Tensor]:
    """_draw_and_end by a kernel, but for rows with filters."""
    flags = rows.flags
    if flags.filtered.any():
        if flags.filtered.all():
            return _draw_and_end(rows, state)
        rest = rows.pick(~flags.filtered)
        return _merge(flags.filtered, _draw_and_end(rows.pick(flags.filtered), state), _draw_by(kernel, rest, state))
    x = rows.x
    if (flags.penalty | flags.bias | rows.active_min).any():
        x = x.clone()
        _edit(x, replace(rows, bitmask=None), state)
    return kernel(x, rows.bitmask, rows.slots, rows.positions, state)


def _draw_and_end(rows: _Rows, state: SamplerState) -> tuple[Tensor, Tensor]:
    """Return ids int64 [rows] and finish uint8 [rows]: POISON, and then the id is 0, STOP, or 0."""
    ids, poison = _draw(rows, state)
    ids = ids.masked_fill(poison, 0)
    stopped = (ids[:, None] == state.stop_ids.index_select(0, rows.slots)).any(-1)
    return ids, (stopped.to(torch.uint8) * STOP).masked_fill_(poison, POISON)


def _draw(rows: _Rows, state: SamplerState) -> tuple[Tensor, Tensor]:
    """Return ids int64 [rows] and poison bool [rows]. Rows that need nothing but an argmax get nothing else."""
    edited = rows.flags.penalty | rows.flags.bias | rows.active_min
    if rows.bitmask is not None:
        edited[:] = True
    plain = rows.flags.greedy & ~edited
    if plain.all():
        return argmax(rows.x)
    if not plain.any():
        return _draw_edited(rows, state, bool(edited.any()))
    first, second = argmax(rows.pick(plain).x), _draw_edited(rows.pick(~plain), state, bool(edited.any()))
    return _merge(plain, first, second)


def _draw_edited(rows: _Rows, state: SamplerState, edited: bool) -> tuple[Tensor, Tensor]:
    """_draw for rows of which each is edited or not greedy."""
    x = rows.x.to(torch.float32, copy=True)
    largest = x.amax(-1)
    poison = ~largest.isfinite()  # of the raw row: a mask would hide it
    if edited:
        _edit(x, rows, state)
        largest = x.amax(-1)
        poison |= ~largest.isfinite()
    if bool(poison.any()):  # a flat row in their place, so that what follows meets numbers; their id is replaced
        x.masked_fill_(poison[:, None], 0.0)
        largest = largest.masked_fill(poison, 0.0)
    greedy = rows.flags.greedy
    if greedy.all():
        return argmax(x)[0], poison
    if not greedy.any():
        return _draw_random(x, largest, rows.slots, rows.positions, rows.flags.filtered, state), poison
    at, rest = _index(greedy, x.device), _index(~greedy, x.device)
    ids = torch.empty_like(rows.slots)
    ids[at] = argmax(x.index_select(0, at))[0]
    x, largest, slots, positions = (t.index_select(0, rest) for t in (x, largest, rows.slots, rows.positions))
    ids[rest] = _draw_random(x, largest, slots, positions, rows.flags.filtered[~greedy], state)
    return ids, poison


def _draw_random(
    x: Tensor, largest: Tensor, slots: Tensor, positions: Tensor, filtered: Mask, state: SamplerState
) -> Tensor:
    """Steps 6 to 8: ids int64 [rows] from the edited logits x, which are overwritten, and their row maxima."""
    z = x.sub_(largest[:, None]).mul_(state.numbers("inverse_temperature", slots))
    keys, terms = state.row_keys(slots, positions), state.id_terms
    if not filtered.any():
        return race(z, terms, keys)
    filters = [state.integers(name, slots) for name in ("top_k", "top_p", "min_weight")]
    if filtered.all():
        return race_kept(z, terms, keys, *filters)
    at, rest = _index(filtered, x.device), _index(~filtered, x.device)
    ids = torch.empty_like(slots)
    ids[at] = race_kept(z.index_select(0, at), terms, keys[at], *(t.index_select(0, at) for t in filters))
    ids[rest] = race(z.index_select(0, rest), terms, keys[rest])
    return ids


def _edit(x: Tensor, rows: _Rows, state: SamplerState) -> None:
    """Steps 1 to 4 in place on x float32 [rows, vocab]."""
    if rows.bitmask is not None:
        # Not masked_fill_, which takes ten times as long on a CPU.
        bound = unpack_bits(rows.bitmask, x.shape[1]).float().sub_(0.5).mul_(math.inf)
        torch.minimum(x, bound, out=x)

    def bias(part: Tensor, slots: Tensor, _: Tensor) -> None:
        part.scatter_add_(1, state.bias_ids.index_select(0, slots), state.bias_values.index_select(0, slots))

    def penalize(part: Tensor, slots: Tensor, _: Tensor) -> None:
        row, token, count = state.seen_tokens(slots)  # few of the vocabulary: far cheaper than whole rows
        values = part[row, token]
        repetition, frequency, presence = (
            state.numbers(name, slots)[row, 0] for name in ("repetition", "frequency", "presence")
        )
        values = torch.where(values > 0, values / repetition, values * repetition)
        part[row, token] = values - frequency * count - presence * (count > 0)

    def forbid_stop(part: Tensor, slots: Tensor, positions: Tensor) -> None:
        stops = state.stop_ids.index_select(0, slots)
        stops = torch.cat((stops, state.eos_ids.expand(len(stops), -1)), dim=1)
        early = (positions < state.integers("min_until", slots))[:, None]
        # Padding adds 0 to id 0; -inf a second time stays -inf.
        part.scatter_add_(1, stops.clamp(min=0), torch.where(early & (stops >= 0), -math.inf, 0.0))

    _on_rows(x, rows.flags.bias, rows.slots, rows.positions, bias)
    _on_rows(x, rows.flags.penalty, rows.slots, rows.positions, penalize)
    _on_rows(x, rows.active_min, rows.slots, rows.positions, forbid_stop)


def _on_rows(
    x: Tensor, chosen: Mask, slots: Tensor, positions: Tensor, change: Callable[[Tensor, Tensor, Tensor], None]
) -> None:
    """Apply change(x, slots, positions), which works in place, to the chosen rows of x. The others cost nothing."""
    if not chosen.any():
        return
    if chosen.all():
        change(x, slots, positions)
        return
    index = _index(chosen, x.device)
    part = x.index_select(0, index)
    change(part, slots.index_select(0, index), positions.index_select(0, index))
    x.index_copy_(0, index, part)


def _add_logprobs(drawn: Sampled, logits: Tensor, wanted: npt.NDArray[np.int64], listed: Tensor) -> None:
    """Fill in the logprobs of the rows that want them; `listed` as SamplerState.listed gives it."""
    rows, vocab = logits.shape
    index = _index(wanted >= 0, logits.device)
    wide = logits.index_select(0, index).float()
    logprobs = torch.log_softmax(wide, dim=-1)
    chosen = logprobs.gather(1, drawn.ids.index_select(0, index)[:, None])[:, 0]
    drawn.logprobs = logprobs.new_full((rows,), math.nan).index_copy_(0, index, chosen)
    drawn.top_n = n = min(int(wanted.max()), vocab)
    drawn.top_ids = torch.full((rows, n), -1, dtype=torch.int32, device=logits.device)
    drawn.top_logprobs = logprobs.new_full((rows, n), math.nan)
    if listed.shape[1]:
        drawn.listed = logprobs.new_full(listed.shape, math.nan)
        drawn.listed[index] = logprobs_of(logprobs, listed.index_select(0, index))
    if not n:
        return
    top_ids = most_likely(wide, n)  # by logits, which are further apart than logprobs, from which a sum was taken
    asked = torch.from_numpy(wanted[wanted >= 0]).to(logits.device)[:, None]
    beyond = torch.arange(n, device=logits.device) >= asked
    drawn.top_logprobs[index] = logprobs.gather(1, top_ids).masked_fill(beyond, math.nan)
    drawn.top_ids[index] = top_ids.to(torch.int32).masked_fill(beyond, -1)


def logprobs_of(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return those of tokens ids int64 [rows, n], NaN where the id is -1; logprobs [rows, vocab]."""
    return logprobs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, math.nan)


def most_likely(values: Tensor, n: int) -> Tensor:
    """Return the ids of the n largest values, the lower id first among equals, int64 [rows, n].

    They lie in the n blocks with the largest maxima (lower blocks first among equals), so only these are ranked.
    """
    width = math.gcd(values.shape[1], 64)
    blocks = values.view(len(values), -1, width)
    maxima = blocks.amax(-1)
    numbers = torch.arange(maxima.shape[1], device=values.device).expand_as(maxima)
    chosen = _rank(maxima, numbers, min(n, maxima.shape[1]))[:, :, None].expand(-1, -1, width)
    ids = chosen * width + torch.arange(width, device=values.device)
    return _rank(blocks.gather(1, chosen).flatten(1), ids.flatten(1), n)


def _rank(values: Tensor, ids: Tensor, n: int) -> Tensor:
    """most_likely among candidates: values float32 and their ids int64, [rows, candidates] each.

    torch.topk breaks ties anyhow, and bfloat16 logits are full of them: so its keys are made distinct, with the
    float32's order in the upper half and the id, turned round, in the lower.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return 0xFFFFFFFF - ((ordered << 32 | (0xFFFFFFFF - ids)).topk(n).values & 0xFFFFFFFF)


def _index(chosen: Mask, device: torch.device) -> Tensor:
    return torch.from_numpy(np.flatnonzero(chosen)).to(device)


def _merge(first: Mask, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Interleave the results of the rows marked in `first` with those of the rest."""
    device = one[0].device
    order = torch.cat((_index(first, device), _index(~first, device)))
    ids, poison = torch.cat((one[0], other[0])), torch.cat((one[1], other[1]))
    return torch.empty_like(ids).index_copy_(0, order, ids), torch.empty_like(poison).index_copy_(0, order, poison)
