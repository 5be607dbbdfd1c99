"""The sampler: the actor that owns how each slot of the batch draws. It lives in its executor's process and thread.

The scheduler sends it SlotParams and grammars over a lane of its own; the executor calls `sync` at the start of a
window and `draw` in each step, so logits never leave the device. Invariant: all of it takes effect with the window it
is sent for, since the slot may still run for another request in the windows before.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, ClassVar, Final, assert_never

import numpy as np
import torch
from torch import Tensor

from ..models.cpu_draw import cpu_race
from ..sampler.drawer import Drawer
from ..sampler.reference import Sampled
from ..sampler.state import SamplerState
from .actor import Actor, Context
from .changes import WindowChanges
from .messages import (
    Drain,
    DropGrammar,
    GrammarStates,
    LoadGrammar,
    PeerDown,
    PeerUp,
    SamplerInbox,
    SamplerMessage,
    SlotMasks,
    SlotParams,
)

BEFORE_ALL: Final = -1
"""A window before a scheduler's first one, which is 0."""


class Sampler(Actor):
    """See the module's text. `state` is set by the executor, which knows the device."""

    inbox_type: ClassVar[Any] = SamplerInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.state: SamplerState | None = None
        self.drawer: Drawer | None = None
        self.changes: WindowChanges[SamplerState] = WindowChanges()
        self.grammars: set[int] = set()
        """Handles of the loaded ones."""

    def receive(self, message: Any, source: str) -> None:
        """Keep changes for their window; forget all of a scheduler that died."""
        match message:
            case SlotParams() | LoadGrammar() | DropGrammar() | GrammarStates() | SlotMasks():
                self.changes.add(message.window, self._change(message))
            case PeerDown():
                self.changes.clear()
                self.changes.add(BEFORE_ALL, self._drop_all)  # a window of its may be under way
            case PeerUp() | Drain():
                pass  # nothing of the sampler's depends on it

    def _change(self, m: SamplerMessage) -> Callable[[SamplerState], None]:
        """What the message does to the state, with copies of its arrays."""
        match m:
            case SlotParams():
                return partial(_admit, m, array(m.prompt_ids, np.int32), array(m.output_ids, np.int32))
            case LoadGrammar():
                classes, canonical = array(m.token_class, np.uint16), array(m.canonical, np.int32)
                transitions = array(m.transitions, np.int16).reshape(len(canonical), -1)
                return partial(self._load, m.handle, classes, transitions, canonical)
            case DropGrammar():
                return partial(self._drop, m.handle)
            case GrammarStates():
                slots, states = array(m.slots, np.int32).tolist(), array(m.states, np.int32).tolist()
                ends = np.cumsum(array(m.counted, np.int32))
                return partial(_jump, slots, states, np.split(array(m.counted_ids, np.int32), ends[:-1]))
            case SlotMasks():
                slots = array(m.slots, np.int32)
                return partial(_set_masks, slots, array(m.bitmask, np.int32).reshape(len(slots), -1))
            case _:
                assert_never(m)

    def _load(
        self, handle: int, classes: np.ndarray, transitions: np.ndarray, canonical: np.ndarray, state: SamplerState
    ) -> None:
        state.load_grammar(handle, classes, transitions, canonical)
        self.grammars.add(handle)

    def _drop(self, handle: int, state: SamplerState) -> None:
        state.drop_grammar(handle)
        self.grammars.discard(handle)

    def _drop_all(self, state: SamplerState) -> None:
        for handle in list(self.grammars):
            self._drop(handle, state)

    def sync(self, window: int, changes: int) -> None:
        """Apply what was sent for `window`, so many messages. Raises as WindowChanges.apply."""
        assert self.state is not None
        self.changes.apply(window, changes, self.state, self.context.inbox, self.receive)

    def prepare(self, max_slots: int, vocab_size: int, eos_ids: tuple[int, ...], device: torch.device) -> None:
        """Make the state; called by the executor, which knows the device."""
        self.state = SamplerState(max_slots, vocab_size, eos_ids, device)
        self.drawer = Drawer(self.state, max_slots, cpu_race() if device.type == "cpu" else None)

    def mode(self, host_slots: np.ndarray) -> Hashable:
        """See stepper.Drawer."""
        assert self.drawer is not None
        return self.drawer.mode(host_slots)

    def draw(
        self, logits: Tensor, slots: Tensor, positions: Tensor, mode: Hashable, host_slots: np.ndarray | None
    ) -> Sampled:
        """Draw a token per row: logits [rows, vocab], slots and positions [rows]; see stepper.Drawer."""
        assert self.drawer is not None
        return self.drawer.draw(logits, slots, positions, mode, host_slots)

    def score(self, logits: Tensor, host_slots: np.ndarray, ids: np.ndarray) -> Sampled:
        """The logprobs of given tokens; see stepper.Drawer."""
        assert self.drawer is not None
        return self.drawer.score(logits, host_slots, ids.astype(np.int64))


def array(view: memoryview, dtype: type[Any]) -> np.ndarray:
    """A copy of a message's array."""
    return np.frombuffer(view, dtype=dtype).copy()


def _admit(m: SlotParams, prompt: np.ndarray, output: np.ndarray, state: SamplerState) -> None:
    length, generated = m.prompt_length, m.output_length
    state.admit(m.slot, m.params, prompt, output, length, generated, m.grammar, m.grammar_state)


def _jump(slots: list[int], states: list[int], counted: list[np.ndarray], state: SamplerState) -> None:
    for slot, value, ids in zip(slots, states, counted, strict=True):
        state.set_grammar_state(slot, value)
        if len(ids):
            state.count_given(slot, ids)


def _set_masks(slots: np.ndarray, masks: np.ndarray, state: SamplerState) -> None:
    state.set_masks(slots, masks)
