"""The stub executor and its sampler: a model that costs nothing, for all that is around one (`--load-format stub`).

Tokens are a function of the seed and the tokens before (stub_draw.py), so the output of a request is known beforehand,
whatever happens to the engine meanwhile. A page of the KV pool holds, for each of its tokens, the hash of the sequence
up to it: a page that is wrong, missing or written by somebody else gives wrong tokens. Invariant: everything passes
through the same messages as with the real executor, and nothing here imports torch.
"""

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Final, assert_never

import numpy as np
import trio
from msgspec.structs import replace

from .actor import Actor, Context
from .changes import WindowChanges
from .constraint import Grammar
from .messages import (
    NOTHING,
    Carried,
    ChunkEnd,
    Drain,
    DropGrammar,
    DropImage,
    ExecutorInbox,
    ExecutorReady,
    Finish,
    GrammarStates,
    ImagePixels,
    Instruct,
    LoadGrammar,
    PeerDown,
    PeerUp,
    Plan,
    Pooled,
    SamplerInbox,
    SamplerMessage,
    Scores,
    SlotMasks,
    SlotParams,
    StepOut,
)
from .ref import Gone
from .stub_draw import START, Draw, logprob_of, moved, vector_of
from .topology import schedulers_among

POOL_TOKENS: Final = 1 << 20
SLOTS: Final = 256


def ints(view: memoryview) -> list[int]:
    """Return a message's int32 array."""
    return view.cast("i").tolist() if len(view) else []


@dataclass(slots=True)
class Seat:
    """A slot's sequence."""

    rid: int
    pages: list[int]
    length: int
    """Tokens whose hashes are in the pages."""
    limit: int
    last: int = -1
    """The newest token, which is in no page yet."""


@dataclass(slots=True)
class Chunk:
    """Tokens to compute for a slot."""

    slot: int
    tokens: list[int]
    draws: bool
    ends: bool
    """The prompt ends here, and its vector is wanted."""
    score_from: int
    targets: list[int]
    """Given tokens whose logprobs are wanted, the first of them behind the place `score_from`; see Plan.score_ids."""


class StubSampler(Actor):
    """What each slot draws by. Lives beside its executor, as the real one does."""

    inbox_type: ClassVar[Any] = SamplerInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.draws: dict[int, Draw] = {}
        self.grammars: dict[int, Grammar] = {}
        self.changes: WindowChanges[StubSampler] = WindowChanges()

    def receive(self, message: Any, source: str) -> None:
        """Keep changes for their window; forget all of a scheduler that died."""
        match message:
            case SlotParams() | LoadGrammar() | DropGrammar() | GrammarStates() | SlotMasks():
                self.changes.add(message.window, self._change(message))
            case PeerDown():
                self.changes.clear()
                self.grammars.clear()
            case PeerUp() | Drain():
                pass

    def sync(self, window: int, count: int) -> None:
        """Apply what was sent for `window`, so many messages. Raises as WindowChanges.apply."""
        self.changes.apply(window, count, self, self.context.inbox, self.receive)

    def _change(self, m: SamplerMessage) -> Any:
        """What the message does, with copies of its arrays."""
        match m:
            case SlotParams():
                return partial(_seat, m.slot, m.params, m.prompt_length, m.grammar, m.grammar_state)
            case LoadGrammar():
                classes, canonical = np.frombuffer(m.token_class, np.uint16), np.frombuffer(m.canonical, np.int32)
                transitions = np.frombuffer(m.transitions, np.int16).reshape(len(canonical), -1)
                return partial(_load, Grammar(m.handle, classes.copy(), transitions.copy(), canonical.copy()))
            case DropGrammar():
                return partial(_drop, m.handle)
            case GrammarStates():
                return partial(_set_states, ints(m.slots), ints(m.states))
            case SlotMasks():
                slots = ints(m.slots)
                masks = np.frombuffer(m.bitmask, np.int32).reshape(len(slots), -1).copy()
                return partial(_set_masks, slots, masks)
            case _:
                assert_never(m)


