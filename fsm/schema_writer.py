"""Sets of values to syntax: the members of objects with their commas, the items of arrays, scalars between quotes. Used
by json_schema.py.

Invariant: the texts written are the spellings of the set's values, all but those that the spelling leaves out (see
json_schema.py); what has no finite exact syntax raises Unsupported.
"""

from typing import Final

from .digits import NUMBER, decimals, integers
from .lengths import within
from .schema_types import step
from .shapes import Array, Number, Object, Shape, String, Unsupported, Values, member, whole_bounds
from .spelling import (
    ANY_CHARACTER,
    Whitespace,
    choice,
    concat,
    constant,
    escape,
    is_nothing,
    optional,
    other_strings,
    quoted,
    repeat,
)
from .syntax import NOTHING, Node, Text

MAX_OPTIONAL_ITEMS: Final = 32
MAX_OPTIONAL_MEMBERS: Final = 1024
MAX_NAMES: Final = 1_000_000
"""Sum of the squared lengths of the names that additional members must not have: each prefix is written out."""


class Writer:
    """Writes sets of values as syntax. What is shared in the sets is shared in the syntax.

    `cause` points to a place whose emptiness emptied what is around it.
    """

    def __init__(self, whitespace: Whitespace) -> None:
        self.whitespace = whitespace
        self.cause: str | None = None
        self.done: dict[tuple[int, int], tuple[Values, Node]] = {}
        """(id, depth) -> the set, held so that its id stays its own, and its syntax."""

    def values(self, values: Values, depth: int) -> Node:
        """The texts of all values in the set, inside `depth` brackets. Raises Unsupported."""
        if values.anything:
            raise Unsupported("any value is admitted here, nested without end: give a type", values.pointer)
        key = (id(values), depth if self.whitespace.indent is not None else 0)
        if key not in self.done:
            options = [constant(value, self.whitespace, depth) for value in values.constants.values()]
            options += [self.shape(shape, depth) for shape in values.shapes]
            self.done[key] = (values, choice(options))
        return self.done[key][1]

    def shape(self, shape: Shape, depth: int) -> Node:
        match shape:
            case Number():
                return _number(shape)
            case String():
                return _string(shape)
            case Array():
                return self.array(shape, depth)
            case Object():
                return self.object(shape, depth)

    def nothing(self, pointer: str) -> Node:
        self.cause = self.cause if self.cause is not None else pointer
        return NOTHING

    # -------------------------------------------------------------- arrays

    def array(self, shape: Array, depth: int) -> Node:
        prefix: list[Node] = []
        high = shape.high
        for values in shape.prefix[:high]:
            node = self.values(values, depth + 1)
            if is_nothing(node):
                high = len(prefix)
                break
            prefix.append(node)
        rest: Node = NOTHING
        if high is None or high > len(prefix):
            rest = self.values(shape.rest, depth + 1)
            high = len(prefix) if is_nothing(rest) else high
        if shape.unique and (high is None or high > 1):
            raise Unsupported("uniqueItems is not supported", step(shape.pointer, "uniqueItems"))
        if len(prefix) - max(shape.low, 1) > MAX_OPTIONAL_ITEMS:
            raise Unsupported(f"more than {MAX_OPTIONAL_ITEMS} optional items of their own", shape.pointer)
        if high is not None and shape.low > high:
            return self.nothing(shape.pointer)
        empty = self.whitespace.empty("[]")
        if high == 0:
            return empty
        items = _items(prefix, rest, self.whitespace.separator(depth + 1), shape.low, high)
        return choice([empty if shape.low == 0 else NOTHING, self.whitespace.enclose("[]", items, depth + 1)])

    # -------------------------------------------------------------- objects

    def object(self, shape: Object, depth: int) -> Node:
        names = [*shape.properties, *(name for name in shape.required if name not in shape.properties)]
        members: list[tuple[Node, bool]] = []
        for name in names:
            values, required = member(shape, name), name in shape.required
            if values.anything and name not in shape.properties:
                raise Unsupported("a required property that is not declared can be anything", shape.required[name])
            node = self.values(values, depth + 1)
            if is_nothing(node) and required:
                return self.nothing(values.pointer)
            if not is_nothing(node):
                members.append((self.member(Text(f'"{escape(name)}"'), node), required))
        return self.members(shape, members, self.additional(shape, names, depth), depth)

    def member(self, key: Node, value: Node) -> Node:
        return concat(key, self.whitespace.key_mark(), value)

    def additional(self, shape: Object, names: list[str], depth: int) -> Node:
        """A member that is none of these names; NOTHING where there is to be none."""
        if shape.additional is None:
            if not shape.declared:
                raise Unsupported("an object of any members: list its properties", shape.pointer)
            return NOTHING
        if shape.additional.empty:
            return NOTHING
        if sum(len(name) ** 2 for name in names) > MAX_NAMES:
            raise Unsupported("additional members beside so many or so long names", shape.additional.pointer)
        return self.member(quoted(other_strings(names)), self.values(shape.additional, depth + 1))

    def members(self, shape: Object, members: list[tuple[Node, bool]], extra: Node, depth: int) -> Node:
        """The object of these members (syntax, whether required) and any number of extra ones, as many as it allows."""
        needed = sum(required for _, required in members)
        most = len(members) if is_nothing(extra) else None
        low, high = shape.low, shape.high
        if (high is not None and high < max(needed, low)) or (most is not None and low > most):
            return self.nothing(shape.pointer)
        if high == needed:
            members, extra, most = [(node, True) for node, required in members if required], NOTHING, needed
        elif high is not None and members and (most is None or high < most):
            raise Unsupported(
                "maxProperties that leaves a choice is not supported", step(shape.pointer, "maxProperties")
            )
        if low == most:
            members = [(node, True) for node, _ in members]
        elif low > max(needed, 1):
            raise Unsupported(
                "minProperties that leaves a choice is not supported", step(shape.pointer, "minProperties")
            )
        if low <= needed == 0 and most == 0:
            return self.whitespace.empty("{}")
        if needed == 0 and len(members) > MAX_OPTIONAL_MEMBERS:
            raise Unsupported(
                f"more than {MAX_OPTIONAL_MEMBERS} optional properties and no required one", shape.pointer
            )
        separator = self.whitespace.separator(depth + 1)
        count = high if not members else None
        inner = self.whitespace.enclose("{}", _members(members, extra, separator, count), depth + 1)
        return choice([self.whitespace.empty("{}") if low <= needed == 0 else NOTHING, inner])


