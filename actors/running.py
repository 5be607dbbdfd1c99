"""What the text actor keeps of running requests: their outputs, what is new for whom, and how it tells them.

The base of text.py's actor, which fills it.
"""

from typing import Final

from ..errors import ActorserveError
from .actor import Actor, Context
from .messages import (
    Abort,
    AskTimelines,
    Chunk,
    Chunks,
    FrontAnswer,
    ImagePixels,
    Look,
    Order,
    Refused,
    Stats,
    Submit,
    Unpin,
)
from .output import Output
from .ref import Gone

SCHEDULER: Final = "sched"


class Running(Actor):
    """State: the running requests, and those with something new for their front."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.outputs: dict[int, Output] = {}
        """Running requests by id."""
        self.prompt_tokens = 0
        """Of their prompts."""
        self.scheduler_up = False
        """It knows all that is here: it was told when it came up."""
        self._changed: dict[str, dict[int, Output]] = {}
        """By front: outputs with something new."""

    def flush(self) -> None:
        """Send each front what is new in one message, first tokens first. Where one lags behind, chunks are joined."""
        desk = self.context.desk
        for front in list(self._changed):
            ref = self.context.ref(front)
            if ref.backlog:
                continue  # credit wakes us, and flush is called again
            changed = sorted(self._changed.pop(front).values(), key=_is_begun)
            while changed:
                chunks: list[Chunk] = []
                for output in changed:
                    desk.now(output.rid)
                    if (chunk := output.chunk()) is not None:
                        chunks.append(chunk)
                desk.rest()
                if chunks:
                    self._post(front, Chunks(chunks))
                changed = [output for output in changed if output.holds_prompt]

    def _forget(self, rid: int) -> Output | None:
        output = self._drop(rid)
        if output is not None:
            self._unmark(output)
        return output

    def _drop(self, rid: int) -> Output | None:
        output = self.outputs.pop(rid, None)
        if output is not None:
            self.prompt_tokens -= output.prompt_tokens
        return output

    def _mark_changed(self, output: Output) -> None:
        self._changed.setdefault(output.front, {})[output.rid] = output

    def _unmark(self, output: Output) -> None:
        self._changed.get(output.front, {}).pop(output.rid, None)

    def _refuse(self, rid: int, n: int, front: str, error: ActorserveError) -> None:
        self._post(front, Refused(rid, n, error.status, error.code, error.message, error.param))

    def _to_scheduler(self, message: Abort | Submit | ImagePixels | Unpin | Order | Look | AskTimelines) -> None:
        """Send, if it is up; else the next one is told all that still holds."""
        if self.scheduler_up:
            self._post(SCHEDULER, message)

    def _post(
        self,
        name: str,
        message: Abort
        | Submit
        | ImagePixels
        | Unpin
        | Chunks
        | Refused
        | Stats
        | Order
        | Look
        | AskTimelines
        | FrontAnswer,
    ) -> None:
        """Send; a peer that is down is told again when it is up, or has lost its requests, and its PeerDown follows."""
        try:
            self.context.ref(name).post(message)
        except Gone:
            self.context.log.debug("%s is down", name)


def _is_begun(output: Output) -> bool:
    return output.begun
