"""Types as JSON schemas, and JSON as instances of them: msgspec structs, dataclasses, TypedDicts and pydantic's models.

Used by `gen(json_schema=...)`. Invariant: the schema of a type admits no members that the type does not have, so that
what a grammar lets through can be made an instance.
"""

from typing import Any

import msgspec

from ..errors import RequestError


def schema_of(given: Any) -> tuple[str, Any]:
    """(the schema as JSON text, the type it stands for or None): from JSON text, a parsed schema, or a type.

    Raises RequestError for a type without a schema.
    """
    if isinstance(given, str):
        return given, None
    if isinstance(given, dict):
        return msgspec.json.encode(given).decode(), None
    try:
        schema = given.model_json_schema() if hasattr(given, "model_json_schema") else msgspec.json.schema(given)
    except TypeError as error:
        raise RequestError(f"json_schema: {error}", param="json_schema") from None
    return msgspec.json.encode(_closed(schema)).decode(), given


def instance(text: str, output_type: Any) -> Any:
    """The text as a value of the type; the text itself for None. Raises RequestError where it is none (cut short)."""
    if output_type is None:
        return text
    try:
        if hasattr(output_type, "model_validate_json"):
            return output_type.model_validate_json(text)
        return msgspec.json.decode(text, type=output_type)
    except ValueError as error:  # msgspec's and pydantic's errors are ValueErrors
        what = getattr(output_type, "__name__", str(output_type))
        raise RequestError(f"the output is no {what}: {error}", param="json_schema", code="invalid_output") from error


def _closed(schema: Any) -> Any:
    """The schema where objects with named members have no others."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed
