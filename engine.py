"""The embedded API: an engine inside the user's program, on asyncio or trio; `Engine.sync` for scripts without either.

    async with actorserve.Engine(model="/models/smollm2") as engine:
        print((await engine.generate("Once upon a time", max_new_tokens=32)).text)

An Engine is one more front: its Client joins the text actor by lanes, as the HTTP front does. The rest runs in a child
process with processes of its own (placement "process") or in a thread (placement "inline"), see embedded_root.py.
Invariant: leaving the context ends all of it, and so does the end of the program, even by SIGKILL.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self, TypeAlias, overload

import anyio
import anyio.abc
import msgspec
import trio

from .actors.actor import Actor, Context
from .actors.admission import Submission, check_task
from .actors.attach import Attachment, Detached, drive
from .actors.client import Client, token_prompt, truncated
from .actors.conversation import ChatMessage, chat_prompt
from .actors.embedded_host import Root
from .actors.grammar_fields import GIVEN, grammar_spec
from .actors.image_fields import ImageData, VideoData, with_images
from .actors.lifeline import Failed, Progress, Up
from .actors.messages import Chunk, FrontInbox, PeerUp, Prompt, Stats, TextPrompt
from .actors.stream import LoopWakeup, Stream
from .config import EngineConfig, ModelInfo, Pooling
from .errors import EngineDown, RequestError, StartupError
from .models.pooling import embedding_of, probabilities
from .outputs import Classification, Deltas, Embedding, Output, collect, collect_vectors
from .sampler.params import SamplingParams

if TYPE_CHECKING:
    from .sync_engine import SyncEngine

STATS_SECONDS: Final = 2.0

PromptLike: TypeAlias = str | Sequence[int]
"""A text, or token ids."""
Message: TypeAlias = Mapping[str, Any]
"""A turn of a conversation, as OpenAI writes it: {"role": "user", "content": "Hello"}."""
OnProgress: TypeAlias = Callable[[str, float], None]
"""Called with a stage of the start and how far it is, 0 to 1."""


class Engine:
    """See the module's text. Settings are the fields of EngineConfig; `log_level` is "warning" unless given.

    All methods raise RequestError for what is wrong with a request, Overloaded above `max_queued_requests`, and
    EngineDown while a part of the engine is down. They may be called from any task of the loop that entered the
    context, as many at once as there are requests.
    """

    def __init__(self, model: str | None = None, *, on_progress: OnProgress | None = None, **settings: Any) -> None:
        """Raises StartupError for a setting that does not exist or has a wrong value. Starts nothing yet."""
        try:
            self.config = msgspec.convert({"log_level": "warning", "model": model} | settings, EngineConfig)
        except msgspec.ValidationError as error:
            raise StartupError(f"wrong setting: {error}") from None
        if self.config.nnodes > 1:
            raise StartupError("several machines (nnodes) are for `actorserve run`")
        self._on_progress = on_progress
        self._root: Root | None = None
        self._group: anyio.abc.TaskGroup | None = None
        self._guest: _Guest | None = None
        self._up = False
        self._failure: str | None = None
        self._changed = anyio.Event()

    @classmethod
    def sync(cls, model: str | None = None, *, on_progress: OnProgress | None = None, **settings: Any) -> "SyncEngine":
        """Return the same engine for programs without an event loop: `with Engine.sync(...) as engine:`."""
        from .sync_engine import SyncEngine

        return SyncEngine(cls(model, on_progress=on_progress, **settings))

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Start the engine and wait until it serves. Raises StartupError."""
        if self._root is not None:
            raise RuntimeError("an Engine can be entered once")
        self._root = root = Root(self.config)
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        try:
            self._group.start_soon(self._attend, root)
            self._group.start_soon(self._listen, root)
            await self._wait_until_up()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything; what still runs fails with EngineDown. Takes 3 s at most."""
        await self._close()

    async def _close(self) -> None:
        assert self._group is not None and self._root is not None
        self._failure = "the engine was closed"
        if self._guest is not None:
            self._guest.client.fail_all(EngineDown(self._failure))
        self._group.cancel_scope.cancel()
        try:
            # Without the body's exception, which the group would wrap in another; ours lets it pass.
            await self._group.__aexit__(None, None, None)
        finally:
            await self._root.close()

    async def _attend(self, root: Root) -> None:
        with suppress(Detached):  # the lifeline has the reason
            await drive(Attachment(root.guest, self._join, FrontInbox))
        if self._guest is not None:
            self._guest.client.fail_all(EngineDown("the engine ended while it worked on the request"))

    def _join(self, context: Context) -> Actor:
        self._guest = _Guest(context, self._notify)
        return self._guest

    async def _listen(self, root: Root) -> None:
        """Take what the root says until it ends."""
        while (status := await root.status()) is not None:
            match status:
                case Progress():
                    if self._on_progress is not None:
                        self._on_progress(status.stage, status.fraction)
                case Up():
                    self._up = True
                case Failed():
                    self._failure = status.message
            self._notify()
        self._failure = self._failure or "the engine's root process ended"
        self._notify()

    async def _wait_until_up(self) -> None:
        while not (self._up and self._guest is not None and self._guest.joined):
            if self._failure is not None:
                raise StartupError(self._failure)
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        self._changed = anyio.Event()
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()

    @property
    def _client(self) -> Client:
        if self._guest is None:
            raise EngineDown("the engine is not running: use it inside `async with`")
        if self._failure is not None:
            raise EngineDown(self._failure)
        return self._guest.client

    @property
    def model(self) -> ModelInfo:
        """What is served: vocabulary size, context length and the like."""
        if self._guest is None:
            raise EngineDown("the engine is not running: use it inside `async with`")
        return self._guest.context.model

    # ------------------------------------------------------------------ requests

    @overload
    async def generate(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, n: Literal[1] = 1, **overrides: Any
    ) -> Output: ...

    @overload
    async def generate(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, n: int, **overrides: Any
    ) -> list[Output]: ...

    @overload
    async def generate(
        self, prompt: Sequence[PromptLike], params: SamplingParams | None = None, *, n: int = 1, **overrides: Any
    ) -> list[Output]: ...

    async def generate(
        self,
        prompt: PromptLike | Sequence[PromptLike],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        cache_salt: str = "",
        priority: int = 0,
        pin: int = 0,
        image_data: ImageData = None,
        video_data: VideoData = None,
        **overrides: Any,
    ) -> Output | list[Output]:
        """Continue a text or token ids, or each of a list of them, n times.

        `overrides` are fields of SamplingParams that replace those of `params`, and one of `regex`, `json_schema` (a
        dict or its JSON text) and `choice` (a list of texts), which each output then matches as a whole; beside a
        schema `json_whitespace` ("spaced", "compact", {"any": n} or {"indent": n}); or `dp_rank`, the replica that is
        to serve the prompts, of those of `dp_size` above 1. Returns one
        Output for one prompt and n 1, otherwise a list, prompt by prompt with n each. Cancelling the call stops the
        work. `pin`: of Client.new_pin, for programs that come back to what this call leaves in the prefix cache.
        `image_data`: for a model that takes images those of the prompt's image tokens, as base64, data: address or a
        file's bytes: one or a list; for a list of prompts a list of these. `video_data`: the same of videos, each a
        list of frames, which are images.
        """
        prompts, is_batch = self._prompts(prompt)
        prompts = with_images(prompts, image_data, is_batch, video_data)
        stream = self._submit(prompts, params, overrides, n, cache_salt, priority, pin)
        return await collect(stream, is_batch or n > 1)

    def stream(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        cache_salt: str = "",
        priority: int = 0,
        image_data: ImageData = None,
        video_data: VideoData = None,
        **overrides: Any,
    ) -> Deltas:
        """As `generate` for one prompt, but give out the output as it comes: `async for delta in engine.stream(...)`.

        The work begins at the call. It stops when the iterator is closed or dropped.
        """
        prompts, is_batch = self._prompts(prompt)
        if is_batch:
            raise RequestError("stream takes one prompt", param="prompt")
        prompts = with_images(prompts, image_data, is_batch, video_data)
        return Deltas(self._client, self._submit(prompts, params, overrides, n, cache_salt, priority))

    @overload
    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, n: Literal[1] = 1, **options: Any
    ) -> Output: ...

    @overload
    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, n: int, **options: Any
    ) -> list[Output]: ...

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        cache_salt: str = "",
        priority: int = 0,
        **options: Any,
    ) -> Output | list[Output]:
        """Answer a conversation. `options`: `add_generation_prompt`, `continue_final_message`,
        `chat_template_kwargs`, and those of `generate`. Without `max_new_tokens` the answer may go on to the end
        of the context. Returns an Output, or a list for n above 1.
        """
        prompt, params, overrides = _conversation(messages, params, options)
        stream = self._submit([prompt], params, overrides, n, cache_salt, priority)
        return await collect(stream, n > 1)

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        cache_salt: str = "",
        priority: int = 0,
        **options: Any,
    ) -> Deltas:
        """As `chat`, but give out the output as it comes."""
        prompt, params, overrides = _conversation(messages, params, options)
        return Deltas(self._client, self._submit([prompt], params, overrides, n, cache_salt, priority))

    @overload
    async def embed(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self,
        prompt: PromptLike,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Embedding: ...

    @overload
    async def embed(
        self,
        prompt: Sequence[PromptLike],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        cache_salt: str = "",
        priority: int = 0,
    ) -> list[Embedding]: ...

    async def embed(
        self,
        prompt: PromptLike | Sequence[PromptLike],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Embedding | list[Embedding]:
        """Return the vector of a text or token ids, or of each of a list of them.

        `dimensions`: only so many numbers of it, for models trained so. `normalize`: to length 1; None: as the model's
        folder says. `truncate_prompt_tokens`: only the first of them, -1 for as many as the model takes; longer prompts
        are refused else. The engine's model must be an embedding model, or `is_embedding=True` given.
        """
        pooling = self._pooling("embed")
        if dimensions is not None and not 1 <= dimensions <= pooling.width:
            raise RequestError(f"dimensions must be from 1 to {pooling.width}", param="dimensions")
        chunks, is_batch = await self._vectors(prompt, cache_salt, priority, truncate_prompt_tokens)
        found = [
            Embedding(
                index=i,
                vector=embedding_of(chunk.vector, pooling, dimensions, normalize),
                prompt_tokens=chunk.prompt_tokens,
                cached_tokens=chunk.cached_tokens,
            )
            for i, chunk in enumerate(chunks)
        ]
        return found if is_batch else found[0]

    @overload
    async def classify(  # type: ignore[overload-overlap]
        self, prompt: PromptLike, *, cache_salt: str = "", priority: int = 0
    ) -> Classification: ...

    @overload
    async def classify(
        self, prompt: Sequence[PromptLike], *, cache_salt: str = "", priority: int = 0
    ) -> list[Classification]: ...

    async def classify(
        self, prompt: PromptLike | Sequence[PromptLike], *, cache_salt: str = "", priority: int = 0
    ) -> Classification | list[Classification]:
        """Return what the model's classification or reward head says of a prompt, or of each of a list of them."""
        pooling = self._pooling("classify")
        chunks, is_batch = await self._vectors(prompt, cache_salt, priority)
        found = []
        for i, chunk in enumerate(chunks):
            logits = embedding_of(chunk.vector, pooling)
            probs = probabilities(logits, pooling)
            found.append(
                Classification(
                    index=i,
                    label=pooling.labels[int(probs.argmax())],
                    logits=logits,
                    probabilities=probs,
                    labels=pooling.labels,
                    prompt_tokens=chunk.prompt_tokens,
                    cached_tokens=chunk.cached_tokens,
                )
            )
        return found if is_batch else found[0]

    def _pooling(self, task: Literal["embed", "classify"]) -> Pooling:
        """How the model makes vectors. Raises RequestError for one that does not do this task."""
        pooling = self.model.pooling
        check_task(pooling, pooled=True)
        assert pooling is not None
        if pooling.task != task:
            use = "labels: use classify" if task == "embed" else "embeddings: use embed"
            raise RequestError(f"the model gives {use}", param="model", code="unsupported_model")
        return pooling

    async def _vectors(
        self, prompt: PromptLike | Sequence[PromptLike], cache_salt: str, priority: int, most: int | None = None
    ) -> tuple[list[Chunk], bool]:
        """(a chunk with a vector for each prompt, whether they were a list)"""
        given, is_batch = self._prompts(prompt)
        prompts = [truncated(one, most, self.model.context_length) for one in given]
        submissions = [Submission(p, SamplingParams(max_new_tokens=0), pooled=True) for p in prompts]
        return await collect_vectors(self._client.submit_all(submissions, cache_salt, priority)), is_batch

    async def stats(self) -> Stats:
        """Return the scheduler's last report: requests, pages, token counts; of several replicas the sums. Raises
        EngineDown without any."""
        with anyio.move_on_after(STATS_SECONDS):
            while len(self._client.reports()) < self.config.dp_size:
                await self._wait_for_change()
        stats = self._client.stats
        if stats is None:
            raise EngineDown("the scheduler has not reported yet")
        return stats

    def _prompts(self, prompt: PromptLike | Sequence[PromptLike]) -> tuple[list[Prompt], bool]:
        """Return the prompts, and whether they were a list."""
        size = self.model.vocab_size
        if isinstance(prompt, str):
            return [TextPrompt(prompt)], False
        texts = [item for item in prompt if isinstance(item, str)]
        lists = [item for item in prompt if not isinstance(item, str | int)]
        ids = [item for item in prompt if isinstance(item, int)]
        if bool(texts) + bool(lists) + bool(ids) > 1:
            raise RequestError("prompts must all be texts, or all lists of token ids", param="prompt")
        if texts or lists:
            return [*map(TextPrompt, texts), *(token_prompt(item, size, "prompt") for item in lists)], True
        return [token_prompt(ids, size, "prompt")], False

    def _submit(
        self,
        prompts: list[Prompt],
        params: SamplingParams | None,
        overrides: dict[str, Any],
        n: int,
        cache_salt: str,
        priority: int,
        pin: int = 0,
    ) -> Stream:
        if n < 1:
            raise RequestError("n must be at least 1", param="n")
        grammar = grammar_spec({name: overrides.pop(name, None) for name in GIVEN})
        rank = overrides.pop("dp_rank", None)
        checked = _sampling(params, overrides)
        submissions = [Submission(p, checked, n, grammar, pin, dp_rank=rank) for p in prompts]
        return self._client.submit_all(submissions, cache_salt, priority)


