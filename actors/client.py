"""Client: the engine as one front sees it. The HTTP front and the embedded API both send requests through it.

It gives out request ids, limits how many requests live at once, and sorts what the text actor answers into streams.
It belongs to one event loop and has no tasks of its own: the owner feeds `receive` from its inbox.
When the text actor dies, its successor is asked for the rest of every output, and readers see a pause.
Invariant: every request that was submitted ends exactly once, by its final chunk, by an error, or by `cancel`;
until then, and no longer, its id is in the table. A reader that is slow finds its chunks joined; it blocks nobody.
"""

import time
from array import array
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Final, Protocol, assert_never

import anyio
import msgspec
from msgspec.structs import replace

from ..config import EngineConfig, ModelInfo
from ..errors import ActorserveError, EngineDown, Overloaded, RequestError
from ..sampler.params import SamplingParams
from . import messages
from .admission import Admission, Submission
from .desk import MAX_DEATHS, Suspects
from .lane import check_size
from .quarantine import CODES, Quarantine
from .questions import Questions, Wakeup, refusal
from .ref import Gone
from .stream import Choice, Stream
from .totals import serves, total, why_down

INDEX_SHIFT: Final = 40
EPOCH_SHIFT: Final = 32
TEXT_DIED: Final = f"the text actor died {MAX_DEATHS} times while it worked on this request; it is not tried again"
DRAINING: Final = "the server is shutting down"
_encode: Final = msgspec.msgpack.Encoder().encode


class Sender(Protocol):
    """What the client needs of a Ref to the text actor."""

    @property
    def up(self) -> bool: ...

    def post(self, message: messages.Message) -> None: ...