def _seat(slot: int, params: Any, prompt_length: int, grammar: int, state: int, sampler: StubSampler) -> None:
    followed = sampler.grammars[grammar] if grammar >= 0 else None
    sampler.draws[slot] = Draw(params, prompt_length, followed, state)


def _load(grammar: Grammar, sampler: StubSampler) -> None:
    sampler.grammars[grammar.handle] = grammar


def _drop(handle: int, sampler: StubSampler) -> None:
    del sampler.grammars[handle]


def _set_states(slots: list[int], states: list[int], sampler: StubSampler) -> None:
    for slot, state in zip(slots, states, strict=True):
        sampler.draws[slot].state = state


def _set_masks(slots: list[int], masks: np.ndarray, sampler: StubSampler) -> None:
    for slot, mask in zip(slots, masks, strict=True):
        sampler.draws[slot].mask = mask


class StubExecutor(Actor):
    """See the module's text."""

    inbox_type: ClassVar[Any] = ExecutorInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config, model = context.config, context.model
        (self.scheduler,) = schedulers_among(context.peers())
        self.page = config.page_size
        pages = -(-(config.max_total_tokens or POOL_TOKENS) // self.page)
        per_slot = min(pages, -(-model.context_length // self.page))
        self.ready = ExecutorReady(pages, config.max_running_requests or SLOTS, per_slot, "cpu")
        self.kv = np.zeros((pages, self.page), dtype=np.uint64)
        self.seats: dict[int, Seat] = {}
        self.decoding: list[int] = []
        self.over: set[int] = set()
        """Slots whose requests have ended, until others are admitted to them."""
        self.sampler: StubSampler | None = None
        self.loaded = ""
        self.start_state = START

    async def start(self) -> None:
        """Find the sampler."""
        sampler = self.context.local(self.context.name.replace("exec.", "sampler."))
        assert isinstance(sampler, StubSampler)
        self.sampler = sampler

    async def run(self) -> None:
        """Take plans and run them, a step in `stub_step_ms`.

        What a step computes it computes after its pause: who gets its tokens has a core for them then, as beside a GPU.
        """
        inbox, pause = self.context.inbox, self.context.config.stub_step_ms / 1e3
        while True:
            item = inbox.poll()
            if item is None:
                await inbox.wait()
            elif not isinstance(item[0], Plan):
                self.receive(*item)
            else:
                steps = self.steps(item[0])
                for _ in range(item[0].k):
                    await trio.sleep(pause)
                    self._publish(next(steps))

    def receive(self, message: Any, source: str) -> None:
        """Greet a scheduler that comes up; forget the batch of one that died."""
        match message:
            case PeerUp(name=self.scheduler):
                self._publish(self.ready)
            case Instruct():
                self._publish(self._instructed(message))
            case PeerDown(name=self.scheduler):
                self.seats.clear()
                self.decoding.clear()
                self.over.clear()
            case PeerUp() | PeerDown() | Drain() | ImagePixels() | DropImage():
                pass

    def _instructed(self, m: Instruct) -> Carried:
        """A folder's name makes other weights, and so other tokens; there is nothing to profile."""
        match m.task:
            case "load_weights":
                self.loaded = m.detail
            case "swap_weights":
                self.start_state = START ^ zlib.crc32(self.loaded.encode())
                self.ready = replace(self.ready, weights=self.loaded)
                self.seats.clear()
                self.decoding.clear()
                self.over.clear()
            case "start_profile" | "stop_profile":
                return Carried(m.rid, m.task, "a stub has no model to profile", 400, "unsupported_value")
        return Carried(m.rid, m.task)

    def _publish(self, message: ExecutorReady | StepOut | Carried) -> None:
        try:
            self.context.ref(self.scheduler).post(message)
        except Gone:
            return  # the next scheduler starts from nothing

    # ------------------------------------------------------------------ a window

    def steps(self, plan: Plan) -> Iterator[StepOut]:
        """Begin a window, of whose message nothing is needed then; return its steps, which run one by one."""
        return self._steps(plan.window, plan.k, self._apply(plan), set(ints(plan.once_slots)))

    def _steps(self, window: int, k: int, chunks: list[Chunk], once: set[int]) -> Iterator[StepOut]:
        for number in range(k):
            started = time.perf_counter_ns()
            work = chunks if number == 0 else []
            chunked = {c.slot for c in work}
            self.decoding = [s for s in self.decoding if s not in chunked]
            rows = self.decoding if number else [*self.decoding, *sorted(once - chunked)]
            for slot in rows:
                self._write(slot, self.seats[slot].last)
            scores = [score for c in work for score in self._compute(c)]
            pooled = self._pooled([c.slot for c in work if c.ends])
            drawing = [*rows, *(c.slot for c in work if c.draws)]
            out = self._draw(drawing)
            ended = {slot for slot, finish in zip(drawing, out[1], strict=True) if finish}
            self.over |= ended
            self.decoding = [s for s in drawing if s not in ended and s not in once]
            took_ns = time.perf_counter_ns() - started
            yield self._step_out(window, number, drawing, *out, scores, pooled, took_ns)

    def _apply(self, plan: Plan) -> list[Chunk]:
        """Change the batch by the plan's deltas, in the order of its fields; return its chunks."""
        assert self.sampler is not None
        released = set(ints(plan.release))
        self.decoding = [s for s in self.decoding if s not in released]
        copies = np.array(ints(plan.copies), dtype=np.int64).reshape(-1, 3)
        contents = [self.kv[source, :tokens].copy() for source, _, tokens in copies]
        for (_, destination, tokens), content in zip(copies, contents, strict=True):
            self.kv[destination, :tokens] = content
        for a in plan.admits:
            self.seats[a.slot] = Seat(a.rid, ints(a.pages), a.cached, a.limit)
            self.over.discard(a.slot)
        self.sampler.sync(plan.window, plan.sampler_changes)
        for slot, page in zip(ints(plan.grow_slots), ints(plan.grow_pages), strict=True):
            self.seats[slot].pages.append(page)
        ids, targets = iter(ints(plan.chunk_ids)), iter(ints(plan.score_ids))
        slots, last = ints(plan.chunk_slots), ints(plan.chunk_last)
        nowhere = [0] * len(slots)
        scored, score_from = ints(plan.chunk_scored) or nowhere, ints(plan.score_starts) or nowhere
        chunks = []
        for i, length in enumerate(ints(plan.chunk_lengths)):
            slot, start = slots[i], ints(plan.chunk_starts)[i]
            tokens, wanted = list(islice(ids, length)), list(islice(targets, scored[i]))
            if slot in self.over:  # a jump that was planned before its row was found to be poisoned runs all the same
                self.seats[slot].length = start
            if start != self.seats[slot].length:
                raise RuntimeError(f"slot {slot} has {self.seats[slot].length} tokens, its chunk starts at {start}")
            end = ChunkEnd(last[i])
            chunks.append(Chunk(slot, tokens, end == ChunkEnd.DRAW, end == ChunkEnd.POOL, score_from[i], wanted))
        return chunks

    def _hash(self, seat: Seat) -> int:
        """Of the seat's sequence, as its pages have it."""
        at = seat.length - 1
        return int(self.kv[seat.pages[at // self.page], at % self.page]) if seat.length else self.start_state

    def _write(self, slot: int, token: int) -> int:
        """Put a token's hash into its page; return it."""
        seat = self.seats[slot]
        state = moved(self._hash(seat), token)
        self.kv[seat.pages[seat.length // self.page], seat.length % self.page] = state
        seat.length += 1
        return state

    def _compute(self, chunk: Chunk) -> list[float]:
        """Write a chunk; return the logprobs of its targets."""
        states = [self._write(chunk.slot, token) for token in chunk.tokens]
        before = states[chunk.score_from : chunk.score_from + len(chunk.targets)]
        return [logprob_of(moved(state, token)) for state, token in zip(before, chunk.targets, strict=True)]

    def _pooled(self, slots: list[int]) -> Pooled | None:
        """The vectors of prompts that are all there."""
        pooling = self.context.model.pooling
        if not slots or pooling is None:
            return None
        seats = [self.seats[slot] for slot in slots]
        vectors = np.stack([vector_of(self._hash(seat), pooling.width) for seat in seats])
        return Pooled(_raw(np.array([seat.rid for seat in seats], dtype=np.int64)), _raw(vectors))

    def _draw(self, slots: list[int]) -> tuple[list[int], list[int], list[float]]:
        """(tokens, Finish values, logprobs: NaN where not asked) of the rows"""
        assert self.sampler is not None
        model, ids, finishes, logprobs = self.context.model, [], [], []
        for slot in slots:
            seat, draw = self.seats[slot], self.sampler.draws[slot]
            state = self._hash(seat)
            token, finish = draw.token(state, seat.length, model.vocab_size, model.eos_ids)
            if finish == Finish.NONE and seat.length + 1 >= seat.limit:
                finish = Finish.LENGTH
            seat.last = token
            ids.append(token)
            finishes.append(finish)
            logprobs.append(float("nan") if draw.params.logprobs is None else logprob_of(moved(state, token)))
        return ids, finishes, logprobs

    def _listed(self, slots: list[int]) -> memoryview:
        """Logprobs of the tokens that requests named, float32 [rows, widest]; empty if none did."""
        assert self.sampler is not None
        named = [self.sampler.draws[slot].params.token_ids_logprob for slot in slots]
        widest = max(map(len, named), default=0)
        if not widest:
            return NOTHING
        values = np.full((len(slots), widest), np.nan, np.float32)
        for row, (slot, tokens) in enumerate(zip(slots, named, strict=True)):
            state = self._hash(self.seats[slot])
            values[row, : len(tokens)] = [logprob_of(moved(state, token)) for token in tokens]
        return _raw(values)

    def _step_out(
        self, window: int, number: int, slots: list[int], ids: list[int], finish: list[int], logprobs: list[float],
        scores: list[float], pooled: Pooled | None, took_ns: int,
    ) -> StepOut:  # fmt: skip
        assert self.sampler is not None
        wanted = [-1 if (n := self.sampler.draws[s].params.logprobs) is None else n for s in slots]
        top_n, asked = max(0, *wanted, 0), any(n >= 0 for n in wanted)
        values = np.array(logprobs, dtype=np.float32)
        top_ids, top_logprobs = self._top(ids, values, top_n) if asked else (NOTHING, NOTHING)
        return StepOut(
            window=window,
            step=number,
            rids=_raw(np.array([self.seats[s].rid for s in slots], dtype=np.int64)),
            ids=_raw(np.array(ids, dtype=np.int32)),
            finish=_raw(np.array(finish, dtype=np.uint8)),
            logprobs=_raw(values) if asked else NOTHING,
            top_n=top_n,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            step_ns=took_ns,
            listed=self._listed(slots) if asked else NOTHING,
            scores=Scores(_raw(np.array(scores, dtype=np.float32)), 0, NOTHING, NOTHING) if scores else None,
            pooled=pooled,
        )

    def _top(self, ids: list[int], logprobs: np.ndarray, top_n: int) -> tuple[memoryview, memoryview]:
        """The most likely tokens: the drawn one, and those that follow it in the vocabulary."""
        behind = np.arange(top_n)
        top_ids = (np.array(ids, dtype=np.int64)[:, None] + behind) % self.context.model.vocab_size
        return _raw(top_ids.astype(np.int32)), _raw((logprobs[:, None] - behind).astype(np.float32))


def _raw(array: np.ndarray) -> memoryview:
    return memoryview(array.tobytes())
