"""A backend that answers by a function, remembers its calls, and can be told to wait: for the language's own tests."""

import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio

from actorserve.lang.backend import Backend, Reply
from actorserve.lang.choices import ChoicesDecision
from actorserve.lang.context import Context
from actorserve.lang.expressions import Sampling
from actorserve.lang.templates import get_chat_template


def echo(text: str, sampling: Sampling, i: int) -> str:
    """<the last word of the prompt>, and in later continuations their number."""
    return f"<{text.split()[-1] if text.split() else ''}{i or ''}>"


class ScriptedBackend(Backend):
    """`answer(text, sampling, i)` is the i-th continuation; what it raises fails the call."""

    def __init__(self, answer: Callable[[str, Sampling, int], str] = echo, template: str = "chatml") -> None:
        super().__init__("scripted", get_chat_template(template))
        self.answer = answer
        self.prompts: list[str] = []
        self.sampling: list[Sampling] = []
        self.cached: list[str] = []
        self.most_calls = 100_000
        self.hold_until = 0
        """Calls last until so many have been live at once."""
        self.gate = threading.Event()
        """A stream's pieces after the first wait for it."""
        self.gate.set()
        self.live = 0
        self.most_live = 0

    async def generate(self, context: Context, sampling: Sampling) -> Reply:
        self.prompts.append(context.text)
        self.sampling.append(sampling)
        if self.live == 0:
            self._reached = anyio.Event()
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        try:
            if self.most_live >= self.hold_until:
                self._reached.set()
            elif self.hold_until:
                await self._reached.wait()
            texts = [self.answer(context.text, sampling, i) for i in range(sampling.n or 1)]
        finally:
            self.live -= 1
        return Reply(texts, {"prompt_tokens": len(context.text)})

    async def stream(self, context: Context, sampling: Sampling) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        reply = await self.generate(context, sampling)
        for i, character in enumerate(reply.texts[0]):
            while i and not self.gate.is_set():  # noqa: ASYNC110
                await anyio.sleep(0.001)
            yield character, {"completion_tokens": i + 1}

    async def select(self, context: Context, choices: Any, temperature: float, method: Any) -> ChoicesDecision:
        self.prompts.append(context.text)
        return ChoicesDecision(choices[-1], {"method": method.name})

    async def commit(self, context: Context) -> None:
        self.cached.append(context.text)

    async def cache_prefix(self, text: str) -> None:
        self.cached.append(text)

    async def flush_cache(self, empty_cache: bool = True) -> bool:
        self.cached.clear()
        return True
