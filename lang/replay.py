"""Runs a program that came as data: on a server, by the same interpreter that runs programs on a client.

Used by http/programs.py. Invariant: a replayed program appends, waits and fails as its body would; what is wrong with
the data itself is a RequestError before or where it is met, never anything else.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import msgspec

from .. import engine
from ..actors.client import Client
from ..config import EngineConfig, ModelInfo
from ..errors import ActorserveError, RequestError
from .backend import Backend
from .conditions import COMPARISONS
from .context import Context
from .engine_backend import EngineBackend
from .expressions import (
    AllOf,
    AnyOf,
    Check,
    Gen,
    Literal,
    Not,
    Repeat,
    RoleBegin,
    RoleEnd,
    Select,
    SeparateReasoning,
    Var,
    VarScopeBegin,
    VarScopeEnd,
    When,
    flatten,
)
from .interpreter import Executor
from .loop import Tasks
from .model_template import model_template
from .remote import (
    Append,
    Assign,
    Branch,
    Condition,
    If,
    Merge,
    Outcome,
    ProgramReply,
    ProgramRequest,
    Reference,
    RemoteNode,
    Return,
    Statement,
    failure_of,
)
from .templates import ChatTemplate, chat_template_of
from .variables import Slot
from .work import Budget

PLAIN: Final = (Literal, Select, RoleBegin, RoleEnd, VarScopeBegin, VarScopeEnd, SeparateReasoning, Var, Check)
"""Nodes that may be inside of others, as they are."""
MOST_STATES: Final = 4096
MOST_READ: Final = 1 << 24
"""Characters of variables that a program may read: it could double a text with each of its statements."""
MOST_DEPTH: Final = 32
MOST_NODES: Final = 20_000
"""That loops may run."""


class ServedEngine(engine.Engine):
    """The engine as a front has it: its client belongs to the front's loop, and its life is not ours."""

    def __init__(self, client: Any, config: EngineConfig, model: ModelInfo) -> None:
        self.config = config
        self._served = client
        self._model = model

    @property
    def client(self) -> Client:
        """The front's, or what stands for it (http/tenants.py)."""
        client: Client = self._served
        return client

    _client = client

    @property
    def model(self) -> ModelInfo:
        return self._model


