"""Tools of a `gen`: functions that the model may call, and the call that it makes, on every kind of backend.

The text of such a `gen` is the call as JSON, {"name": ..., "arguments": {...}}, and its variable a ToolCall. Models
behind text are held to it by a JSON schema; APIs that have tools are told to call one. The program calls the function.
Invariant: the name is one of the tools', and the arguments are those of its schema, as far as the backend promises it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..errors import RequestError
from .structured import schema_of


class ToolCall(msgspec.Struct, frozen=True):
    """What the model wants to call; `call.name`, and `function(**call.arguments)`."""

    name: str
    arguments: dict[str, Any]


def tools_of(given: Sequence[Any]) -> str:
    """OpenAI's list of tools as JSON text, from functions with annotated parameters, or tools in OpenAI's form.

    Raises RequestError for anything else, for none, and for two of one name.
    """
    if not isinstance(given, list | tuple) or not given:
        raise RequestError("tools must be a list of functions or of OpenAI's tools, one at least", param="tools")
    functions = [_of_callable(tool) if callable(tool) else _of_dict(tool) for tool in given]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise RequestError(f"tools: two of {', '.join(names)} have one name", param="tools")
    return msgspec.json.encode([{"type": "function", "function": function} for function in functions]).decode()


def call_schema(tools: str) -> str:
    """The JSON schema of a call of one of the tools."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for i, tool in enumerate(msgspec.json.decode(tools)):
        function = tool["function"]
        parameters = _renamed(function.get("parameters") or {"type": "object", "properties": {}}, f"{i}_")
        definitions |= parameters.pop("$defs", {})
        properties = {"name": {"const": function["name"]}, "arguments": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return msgspec.json.encode(schema | ({"$defs": definitions} if definitions else {})).decode()


def call_text(name: str, arguments: Any) -> str:
    """A call that an API reports, as the text of its `gen`. `arguments`: JSON text, or what it stands for."""
    given = msgspec.Raw(arguments.encode() or b"{}") if isinstance(arguments, str) else arguments
    return msgspec.json.encode({"name": name, "arguments": given}).decode()


def _of_callable(function: Callable[..., Any]) -> dict[str, Any]:
    fields: list[Any] = []
    name = function.__name__
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.annotation is parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise RequestError(f"tools: the parameter {parameter.name!r} of {name} needs a type", param="tools")
        field = (parameter.name, parameter.annotation)
        fields.append(field if parameter.default is parameter.empty else (*field, parameter.default))
    schema = msgspec.json.decode(schema_of(msgspec.defstruct(name, fields, kw_only=True))[0])
    definitions = schema.pop("$defs")
    parameters = definitions.pop(name) | ({"$defs": definitions} if definitions else {})
    return {"name": name, "description": inspect.getdoc(function) or "", "parameters": parameters}


def _of_dict(tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("tools must be functions, or objects of type function with a name", param="tools")
    return function


def _renamed(schema: Any, prefix: str) -> Any:
    """The schema with its definitions under other names, so that several schemas can be parts of one."""
    if isinstance(schema, list):
        return [_renamed(item, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _renamed(value, prefix) for name, value in schema.items()}
    if isinstance(found.get("$defs"), dict):
        found["$defs"] = {prefix + name: value for name, value in found["$defs"].items()}
    if isinstance(reference := found.get("$ref"), str):
        found["$ref"] = reference.replace("#/$defs/", f"#/$defs/{prefix}", 1)
    return found
