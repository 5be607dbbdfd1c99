"""Requests that follow a grammar of llguidance's: their matchers, and the threads that fill their masks.

Part of the fsm actor, which hands in what schedulers send. The library releases the GIL, so the actor goes on
meanwhile. Masks that are asked for together are sent together; one that takes longer than DEADLINE is sent later by
itself, and the next ones of its request are filled by threads that let others go first, as is each request's first
one: so a slow grammar makes its own request slow and no other. Invariant: a matcher has consumed the first
`known` generated tokens of its request; a request that is not known any more is not answered.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import trio

from ..errors import ActorserveError
from .desk import Desk
from .fsm_worker import Guidance, Setup, make_matchers
from .match_crew import DEADLINE, Crew
from .messages import Masks, Match, MatchFailed

if TYPE_CHECKING:
    from ..fsm.matcher import AnyMatcher, Matchers

THREADS: Final = 4
"""Of each crew."""
decode_guidance: Final = msgspec.json.Decoder(Guidance).decode
PROTOTYPES: Final = 64
"""Grammars whose first matcher is kept: a copy of it takes microseconds, and shares what it has learnt."""


@dataclass(slots=True, eq=False)
class Place:
    """A request's place in its grammar."""

    grammar: str
    matcher: "AnyMatcher | None" = None
    known: int = 0
    """Generated tokens that it has consumed."""
    slow: bool = True
    """Whether its last job took longer than DEADLINE; its first one may, which makes the matcher."""


@dataclass(slots=True, eq=False)
class Prototype:
    """The first matcher of a grammar, once it is made."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    matcher: "AnyMatcher | None" = None


@dataclass(slots=True, eq=False)
class Job:
    """Consume these tokens and fill the mask. `place` is the request's as long as it is known."""

    scheduler: str
    rid: int
    place: Place
    ids: list[int]
    mask: np.ndarray | None = None
    error: ActorserveError | None = None


class MatchPool:
    """See the module's text."""

    def __init__(self, setup: Setup, send: Callable[[str, Masks | MatchFailed], None], desk: Desk) -> None:
        self._setup = setup
        self._send = send
        self._desk = desk
        self._words = -(-setup.vocab_size // 32)
        self._places: dict[tuple[str, int], Place] = {}
        """By scheduler and request: what one has given up, another may ask for before we hear of that."""
        self._quick = Crew(THREADS, self._do, self._post, polite=False)
        self._slow = Crew(THREADS, self._do, self._post, polite=True)
        self._matchers: Matchers | None = None
        self._prototypes: OrderedDict[str, Prototype] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to answer, until the nursery is cancelled."""
        self._quick.start(nursery)
        self._slow.start(nursery)

    async def warm_up(self) -> None:
        """Have what makes matchers, before somebody waits for it: half a second."""
        await trio.to_thread.run_sync(self._ready, abandon_on_cancel=True)

    def follow(self, m: Match, scheduler: str) -> None:
        """Take a request's tokens in; the answer follows."""
        if not m.start:
            self._places[scheduler, m.rid] = Place(m.grammar)
        place = self._places.get((scheduler, m.rid))
        if place is None:
            return  # forgotten meanwhile
        ids = np.frombuffer(m.ids, dtype=np.int32).tolist()
        crew = self._slow if place.slow else self._quick
        crew.add(Job(scheduler, m.rid, place, ids))

    def forget(self, scheduler: str, rid: int) -> None:
        """Drop a request's matcher."""
        self._places.pop((scheduler, rid), None)

    def forget_all(self, scheduler: str) -> None:
        """Drop all that this scheduler knew: it is gone."""
        self._places = {key: place for key, place in self._places.items() if key[0] != scheduler}

    # ------------------------------------------------------------------ in threads

    def _do(self, job: Job) -> None:
        note = self._desk.begin(job.rid)
        began = time.perf_counter()
        self._work(job)
        job.place.slow = time.perf_counter() - began > DEADLINE
        self._desk.end(note)

    def _work(self, job: Job) -> None:
        place = job.place
        try:
            if place.matcher is None:
                place.matcher = self._prototype(place.grammar).copy()
            place.matcher.consume(job.ids)
            place.known += len(job.ids)
            mask = np.zeros(self._words, np.int32)
            matchers = self._matchers
            assert matchers is not None
            place.matcher.fill(mask[: matchers.words])
            job.mask = mask
        except ActorserveError as error:
            job.error = error
        except Exception as error:  # a fault of the library's is this request's alone
            job.error = ActorserveError(f"the grammar's parser failed: {type(error).__name__}: {error}"[:400])

    def _ready(self) -> "Matchers":
        with self._lock:
            if self._matchers is None:
                from ..models.tokenizer import load_tokenizer

                self._matchers = make_matchers(load_tokenizer(self._setup.tokenizer), self._setup)
            return self._matchers

    def _prototype(self, grammar: str) -> "AnyMatcher":
        matchers = self._ready()
        with self._lock:
            found = self._prototypes.setdefault(grammar, Prototype())
            self._prototypes.move_to_end(grammar)
            if len(self._prototypes) > PROTOTYPES:
                self._prototypes.popitem(last=False)
        with found.lock:  # others' are made meanwhile
            if found.matcher is None:
                guidance = decode_guidance(grammar)
                found.matcher = matchers.new(guidance.grammar, guidance.thoughts)
            return found.matcher

    # ------------------------------------------------------------------ answers

    def _post(self, done: list[Job]) -> None:
        """Answer what is still asked for."""
        done = [job for job in done if self._places.get((job.scheduler, job.rid)) is job.place]
        filled: dict[str, list[tuple[Job, np.ndarray]]] = {}
        for job in done:
            if job.error is not None:
                error = job.error
                text = f"after {job.place.known} tokens: {error.message}"
                self._send(job.scheduler, MatchFailed(job.rid, error.status, error.code, text))
                del self._places[job.scheduler, job.rid]
            elif job.mask is not None:
                filled.setdefault(job.scheduler, []).append((job, job.mask))
        for scheduler, jobs in filled.items():
            rids = np.array([job.rid for job, _ in jobs], dtype=np.int64)
            lengths = np.array([job.place.known for job, _ in jobs], dtype=np.int32)
            bitmask = np.stack([mask for _, mask in jobs])
            self._send(scheduler, Masks(*(memoryview(a.tobytes()) for a in (rids, lengths, bitmask))))