class ServedBackend(EngineBackend):
    """The engine of a front, for one program: its tasks are of the front's loop, and end with `close`.

    The engine knows what the program will come back to: what a state's call leaves in the prefix cache is pinned until
    its next one, the text before a fork until all of its branches have been joined.
    """

    def __init__(self, running: ServedEngine, template: ChatTemplate | None) -> None:
        Backend.__init__(self, running.model.name, template or _template_of(running.model.path, running.model.name))
        self.loop = Tasks()
        self._engine = running
        self._pins: set[int] = set()
        self.most_calls = max(1, running.config.max_queued_requests // 2)

    def leave(self, context: Context) -> None:
        if context.pin:
            self._pins.discard(context.pin)
            self._client.unpin([context.pin])
            context.pin = 0

    async def close(self) -> None:
        """End the program's tasks, and keep nothing for it any more."""
        await self.loop.end()
        if self._pins:
            self._client.unpin(sorted(self._pins))
            self._pins.clear()

    def _pin(self, context: Context) -> int:
        if not context.pin:
            context.pin = self._client.new_pin()
            self._pins.add(context.pin)
        return context.pin

    @property
    def _client(self) -> Client:
        served = self._engine
        assert isinstance(served, ServedEngine)
        return served.client


@cache
def _template_of(path: str, name: str) -> ChatTemplate:
    return model_template(path) or chat_template_of(name)


async def replay(request: ProgramRequest, backend: Backend) -> ProgramReply:
    """Run a program to its end. Errors of its parts are in the reply. Raises RequestError for wrong data."""
    run = _Run(Executor(backend, request.defaults, budget=Budget(MOST_NODES, MOST_READ)))
    returned: list[Any] = []
    leaf, error = None, None
    try:
        end = await run.statements(request.program)
        if end is not None:
            returned = [await run.value(reference) for reference in end.values]
            leaf = end.leaf
    except _WrongProgramError as wrong:
        raise RequestError(str(wrong), param="program") from None
    except (ActorserveError, LookupError, TypeError, AttributeError) as failed:  # as the body would have raised it
        error = failed
    root = run.states[0]
    root.end(error)
    await root.idle.reached()
    failed_state = error or root.error
    return ProgramReply(
        root.context.text,
        root.context.messages,
        {name: found for name, slot in root.slots.items() if (found := await _outcome(slot)) is not None},
        leaf,
        returned,
        None if failed_state is None else failure_of(failed_state),
    )


class _WrongProgramError(Exception):
    """The data is no program."""


class _Run:
    """The states of a program at work, by number."""

    def __init__(self, root: Executor) -> None:
        self.states = {0: root}
        self._parents: dict[int, int] = {}
        """Of branches that have not been joined."""
        self._read = 0

    async def statements(self, program: Sequence[Statement]) -> Return | None:
        """Run statements until one returns."""
        while True:
            for statement in program:
                match statement:
                    case If(condition=condition, then=then, otherwise=otherwise):
                        chosen = then if await self._holds(condition) else otherwise
                        if statement is not program[-1]:
                            end = await self.statements(chosen)
                            if end is not None:
                                return end
                            continue
                        program = chosen
                        break
                    case Return():
                        return statement
                    case _:
                        await self._do(statement)
            else:
                return None

    async def _do(self, statement: Append | Branch | Merge | Assign) -> None:
        state = self._state(statement.state)
        match statement:
            case Append(nodes=nodes, line=line):
                found = [item for node in nodes for item in await self._resolved(node)]
                for item in found:
                    state.submit(item, line)
            case Branch(branches=numbers, line=line):
                if len(self.states) + len(numbers) > MOST_STATES:
                    raise _WrongProgramError(f"the program has more than {MOST_STATES} states")
                if taken := [n for n in numbers if n in self.states] or len(set(numbers)) < len(numbers):
                    raise _WrongProgramError(f"a branch has the number of another state: {taken}")
                self.states |= dict(zip(numbers, state.fork(len(numbers), line), strict=True))
                self._parents |= dict.fromkeys(numbers, statement.state)
            case Merge(branches=numbers, mode=mode, line=line):
                branches = [self._state(number) for number in numbers]
                for number in numbers:
                    if self._parents.pop(number, None) != statement.state:
                        raise _WrongProgramError(f"state {number} is joined where it was not forked, or twice")
                state.join(branches, mode, line)
            case Assign(name=name, value=value):
                state.set_var(name, value)

    async def value(self, reference: Reference) -> Any:
        """The value of a variable that may still be on its way. Raises what its reader would meet."""
        slot = await self._state(reference.state).find_async(reference.name)
        await slot.done.reached()
        value = slot.result()
        for index in reference.path:
            value = value[index]
        self._read += len(value) if isinstance(value, str) else len(msgspec.json.encode(value))
        if self._read > MOST_READ:
            raise _WrongProgramError(f"the program reads more than {MOST_READ} characters of its variables")
        return value

    async def _resolved(self, node: RemoteNode) -> Sequence[Any]:
        """What a node is for the interpreter."""
        match node:
            case Reference():
                return flatten(await self.value(node))
            case Literal() if not node.text:
                return ()
            case _:
                _check_node(node)
        return (node,)

    async def _holds(self, condition: Condition) -> bool:
        left = await self.value(condition.left)
        right = condition.value if condition.other is None else await self.value(condition.other)
        return bool(COMPARISONS[condition.operator](left, right))

    def _state(self, number: int) -> Executor:
        if number not in self.states:
            raise _WrongProgramError(f"the program has no state {number} yet")
        return self.states[number]


def _check_node(node: Any, depth: int = 0) -> None:
    """Raises _WrongProgramError for what a server does not do, also inside of nodes."""
    if depth > MOST_DEPTH:
        raise _WrongProgramError(f"When, Repeat and their conditions are nested more than {MOST_DEPTH} deep")
    match node:
        case Gen(output_type=None):
            pass
        case Gen():
            raise _WrongProgramError("a Gen has an output_type: types are the client's")
        case When(test=test, then=then, otherwise=otherwise):
            for inner in (test, *then.items, *otherwise.items):
                _check_node(inner, depth + 1)
        case Repeat(bodies=bodies, until=until):
            for inner in (*([] if until is None else [until]), *(item for body in bodies for item in body.items)):
                _check_node(inner, depth + 1)
        case AllOf(parts=parts) | AnyOf(parts=parts):
            for part in parts:
                _check_node(part, depth + 1)
        case Not(part=part):
            _check_node(part, depth + 1)
        case _ if not isinstance(node, PLAIN):
            raise _WrongProgramError(f"{type(node).__name__} cannot be in a When or a Repeat")


async def _outcome(slot: Slot) -> Outcome | None:
    """None for a variable that was not made."""
    await slot.done.reached()
    if slot.missing:
        return None
    if slot.error is not None:
        return Outcome(error=failure_of(slot.error))
    return Outcome(slot.value, slot.meta)
