"""Runs what programs append: one Executor per state, a queue of nodes and, while there is work, one task of the loop.

Used by state.py. Invariant: nodes of a state run in the order in which they were appended, one at a time; every
variable that was declared is filled or failed; after a failure the rest of the state's nodes fail with the same cause.
"""

import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from ..errors import RequestError
from .backend import Backend, Reply, constrained, method_named
from .block import Block, run_block
from .conditions import made_by, read_by
from .context import Context
from .control import Control
from .expressions import (
    Argument,
    Commit,
    Fork,
    Gen,
    Image,
    Join,
    Literal,
    Node,
    Repeat,
    RoleBegin,
    RoleEnd,
    Sampling,
    Select,
    SeparateReasoning,
    Var,
    Variable,
    VarScopeBegin,
    VarScopeEnd,
    Video,
    When,
    flatten,
)
from .images import load
from .loop import Signal
from .program_lines import error_line, program_line
from .reasoning import split
from .speculation import ahead_of, beyond, counts, may_speculate
from .structured import instance
from .variables import ProgramError, Slot, failure, filled
from .work import QUICK, Budget, Elsewhere, Flush, Gather, Inherit, Item, Point

RUN_DEFAULTS: Final = Sampling(
    max_new_tokens=128,
    min_new_tokens=0,
    n=1,
    stop=(),
    stop_token_ids=(),
    temperature=1.0,
    top_p=1.0,
    top_k=-1,
    min_p=0.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    ignore_eos=False,
)
"""SGLang's defaults of a run."""


