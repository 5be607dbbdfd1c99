"""Conditions on variables: what `sgl.when` and `sgl.repeat` decide by, and how their values are read and compared.

Used by the interpreter, on a client and on a server. Invariant: what is read is what the model said, texts and lists of
them, and JSON where a path leads into it; so a client that has instances of types decides as a server that has none.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from ..errors import RequestError
from .expressions import (
    AllOf,
    AnyOf,
    AnyTest,
    Check,
    Gen,
    Node,
    Not,
    Repeat,
    Select,
    SeparateReasoning,
    Var,
    VarScopeEnd,
    When,
)

COMPARISONS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "contains": operator.contains,
    "startswith": lambda value, other: value.startswith(other),
    "endswith": lambda value, other: value.endswith(other),
    "truth": lambda value, _: bool(value),
}


def holds(test: AnyTest, value_of: Callable[[Var], Any]) -> bool:
    """Whether it does; `value_of` reads a variable. Raises RequestError where values cannot be compared so."""
    match test:
        case Check():
            right = test.value if test.other is None else value_of(test.other)
            return _compared(test, value_of(test.left), right)
        case AllOf(parts=parts):
            return all(holds(part, value_of) for part in parts)
        case AnyOf(parts=parts):
            return any(holds(part, value_of) for part in parts)
        case Not(part=part):
            return not holds(part, value_of)


def item_of(value: Any, var: Var) -> Any:
    """What the variable's path leads to in its value. Raises RequestError where there is nothing."""
    for key in var.path:
        try:
            value = (msgspec.json.decode(value) if isinstance(value, str) else value)[key]
        except (LookupError, TypeError, msgspec.DecodeError):
            raise RequestError(f"variable {var.name!r} has no {key!r} at that place") from None
    return value


def made_by(nodes: Sequence[Node]) -> Iterator[str]:
    """The names of the variables that nodes make, those inside of others too; some come several times."""
    for node in nodes:
        match node:
            case Gen(name=str(name)) | Select(name=str(name)) | VarScopeEnd(name=name):
                yield name
            case SeparateReasoning(names=names):
                yield from (made for name in names for made in (name, f"{name}_reasoning_content"))
            case When(then=then, otherwise=otherwise):
                yield from made_by((*then.items, *otherwise.items))
            case Repeat(bodies=bodies):
                for body in bodies:
                    yield from made_by(body.items)


def read_by(nodes: Sequence[Node]) -> Iterator[str]:
    """The names of the variables that nodes read, which they may also make."""
    for node in nodes:
        match node:
            case Var(name=name):
                yield name
            case SeparateReasoning(names=names):
                yield from names
            case When(test=test, then=then, otherwise=otherwise):
                yield from _tested(test)
                yield from read_by((*then.items, *otherwise.items))
            case Repeat(bodies=bodies, until=until):
                if until is not None:
                    yield from _tested(until)
                for body in bodies:
                    yield from read_by(body.items)


def _tested(test: AnyTest) -> Iterator[str]:
    match test:
        case Check(left=left, other=other):
            yield left.name
            if other is not None:
                yield other.name
        case AllOf(parts=parts) | AnyOf(parts=parts):
            for part in parts:
                yield from _tested(part)
        case Not(part=part):
            yield from _tested(part)


def _compared(check: Check, left: Any, right: Any) -> bool:
    """A text that is compared with a number, or with a truth value, is read as one."""
    if isinstance(left, str) and isinstance(right, bool):
        left = left.strip().lower() == "true"
    elif isinstance(left, str) and isinstance(right, int | float):
        left = _number(check.left, left)
    try:
        return bool(COMPARISONS[check.operator](left, right))
    except (TypeError, AttributeError):
        what = f"{check.operator} of a {type(left).__name__} and a {type(right).__name__}"
        raise RequestError(f"variable {check.left.name!r} cannot be compared: {what}") from None


def _number(var: Var, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        what = f"variable {var.name!r} is compared with a number, but is {text[:40]!r}"
        raise RequestError(what) from None