class _Guest(Actor):
    """The actor "client": passes what arrives to the Client. It has no loop of its own; `drive` feeds it."""

    inbox_type: ClassVar[Any] = FrontInbox

    def __init__(self, context: Context, notify: Callable[[], None]) -> None:
        super().__init__(context)
        # An attached client may come again with a new epoch; its requests are those of a new life.
        wakeup = anyio.Event if trio.lowlevel.in_trio_task() else LoopWakeup
        text = context.ref("text")
        self.client = Client(text, context.config, context.model, epoch=context.epoch, new_wakeup=wakeup)
        self.joined = False
        self._notify = notify

    def receive(self, message: Any, source: str) -> None:
        self.client.receive(message, source)
        if isinstance(message, PeerUp):
            self.joined = True
        if isinstance(message, PeerUp | Stats):
            self._notify()


def _sampling(params: SamplingParams | None, overrides: dict[str, Any]) -> SamplingParams:
    """Return `params` with `overrides`; raises RequestError for a name or type that is wrong."""
    fields = msgspec.structs.asdict(params or SamplingParams()) | overrides
    for name, wrap in (("stop", str), ("stop_regex", str), ("stop_token_ids", int)):
        if isinstance(fields.get(name), wrap):
            fields[name] = (fields[name],)
    try:
        return msgspec.convert(fields, SamplingParams)
    except msgspec.ValidationError as error:
        from .http.error_replies import invalid_field

        raise invalid_field(str(error)) from None


def _conversation(
    messages: Sequence[Message], params: SamplingParams | None, options: dict[str, Any]
) -> tuple[Prompt, SamplingParams, dict[str, Any]]:
    """Return the prompt of a conversation, and what is left of the options: overrides of parameters."""
    template = {
        name: options.pop(name)
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        if name in options
    }
    try:
        turns = msgspec.convert([dict(message) for message in messages], list[ChatMessage])
    except msgspec.ValidationError as error:
        raise RequestError(f"messages: {error}", param="messages") from None
    return chat_prompt(turns, **template), params or SamplingParams(max_new_tokens=None), options
