"""The text actor: text in, token ids to a scheduler; token ids back, text out to the fronts.

It owns the tokenizer, the chat template, and for each running request a detokenizer and its stop strings (Output).
When a scheduler dies, its successor is asked for the rest of every output, and the fronts see a pause. Of several
replicas (replicas.py) each request has one, chosen here; orders go to all of them (orders.py).
Invariant: every request id that a front sent gets exactly one final message (a Chunk with `finish`, or Refused),
unless the front cancelled it or died; and after its final message an id is unknown here, so late rows are ignored.
"""

import math
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, TypeVar, assert_never

import numpy as np
import trio
from msgspec.structs import replace

from ..errors import ActorserveError, Overloaded, RequestError
from ..models.detokenize import Detokenizer, Detokenizers
from ..models.images import ImageReader
from ..models.template import load_template
from ..models.tokenizer import load_tokenizer
from ..sampler.params import SamplingParams
from . import messages
from .actor import Context
from .fetch import Fetcher, address_of, fetched, hosts_of, not_fetched
from .lane import MAX_MESSAGE
from .messages import (
    NO_STATS,
    Abort,
    AbortNamed,
    AskTimelines,
    Cancel,
    ChatPrompt,
    Detokenize,
    Detokenized,
    Done,
    Drain,
    Ended,
    Finish,
    Generate,
    Look,
    Order,
    PeerDown,
    PeerUp,
    Pooled,
    PromptLogprobs,
    Refused,
    Seen,
    Started,
    Stats,
    TextInbox,
    Timelines,
    Tokenize,
    Tokenized,
    TokenLogprob,
    TokenPrompt,
    Tokens,
    Unpin,
)
from .output import Output, logprob_of
from .prompts import INLINE_CHARS, Encoded, Prompts
from .replicas import Replica
from .running import Running

R = TypeVar("R")
G = TypeVar("G", Generate, Tokenize)
M = TypeVar("M", Generate, Tokenize, Detokenize)
UNTOKENIZED: Final = "the prompt could not be tokenized"
POISONED: Final = "the model's output for this request was not a number, or no token was allowed"
DEAD_END: Final = "the grammar left no token that could come next, as when it ends before min_new_tokens"
FAILURES: Final[dict[int, Callable[[], ActorserveError]]] = {
    Finish.POISON: partial(ActorserveError, POISONED),
    Finish.GRAMMAR: partial(RequestError, DEAD_END, code="grammar_dead_end"),
}


@dataclass(slots=True, eq=False)
class Tokenizing:
    """A request whose prompt a thread tokenizes, or whose images are on their way."""

    front: str
    request: Generate
    aborted: set[int] = field(default_factory=set)
    """Of its ids, those that its front wants to end as soon as they begin."""


