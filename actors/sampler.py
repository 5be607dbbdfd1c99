"""The sampler: the actor that owns how each slot of the batch draws. It lives in its executor's process and thread.

The scheduler sends it SlotParams over a lane of its own; the executor calls `sync` at the start of a window and
`draw` in each step, so logits never leave the device. Invariant: parameters take effect with the window they are
sent for, since the slot may still run for another request in the windows before.
"""

import time
from collections import deque
from collections.abc import Hashable
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from ..sampler.drawer import Drawer
from ..sampler.reference import Sampled
from ..sampler.state import SamplerState
from .actor import Actor, Context
from .messages import Drain, PeerDown, PeerUp, SamplerInbox, SlotParams

SYNC_SECONDS: Final = 5.0


class Sampler(Actor):
    """See the module's text. `state` is set by the executor, which knows the device."""

    inbox_type: ClassVar[Any] = SamplerInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.state: SamplerState | None = None
        self.drawer: Drawer | None = None
        self.pending: deque[tuple[SlotParams, np.ndarray, np.ndarray]] = deque()

    def receive(self, message: Any, source: str) -> None:
        """Keep SlotParams for their window; forget all of a scheduler that died."""
        match message:
            case SlotParams():
                prompt = np.frombuffer(message.prompt_ids, dtype=np.int32).copy()
                output = np.frombuffer(message.output_ids, dtype=np.int32).copy()
                self.pending.append((message, prompt, output))
            case PeerDown():
                self.pending.clear()
            case PeerUp() | Drain():
                pass  # nothing of the sampler's depends on it

    def sync(self, window: int, admits: int) -> None:
        """Apply the parameters sent for `window`: one message for each of its admits.

        They were sent before the plan, but through another lane, so they may be a moment late.

        Raises:
            RuntimeError: they did not come (the scheduler broke its promise).
        """
        assert self.state is not None
        deadline = time.monotonic() + SYNC_SECONDS
        while admits:
            while (item := self.context.inbox.poll()) is not None:
                self.receive(*item)
            while admits and self.pending and self.pending[0][0].window <= window:
                m, prompt, output = self.pending.popleft()
                self.state.admit(m.slot, m.params, prompt, output, m.prompt_length, m.output_length)
                admits -= m.window == window
            if admits and time.monotonic() > deadline:
                raise RuntimeError(f"{admits} SlotParams missing for window {window}")

    def prepare(self, max_slots: int, vocab_size: int, eos_ids: tuple[int, ...], device: torch.device) -> None:
        """Make the state; called by the executor, which knows the device."""
        self.state = SamplerState(max_slots, vocab_size, eos_ids, device)
        self.drawer = Drawer(self.state, max_slots)

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
