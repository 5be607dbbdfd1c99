"""Programs as data that a server runs, and what it sends back: the bodies of /v1/programs.

A program is a list of statements over numbered states: 0 is the program's own, forks make further ones. Written by
recording.py, sent by endpoint.py, run by replay.py. Invariant: nothing here is code; statements run once, forwards, and
what is repeated (Repeat) says how often at most, so that every program ends.
"""

from typing import Any, TypeAlias

import msgspec

from ..errors import ActorserveError, EngineDown, Overloaded, RequestError
from .context import ChatTurn
from .expressions import (
    Gen,
    Literal,
    Operator,
    Repeat,
    RoleBegin,
    RoleEnd,
    Sampling,
    Select,
    SeparateReasoning,
    Var,
    VarScopeBegin,
    VarScopeEnd,
    When,
)
from .templates import ChatTemplate


class Reference(msgspec.Struct, frozen=True, tag=True):
    """A variable's value, or with a `path` an item of a list in it."""

    state: int
    name: str
    path: tuple[int, ...] = ()


RemoteNode: TypeAlias = (
    Literal
    | Gen
    | Select
    | RoleBegin
    | RoleEnd
    | VarScopeBegin
    | VarScopeEnd
    | SeparateReasoning
    | Reference
    | Var
    | When
    | Repeat
)
"""What a program may append, and but for Reference what may be inside of When and Repeat. No pictures: the server opens
no files and no addresses."""


class Append(msgspec.Struct, frozen=True, tag=True):
    """`s += ...`; `line` is the program's "file:line", for errors."""

    state: int
    nodes: tuple[RemoteNode, ...]
    line: str = ""


class Branch(msgspec.Struct, frozen=True, tag=True):
    """`s.fork(...)`: the branches are new states with these numbers."""

    state: int
    branches: tuple[int, ...]
    line: str = ""


class Merge(msgspec.Struct, frozen=True, tag=True):
    """`forks.join(mode)`."""

    state: int
    branches: tuple[int, ...]
    mode: str = "gather_variable"
    line: str = ""


class Assign(msgspec.Struct, frozen=True, tag=True):
    """`s[name] = value`."""

    state: int
    name: str
    value: Any


class Condition(msgspec.Struct, frozen=True):
    """A comparison of a variable's value with another one's, or if that is None with a constant.

    "contains": `value in variable`. "truth": the value is not empty.
    """

    left: Reference
    operator: Operator
    value: Any = None
    other: Reference | None = None


class If(msgspec.Struct, frozen=True, tag=True):
    """Waits for the condition's variables, and goes on with one of the two."""

    condition: Condition
    then: "tuple[Statement, ...]"
    otherwise: "tuple[Statement, ...]" = ()


class Return(msgspec.Struct, frozen=True, tag=True):
    """An end of the program. `leaf` is a number that comes back, with the values of the references."""

    leaf: int = 0
    values: tuple[Reference, ...] = ()


Statement: TypeAlias = Append | Branch | Merge | Assign | If | Return


class ProgramRequest(msgspec.Struct, frozen=True):
    """The body of POST /v1/programs. `defaults`: how to draw where a `gen` does not say."""

    program: tuple[Statement, ...]
    defaults: Sampling = Sampling()
    template: ChatTemplate | None = None
    """Absent: the model's own."""


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error, with the line of the program that it belongs to."""

    message: str
    code: str | None = None
    status: int = 500
    param: str | None = None
    line: str = ""


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """A variable: its value and meta_info, or why there is none."""

    value: Any = None
    meta: dict[str, Any] | None = None
    error: Failure | None = None


class ProgramReply(msgspec.Struct, frozen=True):
    """The program's own state at its end, and what `Return` asked for. `error`: what ended it before."""

    text: str
    messages: list[ChatTurn]
    variables: dict[str, Outcome]
    leaf: int | None = None
    returned: list[Any] = []
    error: Failure | None = None
    object: str = "program"


def failure_of(error: Exception) -> Failure:
    """An error as data."""
    line = str(getattr(error, "line", ""))
    if isinstance(error, ActorserveError):
        return Failure(error.message, error.code, error.status, getattr(error, "param", None), line)
    return Failure(f"{type(error).__name__}: {error}", status=400, line=line)


def error_of(failure: Failure) -> ActorserveError:
    """The error again, of the class that its status says."""
    if failure.status == 429:
        return Overloaded(failure.message)
    if failure.status >= 500:
        return EngineDown(failure.message, code=failure.code or "engine_down", status=failure.status)
    return RequestError(failure.message, param=failure.param, code=failure.code or "rejected", status=failure.status)
