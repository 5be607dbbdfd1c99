"""Programs recorded for a server: the body runs without a model, once for each way that its conditions can go.

Variables are stand-ins. A comparison with one asks the recording which way to go: the first run goes where all are
true, and further ones, with the same decisions up to there, the other ways (path exploration, as in symbolic
execution). So loops unroll and conditions become If statements, and the body is ordinary Python. What needs a value
itself (a tool, `int(...)`, an f-string) cannot be recorded. Invariant: a recorded program does what the body would do,
or Untraceable is raised; a body that does not do the same in each run, or swallows the refusal, is noticed.
"""

from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from ..errors import ActorserveError
from .conditions import made_by
from .expressions import (
    Expr,
    Gen,
    Image,
    Node,
    Operator,
    Repeat,
    Select,
    SeparateReasoning,
    Sequence,
    Untraceable,
    Var,
    VarScopeEnd,
    Video,
    When,
    flatten,
)
from .program_lines import program_line
from .remote import Append, Assign, Branch, Condition, If, Merge, Reference, Return, Statement
from .structured import instance
from .tracing import TraceGroup, TraceState, run_body, tracing

MOST_RUNS: Final = 256
"""Ways through a program."""
MOST_DECISIONS: Final = 64
"""Conditions on one way."""
MOST_STATEMENTS: Final = 10_000


class Kind(NamedTuple):
    """What is known of a variable: how many items it has if it is a list, and the type it becomes."""

    length: int | None = None
    output_type: Any = None
    optional: bool = False
    """It is made in a part of `when` or `repeat`, and perhaps not at all."""


@dataclass(slots=True)
class Leaf:
    """An end of the program: what the body returned there, with stand-ins, and what is known of its variables."""

    returned: Any
    values: list["Value"]
    kinds: dict[str, Kind]


@dataclass(slots=True)
class Recorded:
    statements: tuple[Statement, ...]
    leaves: list[Leaf]


@dataclass(slots=True)
class Recording:
    """One run of the body. `decisions`: how its conditions go; beyond them they are true."""

    decisions: list[bool]
    segments: list[list[Statement]] = field(default_factory=lambda: [[]])
    """Statements between conditions: one list more than there are conditions."""
    conditions: list[Condition] = field(default_factory=list)
    states: int = 1
    count: int = 0
    refusal: str | None = None

    def add(self, statement: Statement) -> None:
        self.count += 1
        if self.count > MOST_STATEMENTS:
            self.refuse(f"the program has more than {MOST_STATEMENTS} statements")
        self.segments[-1].append(statement)

    def decide(self, condition: Condition) -> bool:
        """Which way the body goes in this run."""
        if len(self.conditions) >= MOST_DECISIONS:
            self.refuse(f"the program decides more than {MOST_DECISIONS} times: a loop without a bound?")
        if len(self.conditions) == len(self.decisions):
            self.decisions.append(True)
        self.conditions.append(condition)
        self.segments.append([])
        return self.decisions[len(self.conditions) - 1]

    def refuse(self, why: str) -> NoReturn:
        self.refusal = self.refusal or why
        raise Untraceable(why)


class Choice:
    """A comparison, not decided before somebody asks."""

    def __init__(self, recording: Recording, condition: Condition) -> None:
        self._recording = recording
        self._condition = condition

    def __bool__(self) -> bool:
        return self._recording.decide(self._condition)


class Value(Expr, frozen=True, eq=False):
    """Stands for a variable's value."""

    recording: Recording
    reference: Reference
    kind: Kind

    def __getitem__(self, index: Any) -> "Value":
        if not isinstance(index, int) or isinstance(index, bool):
            self._refuse("is cut or looked up in")
        path = (*self.reference.path, index)
        return Value(
            self.recording, msgspec.structs.replace(self.reference, path=path), Kind(None, self.kind.output_type)
        )

    def __len__(self) -> int:
        if self.kind.length is None:
            self._refuse("is counted")
        return self.kind.length

    def __iter__(self) -> Iterator["Value"]:
        return iter([self[i] for i in range(len(self))])

    def __bool__(self) -> bool:
        return bool(self._compare("truth", None))

    def __contains__(self, item: Any) -> bool:
        return bool(self._compare("contains", item))

    def __eq__(self, other: object) -> Any:
        return self._compare("eq", other)

    def __ne__(self, other: object) -> Any:
        return self._compare("ne", other)

    def __lt__(self, other: Any) -> Any:
        return self._compare("lt", other)

    def __le__(self, other: Any) -> Any:
        return self._compare("le", other)

    def __gt__(self, other: Any) -> Any:
        return self._compare("gt", other)

    def __ge__(self, other: Any) -> Any:
        return self._compare("ge", other)

    def __hash__(self) -> int:
        self._refuse("is looked up")

    def __int__(self) -> int:
        self._refuse("becomes a number")

    def __float__(self) -> float:
        self._refuse("becomes a number")

    def __index__(self) -> int:
        self._refuse("becomes a number")

    def __format__(self, spec: str) -> str:
        self._refuse("is put into a string (write `s += text + s[...]`)")

    def __str__(self) -> str:
        self._refuse("becomes a string (write `s += text + s[...]`)")

    __repr__ = __str__

    def __getattr__(self, name: str) -> Any:
        self._refuse(f"is asked for .{name}")

    def _compare(self, operator: Operator, other: Any) -> Choice:
        if self.kind.output_type is not None:
            self._refuse("is compared as an instance of a type")
        if isinstance(other, Value):
            return Choice(self.recording, Condition(self.reference, operator, other=other.reference))
        if other is not None and not isinstance(other, str | int | float | bool):
            self._refuse(f"is compared with a {type(other).__name__}")
        return Choice(self.recording, Condition(self.reference, operator, other))

    def _refuse(self, what: str) -> NoReturn:
        self.recording.refuse(f"the value of s[{self.reference.name!r}] {what}, which is known only when it runs")


