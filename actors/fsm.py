"""The fsm actor: compiles grammars for the schedulers, in processes of its own, and remembers them.

Equal grammars are compiled once, whoever waits for them, and their tables kept as long as there is room. Compilers are
killed when they take too long, and started again (compile_pool.py). Grammars that no table can have are followed here,
request by request (match_pool.py). Invariant: each Compile gets one Compiled, Translated or CompileFailed, unless it
was discarded; what a request that runs needs of here can be made again from its tokens.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import trio

from .actor import Actor, Context
from .compile_pool import Mother, Worker, WorkerDied
from .fsm_worker import Failed, Made, MadeText, Result, Setup
from .malloc import share_arenas
from .match_pool import MatchPool
from .messages import (
    Compile,
    Compiled,
    CompileFailed,
    Discard,
    Drain,
    FsmInbox,
    GrammarSpec,
    Masks,
    Match,
    MatchFailed,
    PeerDown,
    PeerUp,
    Translated,
    Unmatch,
)
from .ref import Gone

WORKERS: Final = 2
CACHE_BYTES: Final = 128 << 20
ENTRY_BYTES: Final = 1024
"""What an answer takes beside its arrays and the grammar's text, roughly."""
TRIES: Final = 2
"""A compiler that dies of something else than its deadline may have been killed by chance."""


@dataclass(slots=True, eq=False)
class Work:
    """A grammar that is queued or being compiled, and the handles of who waits."""

    spec: GrammarSpec
    handles: list[tuple[str, int]] = field(default_factory=list)
    """Each a scheduler's."""


class Cache:
    """Answers by grammar, least recently used first, bounded in bytes. The tokenizer is the same for all."""

    def __init__(self, most: int = CACHE_BYTES) -> None:
        self.most = most
        self.size = 0
        self._answers: OrderedDict[GrammarSpec, Result] = OrderedDict()

    def get(self, spec: GrammarSpec) -> Result | None:
        """The answer, if it is known."""
        answer = self._answers.get(spec)
        if answer is not None:
            self._answers.move_to_end(spec)
        return answer

    def put(self, spec: GrammarSpec, answer: Result) -> None:
        """Remember, and forget others for it."""
        self._answers[spec] = answer
        self.size += _bytes(spec, answer)
        while self.size > self.most:
            self.size -= _bytes(*self._answers.popitem(last=False))


