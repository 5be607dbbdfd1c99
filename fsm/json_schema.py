"""JSON Schema as syntax: exactly the JSON texts, in one fixed spelling, that validate; or an error that says which
keyword stands in the way. Used by the grammar compiler, which hands what is `Unsupported` to another backend.

The spelling is that of spelling.py and digits.py; members of objects come in the order of `properties`, and an object
that lists properties and says nothing of additional ones is written with the listed ones only. Invariant: every text
of the result validates (formats asserted), and every value that validates and can be so spelled is among the texts.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from .schema_reader import MAX_DEPTH, Reader
from .schema_types import step
from .schema_writer import Writer
from .shapes import SchemaError, Unsupported, Values, meet, of_type
from .spelling import DEFAULT, Whitespace, choice, concat, container, escape, is_nothing
from .syntax import Choice, Concat, Node, Repeat, Text

MAX_BYTES: Final = 1_000_000
MAX_SIZE: Final = 4_000_000
"""Nodes and characters of the result, shared parts counted wherever they occur."""


def schema_to_syntax(schema: Any, whitespace: Whitespace = DEFAULT) -> Node:
    """The JSON texts that validate against the schema, itself given as parsed JSON.

    Raises SchemaError: malformed, larger than MAX_BYTES, deeper than MAX_DEPTH, or satisfied by nothing; Unsupported:
    valid, but not to be expressed exactly.
    """
    with _located(""):
        _check_document(schema)
        return _written(Reader(schema).read(schema, ""), whitespace, depth=0)


def function_call_syntax(
    tools: Sequence[dict[str, Any]], whitespace: Whitespace = DEFAULT, keys: tuple[str, str] = ("name", "arguments")
) -> Node:
    """`{"name": ..., "arguments": {...}}` for one of these tools, each with a `name` and the schema of `parameters`.

    `keys`: what the two members are called. Arguments are as of arguments_syntax. Raises as schema_to_syntax does;
    pointers begin at the array of tools.
    """
    calls = [_function_call(tool, i, whitespace, keys) for i, tool in enumerate(tools)]
    if not calls:
        raise SchemaError("there are no tools to call", "")
    return _checked_size(choice(calls))


def choices(texts: Sequence[str]) -> Node:
    """One of these texts, as they are. Raises SchemaError when there are none, or one is not Unicode text."""
    for i, text in enumerate(texts):
        if not isinstance(text, str) or _has_surrogate(text):
            raise SchemaError("a choice is Unicode text", step("", i))
    if not texts:
        raise SchemaError("there is nothing to choose from", "")
    return choice(map(Text, texts))


def arguments_syntax(tool: dict[str, Any], index: int, whitespace: Whitespace = DEFAULT, depth: int = 0) -> Node:
    """The arguments of a call of `tool`, the index-th of its array, inside `depth` brackets.

    They are an object even where the schema of `parameters` does not say so; a tool without `parameters` takes none.
    Raises as schema_to_syntax does; pointers begin at the array of tools.
    """
    with _located(step("", str(index), "parameters")):
        schema = tool.get("parameters", {"properties": {}})
        _check_document(schema)
        reader = Reader(schema)
        values = meet(of_type("object", ""), reader.read(schema, ""), reader.work)
        return _written(values, whitespace, depth)


def _function_call(tool: dict[str, Any], index: int, whitespace: Whitespace, keys: tuple[str, str]) -> Node:
    name = tool.get("name")
    if not isinstance(name, str) or _has_surrogate(name):
        raise SchemaError("a tool has a name", step("", str(index), "name"))
    mark = whitespace.key_mark()
    values = Text(f'"{escape(name)}"'), arguments_syntax(tool, index, whitespace, depth=1)
    members = [concat(Text(f'"{escape(key)}"'), mark, value) for key, value in zip(keys, values, strict=True)]
    return container("{}", members, whitespace, 0)


# ------------------------------------------------------------------ checks


@contextmanager
def _located(prefix: str) -> Iterator[None]:
    """Errors point into the document that begins at `prefix`; Python's stack limit becomes one of them."""
    try:
        yield
    except SchemaError as error:
        raise type(error)(error.reason, prefix + error.pointer) from None
    except RecursionError:
        raise Unsupported("the schema or a pattern in it is nested too deeply", prefix) from None


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


_Path = tuple["_Path", str | int] | None
"""A place in the document, from its end to the root; becomes a pointer only in an error."""


def _check_document(schema: Any) -> None:
    """Raise SchemaError unless this is JSON of Unicode text, within MAX_DEPTH and MAX_BYTES."""
    level: list[tuple[Any, _Path]] = [(schema, None)]
    for _ in range(MAX_DEPTH + 1):
        inner: list[tuple[Any, _Path]] = []
        for value, path in level:
            if isinstance(value, dict):
                if any(not isinstance(key, str) or _has_surrogate(key) for key in value):
                    raise SchemaError("names are Unicode text", _pointer(path))
                inner += [(item, (path, key)) for key, item in value.items()]
            elif isinstance(value, list):
                inner += [(item, (path, i)) for i, item in enumerate(value)]
            elif isinstance(value, str) and _has_surrogate(value):
                raise SchemaError("a lone surrogate is no Unicode text", _pointer(path))
        level = inner
    if level:
        raise SchemaError(f"the schema is more than {MAX_DEPTH} deep", _pointer(level[0][1]))
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError):
        raise SchemaError("the schema is no JSON: it holds NaN, an infinity or something else", "") from None
    if size > MAX_BYTES:
        raise SchemaError(f"the schema has more than {MAX_BYTES} bytes", "")


def _pointer(path: _Path) -> str:
    names: list[str | int] = []
    while path is not None:
        path, name = path
        names.append(name)
    return step("", *reversed(names))


def _written(values: Values, whitespace: Whitespace, depth: int) -> Node:
    writer = Writer(whitespace)
    node = writer.values(values, depth)
    if is_nothing(node):
        raise SchemaError("no value satisfies this", writer.cause if writer.cause is not None else values.pointer)
    return _checked_size(node)


def _checked_size(node: Node) -> Node:
    if _size(node, {}) > MAX_SIZE:
        raise Unsupported("the schema becomes too large when its references are written out", "")
    return node


def _size(node: Node, known: dict[int, int]) -> int:
    if id(node) not in known:
        match node:
            case Concat(parts) | Choice(parts):
                inner = sum(_size(part, known) for part in parts)
            case Repeat(body):
                inner = _size(body, known)
            case Text(text):
                inner = len(text)
            case _:
                inner = 0
        known[id(node)] = inner + 1
    return known[id(node)]
