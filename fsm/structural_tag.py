"""Structural tags: free text in which a trigger begins a tag, `<f>{...}</f>`, whose middle has a schema.

Used by the grammar compiler; SGLang's form: {"type": "structural_tag", "structures": [{"begin", "schema", "end"}, ...],
"triggers": [...]}. Invariant: wherever a trigger's text appears, one of the tags that begin with it follows; outside
of tags everything may come, and an output may end.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from .errors import GrammarError
from .guidance import json_options, prepared
from .schema_types import step

MAX_STRUCTURES: Final = 1024
FREE_TEXT: Final = r"/(.|\n)*/"
NO_TOKENS: Final[Mapping[str, int]] = MappingProxyType({})


def tag_grammar(value: Any, special: Mapping[str, int] = NO_TOKENS) -> str:
    """Return the Lark of a structural tag, given as parsed JSON. `special`: the model's special tokens, text to id.

    Raises GrammarError with the pointer to what is malformed; SchemaError, Unsupported for the schemas.
    """
    triggers = _list_of(value, "triggers", str)
    structures = _list_of(value, "structures", dict)
    bodies: dict[str, list[str]] = {}
    for i, structure in enumerate(structures):
        begin, end = (_text(structure, name, i) for name in ("begin", "end"))
        trigger = min((t for t in triggers if t and begin.startswith(t)), key=len, default=None)
        if trigger is None:
            raise GrammarError(f"no trigger begins it (at {step('', 'structures', i, 'begin')})")
        if "schema" not in structure:
            raise GrammarError(f"a structure needs a schema (at {step('', 'structures', i)})")
        schema = prepared(structure["schema"], step("", "structures", i, "schema")) | {"x-guidance": json_options()}
        parts = [_quoted(begin[len(trigger) :]), f"%json {json.dumps(schema)}", _quoted(end)]
        bodies.setdefault(trigger, []).append(" ".join(filter(None, parts)))
    return _lark(bodies, special)


def _lark(bodies: dict[str, list[str]], special: Mapping[str, int]) -> str:
    """The text before a trigger is part of a lazy lexeme: it ends where the trigger appears first. A special token is
    no text, so that free text ends before it anyway; by its id, since Lark has no names like [TOOL_CALLS]."""
    tags = " | ".join(f"tag_{i}" for i in range(len(bodies)))
    lines = [f"start: ({tags})* TEXT", f"TEXT: {FREE_TEXT}"]
    for i, (trigger, options) in enumerate(bodies.items()):
        if trigger in special:
            lines.append(f"tag_{i}: TEXT <[{special[trigger]}]> body_{i}")
        else:
            lines += [f"trigger_{i}[lazy]: TEXT {_quoted(trigger)}", f"tag_{i}: trigger_{i} body_{i}"]
        lines += [f"body_{i}: " + " | ".join(f"body_{i}_{j}" for j in range(len(options)))]
        lines += [f"body_{i}_{j}: {option}" for j, option in enumerate(options)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _list_of(value: Any, name: str, kind: type) -> list[Any]:
    items = value.get(name) if isinstance(value, dict) else None
    if not isinstance(items, list) or not items or not all(isinstance(item, kind) for item in items):
        what = "strings" if kind is str else "objects with begin, schema and end"
        raise GrammarError(f"it needs {name}, a list of {what} (at {step('', name)})")
    if len(items) > MAX_STRUCTURES:
        raise GrammarError(f"more than {MAX_STRUCTURES} {name} (at {step('', name)})")
    return items


def _text(structure: dict[str, Any], name: str, index: int) -> str:
    text = structure.get(name)
    if not isinstance(text, str):
        raise GrammarError(f"{name} is a string (at {step('', 'structures', index, name)})")
    return text
