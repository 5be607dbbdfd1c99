"""The fields by which requests ask for a grammar: exactly one of FIELDS, and what else there is to say of it.

Used by the HTTP protocols and the embedded API, which name the fields alike. Invariant: specs of one meaning are equal
however the client wrote the JSON, but for the order of members, which is part of the meaning.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from ..errors import RequestError
from ..fsm.spelling import MAX_RUN, policy
from .messages import GrammarSpec

FIELDS: Final = ("regex", "json_schema", "choice", "ebnf", "structural_tag")
WHITESPACE: Final = "json_whitespace"
GIVEN: Final = (*FIELDS, WHITESPACE)
"""What a request may say of its grammar."""
UNSUPPORTED: Final = ("whitespace_pattern",)


def grammar_spec(given: Mapping[str, Any], names: Mapping[str, str] | None = None) -> GrammarSpec | None:
    """The spec of `given` (values of GIVEN and UNSUPPORTED, None where absent); None if there is none.

    regex, ebnf: str. json_schema: a schema as JSON text, or parsed; structural_tag likewise. choice: texts.
    json_whitespace: "spaced", "compact", {"any": n} or {"indent": n}. `names`: what the client called them.
    Raises RequestError naming the field.
    """
    names = names or {}
    for name in UNSUPPORTED:
        if given.get(name) is not None:
            raise RequestError(f"{name} is not supported yet", param=name, code="unsupported_value")
    present = [name for name in FIELDS if given.get(name) is not None]
    whitespace = given.get(WHITESPACE)
    if whitespace is not None and present != ["json_schema"]:
        text = f"{WHITESPACE} is about the JSON of a json_schema, which there is none of"
        raise RequestError(text, param=names.get(WHITESPACE, WHITESPACE))
    if not present:
        return None
    if len(present) > 1:
        one, other = (names.get(name, name) for name in present[:2])
        raise RequestError(f"{one} and {other} exclude each other: an output has one grammar", param=other)
    name = present[0]
    value, shown = given[name], names.get(name, name)
    match name:
        case "regex" | "ebnf":
            if not isinstance(value, str):
                raise RequestError(f"{shown} must be a string", param=shown, code="invalid_type")
            _json(value, shown)
            return GrammarSpec(name, value)
        case "json_schema":
            schema = _parsed(value, shown)
            if not isinstance(schema, dict | bool):
                raise RequestError(f"{shown} must be a JSON schema: an object", param=shown, code="invalid_type")
            return GrammarSpec(name, _json(schema, shown), _whitespace(whitespace))
        case "structural_tag":
            tag = _parsed(value, shown)
            if not isinstance(tag, dict) or tag.get("type", name) != name:
                raise RequestError(f"{shown} must be an object of type {name}", param=shown, code="invalid_type")
            return GrammarSpec(name, _json({key: tag.get(key) for key in ("structures", "triggers")}, shown))
        case _:
            return GrammarSpec("choice", _choices(value, shown))


def _parsed(value: Any, name: str) -> Any:
    """JSON, which clients send as text or as itself."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except RecursionError:
        raise RequestError(f"{name} is nested too deeply", param=name, code="invalid_json_schema") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"{name} is not JSON: {error}", param=name, code="invalid_json_schema") from None


def _whitespace(value: Any) -> str:
    """The name of the policy (fsm/spelling.py)."""
    name = "spaced" if value is None else value
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, number),) = value.items()
        name = f"{kind} {number}" if isinstance(number, int) and not isinstance(number, bool) else ""
    try:
        policy(name if isinstance(name, str) else "")
    except ValueError as error:
        about = f": {error}" if isinstance(value, Mapping) else ""
        text = f'{WHITESPACE} is "spaced", "compact", {{"any": 1 to {MAX_RUN}}} or {{"indent": 0 to {MAX_RUN}}}{about}'
        raise RequestError(text, param=WHITESPACE) from None
    return str(name)


def _choices(value: Any, name: str) -> str:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise RequestError(f"{name} must be a list of strings", param=name, code="invalid_type")
    if not value:
        raise RequestError(f"{name} is empty: there is nothing to choose from", param=name)
    return _json(list(value), name)


def _json(value: Any, name: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError, UnicodeError):
        raise RequestError(f"{name} is no JSON of Unicode text", param=name, code="invalid_type") from None