class RecordState(TraceState):
    """Stands for ProgramState; `number` is the state's."""

    def __init__(self, recording: Recording, number: int, kinds: dict[str, Kind]) -> None:
        super().__init__()
        self.recording = recording
        self.number = number
        self.kinds = kinds

    def __iadd__(self, other: Any) -> "RecordState":
        if other is not None:
            nodes = tuple(self._node(node) for node in flatten(other))
            self.recording.add(Append(self.number, nodes, program_line()))
        return self

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> "RecordGroup":
        first, count = self.recording.states, int(size)
        self.recording.states += count
        self.recording.add(Branch(self.number, tuple(range(first, first + count)), program_line()))
        return RecordGroup([RecordState(self.recording, first + i, dict(self.kinds)) for i in range(count)], self)

    def get_var(self, name: str) -> Any:
        return Value(self.recording, Reference(self.number, name), self.kinds.get(name, Kind()))

    __getitem__ = get_var

    async def aget_var(self, name: str) -> Any:
        return self.get_var(name)

    def set_var(self, name: str, value: Any) -> None:
        if not _is_plain(value):
            self.recording.refuse(f"s[{name!r}] is set to a {type(value).__name__}")
        self.kinds[name] = Kind(len(value) if isinstance(value, list) else None)
        self.recording.add(Assign(self.number, name, value))

    __setitem__ = set_var

    def sync(self) -> None:
        """Nothing has to be waited for."""

    def __await__(self) -> Generator[Any, None, "RecordState"]:
        yield from ()
        return self

    def __contains__(self, name: str) -> bool:
        if name in self.kinds and self.kinds[name].optional:
            self.recording.refuse(f"the program asks whether {name!r} is there, which is known only when it runs")
        return name in self.kinds

    def __getattr__(self, name: str) -> Any:
        self.recording.refuse(f"the program uses s.{name}, whose value is known only when it runs")

    def _node(self, node: Node | Value) -> Any:
        """A node as it is sent; what it declares is remembered."""
        match node:
            case Value(kind=Kind(length=None, output_type=None)):
                return node.reference
            case Value():
                self.recording.refuse(f"s[{node.reference.name!r}], which is no text, is appended")
            case Image() | Video():
                self.recording.refuse("pictures are not sent with a program")
            case When() | Repeat():
                return self._control(node, frozenset(made_by([node])))
            case Gen(name=name, sampling=sampling, output_type=output_type):
                several = sampling.n if (sampling.n or 1) > 1 else None
                self._declare(name, Kind(several, output_type))
                return msgspec.structs.replace(node, output_type=None)
            case Select(name=name) | VarScopeEnd(name=name):
                self._declare(name, Kind())
            case SeparateReasoning(names=names):
                for name in names:
                    self._declare(f"{name}_reasoning_content", Kind())
        return node

    def _control(self, node: Any, made: frozenset[str]) -> Any:
        """A node inside of When or Repeat as it is sent; `made`: the names that the outermost one makes."""
        match node:
            case When(then=then, otherwise=otherwise):
                return When(node.test, self._inside(then, made), self._inside(otherwise, made))
            case Repeat(bodies=bodies):
                return msgspec.structs.replace(node, bodies=tuple(self._inside(body, made) for body in bodies))
            case Value(reference=Reference(state=state, name=name, path=path), kind=kind):
                if state != self.number or name in made or kind != Kind():
                    self.recording.refuse(f"s[{name!r}] is used inside of sgl.when or sgl.repeat (write sgl.var there)")
                return Var(name, path)
        before = {name: self.kinds[name] for name in made_by([node]) if name in self.kinds}
        node = self._node(node)
        for name in made_by([node]):
            self._declare_inside(name, before.get(name))
        return node

    def _inside(self, nodes: Sequence, made: frozenset[str]) -> Sequence:
        return Sequence(tuple(self._control(node, made) for node in nodes.items))

    def _declare_inside(self, name: str, before: Kind | None) -> None:
        """What may be made or not is one thing either way, or the program is not sent."""
        kind = self.kinds[name]
        if before is not None and before[:2] != kind[:2]:
            self.recording.refuse(f"{name!r} is of one kind or another, as sgl.when or sgl.repeat decides")
        self.kinds[name] = kind._replace(optional=before is None or before.optional)

    def _declare(self, name: str | None, kind: Kind) -> None:
        if name is not None:
            self.kinds[name] = kind


