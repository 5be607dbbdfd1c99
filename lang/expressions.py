"""The intermediate form of a program: what `s += ...` appends, as typed data. Made by api.py, run by interpreter.py.

Every node is a msgspec struct with a tag, so that a traced program (tracing.py) is data that could be sent elsewhere.
Invariant: nodes never change; `+` makes a Sequence, flat, in the order in which it was written.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final, NoReturn, TypeAlias
from typing import Literal as OneOf

import msgspec

from ..errors import RequestError


class Expr(msgspec.Struct, frozen=True, tag=True):
    """Something that can be appended to a state, alone or joined to others and to texts by `+`."""

    def __add__(self, other: "Appendable") -> "Sequence":
        return sequence((self, other))

    def __radd__(self, other: "Appendable") -> "Sequence":
        return sequence((other, self))


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a call draws, in SGLang's names. None: as the program's run says, and after it the backend's default."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    n: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    stop_regex: tuple[str, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    priority: int | None = None
    dtype: str | None = None
    """"int", "float", "bool" or "str"."""
    regex: str | None = None
    json_schema: str | None = None
    """A JSON schema as JSON text."""
    ebnf: str | None = None
    tools: str | None = None
    """OpenAI's list of tools as JSON text, of which one must be called (tools.py)."""

    def over(self, defaults: "Sampling") -> "Sampling":
        """These parameters, and where they say nothing, `defaults`."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(defaults, **given)


class Literal(Expr, frozen=True):
    """Text of the program."""

    text: str


class Gen(Expr, frozen=True):
    """The model continues the text. `output_type`: what the JSON becomes (a class), or None for text."""

    name: str | None
    sampling: Sampling
    output_type: Any = None


class Select(Expr, frozen=True):
    """The model chooses one of several texts; `method` names a way of choices.py."""

    name: str | None
    choices: tuple[str, ...]
    temperature: float
    method: str


class RoleBegin(Expr, frozen=True):
    role: str


class RoleEnd(Expr, frozen=True):
    role: str


class Image(Expr, frozen=True):
    """A picture: a path, an address, or base64."""

    source: str


class Video(Expr, frozen=True):
    """A film, of which the model sees `num_frames` pictures."""

    source: str
    num_frames: int


class VarScopeBegin(Expr, frozen=True):
    name: str


class VarScopeEnd(Expr, frozen=True):
    """The variable becomes what was appended since its VarScopeBegin."""

    name: str


class SeparateReasoning(Expr, frozen=True):
    """Splits the variables `names`, just generated, into thoughts and answer; see models/reasoning_parser.py."""

    names: tuple[str, ...]
    model_type: str


class Commit(Expr, frozen=True):
    """Computes the text so far into the prefix cache."""


class Fork(Expr, frozen=True):
    """Where `size` branches begin, which go on with `branches[i]`. Only in traced programs."""

    size: int
    branches: tuple["Sequence", ...] = ()


class Join(Expr, frozen=True):
    """Where a traced program's branches end."""

    mode: str


class Argument(Expr, frozen=True):
    """A traced program's argument, whose value is not known yet."""

    name: str

    def __format__(self, spec: str) -> str:
        raise Untraceable(f"the argument {self.name!r} is put into a string; write `s += text + {self.name}` instead")

    def __str__(self) -> str:
        return self.__format__("")

    def __bool__(self) -> bool:
        raise Untraceable(f"the program decides by the argument {self.name!r}")

    def __iter__(self) -> Iterator[Any]:
        raise Untraceable(f"the program walks through the argument {self.name!r}")


class Variable(Expr, frozen=True):
    """A traced program's variable, whose value is not known yet."""

    name: str

    def __format__(self, spec: str) -> str:
        raise Untraceable(f"the variable {self.name!r} is put into a string; write `s += text + s[...]` instead")

    def __str__(self) -> str:
        return self.__format__("")

    def __bool__(self) -> bool:
        raise Untraceable(f"the program decides by the variable {self.name!r}")

    def __iter__(self) -> Iterator[Any]:
        raise Untraceable(f"the program walks through the variable {self.name!r}")


class Sequence(Expr, frozen=True):
    """Expressions one after the other; none of them is a Sequence."""

    items: tuple["Node", ...]


Operator: TypeAlias = OneOf["eq", "ne", "lt", "le", "gt", "ge", "contains", "startswith", "endswith", "truth"]
Scalar: TypeAlias = str | int | float | bool | None
MOST_TIMES: Final = 10_000
"""Turns of a loop."""


class Test(msgspec.Struct, frozen=True, tag=True):
    """A condition on variables, decided when the program comes to it; `&`, `|` and `~` join and turn them."""

    def __and__(self, other: "Test") -> "AllOf":
        return AllOf((self, other))  # type: ignore[arg-type]  # every Test is one of the union

    def __or__(self, other: "Test") -> "AnyOf":
        return AnyOf((self, other))  # type: ignore[arg-type]

    def __invert__(self) -> "Not":
        return Not(self)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        raise RequestError(
            "a condition on sgl.var(...) is decided when the program comes to it: use sgl.when or sgl.repeat, and for"
            " Python's `if` read the variable, s[...]"
        )


