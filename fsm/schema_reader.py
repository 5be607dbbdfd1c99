"""JSON Schema to sets of values: types, combinators and references. Used by json_schema.py.

Draft 2020-12, and what older drafts say in the same words; array-form `items` as before it. References are followed
inside the schema; recursive ones are refused. Invariant: every keyword is obeyed, an annotation, without effect on the
given types, or refused with the pointer to it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import unquote

from .schema_types import KEYWORDS, Schema, array_shape, number_shape, object_shape, step, string_shape
from .shapes import (
    TYPES,
    SchemaError,
    Shape,
    Unsupported,
    Values,
    Work,
    admits,
    constants,
    meet,
    of_type,
    spread,
    union,
)

ANNOTATIONS: Final = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $comment $anchor $dynamicAnchor "
    "$vocabulary $defs definitions contentMediaType contentEncoding contentSchema $id id "
    # without `if` and `contains`, which are refused, these say nothing
    "then else minContains maxContains".split()
)
"""Keywords without effect on what is valid. So are those that begin with `x-`."""

COMBINATORS: Final = frozenset("type enum const $ref allOf anyOf oneOf".split())
TYPED: Final = {keyword: kind for kind, keywords in KEYWORDS.items() for keyword in keywords}
MAX_DEPTH: Final = 64
_INDEX: Final = re.compile("0|[1-9][0-9]{0,8}")


class Reader:
    """Reads one schema document. Each place is read once, so what is shared by references is shared in memory."""

    def __init__(self, root: Any) -> None:
        self.root = root
        named = root.get("$schema") if isinstance(root, dict) else None
        self.lone_references = isinstance(named, str) and re.search(r"draft-0[3-7]/", named) is not None
        """Up to draft 7, what stands beside $ref has no effect."""
        self.work = Work()
        self.done: dict[str, Values] = {}
        self.open: set[str] = set()
        """Pointers of the schemas around the one being read, through references too."""

    def read(self, schema: Any, pointer: str) -> Values:
        """The values that the schema at this pointer admits. Raises SchemaError, Unsupported."""
        if isinstance(schema, bool):
            return Values(pointer, anything=schema)
        if not isinstance(schema, dict):
            raise SchemaError("a schema is an object, true or false", pointer)
        if pointer in self.done:
            return self.done[pointer]
        if len(self.open) > MAX_DEPTH:
            raise Unsupported(f"references lead more than {MAX_DEPTH} schemas deep", pointer)
        self.open.add(pointer)
        try:
            values = self._all_keywords(schema, pointer)
        finally:
            self.open.discard(pointer)
        self.done[pointer] = values
        return values

    def _all_keywords(self, schema: Schema, pointer: str) -> Values:
        """What all keywords of a schema together admit."""
        for keyword in schema:
            if keyword not in ANNOTATIONS | COMBINATORS and keyword not in TYPED and not keyword.startswith("x-"):
                raise Unsupported(f"{keyword} is not supported", step(pointer, keyword))
        if pointer and isinstance(schema.get("$id"), str):
            raise Unsupported("a schema inside this one with an identity of its own", step(pointer, "$id"))
        if self.lone_references and "$ref" in schema:
            return self._reference(schema["$ref"], step(pointer, "$ref"))
        values = self._own_types(schema, pointer)
        for part in self._parts(schema, pointer):
            met = meet(values, part, self.work)
            values = met if part.empty or not met.empty else Values(pointer)  # empty by contradiction: point here
        if "oneOf" in schema:
            place = step(pointer, "oneOf")
            branches = [meet(values, branch, self.work) for branch in self._branches(schema, "oneOf", pointer)]
            values = exactly_one(branches, place, self.work)
        return values

    def _parts(self, schema: Schema, pointer: str) -> Iterator[Values]:
        """What the combinators but oneOf admit, one after another."""
        if "$ref" in schema:
            yield self._reference(schema["$ref"], step(pointer, "$ref"))
        if "const" in schema:
            yield constants([schema["const"]], step(pointer, "const"))
        if "enum" in schema:
            if not isinstance(schema["enum"], list):
                raise SchemaError("enum is an array", step(pointer, "enum"))
            yield constants(schema["enum"], step(pointer, "enum"))
        if "allOf" in schema:
            yield from self._branches(schema, "allOf", pointer)
        if "anyOf" in schema:
            yield union(self._branches(schema, "anyOf", pointer), step(pointer, "anyOf"))

    def _branches(self, schema: Schema, keyword: str, pointer: str) -> list[Values]:
        branches = schema[keyword]
        if not isinstance(branches, list) or not branches:
            raise SchemaError(f"{keyword} is an array of at least one schema", step(pointer, keyword))
        return [self.read(branch, step(pointer, keyword, i)) for i, branch in enumerate(branches)]

    # -------------------------------------------------------------- types

    def _own_types(self, schema: Schema, pointer: str) -> Values:
        """What `type` and the keywords of the types admit."""
        names = type_names(schema, pointer)
        if "type" not in schema and not any(keyword in TYPED for keyword in schema):
            return Values(pointer, anything=True)
        return union([self._own_type(name, schema, pointer) for name in names], pointer)

    def _own_type(self, name: str, schema: Schema, pointer: str) -> Values:
        shape: Shape
        match name:
            case "null" | "boolean":
                return of_type(name, pointer)
            case "string":
                shape = string_shape(schema, pointer)
            case "array":
                shape = array_shape(schema, pointer, self.read)
            case "object":
                shape = object_shape(schema, pointer, self.read)
            case _:
                shape = number_shape(schema, pointer, integer=name == "integer")
        return Values(pointer, shapes=(shape,))

    # -------------------------------------------------------------- references

    def _reference(self, reference: Any, pointer: str) -> Values:
        if not isinstance(reference, str):
            raise SchemaError("$ref is a string", pointer)
        if reference != "#" and not reference.startswith("#/"):
            raise Unsupported("only references by JSON pointer inside the schema (#/...) are followed", pointer)
        place, target = find(self.root, reference, pointer)
        if target in self.open:
            raise Unsupported("recursion: the schema refers to itself", pointer)
        return self.read(place, target)


def find(root: Any, reference: str, pointer: str) -> tuple[Any, str]:
    """What is at the JSON pointer behind the # of a reference, and the pointer. Raises SchemaError where nothing is."""
    place, target = root, ""
    for name in unquote(reference.partition("#")[2]).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        index = int(name) if isinstance(place, list) and _INDEX.fullmatch(name) else name
        try:
            place = place[index]
        except (LookupError, TypeError):
            raise SchemaError(f"the reference {reference} leads nowhere", pointer) from None
        target = step(target, name)
    return place, target