class RecordGroup(TraceGroup):
    """Stands for ProgramStateGroup."""

    states: Several[RecordState]  # type: ignore[assignment]
    joined = False

    def join(self, mode: str = "gather_variable") -> None:
        source: Any = self._source
        if self.joined:
            source.recording.refuse("branches are joined twice")
        self.joined = True
        source.recording.add(Merge(source.number, tuple(s.number for s in self.states), mode, program_line()))
        if mode != "gather_variable":
            return
        names = dict.fromkeys(name for state in self.states for name in state.kinds if name not in source.kinds)
        for name in names:
            having = [state.kinds[name] for state in self.states if name in state.kinds]
            uncertain = any(kind.optional for kind in having)
            source.kinds[name] = Kind(None if uncertain else len(having), having[0].output_type, uncertain)


def record(body: Callable[..., Any], arguments: dict[str, Any]) -> Recorded:
    """The program that a body is with these arguments. Raises Untraceable with the reason if it cannot be said."""
    leaves: list[Leaf] = []
    return Recorded(_explore(body, arguments, [], leaves, []), leaves)


def restored(leaf: Leaf, values: Several[Any]) -> Any:
    """What the body returned, with values for the stand-ins. Raises RequestError for one that is no instance."""
    found = iter([typed(value, stand_in.kind.output_type) for stand_in, value in zip(leaf.values, values, strict=True)])

    def fill(part: Any) -> Any:
        match part:
            case Value():
                return next(found)
            case list() | tuple():
                return type(part)([fill(item) for item in part])
            case dict():
                return {key: fill(item) for key, item in part.items()}
        return part

    return fill(leaf.returned)


def typed(value: Any, output_type: Any) -> Any:
    """A text as an instance of its type; of a list each item."""
    if isinstance(value, list):
        return [typed(item, output_type) for item in value]
    return instance(value, output_type) if isinstance(value, str) else value


def _explore(
    body: Callable[..., Any],
    arguments: dict[str, Any],
    decisions: list[bool],
    leaves: list[Leaf],
    before: list[list[Statement]],
) -> tuple[Statement, ...]:
    """The statements behind `decisions`; `before`: the segments that lead there, as an earlier run had them."""
    if len(leaves) >= MOST_RUNS:
        raise Untraceable(f"the program has more than {MOST_RUNS} ways to go")
    known = len(decisions)
    recording = Recording(decisions)
    _run(body, arguments, recording, leaves)
    if recording.segments[:known] != before or len(recording.segments) <= known:
        raise Untraceable("the program does not do the same each time that it runs")
    tail = tuple(recording.segments[-1])
    for i in range(len(recording.conditions) - 1, known - 1, -1):
        other = _explore(body, arguments, [*recording.decisions[:i], False], leaves, recording.segments[: i + 1])
        tail = (*recording.segments[i], If(recording.conditions[i], tail, other))
    return tail


def _run(body: Callable[..., Any], arguments: dict[str, Any], recording: Recording, leaves: list[Leaf]) -> None:
    state = RecordState(recording, 0, {})
    token = tracing.set(state)
    try:
        returned = run_body(body, state, arguments)
    except ActorserveError as error:
        raise Untraceable(error.message) from error
    except Exception as error:  # whatever a body raises because of stand-ins; it runs again, with values
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    finally:
        tracing.reset(token)
    if recording.refusal is not None:
        raise Untraceable(recording.refusal)
    values: list[Value] = []
    if not _is_plain(returned, values):
        raise Untraceable(f"the program returns a {type(returned).__name__}")
    recording.segments[-1].append(Return(len(leaves), tuple(value.reference for value in values)))
    leaves.append(Leaf(returned, values, state.kinds))


def _is_plain(value: Any, values: list[Value] | None = None) -> bool:
    """Whether it is JSON's, or with `values` has stand-ins in it, which are put there in order."""
    match value:
        case Value() if values is not None:
            values.append(value)
            return True
        case None | str() | bool() | int() | float():
            return True
        case list() | tuple() if type(value) in (list, tuple):
            return all(_is_plain(item, values) for item in value)
        case dict():
            return all(isinstance(key, str) and _is_plain(item, values) for key, item in value.items())
    return False