class Fsm(Actor):
    """See the module's text."""

    inbox_type: ClassVar[Any] = FsmInbox

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config, model = context.config, context.model
        tokenizer, seconds = config.tokenizer_path or model.path, config.grammar_seconds
        setup = Setup(tokenizer, model.eos_ids, model.vocab_size, seconds, config.grammar_backend)
        self.mother = Mother(setup, context.name)
        self.workers = [Worker(self.mother) for _ in range(WORKERS)]
        self.matches = MatchPool(setup, self._send, context.desk)
        self.cache = Cache()
        self.works: dict[GrammarSpec, Work] = {}
        """Those without an answer."""
        self._queue: deque[Work] = deque()
        self._busy = [False] * WORKERS
        self._wake = trio.Event()

    async def start(self) -> None:
        """Start the first compiler, in the background; one in a program's own loop starts at need."""
        if self.context.config.placement == "process":
            share_arenas()
        self.matches.start(self.context.nursery)
        for number, worker in enumerate(self.workers):
            warm = not number and self.context.config.placement == "process"
            self.context.nursery.start_soon(self._serve, number, worker, warm)
        self.context.nursery.start_soon(self._end_with)

    def receive(self, message: Any, source: str) -> None:
        match message:
            case Compile():
                self._compile(message, source)
            case Discard():
                self._discard(source, message.handle)
            case Match():
                self.matches.follow(message, source)
            case Unmatch():
                self.matches.forget(source, message.rid)
            case PeerDown(name=name):
                self.matches.forget_all(name)
                for scheduler, handle in [one for work in self.works.values() for one in work.handles]:
                    if scheduler == name:
                        self._discard(name, handle)
            case PeerUp() | Drain():
                pass  # the scheduler asks again for what it needs

    # ------------------------------------------------------------------ requests

    def _compile(self, m: Compile, scheduler: str) -> None:
        answer = self.cache.get(m.spec)
        if answer is not None:
            self._answer(scheduler, m.handle, answer)
            return
        work = self.works.get(m.spec)
        if work is None:
            work = self.works[m.spec] = Work(m.spec)
            self._queue.append(work)
            self._ring()
        work.handles.append((scheduler, m.handle))

    def _discard(self, scheduler: str, handle: int) -> None:
        work = next((work for work in self.works.values() if (scheduler, handle) in work.handles), None)
        if work is None:
            return
        work.handles.remove((scheduler, handle))
        if not work.handles and work in self._queue:  # what is being compiled may as well be finished
            self._queue.remove(work)
            del self.works[work.spec]

    def _answer(self, scheduler: str, handle: int, answer: Result, status: int = 400, seconds: float = 0.0) -> None:
        match answer:
            case Made():
                arrays = (memoryview(a) for a in (answer.token_class, answer.transitions, answer.canonical))
                token_class, transitions, canonical = arrays
                self._send(scheduler, Compiled(handle, token_class, transitions, canonical, seconds))
            case MadeText():
                self._send(scheduler, Translated(handle, answer.grammar, seconds))
            case Failed():
                self._send(scheduler, CompileFailed(handle, status, answer.code, answer.message, seconds))

    def _send(self, scheduler: str, message: Compiled | Translated | CompileFailed | Masks | MatchFailed) -> None:
        try:
            self.context.ref(scheduler).post(message)
        except Gone:
            return  # it asks again when it is back

    # ------------------------------------------------------------------ compilers

    def _ring(self) -> None:
        """Wake the compilers that wait for work."""
        self._wake.set()
        self._wake = trio.Event()

    async def _next_work(self, number: int) -> Work:
        """Wait for work that the compilers before this one are too busy for: those are warm."""
        self._busy[number] = False
        while not self._queue or not all(self._busy[:number]):
            await self._wake.wait()
        self._busy[number] = True
        work = self._queue.popleft()
        if self._queue:
            self._ring()
        return work

    async def _serve(self, number: int, worker: Worker, warm: bool) -> None:
        """Feed one compiler."""
        try:
            if warm:
                await self._warm_up(worker)
                if self.mother.refusal is None and self.mother.setup.backend != "fsm":
                    self.context.nursery.start_soon(self.matches.warm_up)
            while True:
                work = await self._next_work(number)
                started = trio.current_time()
                answer, status = await self._made(worker, work.spec)
                seconds = trio.current_time() - started
                if not (isinstance(answer, Failed) and (answer.late or status != 400)):
                    self.cache.put(work.spec, answer)
                if self.works.get(work.spec) is work:
                    del self.works[work.spec]
                for scheduler, handle in work.handles:
                    self._answer(scheduler, handle, answer, status, seconds)
                await self._warm_up(worker)  # again, if it was killed: before somebody waits for it
        finally:
            worker.close()

    async def _end_with(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.mother.close()

    async def _warm_up(self, worker: Worker) -> None:
        try:
            await worker.start()
        except (WorkerDied, trio.TooSlowError):
            self.context.log.warning("a compiler of grammars ended in its start")

    async def _made(self, worker: Worker, spec: GrammarSpec) -> tuple[Result, int]:
        """(the answer, its HTTP status)"""
        for _ in range(TRIES):
            try:
                return await worker.compile(spec), 400
            except (WorkerDied, trio.TooSlowError) as error:
                self.context.log.warning("a compiler of grammars ended: %s", error)
        return Failed("compiler_crashed", "the grammar's compiler ended; send the request again"), 503


def _bytes(spec: GrammarSpec, answer: Result) -> int:
    size = len(spec.text) + ENTRY_BYTES
    if isinstance(answer, MadeText):
        size += len(answer.grammar)
    if isinstance(answer, Made):
        size += len(answer.token_class) + len(answer.transitions) + len(answer.canonical)
    return size