def _items(prefix: list[Node], rest: Node, separator: Node, low: int, high: int | None) -> Node:
    """Low to high items, at least one: those of the prefix, then `rest`; no more than the prefix if that is NOTHING."""
    count = max(len(prefix), 1)
    tail = repeat(concat(separator, rest), max(0, low - count), None if high is None else max(0, high - count))
    for i in range(len(prefix) - 1, 0, -1):
        item = concat(separator, prefix[i], tail)
        tail = item if i < low else optional(item)
    return concat(prefix[0] if prefix else rest, tail)


def _members(members: list[tuple[Node, bool]], extra: Node, separator: Node, count: int | None) -> Node:
    """At least one member, in this order; then extra ones, up to `count` of them if there are no others."""
    more = repeat(concat(separator, extra), 0, None if count is None else count - 1)
    first = next((i for i, (_, required) in enumerate(members) if required), None)
    if first is None:
        alone = concat(extra, more)
        return choice([concat(_some([node for node, _ in members], separator), more), alone])
    before = [optional(concat(node, separator)) for node, _ in members[:first]]
    after = [
        concat(separator, node) if must else optional(concat(separator, node)) for node, must in members[first + 1 :]
    ]
    return concat(*before, members[first][0], *after, more)


def _some(nodes: list[Node], separator: Node) -> Node:
    """At least one of the nodes, in this order. Halving keeps the size at n log n copies of the nodes."""
    if len(nodes) < 2:
        return choice(nodes)
    left, right = nodes[: len(nodes) // 2], nodes[len(nodes) // 2 :]
    following = [optional(concat(separator, node)) for node in right]
    return choice([concat(_some(left, separator), *following), _some(right, separator)])


# ------------------------------------------------------------------ scalars


def _number(shape: Number) -> Node:
    if shape.integer:
        node = integers(*whole_bounds(shape), shape.multiple)
    elif shape.low is None and shape.high is None:
        node = NUMBER
    else:
        node = decimals(shape.low, shape.low_open, shape.high, shape.high_open)
    if node is None:
        raise Unsupported("these bounds or multiples cannot be told by digits", shape.pointer)
    return node


def _string(shape: String) -> Node:
    if not shape.languages:
        return quoted(repeat(ANY_CHARACTER, shape.low, shape.high))
    language = shape.languages[0]
    if len(shape.languages) > 1:
        raise Unsupported(
            f"a text cannot be checked for two of these at once: {language.source}", shape.languages[1].pointer
        )
    node = within(language.node, shape.low, shape.high)
    if node is None:
        raise Unsupported("minLength or maxLength cannot be combined exactly with this", language.pointer)
    return quoted(node)