class Executor:
    """One state. `life` ends when the body of the program has: branches share their root's."""

    def __init__(
        self,
        backend: Backend,
        defaults: Sampling,
        *,
        stream: bool = False,
        spec_tokens: int | None = None,
        eager: bool = False,
        life: Signal | None = None,
        branch: str = "",
        budget: Budget | None = None,
    ) -> None:
        """`spec_tokens`: see speculation.py. `eager`: every statement ends before the next one begins. `budget`: of
        the loops of this state and its branches; None is no limit."""
        if stream and spec_tokens is not None:
            raise RequestError("stream and num_api_spec_tokens exclude each other", param="stream")
        self.backend = backend
        self.defaults = defaults.over(RUN_DEFAULTS)
        self.stream = stream
        self.spec_tokens = spec_tokens
        self.eager = eager
        self.life = life or Signal()
        self.branch = branch
        self.budget = budget
        self._records = backend.is_chat_model and spec_tokens is not None
        self.context = Context(backend.chat_template)
        self.slots: dict[str, Slot] = {}
        self.error: ProgramError | None = None
        self.changed = Signal()
        """Set at any change that a reader of streams may wait for; see Slot.changed."""
        self.idle = Signal()
        """Set when the queue is empty; another one takes its place with new work."""
        self.idle.set()
        self._queue: deque[Item] = deque()
        self._block: Block | None = None
        self.gathered: dict[str, Slot] = {}
        """Variables of joins, which nothing declares before they are done."""
        self._lock = threading.Lock()
        self.life.when_set(self.notify)

    # ------------------------------------------------------------------ the program's side

    def submit(self, expr: Any, line: str | None = None) -> None:
        """Append texts and expressions; `line`: where the program does. Raises RequestError for anything else."""
        line = program_line() if line is None else line
        self._put([self._item(node, line) for node in flatten(expr)])

    def fork(self, size: int, line: str | None = None) -> list["Executor"]:
        """`size` states that go on from here, each alone; the prefix is computed once before they do."""
        line = program_line() if line is None else line
        point = Point()
        self._put([*([Item(Commit(), line)] if size > 1 else []), Item(point, line)])
        branches = []
        for i in range(size):
            name = f"{self.branch}.{i}" if self.branch else str(i)
            branch = Executor(
                self.backend,
                self.defaults,
                stream=self.stream,
                spec_tokens=self.spec_tokens,
                eager=self.eager,
                life=self.life,
                branch=name,
                budget=self.budget,
            )
            branch.slots = dict(self.slots)
            branch._put([Item(Inherit(point), line)])
            branches.append(branch)
        return branches

    def join(self, branches: list["Executor"], mode: str, line: str | None = None) -> None:
        """Raises RequestError for an unknown mode."""
        if mode not in ("gather_variable", "concate_and_append"):
            raise RequestError(f"join takes gather_variable or concate_and_append, not {mode!r}", param="mode")
        line = program_line() if line is None else line
        self._put([Item(Gather(branches, frozenset(self.slots), mode), line)])

    def run_elsewhere(self, run: Callable[["Executor"], Awaitable[None]]) -> None:
        """The program's whole run is that of `run`, which fills this state."""
        self._put([Item(Elsewhere(run), program_line())])

    def find(self, name: str) -> Slot:
        """The variable, perhaps still on its way. Waits only if it is not declared. Raises KeyError."""
        self.flush(name)
        if name not in self.slots:
            self.idle.wait()
        return self._found(name)

    async def find_async(self, name: str) -> Slot:
        """As `find`, in any event loop."""
        self.flush(name)
        if name not in self.slots:
            await self.idle.reached()
        return self._found(name)

    def flush(self, name: str | None = None) -> None:
        """Before a read of `name`, or of everything: a block of a chat model that is open must answer now."""
        slot = self.slots.get(name) if name is not None else None
        if self._records and not (slot is not None and slot.done.is_set):
            self._put([Item(Flush(), program_line())])

    def set_var(self, name: str, value: Any) -> None:
        self.slots[name] = filled(name, value)
        self.notify()

    def _fail(self, cause: Exception, what: str, line: str) -> None:
        """What comes after fails with this cause."""
        if self.error is None:
            what = f"{what}{self.where}"
            self.error = cause if isinstance(cause, ProgramError) else failure(cause, what, line)
        self.notify()

    def end(self, error: Exception | None = None) -> None:
        """The program's function has returned, or raised."""
        if error is not None:
            self._put([Item(error, error_line(error))])
        self.life.set()

    def notify(self) -> None:
        changed, self.changed = self.changed, Signal()
        changed.set()

    def _found(self, name: str) -> Slot:
        slot = self.slots.get(name)
        if slot is not None:
            return slot
        if self.error is not None:
            raise self.error
        raise KeyError(f"the program has no variable {name!r}; it has {', '.join(self.slots) or 'none'}")

    @property
    def where(self) -> str:
        """Which branch this is, for errors."""
        return f" in branch {self.branch}" if self.branch else ""

    def _item(self, node: Node, line: str) -> Item:
        match node:
            case Gen(name=name) | Select(name=name) | VarScopeEnd(name=name):
                return Item(node, line, (self._declare(name, line),))
            case SeparateReasoning(names=names):
                raw = tuple(self.slots[name] for name in names)
                made = [self._declare(made, line) for name in names for made in (name, f"{name}_reasoning_content")]
                return Item(node, line, tuple(made), raw)
            case When() | Repeat() | Var():
                may_make = dict.fromkeys(made_by([node]))
                known = {name: self.slots[name] for name in (*may_make, *read_by([node])) if name in self.slots}
                return Item(node, line, tuple(self._declare(name, line, True) for name in may_make), known=known)
            case _:
                return Item(node, line)

    def _declare(self, name: str | None, line: str, optional: bool = False) -> Slot:
        slot = Slot(name or "", line, self.where, optional)
        if name is not None:
            self.slots[name] = slot
        return slot

    def _put(self, items: list[Item]) -> None:
        with self._lock:
            self._queue.extend(items)
            start = self.idle.is_set
            while start and self._queue and self._is_quick(self._queue[0]):
                self._run_quick(self._queue.popleft())
            start = start and bool(self._queue)
            if start:
                self.idle = Signal()
        if start:
            self.backend.loop.start(self._drain)
        self.notify()
        if self.eager:
            self.idle.wait()

    # ------------------------------------------------------------------ the loop's side

    async def _drain(self) -> None:
        """Work until the queue is empty. Raises nothing but cancellation, at the end of the loop."""
        while True:
            with self._lock:
                if not self._queue:
                    self.idle.set()
                    break
                item = self._queue.popleft()
            if self._is_quick(item):
                self._run_quick(item)
                continue
            try:
                await self._run_slow(item)
            except Exception as error:
                self._fail_item(item, error)
            except BaseException:
                self._fail_item(item, RequestError("the program was cancelled"))
                raise
        self.notify()

    def _is_quick(self, item: Item) -> bool:
        """Whether it needs no waiting, so that no task has to run it."""
        if self.error is not None:
            return True
        match item.work:
            case Literal() | Gen() if self._block is not None:
                return True
            case _ if self._block is not None:
                return False
            case Inherit(point=point):
                return point.reached.is_set
            case _:
                return isinstance(item.work, QUICK)

    def _run_quick(self, item: Item) -> None:
        try:
            if self.error is not None:
                raise self.error
            self._do_quick(item)
        except Exception as error:
            self._fail_item(item, error)

    def _do_quick(self, item: Item) -> None:
        context = self.context
        match item.work:
            case Literal(text=text) if self._block is not None:
                self._block.add_text(text)
            case Literal(text=text):
                context.fill(text)
            case Gen() as gen:
                assert self._block is not None
                self._block.add_gen(gen, self._sampling(gen.sampling), item.slots[0])
            case RoleBegin(role=role):
                context.begin_role(role)
                self._open_block()
            case RoleEnd(role=role):
                context.end_role(role)
            case VarScopeBegin(name=name):
                context.scopes[name] = len(context.text)
            case VarScopeEnd(name=name):
                item.slots[0].fill(context.text[context.scopes.pop(name) :])
            case SeparateReasoning(model_type=model_type):
                split(context, item.raw, item.slots, model_type)
            case Image(source=source):
                self._add_picture(source)
            case Video():
                raise RequestError(f"{self.backend.name} takes no videos", param="video", code="unsupported_value")
            case Point() as point:
                point.context, point.gathered = context.branch(), dict(self.gathered)
                point.reached.set()
            case Inherit(point=point):
                self._inherit(point)
            case Exception() as error:
                self._fail(error, "the program", item.line)
            case Flush():
                pass  # the block has answered before this came to its turn
            case _:
                raise AssertionError(f"{item.work} is not quick")

    async def do(self, item: Item) -> None:
        """Do a part of the work that is being done (control.py). Raises what goes wrong."""
        if self._is_quick(item):
            self._do_quick(item)
        else:
            await self._run_slow(item)

    async def end_block(self) -> None:
        """Let a block of a chat model that is open answer now, and go on with a new one."""
        if self._block is not None:
            await self._end_block()
            self._open_block()

    async def _run_slow(self, item: Item) -> None:
        if self._block is not None:
            await self._end_block()
        match item.work:
            case When() | Repeat() | Var() as node:
                self._open_block()
                await Control(self, item).run(node)
            case Gen() as gen:
                await self._generate(gen, item.slots[0])
            case Select(choices=choices, temperature=temperature, method=method):
                async with self.backend.turn:
                    decision = await self.backend.select(self.context, choices, temperature, method_named(method))
                self.context.fill(decision.decision)
                item.slots[0].fill(decision.decision, decision.meta_info)
            case Commit():
                if self.context.text:
                    async with self.backend.turn:
                        await self.backend.commit(self.context)
            case Inherit(point=point):
                await point.reached.reached()
                self._inherit(point)
            case Gather() as gather:
                await self._gather(gather)
            case Elsewhere(run=run):
                await run(self)
            case Argument() | Variable() | Fork() | Join():
                raise RequestError(f"{type(item.work).__name__} belongs to traced programs")
            case _:
                self._do_quick(item)
        self._open_block()

    async def _generate(self, gen: Gen, slot: Slot) -> None:
        sampling = self._sampling(gen.sampling)
        if self.stream:
            await self._stream(gen, sampling, slot)
            return
        speculate = self.spec_tokens is not None and not self.backend.is_chat_model
        speculate = speculate and may_speculate(sampling) and not counts(sampling)
        async with self.backend.turn:
            reply = await (self._ahead(sampling) if speculate else self.backend.generate(self.context, sampling))
        if not speculate:
            self.context.ahead = None
        self.context.text += reply.texts[0]
        values = [instance(text, gen.output_type) for text in reply.texts]
        several = (sampling.n or 1) > 1
        slot.fill(values if several else values[0], reply.meta, reply.texts if several else reply.texts[0])

    async def _stream(self, gen: Gen, sampling: Sampling, slot: Slot) -> None:
        if (sampling.n or 1) > 1:
            raise RequestError("a stream has one continuation: n must be 1", param="n")
        async with self.backend.turn:
            async for piece, meta in self.backend.stream(self.context, sampling):
                self.context.text += piece
                slot.grow(piece, meta)
                self.notify()
        slot.fill(instance(slot.text, gen.output_type), slot.meta, slot.text)

    async def _ahead(self, sampling: Sampling) -> Reply:
        """Answer from what the model has said beyond the program, or call for more than is asked."""
        assert self.spec_tokens is not None
        context, stats = self.context, self.context.speculation
        stops, most = sampling.stop or (), sampling.max_new_tokens or 0
        if (ahead := context.ahead) is not None:
            prompt_tokens = ahead.prompt_tokens
            taken = ahead.take_gen(stops, most) if ahead.fits(sampling) else None
            if taken is not None:
                stats.hits += 1
                stats.tokens_saved += prompt_tokens
                return Reply([taken[0]], {"finish_reason": {"type": taken[1]}, "speculation": stats.report()})
            stats.misses += bool(ahead.text)
        context.ahead = None
        stats.calls += 1
        asked = beyond(sampling, self.spec_tokens, self.backend.tells_tokens)
        reply = await self.backend.generate(context, asked)
        ahead = ahead_of(reply.texts[0], reply.meta, asked)
        taken = ahead.take_gen(stops, most)
        if taken is None:  # the server does not tell where tokens end: ask for exactly what is wanted
            stats.calls += 1
            reply = await self.backend.generate(context, sampling)
            return Reply(reply.texts, reply.meta | {"speculation": stats.report()})
        context.ahead = ahead
        finish = {"finish_reason": {"type": taken[1]}, "speculation": stats.report()}
        return Reply([taken[0]], reply.meta | finish)

    def _open_block(self) -> None:
        """Inside an assistant's turn of a chat model under speculation, record from here on."""
        if self._records and self.context.role == "assistant" and self._block is None:
            self._block = Block()

    async def _end_block(self) -> None:
        block, self._block = self._block, None
        assert block is not None and self.spec_tokens is not None
        if not block.gens:
            self.context.text += block.text()
            return
        async with self.backend.turn:
            await run_block(block, self.backend, self.context, self.spec_tokens)

    async def _gather(self, gather: Gather) -> None:
        for branch in gather.branches:
            await branch.idle.reached()
            self.backend.leave(branch.context)
        if gather.mode == "concate_and_append":
            for branch in gather.branches:
                if branch.error is not None:
                    raise branch.error
            self.context.fill("".join(b.context.text[b.context.fork_begin :] for b in gather.branches))
            return
        known = gather.known | self.gathered.keys()
        names = dict.fromkeys(name for branch in gather.branches for name in branch.slots if name not in known)
        for name in names:
            made = [branch.slots[name] for branch in gather.branches if name in branch.slots]
            made = [slot for slot in made if not slot.missing]
            if not made:
                continue
            slot = Slot(name)
            failed = next((s.error for s in made if s.error is not None), None)
            if failed is not None:
                slot.error = failed
            said = [s.value if s.said is None else s.said for s in made]
            slot.fill([s.value for s in made], {"branches": [s.meta for s in made]}, said)
            self.slots[name] = self.gathered[name] = slot

    def _inherit(self, point: Point) -> None:
        if point.error is not None:
            raise point.error
        assert point.context is not None
        self.context = point.context.branch()
        self.gathered = dict(point.gathered)
        for name, slot in point.gathered.items():
            self.slots.setdefault(name, slot)
        self._open_block()

    def _add_picture(self, source: str) -> None:
        if not self.backend.takes_pictures:
            raise RequestError(f"{self.backend.name} has no vision", param="image", code="unsupported_value")
        picture = load(source)
        self.context.pictures += (picture,)
        self.context.new_pictures += (picture,)
        self.context.fill(self.context.template.image_token)

    def _sampling(self, own: Sampling) -> Sampling:
        """The parameters of a call: its own, then the run's, and the template's stop strings."""
        sampling = constrained(own.over(self.defaults), self.backend.takes_tools)
        stops = dict.fromkeys((*(sampling.stop or ()), *self.context.template.stop_str))
        return msgspec.structs.replace(sampling, stop=tuple(stops))

    def _fail_item(self, item: Item, error: Exception) -> None:
        for slot in item.slots:
            slot.fail(error)
        if self._block is not None:
            self._block.fail(error)
            self._block = None
        what = f"{type(item.work).__name__}"
        self._fail(item.slots[0].error or error if item.slots else error, what, item.line)
        if isinstance(item.work, Point):
            item.work.error = self.error
            item.work.reached.set()
