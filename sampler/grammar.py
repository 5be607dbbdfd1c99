"""Grammars: which tokens each slot's grammar allows next, as tables that a draw follows without the host.

Used by SamplerState. A grammar is an automaton over token ids (fsm/token_table.py, whose arrays come here as they are):
a state allows the tokens whose class has a transition, or one canonical token alone, and a drawn token leads to the
next state. On a GPU the fused kernels read tables, bindings and states on the device (`directory` has the tables'
addresses, so that CUDA graphs see grammars that come and go); on a CPU the states are the host's, and the masks of
states are kept, since outputs come back to the same states. Where no table can have a grammar, each draw of a slot gets
a mask from the host. Invariant: a slot is bound to at most one loaded grammar, or has masks.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .upload import upload

NONE: Final = -1
END: Final = 1
"""The class of the tokens that end an output; it leads a final state to itself."""
COLUMNS: Final = 4
"""Of the directory: addresses of token_class, transitions and canonical, then K."""
MASKS: Final = 512
"""Masks of states that a CPU keeps, per grammar."""

Int16Array = npt.NDArray[np.int16]
UInt16Array = npt.NDArray[np.uint16]
Int32Array = npt.NDArray[np.int32]


@dataclass(slots=True)
class Grammar:
    """S states, K classes, V tokens. Lives on the device; on a CPU also the masks of states met lately."""

    number: int
    token_class: Tensor
    """int16 [V]"""
    transitions: Tensor
    """int16 [S, K], -1: the token can't come."""
    canonical: Tensor
    """int32 [S]: the only token of a state, or -1."""
    masks: "OrderedDict[int, Tensor]" = field(default_factory=OrderedDict)
    """State -> int32 [ceil(V / 32)], bit i of word w for token 32 w + i."""


