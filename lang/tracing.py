"""Programs as data: runs a body without a model and records what it appends. Used by program.py.

Arguments that are not given and all variables are placeholders; a body that needs their values cannot be traced beyond
that place. Invariant: `constant_prefix` is a prefix of the text of every run of the program with this backend.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .context import Context
from .expressions import (
    Argument,
    Fork,
    Join,
    Literal,
    Node,
    RoleBegin,
    RoleEnd,
    Sequence,
    Untraceable,
    Variable,
    VarScopeBegin,
    VarScopeEnd,
    flatten,
    sequence,
)
from .templates import ChatTemplate

if TYPE_CHECKING:
    from .program import SglFunction

tracing: Final[ContextVar["TraceState | None"]] = ContextVar("tracing", default=None)
"""The state that a body of this thread is traced into."""


class Trace(msgspec.Struct, frozen=True):
    """A traced program. `reason`: why it could be traced no further; None if it was to the end."""

    nodes: Sequence
    reason: str | None


class _EnoughError(Exception):
    """The recorder wants no more."""


class TraceState:
    """Stands for ProgramState. `only_constant`: stop at the first node that is not text or a role."""

    def __init__(self, only_constant: bool = False) -> None:
        self.nodes: list[Node] = []
        self._only_constant = only_constant
        self._forks: list[tuple[int, int, TraceGroup]] = []

    def __iadd__(self, other: Any) -> "TraceState":
        for node in flatten(other):
            if self._only_constant and not isinstance(node, Literal | RoleBegin | RoleEnd):
                raise _EnoughError
            self.nodes.append(node)
        return self

    def system(self, expr: Any = None) -> Any:
        return self._role("system", expr)

    def user(self, expr: Any = None) -> Any:
        return self._role("user", expr)

    def assistant(self, expr: Any = None) -> Any:
        return self._role("assistant", expr)

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        self += VarScopeBegin(name)
        yield
        self += VarScopeEnd(name)

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> "TraceGroup":
        if self._only_constant:
            raise _EnoughError
        group = TraceGroup([TraceState() for _ in range(int(size))], self)
        self._forks.append((len(self.nodes), int(size), group))
        self.nodes.append(Fork(int(size)))
        return group

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator["TraceState"]:
        group = self.fork(1)
        yield group[0]
        group.join()

    def get_var(self, name: str) -> Variable:
        return Variable(name)

    __getitem__ = get_var

    async def aget_var(self, name: str) -> Variable:
        return Variable(name)

    def recorded(self) -> Sequence:
        """All nodes, with those of the branches inside their forks."""
        nodes = list(self.nodes)
        for place, size, group in self._forks:
            nodes[place] = Fork(size, tuple(state.recorded() for state in group.states))
        return sequence(nodes)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"the program uses s.{name}, whose value is known only when it runs")

    def _role(self, name: str, expr: Any) -> Any:
        if expr is not None:
            self += sequence((RoleBegin(name), expr, RoleEnd(name)))
            return None

        @contextmanager
        def scope() -> Iterator[None]:
            self.__iadd__(RoleBegin(name))
            yield
            self.__iadd__(RoleEnd(name))

        return scope()


class TraceGroup:
    """Stands for ProgramStateGroup."""

    def __init__(self, states: list[TraceState], source: TraceState) -> None:
        self.states = states
        self._source = source

    def join(self, mode: str = "gather_variable") -> None:
        self._source += Join(mode)

    def __getitem__(self, index: int) -> TraceState:
        return self.states[index]

    def __setitem__(self, index: int, state: TraceState) -> None:
        self.states[index] = state

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[TraceState]:
        return iter(self.states)

    def __iadd__(self, other: Any) -> "TraceGroup":
        for i, state in enumerate(self.states):
            item = other(i) if callable(other) else other[i] if isinstance(other, list | tuple) else other
            state += item
        return self


def trace_program(program: "SglFunction", arguments: dict[str, Any]) -> Trace:
    """Trace a program with these arguments; the others become Argument nodes."""
    state = TraceState()
    reason = _record(program, arguments, state)
    return Trace(state.recorded(), reason)


def constant_prefix(program: "SglFunction", template: ChatTemplate) -> str:
    """The text with which every run of the program begins, whatever its arguments."""
    state = TraceState(only_constant=True)
    _record(program, program.bind_arguments, state)
    context = Context(template)
    for node in state.nodes:
        match node:
            case Literal(text=text):
                context.fill(text)
            case RoleBegin(role=role):
                context.begin_role(role)
            case RoleEnd(role=role):
                context.end_role(role)
    return context.text


def _record(program: "SglFunction", arguments: dict[str, Any], state: TraceState) -> str | None:
    """Run the body; returns why it could not be run to its end.

    Placeholders are not what a body expects: whatever it raises because of them ends the trace, not the program.
    """
    values: dict[str, Any] = {name: Argument(name) for name in program.required}
    token = tracing.set(state)
    try:
        run_body(program.func, state, values | arguments)
    except _EnoughError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        tracing.reset(token)
    return None


def run_body(func: Callable[..., Any], state: TraceState, values: dict[str, Any]) -> Any:
    """Call a body and return its value; an `async def` one as far as it goes without waiting. Raises Untraceable."""
    result = func(state, **values)
    if not inspect.iscoroutine(result):
        return result
    try:
        result.send(None)
    except StopIteration as end:
        return end.value
    result.close()
    raise Untraceable("the program waits for something that is known only when it runs")
