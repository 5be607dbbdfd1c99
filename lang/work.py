"""What waits in a state's queue: the nodes that a program appends, and what forks, joins and reads put between them.

Used by the interpreter, whose Executor works it off. Invariant: an item's variables are declared before it is queued.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from ..errors import RequestError
from .context import Context
from .expressions import (
    Image,
    Literal,
    Node,
    RoleBegin,
    RoleEnd,
    SeparateReasoning,
    VarScopeBegin,
    VarScopeEnd,
    Video,
)
from .loop import Signal
from .variables import ProgramError, Slot

if TYPE_CHECKING:
    from .interpreter import Executor


@dataclass(slots=True)
class Point:
    """A place in a state's queue where branches begin."""

    reached: Signal = field(default_factory=Signal)
    context: Context | None = None
    gathered: dict[str, Slot] = field(default_factory=dict)
    """Variables that joins before this place have made."""
    error: ProgramError | None = None


@dataclass(slots=True)
class Inherit:
    """The first item of a branch: wait for the point and go on from there."""

    point: Point


@dataclass(slots=True)
class Gather:
    """Wait for the branches; take over their new variables as lists (gather_variable), or their texts."""

    branches: "list[Executor]"
    known: frozenset[str]
    mode: str


@dataclass(slots=True)
class Flush:
    """Ask the model now for what the open block of a chat model has recorded (block.py)."""


@dataclass(slots=True)
class Elsewhere:
    """The whole program runs on a server (remote.py): `run` fills the state with what it brings back."""

    run: "Callable[[Executor], Awaitable[None]]"


QUICK: Final = (
    Literal, RoleBegin, RoleEnd, VarScopeBegin, VarScopeEnd, SeparateReasoning, Image, Video, Point, Flush, Exception
)  # fmt: skip
"""What needs no waiting."""
Work: TypeAlias = "Node | Point | Inherit | Gather | Flush | Elsewhere | Exception"
"""An exception ends the state, after the work before it."""


@dataclass(slots=True)
class Item:
    """One piece of work; `slots` are the variables it must fill, `raw` those it reads."""

    work: Work
    line: str
    slots: tuple[Slot, ...] = ()
    raw: tuple[Slot, ...] = ()
    known: dict[str, Slot] = field(default_factory=dict)
    """Of a node that reads variables when it runs, those that there were when it was queued."""


@dataclass(slots=True)
class Budget:
    """What a program that came as data may do in its loops: so many nodes, and so many characters appended by them."""

    nodes: int
    characters: int

    def take(self, text: str = "") -> None:
        """Count a node, and the text that it appends. Raises RequestError when there is no more."""
        self.nodes -= 1
        self.characters -= len(text)
        if self.nodes < 0 or self.characters < 0:
            raise RequestError("the program's loops do more than a server lets them", param="program")