class Text(Running):
    """State: the requests being tokenized, what fronts pinned, and what Running has."""

    inbox_type: ClassVar[object] = TextInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.tokenizing: dict[int, Tokenizing] = {}
        """Requests that are not known to a scheduler yet, by their first id."""
        self.prompts = Prompts(context.config, context.model, None, None)
        self.fetcher: Fetcher | None = None
        """Of images that clients name by an address."""
        self.pins: dict[str, dict[int, int]] = {}
        """Of each front, what a scheduler may hold for it, and which replica's."""
        self._detokenizers: Detokenizers | None = None
        self._threads = trio.CapacityLimiter(max(1, (os.cpu_count() or 2) // 2))

    async def start(self) -> None:
        """Load tokenizer and template. Raises StartupError."""
        context = self.context
        images = None
        if context.config.allow_image_urls:
            self.fetcher = Fetcher(hosts_of(context.config.allowed_media_domains), context.config.image_url_seconds)
        if context.model.image_token_id is not None:
            most = context.config.max_image_pixels
            images = await trio.to_thread.run_sync(ImageReader, Path(context.model.path), most)
        if context.config.skip_tokenizer_init:
            self.prompts = Prompts(context.config, context.model, None, None, images)
            return
        await context.progress("tokenizer", 0.0)
        path = context.config.tokenizer_path or context.model.path
        tokenizer = await trio.to_thread.run_sync(load_tokenizer, path)
        await context.progress("tokenizer", 0.5)
        template = load_template(tokenizer, context.config.chat_template)
        if template is not None:
            await trio.to_thread.run_sync(tokenizer.prepare)
        self._detokenizers = Detokenizers(tokenizer)
        self.prompts = Prompts(context.config, context.model, tokenizer, template, images)
        await context.progress("tokenizer", 1.0)

    def receive(self, message: messages.TextInbox, source: str) -> None:
        match message:
            case Tokens():
                self._tokens(message)
            case PromptLogprobs():
                self._prompt_logprobs(message)
            case Pooled():
                self._pooled(message)
            case Generate():
                self._generate(message, source)
            case Cancel():
                self._cancel(message, source)
            case Unpin():
                self._unpin(message, source)
            case Started():
                if (output := self.outputs.get(message.rid)) is not None:
                    output.cached_tokens = message.cached_tokens
                    if message.complete is not None:
                        output.follow(message.complete)
            case Ended():
                self._ended(message)
            case Stats():
                self._stats(message, self.replicas[message.dp_rank])
            case PeerDown():
                self._peer_down(message)
            case PeerUp():
                self._peer_up(message.name)
            case Abort():
                self._abort(message)
            case AbortNamed():
                self._abort_named(message)
            case Tokenize():
                self._tokenize(message, source)
            case Detokenize():
                self._detokenize(message, source)
            case Order() | Look() | AskTimelines():
                self._order(message, source)
            case Done() | Seen() | Timelines() | Refused():
                self._order_ended(message, source)
            case Drain():
                pass  # the fronts send nothing new
            case _:
                assert_never(message)

    # ------------------------------------------------------------------ from the fronts

    def _generate(self, m: Generate, front: str) -> None:
        if m.rid in self.tokenizing or any(rid in self.outputs for rid in range(m.rid, m.rid + m.n)):
            return  # its front asked us before it heard that our predecessor had died, and asks for all again
        if not self.prompts.is_long(m.prompt):
            self._submit(m, front)
            return
        if isinstance(m.prompt, TokenPrompt):
            m = replace(m, prompt=replace(m.prompt, ids=memoryview(bytes(m.prompt.ids))))
        self.tokenizing[m.rid] = Tokenizing(front, m)
        self.context.nursery.start_soon(self._submit_from_thread, m, front)

    async def _submit_from_thread(self, m: Generate, front: str) -> None:
        """A long prompt, or one with images: nothing of `m` aliases the ring."""
        prompt = await self._in_thread(self._encode, m)
        early = self.tokenizing.pop(m.rid, None)
        if early is not None:
            self._admit(m, front, prompt)
            for rid in sorted(early.aborted):
                self._abort(Abort(rid))

    def _submit(self, m: Generate, front: str) -> None:
        self._admit(m, front, self._encode(m))

    def _encode(self, m: Generate) -> Encoded | ActorserveError:
        """The prompt's ids, or what is wrong with it. A prompt that breaks the tokenizer breaks only its request."""
        try:
            return self.prompts.encode(m.prompt)
        except RequestError as error:
            return error
        except Exception:
            self.context.log.exception("tokenizing failed")
            return ActorserveError(UNTOKENIZED)

    def _admit(self, m: Generate, front: str, prompt: Encoded | ActorserveError) -> None:
        """Hand the choices to a scheduler, or refuse them all. If it is down they wait for the next one."""
        try:
            if isinstance(prompt, ActorserveError):
                raise prompt
            submits = self.prompts.submits(m, prompt)
            if m.resumed is None:
                self._check_room(len(prompt.ids) * m.n)
        except ActorserveError as error:
            self._refuse(m.rid, m.n, front, error)
            return
        replica = self._replica_for(m, front, prompt)
        self._send_images(replica, prompt.images)
        resumed = None if m.resumed is None else {one.rid: one for one in m.resumed}
        for submit in submits:
            if resumed is None or submit.rid in resumed:
                detokenizer = self._detokenizer(m, prompt.plain)
                output = Output(submit, front, replica, m.params, detokenizer, prompt.thinking)
                output.images = prompt.images
                if resumed is not None:
                    output.resume(resumed[submit.rid])
                if m.params.wants_prompt:
                    output.push_prompt([self._first_of_prompt(prompt.ids, m.params)])
                self.outputs[submit.rid] = output
                self.prompt_tokens += output.prompt_tokens
                replica.requests += 1
                self._to_scheduler(replica, output.submission())

    def _replica_for(self, m: Generate, front: str, prompt: Encoded) -> Replica:
        """Choose, and note where its pin is: what an earlier request left elsewhere is let go."""
        if not m.pin:
            return self.replicas.choose(prompt.ids, m.cache_salt, m.dp_rank)
        pins = self.pins.setdefault(front, {})
        before = pins.get(m.pin)
        replica = self.replicas.choose(prompt.ids, m.cache_salt, m.dp_rank, before)
        pins[m.pin] = replica.number
        if before not in (None, replica.number):
            self._to_scheduler(self.replicas[before], Unpin(memoryview(array("q", [m.pin])).cast("B")))
        return replica

    def _check_room(self, tokens: int) -> None:
        """Raise Overloaded where a new request's prompts are too many for now, RequestError where they always are."""
        most = self.context.config.max_queued_tokens
        if tokens > most:
            raise RequestError(f"n prompts of {tokens} tokens in all; the most is {most}", param="n", code="too_large")
        if self.prompt_tokens + tokens > most:
            raise Overloaded(f"prompts of {self.prompt_tokens} tokens are in the engine, the most is {most}; try again")

    def _first_of_prompt(self, ids: np.ndarray, params: SamplingParams) -> TokenLogprob:
        """Of the first token that is wanted: nothing is before it."""
        first = int(ids[params.logprob_start_len])
        return TokenLogprob(first, math.nan, self._bytes(first), [])

    def _detokenizer(self, m: Generate, ids: np.ndarray) -> Detokenizer | None:
        if self._detokenizers is None:
            return None
        skip, spaces = m.params.skip_special_tokens, m.params.spaces_between_special_tokens
        shown = frozenset(m.prompt.shown) if isinstance(m.prompt, ChatPrompt) else frozenset[str]()
        return self._detokenizers.new(ids.data, skip, spaces, shown)

    def _cancel(self, m: Cancel, front: str) -> None:
        self.tokenizing.pop(m.rid, None)
        for rid in range(m.rid, m.rid + m.n):
            self._changed.get(front, {}).pop(rid, None)
            if (output := self._forget(rid)) is not None:
                self._to_scheduler(output.replica, Abort(rid))

    def _unpin(self, m: Unpin, front: str) -> None:
        pins = memoryview(bytes(m.pins))  # the message lies in the ring
        for pin in pins.cast("q"):
            self.pins.get(front, {}).pop(pin, None)
        self._to_schedulers(Unpin(pins))

    def _abort(self, m: Abort) -> None:
        """A front's wish; an output that has ended is not known. One that is not tokenized yet ends when it is."""
        output = self.outputs.get(m.rid)
        if output is None:
            for early in self.tokenizing.values():
                if m.rid - early.request.rid in range(early.request.n):
                    early.aborted.add(m.rid)
        else:
            output.aborted = True
            if output.replica.up and not output.replica.stale:
                self._to_scheduler(output.replica, m)
            else:
                self._end_aborted(output)

    def _abort_named(self, m: AbortNamed) -> None:
        for output in list(self.outputs.values()):
            if output.is_called(m.name, m.tenant):
                self._abort(Abort(output.rid))
        for early in self.tokenizing.values():
            request = early.request
            if m.name in ("", request.name) and m.tenant in (None, request.tenant):
                early.aborted.update(range(request.rid, request.rid + request.n))

    def _tokenize(self, m: Tokenize, front: str) -> None:
        if self.prompts.is_long(m.prompt):
            if isinstance(m.prompt, TokenPrompt):
                m = replace(m, prompt=replace(m.prompt, ids=memoryview(bytes(m.prompt.ids))))
            self.context.nursery.start_soon(self._tokenize_in_thread, m, front)
        else:
            self._answer_question(front, self._tokenized(m))

    async def _tokenize_in_thread(self, m: Tokenize, front: str) -> None:
        result = await self._in_thread(self._tokenized, m)
        if isinstance(result, ActorserveError):
            result = Refused(m.rid, 1, result.status, result.code, result.message, result.param)
        self._answer_question(front, result)

    def _answer_question(self, front: str, answer: Tokenized | Detokenized | Refused) -> None:
        """One that is more than a lane takes is refused."""
        try:
            self._post(front, answer)
        except ValueError:
            error = RequestError(f"the answer is above {MAX_MESSAGE} bytes: ask for less at once", code="too_large")
            self._refuse(answer.rid, 1, front, error)

    async def _in_thread(self, work: Callable[[G], R], m: G) -> R | RequestError:
        """What a thread makes of a message, once the images of its prompt are there; or why they are not."""
        address = address_of(m.prompt)
        if address is None:
            return await self._threaded(work, m)
        try:
            self.prompts.check_images(m.prompt)
            if self.fetcher is None:
                raise not_fetched(address)
            async with self.fetcher.at_once:
                return await self._threaded(work, replace(m, prompt=await fetched(self.fetcher, m.prompt)))
        except RequestError as error:
            return error

    async def _threaded(self, work: Callable[[M], R], m: M) -> R:
        def noted() -> R:
            note = self.context.desk.begin(m.rid)
            result = work(m)
            self.context.desk.end(note)
            return result

        return await trio.to_thread.run_sync(noted, abandon_on_cancel=True, limiter=self._threads)

    def _tokenized(self, m: Tokenize) -> Tokenized | Refused:
        """The answer. A text that breaks the tokenizer breaks only its request, here too."""
        try:
            return Tokenized(m.rid, memoryview(self.prompts.tokenize(m.prompt, m.add_special_tokens).tobytes()))
        except RequestError as error:
            return Refused(m.rid, 1, error.status, error.code, error.message, error.param)
        except Exception:
            self.context.log.exception("tokenizing failed")
            fault = ActorserveError(UNTOKENIZED)
            return Refused(m.rid, 1, fault.status, fault.code, fault.message)

    def _detokenize(self, m: Detokenize, front: str) -> None:
        if self._detokenizers is None:
            self._refuse(m.rid, 1, front, RequestError("this server runs without a tokenizer", param="tokens"))
            return
        work = partial(_detokenized, self._detokenizers)
        if len(m.ids) > 4 * INLINE_CHARS:
            m = replace(m, ids=memoryview(bytes(m.ids)))  # they lie in the ring
            self.context.nursery.start_soon(self._detokenize_in_thread, work, m, front)
        else:
            self._answer_question(front, work(m))

    async def _detokenize_in_thread(self, work: Callable[[Detokenize], Detokenized], m: Detokenize, front: str) -> None:
        self._answer_question(front, await self._threaded(work, m))

    # ------------------------------------------------------------------ from the scheduler

    def _tokens(self, m: Tokens) -> None:
        rids = np.frombuffer(m.rids, dtype=np.int64).tolist()
        outputs = self.outputs
        first = [i for i, rid in enumerate(rids) if (output := outputs.get(rid)) is not None and not output.begun]
        self._rows(m, rids, first or range(len(rids)))
        if first and len(first) < len(rids):
            # Who waits for a first token has it before everybody's next one is written, which takes milliseconds.
            self.flush()
            begun = set(first)
            self._rows(m, rids, [i for i in range(len(rids)) if i not in begun])

    def _rows(self, m: Tokens, rids: list[int], rows: Sequence[int]) -> None:
        """Take these rows of a message."""
        ids = np.frombuffer(m.ids, dtype=np.int32).tolist()
        finishes = bytes(m.finish)
        logprobs = np.frombuffer(m.logprobs, dtype=np.float32).tolist() if len(m.logprobs) else None
        complete = set(np.frombuffer(m.complete, dtype=np.int32).tolist())
        desk = self.context.desk
        for row in rows:
            rid = rids[row]
            output = self.outputs.get(rid)
            if output is None:
                continue  # cancelled, or ended by a stop string
            desk.now(rid)
            finish = finishes[row]
            if finish in FAILURES:
                self._forget(rid)
                self._refuse(rid, 1, output.front, FAILURES[finish]())
                continue
            logprob = None
            if logprobs is not None and output.params.logprobs is not None and ids[row] >= 0:
                logprob = logprob_of(m, row, ids[row], logprobs[row], output.params, self._bytes)
            if m.forced:
                output.forced_tokens += 1
                output.jumps += not row or rids[row - 1] != rid
            output.push(ids[row], finish, logprob, complete=row in complete)
            self._mark_changed(output)
            if output.finish is not None:
                self._drop(rid)
                if not finish:  # a stop string: the scheduler does not know yet
                    self._to_scheduler(output.replica, Abort(rid))

    def _pooled(self, m: Pooled) -> None:
        """Vectors are the last that their requests get."""
        rids = np.frombuffer(m.rids, dtype=np.int64)
        vectors = np.frombuffer(m.vectors, dtype=np.float32).reshape(len(rids), -1)
        for rid, vector in zip(rids.tolist(), vectors, strict=True):
            self.context.desk.now(rid)
            output = self._forget(rid)
            if output is None:
                continue  # cancelled
            if np.isfinite(vector).all():
                output.push_vector(vector.tobytes())
                self._mark_changed(output)
            else:
                self._refuse(rid, 1, output.front, FAILURES[Finish.POISON]())

    def _prompt_logprobs(self, m: PromptLogprobs) -> None:
        output = self.outputs.get(m.rid)
        if output is None:
            return  # cancelled
        ids = np.frombuffer(m.ids, dtype=np.int32).tolist()
        logprobs = np.frombuffer(m.logprobs, dtype=np.float32).tolist()
        output.push_prompt(
            [
                logprob_of(m, row, token, logprob, output.params, self._bytes)
                for row, (token, logprob) in enumerate(zip(ids, logprobs, strict=True))
            ]
        )
        self._mark_changed(output)

    def _bytes(self, token: int) -> bytes:
        return b"" if self._detokenizers is None else self._detokenizers.bytes[token]

    def _ended(self, m: Ended) -> None:
        output = self.outputs.get(m.rid)
        if output is None:
            return  # the answer to our Abort
        if m.status == 0:
            self._end_aborted(output)
            return
        self._forget(m.rid)
        error = ActorserveError(m.message, param=m.param, code=m.code, status=m.status)
        self._refuse(m.rid, 1, output.front, error)

    # ------------------------------------------------------------------ peers

    def _peer_up(self, name: str) -> None:
        replica = self.replicas.named(name)
        if replica is not None:
            self._ask_again(replica)
            return
        for stats in (replica.stats for replica in self.replicas):
            if stats != replace(NO_STATS, dp_rank=stats.dp_rank):
                self._post(name, stats)  # the next ones may be long in coming

    def _peer_down(self, m: PeerDown) -> None:
        replica = self.replicas.named(m.name)
        if replica is not None:
            self._scheduler_down(m, replica)
            return
        name = m.name
        self._changed.pop(name, None)
        self.tokenizing = {rid: early for rid, early in self.tokenizing.items() if early.front != name}
        self.orders.drop(name)
        for output in [o for o in self.outputs.values() if o.front == name]:
            self._forget(output.rid)
            self._to_scheduler(output.replica, Abort(output.rid))
        if pins := self.pins.pop(name, None):
            self._to_schedulers(Unpin(memoryview(array("q", pins)).cast("B")))


def _detokenized(detokenizers: Detokenizers, m: Detokenize) -> Detokenized:
    ids = np.frombuffer(m.ids, dtype=np.int32).tolist()
    return Detokenized(m.rid, detokenizers.text(ids, m.skip_special_tokens))
