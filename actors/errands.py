"""Errands: what the scheduler has the executors do beside windows: profiles, and other weights.

Owned by the scheduler, which passes on what comes of them and makes no plans while `holds`. An update of the weights
goes in two parts: the executors load them beside those in use, while requests go on; then, when no window is in flight,
all KV is forgotten and they are swapped. Invariant: every Order that came here is answered once, also when an executor
dies meanwhile; an executor that comes back gets the weights that its predecessor had before it gets a plan.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .messages import Carried, Done, Instruct, Order, Refused, Task

OURS: Final = -1
"""Id of an update of nobody's: an executor that came back."""
PROFILES: Final[dict[str, Task]] = {"start_profile": "start_profile", "stop_profile": "stop_profile"}


@dataclass(slots=True)
class Update:
    """Weights on their way."""

    rid: int
    folder: str
    abort: bool
    loaded: bool = False
    swapping: bool = False


class Errands:
    """See the module's text. `instruct` sends to every executor, `answer` to who gave the order."""

    def __init__(self, instruct: Callable[[Instruct], None], answer: Callable[[Done | Refused], None]) -> None:
        self._instruct = instruct
        self._answer = answer
        self._open: set[int] = set()
        """Orders that are profiles."""
        self.update: Update | None = None
        self.weights = ""
        """The folder of those in use; empty: those of the start."""

    @property
    def holds(self) -> bool:
        """No plans now: weights wait to be swapped, or are not yet those of before an executor's death."""
        return self.update is not None and (self.update.loaded or self.update.rid == OURS)

    def order(self, m: Order) -> None:
        """Take an order; its answer comes later, and once, also if a text actor's successor sends it again."""
        if m.rid in self._open or (self.update is not None and self.update.rid == m.rid):
            return
        if m.action in PROFILES:
            self._open.add(m.rid)
            self._instruct(Instruct(m.rid, PROFILES[m.action], m.detail))
        elif self.update is not None:
            self._answer(Refused(m.rid, 1, 409, "busy", "an update of the weights is under way"))
        else:
            self.update = Update(m.rid, m.detail, m.action == "update_weights_abort")
            self._instruct(Instruct(m.rid, "load_weights", m.detail))

    def swap(self) -> None:
        """No window is in flight, and no KV is of use any more."""
        assert self.update is not None
        self.update.swapping = True
        self._instruct(Instruct(self.update.rid, "swap_weights"))
        self.weights = self.update.folder

    def carried(self, m: Carried) -> str | None:
        """Take what the executors say. Returns why they cannot have the weights that they had; None: all is well."""
        if m.rid in self._open:
            self._open.discard(m.rid)
            self._tell(m)
        elif self.update is not None and m.rid == self.update.rid:
            if m.status == 0 and m.task == "load_weights":
                self.update.loaded = True
                return None
            ours, self.update = self.update.rid == OURS, None
            if not ours:
                self._tell(m)
            elif m.status:
                return m.text
        return None

    def restore(self, has: str) -> bool:
        """An executor came (back) with the weights of the folder `has`; True if it must load others first."""
        self.weights = self.weights or has
        if self.weights == has:
            return False
        self.update = Update(OURS, self.weights, abort=False)
        self._instruct(Instruct(OURS, "load_weights", self.weights))
        return True

    def executor_lost(self) -> None:
        """Nothing of what was asked comes any more."""
        waiting = [*self._open]
        self._open.clear()
        if self.update is not None and self.update.rid != OURS and not self.update.swapping:
            waiting.append(self.update.rid)
        elif self.update is not None and self.update.swapping and self.update.rid != OURS:
            self._answer(Done(self.update.rid))  # its successor begins with them
        self.update = None
        for rid in waiting:
            self._answer(Refused(rid, 1, 503, "executor_crashed", "the executor died meanwhile; try again"))

    def _tell(self, m: Carried) -> None:
        if m.status:
            self._answer(Refused(m.rid, 1, m.status, m.code, m.text, m.param))
        else:
            self._answer(Done(m.rid, m.text))