class Var(Expr, frozen=True, eq=False):
    """A variable of the state, as its value is when the program comes here: to be appended, or compared in a Test.

    `path`: of a list the item at an index, of JSON the member of a name. Comparisons make Tests.
    """

    name: str
    path: tuple[int | str, ...] = ()

    def __getitem__(self, key: int | str) -> "Var":
        return Var(self.name, (*self.path, key))

    def __eq__(self, other: object) -> "Check":  # type: ignore[override]
        return self._check("eq", other)

    def __ne__(self, other: object) -> "Check":  # type: ignore[override]
        return self._check("ne", other)

    def __lt__(self, other: object) -> "Check":
        return self._check("lt", other)

    def __le__(self, other: object) -> "Check":
        return self._check("le", other)

    def __gt__(self, other: object) -> "Check":
        return self._check("gt", other)

    def __ge__(self, other: object) -> "Check":
        return self._check("ge", other)

    def contains(self, other: object) -> "Check":
        """The text has this in it, or the list."""
        return self._check("contains", other)

    def startswith(self, other: object) -> "Check":
        """The text begins with this."""
        return self._check("startswith", other)

    def endswith(self, other: object) -> "Check":
        """The text ends with this."""
        return self._check("endswith", other)

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        self._refuse("decides in Python")

    def __iter__(self) -> Iterator[Any]:
        self._refuse("is walked through")

    def __contains__(self, item: Any) -> bool:
        self._refuse("is searched (write .contains(...))")

    def __format__(self, spec: str) -> str:
        self._refuse("is put into a string (write text + sgl.var(...))")

    def __str__(self) -> str:
        self._refuse("becomes a string (write text + sgl.var(...))")

    def _check(self, operator: Operator, other: object) -> "Check":
        if isinstance(other, Var):
            return Check(self, operator, other=other)
        if other is not None and not isinstance(other, str | int | float | bool):
            raise RequestError(f"sgl.var({self.name!r}) is compared with a {type(other).__name__}")
        return Check(self, operator, other)

    def _refuse(self, what: str) -> NoReturn:
        raise RequestError(f"sgl.var({self.name!r}) {what}, but its value is known only when the program comes to it")


class Check(Test, frozen=True):
    """A variable compared with a constant, or with `other`. "truth": it is not empty. See conditions.py."""

    left: Var
    operator: Operator
    value: Scalar = None
    other: Var | None = None


class AllOf(Test, frozen=True):
    parts: tuple["AnyTest", ...]


class AnyOf(Test, frozen=True):
    parts: tuple["AnyTest", ...]


class Not(Test, frozen=True):
    part: "AnyTest"


AnyTest: TypeAlias = Check | AllOf | AnyOf | Not


class When(Expr, frozen=True):
    """One of two expressions, by a condition."""

    test: AnyTest
    then: Sequence
    otherwise: Sequence = Sequence(())


class Repeat(Expr, frozen=True):
    """An expression again and again: `times` turns at most, and none after one behind which `until` holds.

    `bodies`: one for all turns, or one for each.
    """

    bodies: tuple[Sequence, ...]
    times: int
    until: AnyTest | None = None

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not 1 <= self.times <= MOST_TIMES:
            raise ValueError(f"times must be 1 to {MOST_TIMES}, not {self.times}")
        if len(self.bodies) not in (1, self.times):
            raise ValueError(f"a loop of {self.times} turns has 1 body, or as many, not {len(self.bodies)}")

    def body(self, turn: int) -> Sequence:
        """Of a turn, from 0 on."""
        return self.bodies[turn % len(self.bodies)]


class Untraceable(RequestError):
    """The program does something with a value that is known only when it runs."""

    code = "untraceable"


Node: TypeAlias = (
    Literal
    | Gen
    | Select
    | RoleBegin
    | RoleEnd
    | Image
    | Video
    | VarScopeBegin
    | VarScopeEnd
    | SeparateReasoning
    | Commit
    | Fork
    | Join
    | Argument
    | Variable
    | Var
    | When
    | Repeat
)
Appendable: TypeAlias = "Expr | str | int | float"
"""What may stand on the right of `s +=`; numbers are their text."""


def flatten(item: Any) -> tuple[Node, ...]:
    """The nodes of anything that may be appended. Raises RequestError for what may not."""
    match item:
        case Sequence():
            return item.items
        case Expr():
            return (item,)  # type: ignore[return-value]  # every Expr but Sequence is a Node
        case str():
            return (Literal(item),)
        case bool() | int() | float():
            return (Literal(str(item)),)
        case _:
            raise RequestError(f"a {type(item).__name__} cannot be appended to a program; texts and sgl.gen(...) can")


def sequence(items: Iterable[Any]) -> Sequence:
    """The items, texts and expressions, as one expression."""
    return Sequence(tuple(node for item in items for node in flatten(item)))
