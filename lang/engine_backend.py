"""The embedded engine as a backend: `sgl.Engine(...)` runs actorserve.Engine in the language's loop.

Choices are scored by the logprobs of a prompt that ends in them, whose beginning is in the prefix cache.
Invariant: it ends with the program or `shutdown()`.
"""

import atexit
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import msgspec

from .. import engine
from ..errors import Overloaded, RequestError
from ..outputs import Delta, Output, TokenLogprob
from .backend import Backend, Reply
from .choices import ChoicesDecision, ChoicesMethod, TokenScore
from .context import Context
from .expressions import Sampling
from .loop import LOOP
from .model_template import model_template
from .templates import chat_template_of, get_chat_template

T = TypeVar("T")
SAME_NAME: Final = (
    "max_new_tokens min_new_tokens temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty"
    " stop stop_regex stop_token_ids ignore_eos seed logit_bias regex json_schema ebnf".split()
)
"""Parameters that the engine has under the same names."""
FULL_SECONDS: Final = 0.02
"""Between two tries at an engine that is full."""


class EngineBackend(Backend):
    """A running engine of the loop. Made by Engine. The chat template is the model's own, if it can be said as text."""

    def __init__(self, running: engine.Engine, chat_template: str | None = None) -> None:
        """Raises RequestError for an unknown template."""
        name = running.model.name
        if chat_template is not None:
            template = get_chat_template(chat_template)
        else:
            template = model_template(running.model.path) or chat_template_of(name)
        super().__init__(name, template)
        self._engine = running
        self.takes_pictures = running.model.image_token_id is not None
        self.most_calls = max(1, running.config.max_queued_requests // 2)

    async def generate(self, context: Context, sampling: Sampling) -> Reply:
        options = _request(sampling) | _pictures(context)
        outputs = await self._outputs(context.text, self._pin(context), n=sampling.n or 1, **options)
        first = outputs[0]
        return Reply([o.text for o in outputs], meta_info(first, first.logprobs, sampling, first.prompt_logprobs))

    async def stream(self, context: Context, sampling: Sampling) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        logprobs: list[TokenLogprob] = []
        of_prompt: list[TokenLogprob] = []
        options = _request(sampling) | _pictures(context, batch=False)
        async with self._engine.stream(context.text, **options) as deltas:
            async for delta in deltas:
                logprobs += delta.logprobs
                of_prompt += delta.prompt_logprobs
                yield delta.text, meta_info(delta, logprobs, sampling, of_prompt)

    async def select(
        self, context: Context, choices: Sequence[str], temperature: float, method: ChoicesMethod
    ) -> ChoicesDecision:
        if temperature > 1e-5:
            raise RequestError("select chooses by probability: its temperature must be 0", param="temperature")
        if context.pictures:
            raise RequestError("select with pictures is not served", param="select", code="unsupported_value")
        (prompt,) = await self._outputs(context.text, self._pin(context), max_new_tokens=0)
        given = (context.text, prompt.prompt_tokens)
        scores = await _gathered([partial(self._score, *given, choice) for choice in choices])
        unconditional = None
        if method.requires_unconditional_logprobs:
            unconditional = await _gathered([partial(self._score_alone, tokens) for tokens in scores])
        return method.decide(choices, scores, unconditional)

    async def commit(self, context: Context) -> None:
        await self._outputs(context.text, self._pin(context), max_new_tokens=0, **_pictures(context))

    async def cache_prefix(self, text: str) -> None:
        if text:
            await self._outputs(text, max_new_tokens=0)

    async def get_server_info(self) -> dict[str, Any]:
        info: dict[str, Any] = msgspec.to_builtins(self._engine.model)
        return info | {"settings": msgspec.to_builtins(self._engine.config)}

    def _pin(self, context: Context) -> int:
        """Under which number the engine keeps the context's text until the next call; 0: as it likes."""
        return context.pin

    async def _outputs(self, prompt: engine.PromptLike, pin: int = 0, **options: Any) -> list[Output]:
        """Continue one prompt. An engine that is full is waited for: its load is this program's own."""
        if pin:
            options["pin"] = pin
        while True:
            try:
                return await self._engine.generate([prompt], **options)
            except Overloaded as error:
                if error.status != 429:
                    raise
                await anyio.sleep(FULL_SECONDS)

    async def _score(self, prompt: str, tokens: int, choice: str) -> list[TokenScore]:
        """The tokens of a choice behind a prompt of so many tokens.

        Asked from two before the prompt's end: a choice may be spelt with the prompt's last token in one (token
        healing), which then counts; where even more of the prompt is spelt another way, from its start.
        """
        rows: list[TokenLogprob] = []
        for start in dict.fromkeys((max(tokens - 2, 0), 0)):
            try:
                rows = spelling(await self._prompt_logprobs(prompt + choice, start), choice)
            except RequestError as error:
                if error.param != "logprob_start_len":
                    raise
            if rows and not math.isnan(rows[0].logprob):
                break
        return [_score(item) for item in rows]

    async def _score_alone(self, tokens: list[TokenScore]) -> list[TokenScore]:
        """The same tokens without the prompt. No model has a probability for the very first; the method ignores it."""
        return [_score(item) for item in await self._prompt_logprobs([token for _, token, _ in tokens], 0)]

    async def _prompt_logprobs(self, prompt: engine.PromptLike, start: int) -> list[TokenLogprob]:
        (output,) = await self._outputs(prompt, max_new_tokens=0, logprobs=0, logprob_start_len=start)
        return output.prompt_logprobs


class Engine:
    """An engine in this process, started by the constructor. As SGLang's: `generate`, `async_generate`, `shutdown`."""

    def __init__(self, model_path: str | None = None, *, chat_template: str | None = None, **settings: Any) -> None:
        """`settings` are actorserve.EngineConfig's. Raises StartupError; RequestError for an unknown template."""
        running = engine.Engine(settings.pop("model", model_path), **settings)
        self._held: AbstractContextManager[Any] | None = LOOP.hold(running)
        self._held.__enter__()
        atexit.register(self.shutdown)
        self._engine = running
        try:
            self.endpoint = EngineBackend(running, chat_template)
        except RequestError:
            self.shutdown()
            raise

    def generate(self, prompt: Any, sampling_params: dict[str, Any] | None = None) -> Any:
        """Continue a text, or each of a list: {"text", "meta_info"}, or a list of them."""
        return LOOP.call(self._generate, prompt, sampling_params or {})

    async def async_generate(self, prompt: Any, sampling_params: dict[str, Any] | None = None) -> Any:
        """As `generate`, in any event loop."""
        return await LOOP.acall(self._generate, prompt, sampling_params or {})

    def shutdown(self) -> None:
        """End the engine; without effect the second time."""
        held, self._held = self._held, None
        if held is not None:
            atexit.unregister(self.shutdown)
            held.__exit__(None, None, None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    async def _generate(self, prompt: Any, sampling_params: dict[str, Any]) -> Any:
        result: Output | list[Output] = await self._engine.generate(prompt, **sampling_params)
        if isinstance(result, list):
            return [{"text": output.text, "meta_info": meta_info(output)} for output in result]
        return {"text": result.text, "meta_info": meta_info(result)}


def meta_info(
    delta: Delta,
    logprobs: Sequence[TokenLogprob] = (),
    sampling: Sampling | None = None,
    of_prompt: Sequence[TokenLogprob] = (),
) -> dict[str, Any]:
    """SGLang's meta_info of an output, or of a stream so far; `logprobs` and those `of_prompt` are all so far."""
    finish = None if delta.finish_reason is None else {"type": delta.finish_reason, "matched": delta.matched}
    meta: dict[str, Any] = {
        "finish_reason": finish,
        "prompt_tokens": delta.prompt_tokens,
        "completion_tokens": delta.completion_tokens,
        "cached_tokens": delta.cached_tokens,
        "forced_tokens": delta.forced_tokens,
        "jumps": delta.jumps,
    }
    if sampling is not None and sampling.return_logprob:
        for name, items in (("output", logprobs), ("input", of_prompt)):
            meta[f"{name}_token_logprobs"] = [_row(item.token, item.logprob, item.text) for item in items]
            if sampling.top_logprobs_num:
                meta[f"{name}_top_logprobs"] = [[_row(*other) for other in item.top] or None for item in items]
    return meta


def _request(sampling: Sampling) -> dict[str, Any]:
    """The engine's parameters."""
    given = {name: value for name in SAME_NAME if (value := getattr(sampling, name)) is not None}
    if sampling.return_logprob:
        given["logprobs"] = sampling.top_logprobs_num or 0
        if sampling.logprob_start_len is not None:
            given["logprob_start_len"] = sampling.logprob_start_len
    return given | {"priority": sampling.priority or 0}


def _pictures(context: Context, batch: bool = True) -> dict[str, Any]:
    """The option of the engine that has those of the text so far, if there are any; `batch`: of a list of prompts."""
    urls = [picture.url for picture in context.pictures]
    return {"image_data": [urls] if batch else urls} if urls else {}


def spelling(rows: list[TokenLogprob], text: str) -> list[TokenLogprob]:
    """The last rows, as many as it takes to spell the text."""
    missing, first = len(text.encode()), len(rows)
    while missing > 0 and first:
        first -= 1
        missing -= len(rows[first].text)
    return rows[first:]


def _score(item: TokenLogprob) -> TokenScore:
    """The first token of all has no logprob, and 0 stands in."""
    logprob, token, text = _row(item.token, item.logprob, item.text)
    return (logprob or 0.0, token, text)


def _row(token: int, logprob: float, text: bytes) -> tuple[float | None, int, str]:
    """SGLang's form of a logprob."""
    return (None if math.isnan(logprob) else logprob, token, text.decode("utf-8", "replace"))


async def _gathered(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of calls made at once, in order. The first error ends the others, and is raised as it is."""
    results: list[Any] = [None] * len(calls)

    async def run(i: int) -> None:
        results[i] = await calls[i]()

    try:
        async with anyio.create_task_group() as group:
            for i in range(len(calls)):
                group.start_soon(run, i)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return results