def type_names(schema: Schema, pointer: str) -> list[str]:
    """The types that a schema allows, all if it does not say. Raises SchemaError."""
    named = schema.get("type", [name for name in TYPES if name != "integer"])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names or any(name not in TYPES for name in names):
        raise SchemaError(f"type is one of {', '.join(TYPES)}, or an array of them", step(pointer, "type"))
    return [name for name in dict.fromkeys(names) if name != "integer" or "number" not in names]


def exactly_one(branches: list[Values], pointer: str, work: Work) -> Values:
    """The values that are in one branch and in no other.

    Constants are counted; shapes of different branches must not overlap, nor hold a constant of another branch.
    Raises Unsupported, with the pointer to the later branch, where that cannot be proven.
    """
    branches = [spread(branch) for branch in branches]
    whole = union(branches, pointer)
    counts = Counter(key for branch in branches for key in branch.constants)
    shaped = [(j, Values(branch.pointer, shapes=branch.shapes)) for j, branch in enumerate(branches) if branch.shapes]
    for n, (j, shapes) in enumerate(shaped):
        foreign = [v for key, v in whole.constants.items() if key not in branches[j].constants or counts[key] > 1]
        work.spend(len(foreign) * len(shapes.shapes), pointer)
        overlap = any(not meet(other, shapes, work).empty for _, other in shaped[:n])
        if overlap or any(admits(shapes, value) for value in foreign):
            raise Unsupported("the alternatives of oneOf may overlap: use anyOf", step(pointer, j))
    return Values(pointer, {key: v for key, v in whole.constants.items() if counts[key] == 1}, whole.shapes)
