"""Questions: what a front asks the engine beside outputs: token ids of a text, text of token ids, orders to it.

Part of the Client, which gives out the ids and passes the answers on. Invariant: each question that was sent is
answered once, by its answer or by an error; when the actor that was asked dies, the next one is asked.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ..errors import ActorserveError, EngineDown, Overloaded, RequestError
from . import messages
from .ref import Gone

MOST: Final = 256
"""Questions that may be open at once: they are quick, and their texts large."""


class Wakeup(Protocol):
    """One sleep of one task: `set` ends it, from the same thread."""

    def set(self) -> None: ...

    async def wait(self) -> object: ...


class Question:
    """`answer` is set before the wakeup."""

    __slots__ = ("answer", "message", "wakeup")

    def __init__(self, message: messages.Message, wakeup: Wakeup) -> None:
        self.message = message
        self.wakeup = wakeup
        self.answer: Answer | ActorserveError | None = None


Answer = list[int] | str | messages.Done | messages.Seen | messages.Timelines


class Questions:
    """All open questions of one front. The methods raise what the engine refuses, EngineDown, or Overloaded."""

    def __init__(
        self,
        post: Callable[[messages.Message], None],
        new_wakeup: Callable[[], Wakeup],
        new_rid: Callable[[], int],
    ) -> None:
        self._post = post
        self._new_wakeup = new_wakeup
        self._new_rid = new_rid
        self._open: dict[int, Question] = {}

    async def tokenize(self, prompt: messages.Prompt, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, or of a conversation by the model's template."""
        rid = self._new_rid()
        answer = await self._ask(rid, messages.Tokenize(rid, prompt, add_special_tokens))
        assert isinstance(answer, list)
        return answer

    async def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, which the caller has checked to be in the vocabulary."""
        rid = self._new_rid()
        raw = memoryview(array("i", ids).tobytes())
        answer = await self._ask(rid, messages.Detokenize(rid, raw, skip_special_tokens))
        assert isinstance(answer, str)
        return answer

    async def order(self, action: messages.Action, detail: str = "") -> str:
        """Have the scheduler do something; return what came of it when it is done."""
        rid = self._new_rid()
        answer = await self._ask(rid, messages.Order(rid, action, detail))
        assert isinstance(answer, messages.Done)
        return answer.text

    async def look(self, nodes: int, requests: int) -> messages.Seen:
        """Return what the engine is doing, with at most so many radix nodes and requests."""
        rid = self._new_rid()
        answer = await self._ask(rid, messages.Look(rid, nodes, requests))
        assert isinstance(answer, messages.Seen)
        return answer

    async def timelines(self, name: str, tenant: str | None) -> list[messages.TimelineView]:
        """Return when what happened to the requests of a name, of one tenant or of anybody; empty if it is unknown."""
        rid = self._new_rid()
        answer = await self._ask(rid, messages.AskTimelines(rid, name, tenant))
        assert isinstance(answer, messages.Timelines)
        return answer.timelines

    def take(self, message: messages.FrontAnswer | messages.Refused) -> bool:
        """Take an answer; False if nobody asked (any more)."""
        question = self._open.get(message.rid)
        if question is None:
            return False
        match message:
            case messages.Tokenized():
                question.answer = list(message.ids.cast("i"))
            case messages.Detokenized():
                question.answer = message.text
            case messages.Done() | messages.Seen() | messages.Timelines():
                question.answer = message
            case messages.Refused():
                question.answer = refusal(message)
        question.wakeup.set()
        return True

    def ask_again(self) -> None:
        """Ask a new text actor all that is open. Raises Gone."""
        for question in self._open.values():
            if question.answer is None:
                self._post(question.message)

    def fail(self, rid: int, error: ActorserveError) -> None:
        """Answer one of them, if it is one, by an error."""
        question = self._open.get(rid)
        if question is not None:
            question.answer = error
            question.wakeup.set()

    def fail_all(self, error: ActorserveError) -> None:
        """The engine is gone, or the front stops."""
        for rid in self._open:
            self.fail(rid, error)

    async def _ask(self, rid: int, message: messages.Message) -> Answer:
        if len(self._open) >= MOST:
            raise Overloaded(f"{MOST} questions are open; try again")
        question = self._open[rid] = Question(message, self._new_wakeup())
        try:
            self._post(message)
            await question.wakeup.wait()
        except Gone:
            raise EngineDown("the engine is starting or restarting; try again") from None
        finally:
            del self._open[rid]
        answer = question.answer
        assert answer is not None
        if isinstance(answer, ActorserveError):
            raise answer
        return answer


def refusal(refused: messages.Refused) -> ActorserveError:
    """Return the exception that a Refused stands for."""
    message, code, status = refused.message, refused.code, refused.status
    if status == 429 or (status == 503 and code == Overloaded.code):
        overloaded = Overloaded(message, status=status)
        overloaded.code = code
        return overloaded
    if status == 503:
        return EngineDown(message, code=code, param=refused.param)
    if 400 <= status < 500:
        return RequestError(message, param=refused.param, code=code, status=status)
    return ActorserveError(message, param=refused.param, code=code)
