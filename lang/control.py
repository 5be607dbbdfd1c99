"""Runs `when`, `repeat` and `var`: the nodes of a program that decide, repeat and read when a state comes to them.

Used by the interpreter, one Control for each such node that a program appends. Invariant: a variable is read as it was
when the node was appended, or as the node has made it since; at the end each variable that the node may make is
filled, failed, or missing.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from ..errors import RequestError
from .conditions import holds, item_of, made_by, read_by
from .expressions import (
    AnyTest,
    Gen,
    Literal,
    Node,
    Repeat,
    Select,
    SeparateReasoning,
    Sequence,
    Var,
    VarScopeEnd,
    When,
    flatten,
)
from .variables import Slot
from .work import Item

if TYPE_CHECKING:
    from .interpreter import Executor


class Control:
    """A node at work in a state. `made`: the variables that it has made so far."""

    def __init__(self, executor: "Executor", item: Item) -> None:
        self._executor = executor
        self._item = item
        self._made: dict[str, Slot] = {}

    async def run(self, node: Node) -> None:
        """Run the node, and fill the item's variables. Raises what goes wrong in it."""
        try:
            await self._node(node)
            if self._made:
                await self._executor.end_block()
        except Exception:
            for slot in self._item.slots:
                if (failed := self._made.get(slot.name)) is not None and failed.error is not None:
                    slot.take(failed)
            raise
        for slot in self._item.slots:
            slot.take(self._made.get(slot.name) or self._item.known.get(slot.name))

    async def _node(self, node: Node) -> None:
        match node:
            case When(test=test, then=then, otherwise=otherwise):
                await self._sequence(then if await self._holds(test) else otherwise)
            case Repeat(times=times, until=until):
                for turn in range(times):
                    await self._sequence(node.body(turn))
                    if until is not None and await self._holds(until):
                        return
            case Var():
                await self._executor.end_block()
                for found in flatten(self._value(node)):
                    await self._step(found)
            case _:
                await self._step(node)

    async def _sequence(self, nodes: Sequence) -> None:
        self._count("")
        await anyio.lowlevel.checkpoint()  # a loop of texts alone must not keep the event loop
        for node in nodes.items:
            await self._node(node)

    async def _step(self, node: Node) -> None:
        """A node that is no control, as the interpreter does it."""
        self._count(node.text if isinstance(node, Literal) else "")
        inner = Item(node, self._item.line, tuple(self._slots(node)), self._raw(node))
        self._made |= {slot.name: slot for slot in inner.slots if slot.name}
        try:
            await self._executor.do(inner)
        except Exception as error:
            for slot in inner.slots:
                slot.fail(error)
            raise (inner.slots[0].error if inner.slots else None) or error from None

    async def _holds(self, test: AnyTest) -> bool:
        await self._executor.end_block()
        return holds(test, self._value)

    def _value(self, var: Var) -> Any:
        slot = self._read(var.name)
        value = slot.result()
        return item_of(value if slot.said is None else slot.said, var)

    def _read(self, name: str) -> Slot:
        slot = self._made.get(name) or self._item.known.get(name) or self._executor.gathered.get(name)
        if slot is None:
            raise RequestError(f"the program has no variable {name!r} at this place")
        return slot

    def _slots(self, node: Node) -> Iterator[Slot]:
        match node:
            case Gen(name=name) | Select(name=name) | VarScopeEnd(name=name):
                yield Slot(name or "", self._item.line, self._executor.where)
            case SeparateReasoning():
                for name in made_by([node]):
                    yield Slot(name, self._item.line, self._executor.where)

    def _raw(self, node: Node) -> tuple[Slot, ...]:
        return tuple(self._read(name) for name in read_by([node])) if isinstance(node, SeparateReasoning) else ()

    def _count(self, text: str) -> None:
        if self._executor.budget is not None:
            self._executor.budget.take(text)