class Client:
    """All live requests of one front. See the module's text for the invariant.

    `on_end(choice)` is called when a choice's final chunk arrives (for metrics). `new_wakeup` makes what a waiting
    reader sleeps on; the default works on asyncio and trio.
    """

    def __init__(
        self,
        text: Sender,
        config: EngineConfig,
        model: ModelInfo,
        *,
        index: int = 0,
        epoch: int = 0,
        on_end: Callable[[Choice], None] | None = None,
        new_wakeup: Callable[[], Wakeup] = anyio.Event,
    ) -> None:
        self.table: dict[int, Choice] = {}
        self.replicas: dict[int, messages.Stats] = {}
        """The last report of each replica's scheduler."""
        self.draining = False
        self.orphans: deque[Stream] = deque()
        """Streams whose reader was garbage collected, on whatever thread; cancelled when the next output comes."""
        self.new_wakeup = new_wakeup
        self._text = text
        self._text_known = False
        """Whether there was one ever."""
        self._text_died = False
        """And is not back yet."""
        self._suspects = Suspects()
        self._quarantine = Quarantine()
        self.admission = Admission(config, model)
        self._fronts = config.http_workers
        self._on_end = on_end
        # A restarted front must not reuse an id that the scheduler still knows from the life before.
        self._next_rid = index << INDEX_SHIFT | (epoch & 0xFF) << EPOCH_SHIFT
        self.questions = Questions(self._post, new_wakeup, lambda: self._take_rids(1))

    def submit(
        self,
        prompt: messages.Prompt,
        params: SamplingParams,
        n: int = 1,
        cache_salt: str = "",
        priority: int = 0,
        grammar: messages.GrammarSpec | None = None,
        name: str = "",
        dp_rank: int | None = None,
    ) -> Stream:
        """Ask for n continuations of one prompt. Raises as `submit_all`."""
        submission = Submission(prompt, params, n, grammar, name=name, dp_rank=dp_rank)
        return self.submit_all([submission], cache_salt, priority)

    def submit_all(
        self,
        submissions: Sequence[Submission],
        cache_salt: str = "",
        priority: int = 0,
        tenant: str = "",
        weight: float = 1.0,
    ) -> Stream:
        """Ask for continuations of several prompts, read as one stream. Waiting tenants take turns by their weight.

        Raises RequestError for bad parameters, Overloaded above the limit or while draining, EngineDown before there
        is a text actor; then nothing of it runs. While one is restarted the request waits for it.
        """
        if self.draining:
            raise Overloaded(DRAINING, status=503)
        for submission in submissions:
            self._quarantine.check(submission)
        costs, counts = self.admission.admit(submissions), [s.n for s in submissions]
        stream = Stream(self, self._take_rids(sum(counts)), counts, costs, priority)
        self.table.update((choice.rid, choice) for choice in stream.choices)
        arrival = stream.choices[0].arrival_ns
        for (rid, n), s in zip(stream.groups, submissions, strict=True):
            for choice in stream.choices[rid - stream.rid :][:n]:
                choice.name = s.name
            stream.requests.append(
                messages.Generate(
                    rid=rid,
                    n=n,
                    prompt=s.prompt,
                    params=s.params,
                    cache_salt=cache_salt,
                    priority=priority,
                    arrival_ns=arrival,
                    grammar=s.grammar,
                    tenant=tenant,
                    weight=weight,
                    pin=s.pin,
                    pooled=s.pooled,
                    name=s.name,
                    dp_rank=s.dp_rank,
                )
            )
        try:
            for asked in stream.requests:
                self._post(asked)
        except Gone:
            self.forget(stream)
            raise EngineDown("the engine is starting or restarting; try again") from None
        except (ValueError, OverflowError) as error:  # a text that is no Unicode, or more than a lane takes
            self.forget(stream)
            raise RequestError(f"the request cannot be sent to the engine: {error}", param="prompt") from None
        return stream

    def check_room(self) -> None:
        """Raise Overloaded where any request would be refused, whatever it is."""
        if self.draining:
            raise Overloaded(DRAINING, status=503)
        self.admission.check_room(1)

    def receive(self, message: messages.FrontInbox, source: str) -> None:
        """Take one message of the front's inbox. Sync, never blocks, raises nothing."""
        match message:
            case messages.Chunks(chunks=chunks):
                self.deliver(chunks)
            case messages.Refused():
                if not self.questions.take(message):
                    self._refuse(message)
            case (
                messages.Tokenized() | messages.Detokenized() | messages.Done() | messages.Seen() | messages.Timelines()
            ):
                self.questions.take(message)
            case messages.Stats():
                self.replicas[message.dp_rank] = message
            case messages.PeerDown(name=name):
                if name == "text":
                    self._text_down(message)
            case messages.Drain():
                self.draining = True
            case messages.PeerUp(name=name):
                if name == "text":
                    self._text_known = True
                    if self._text_died:
                        self._ask_again()
            case _:
                assert_never(message)

    def forget(self, stream: Stream) -> None:
        """Drop a stream; where the engine still works for it, tell the engine to stop."""
        for rid, n in stream.groups:
            live = [i for i in range(rid, rid + n) if self._take(i) is not None]
            if live:
                with suppress(Gone):  # the text actor died, and the request with it
                    self._text.post(messages.Cancel(rid, n))

    def abort(self, name: str | None, among: Collection[Stream] | None = None, tenant: str | None = None) -> None:
        """End the choices with this name, or all of them; each keeps the output that it has, with finish "abort".

        `among`: only those of these streams; `tenant`: and of other fronts', those of this one.
        """
        if self._fronts > 1:
            with suppress(Gone):
                self._text.post(messages.AbortNamed(name or "", tenant))
        for choice in self.table.values():
            if (name is None or choice.name == name) and (among is None or choice.stream in among):
                choice.aborted = True
                with suppress(Gone):  # it is said again when there is a text actor
                    self._text.post(messages.Abort(choice.rid))

    def new_pin(self) -> int:
        """Return a number for Submission.pin; its owner calls `unpin` in the end."""
        return self._take_rids(1) + 1  # never 0, which is none

    def unpin(self, pins: Sequence[int]) -> None:
        """Nobody comes back to what these hold."""
        with suppress(Gone):  # with the text actor the pins are gone
            self._text.post(messages.Unpin(memoryview(array("q", pins)).cast("B")))

    def fail_all(self, error: ActorserveError) -> None:
        """End every live request with an error: its engine is gone, or the front stops."""
        streams = {id(choice.stream): choice.stream for choice in self.table.values()}
        for rid in list(self.table):
            self._take(rid)
        for stream in streams.values():
            stream.fail(error)
        self.questions.fail_all(error)

    def reason_down(self) -> str | None:
        """Return why requests cannot be served now, or None."""
        if not self._text.up:
            return "the text actor is down" if self._text_died else "the text actor is starting"
        replicas = self.reports()
        if not replicas:
            return "the scheduler has not reported yet"
        return None if any(serves(stats) for stats in replicas) else why_down(replicas)

    def reason_degraded(self) -> str | None:
        """Return why not all replicas serve, or None."""
        return why_down(self.reports()) or None

    def reports(self) -> list[messages.Stats]:
        """Return the last report of each replica, in their order; those that have sent none are left out."""
        return [self.replicas[number] for number in sorted(self.replicas)]

    @property
    def stats(self) -> messages.Stats | None:
        """What all replicas report together; None before the first report."""
        replicas = self.reports()
        return total(replicas) if replicas else None

    def busy(self, priority: int) -> bool:
        """Whether a request above this priority is in the engine."""
        return any(choice.stream.priority > priority for choice in self.table.values())

    async def timelines(self, name: str) -> list[messages.TimelineView]:
        """As Questions.timelines, of everybody's requests."""
        return await self.questions.timelines(name, None)

    def _post(self, message: messages.Message) -> None:
        """Ask the text actor, or leave it to `_ask_again`. Raises Gone if there never was one, ValueError and
        OverflowError for what cannot be sent."""
        if not self._text_died:
            try:
                self._text.post(message)
                return
            except Gone:  # between its death and our reading of PeerDown
                if not self._text_known:
                    raise
        check_size(_encode(message))

    def _text_down(self, down: messages.PeerDown) -> None:
        """All wait for the next text actor, but those that it died of."""
        self.replicas.clear()
        self._text_died = True
        for rid in self._suspects.guilty(down):
            error = EngineDown(TEXT_DIED, code="text_crashed")
            for stream in {choice.stream for choice in self.table.values()}:
                if self._isolate(stream, rid):
                    stream.cancel(error)
            self.questions.fail(rid, error)

    def _isolate(self, stream: Stream, rid: int) -> bool:
        """Put what this id is of into quarantine, if it is this stream's."""
        found = [asked for asked in stream.requests if asked.rid <= rid < asked.rid + asked.n]
        for asked in found:
            self._quarantine.add(asked)
        return bool(found)

    def _ask_again(self) -> None:
        """Ask a new text actor for the rest of everything."""
        self._text_died = False
        live = {id(choice.stream): choice.stream for choice in self.table.values()}
        with suppress(Gone):  # it died again, and PeerDown follows
            for stream in live.values():
                for asked in stream.requests:
                    self._text.post(self._rest_of(asked))
            for choice in self.table.values():
                if choice.aborted:
                    self._text.post(messages.Abort(choice.rid))
            self.questions.ask_again()

    def _rest_of(self, asked: messages.Generate) -> messages.Generate:
        choices = [self.table.get(rid) for rid in range(asked.rid, asked.rid + asked.n)]
        if all(choice is not None and choice.last is None for choice in choices):
            return asked
        return replace(asked, resumed=[choice.resumed() for choice in choices if choice is not None])

    def _take_rids(self, count: int) -> int:
        """Return the first of that many ids."""
        rid = self._next_rid
        self._next_rid += count
        return rid

    def _take(self, rid: int) -> Choice | None:
        """Remove a choice that is over; None if it is not there (any more)."""
        choice = self.table.pop(rid, None)
        if choice is not None:
            self.admission.leave(choice.cost)
        return choice

    def deliver(self, chunks: list[messages.Chunk]) -> None:
        """Take output: what `receive` does with Chunks."""
        while self.orphans:
            self.orphans.popleft().cancel()
        now = time.monotonic_ns()
        table = self.table
        for chunk in chunks:
            choice = table.get(chunk.rid)
            if choice is None:
                continue  # cancelled here while the chunk was on its way
            if not choice.first_ns and chunk.ids:
                choice.first_ns = now
            choice.last_ns = now
            choice.received(chunk)
            if chunk.finish is not None:
                self._take(chunk.rid)
                if self._on_end is not None:
                    self._on_end(choice)
            choice.stream.push(choice, chunk)

    def _refuse(self, refused: messages.Refused) -> None:
        # One prompt's failure fails the whole request: its reader gets one answer, and the rest is cancelled.
        rids = range(refused.rid, refused.rid + refused.n)
        ended = [choice for rid in rids if (choice := self._take(rid)) is not None]
        for choice in ended:
            if refused.code in CODES:
                self._isolate(choice.stream, choice.rid)
            choice.stream.cancel(refusal(refused))


def truncated(prompt: messages.Prompt, wanted: int | None, longest: int) -> messages.Prompt:
    """Return a prompt of which only the first `wanted` tokens are taken; -1: as many as the model takes; None: all.

    Raises RequestError for another number, or more than `longest`.
    """
    if wanted is None:
        return prompt
    most = longest if wanted == -1 else wanted
    if not 1 <= most <= longest:
        raise RequestError(
            f"truncate_prompt_tokens must be from 1 to {longest}, or -1 for that", param="truncate_prompt_tokens"
        )
    if isinstance(prompt, messages.TextPrompt):
        return replace(prompt, most=most)
    assert isinstance(prompt, messages.TokenPrompt)
    return messages.TokenPrompt(prompt.ids[: 4 * most])


def token_prompt(ids: Sequence[int], vocab_size: int, param: str = "input_ids") -> messages.TokenPrompt:
    """Return a prompt of token ids; raises RequestError when it is empty or has an id outside the vocabulary."""
    if not ids:
        raise RequestError("the prompt has no tokens", param=param)
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise RequestError(f"token ids must be between 0 and {vocab_size - 1}", param=param)
    return messages.TokenPrompt(memoryview(array("i", ids)).cast("B"))