class Grammars:
    """Loaded grammars, and each slot's: `bound` int32 [slots] its number or -1, `state` int32 [slots]; `masks` int32
    [slots, words]."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.bound = torch.full((slots,), NONE, dtype=torch.int32, device=device)
        self.state = torch.zeros(slots, dtype=torch.int32, device=device)
        self.masks = torch.full((slots, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
        """What the host allows each slot; all ones where it says nothing."""
        self.directory = torch.zeros(2 * slots, COLUMNS, dtype=torch.int64, device=device)
        self.host_bound = np.full(slots, NONE, np.int32)
        self._host_state = np.zeros(slots, np.int64)
        """The truth on a CPU only."""
        self._loaded: dict[int, Grammar] = {}
        self._by_number: dict[int, Grammar] = {}
        self._free = list(range(2 * slots))[::-1]

    # ------------------------------------------------------------------ grammars come and go

    def load(self, handle: int, token_class: UInt16Array, transitions: Int16Array, canonical: Int32Array) -> None:
        """Load a grammar under a handle of the caller's. Tokens that the model has beyond the grammar's never come.

        The arrays may alias a message: they are copied.

        Raises ValueError if it has more tokens than the model, or is loaded, or too many are.
        """
        if len(token_class) > self.vocab_size or handle in self._loaded or not self._free:
            raise ValueError(f"grammar {handle} of {len(token_class)} tokens cannot be loaded, or is")
        number = self._free.pop()
        classes = np.zeros(self.vocab_size, np.int16)  # class 0 never comes
        classes[: len(token_class)] = token_class.view(np.int16)
        arrays = (classes, np.array(transitions, np.int16, order="C"), np.array(canonical, np.int32))
        tables = [upload(array, self.device) for array in arrays]
        self._loaded[handle] = self._by_number[number] = Grammar(number, tables[0], tables[1], tables[2])
        entry = [*(table.data_ptr() for table in tables), transitions.shape[1]]
        self.directory[number] = upload(np.array(entry, dtype=np.int64), self.device)

    def drop(self, handle: int) -> None:
        """Forget a grammar that no slot is bound to; steps launched before may still read it."""
        grammar = self._loaded.pop(handle)
        del self._by_number[grammar.number]
        self._free.append(grammar.number)

    def bind(self, slot: int, handle: int, state: int) -> None:
        """Let a slot follow a grammar from a state on; handle NONE: none."""
        number = NONE if handle == NONE else self._loaded[handle].number
        if number == NONE and self.host_bound[slot] == NONE:
            return
        self.host_bound[slot] = number
        self.bound[slot] = number
        self.set_state(slot, state)

    def set_state(self, slot: int, state: int) -> None:
        """Put a slot's grammar into a state: its output went on without a draw."""
        self._host_state[slot] = state
        self.state[slot] = state

    def set_masks(self, slots: Int32Array, masks: Int32Array) -> None:
        """Let slots [rows], which are bound to nothing, draw under masks [rows, words]; missing words allow nothing."""
        rows = np.zeros((len(slots), self.masks.shape[1]), np.int32)
        rows[:, : masks.shape[1]] = masks
        self.masks.index_copy_(0, upload(slots.astype(np.int64), self.device), upload(rows, self.device))

    def unmask(self, slot: int) -> None:
        """Let a slot draw without a mask."""
        self.masks[slot] = -1

    # ------------------------------------------------------------------ on a CPU

    def mask(self, slots: npt.NDArray[np.int64], bitmask: Tensor | None) -> Tensor:
        """Return a bitmask int32 [rows, words] of what slots [rows] may draw, also by `bitmask` if there is one."""
        bound = self.host_bound[slots]
        rows = self.masks.index_select(0, torch.from_numpy(slots))
        for i in np.flatnonzero(bound != NONE).tolist():
            rows[i] = self._mask_of(self._by_number[int(bound[i])], int(self._host_state[slots[i]]))
        return rows if bitmask is None else rows & bitmask

    def advance(self, slots: npt.NDArray[np.int64], ids: Tensor) -> npt.NDArray[np.bool_]:
        """Follow the ids [rows] drawn for slots [rows], all of which are bound; returns which of them drew an end."""
        ended = np.zeros(len(slots), np.bool_)
        for row, (slot, token) in enumerate(zip(slots.tolist(), ids.tolist(), strict=True)):
            grammar = self._by_number[int(self.host_bound[slot])]
            token_class = int(grammar.token_class.numpy()[token])
            self._host_state[slot] = grammar.transitions.numpy()[self._host_state[slot], token_class]
            ended[row] = token_class == END
        return ended

    def _mask_of(self, grammar: Grammar, state: int) -> Tensor:
        found = grammar.masks.get(state)
        if found is None:
            found = grammar.masks[state] = pack_bits(allowed(grammar, state).numpy())
            if len(grammar.masks) > MASKS:
                grammar.masks.popitem(last=False)
        grammar.masks.move_to_end(state)
        return found


def allowed(grammar: Grammar, state: int) -> Tensor:
    """bool [V]: the tokens that a state allows. A dead state (-1) allows none."""
    if state < 0:
        return torch.zeros(len(grammar.token_class), dtype=torch.bool)
    only = int(grammar.canonical[state])
    if only != NONE:
        return torch.arange(len(grammar.token_class)) == only
    return (grammar.transitions[state] >= 0).index_select(0, grammar.token_class.to(torch.int32))


def pack_bits(mask: npt.NDArray[np.bool_]) -> Tensor:
    """bool [V] -> int32 [ceil(V / 32)], bit i of word w for element 32 w + i."""
    padded = np.zeros(-(-len(mask) // 32) * 32, np.bool_)
    padded[: len(mask)] = mask
    return torch.from_numpy(np.packbits(padded, bitorder="little").view(np.int32))


def unpack_bits(masks: Tensor, width: int) -> Tensor:
    """int32 [rows, words] -> uint8 0 or 1 [rows, width], the reverse of pack_bits."""
    if masks.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(masks.numpy().view(np.uint8), axis=1, count=width, bitorder="little"))
    places = torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> places) & 1).flatten(1)[:, :width].to(torch.uint8)
