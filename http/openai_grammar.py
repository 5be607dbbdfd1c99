"""Which grammar an OpenAI request asks for: response_format, SGLang's and vLLM's extra fields.

Used by openai.py. Invariant: of all these fields a request has one at most, else it is refused naming a field.
"""

from typing import Any, Final

from ..actors.grammar_fields import WHITESPACE, grammar_spec
from ..actors.messages import GrammarSpec
from ..errors import RequestError
from .chat_types import ResponseFormat
from .openai_types import OpenAIRequest, StructuredOutputs

_ALIASES: Final = {
    "regex": "regex",
    "guided_regex": "regex",
    "json_schema": "json_schema",
    "guided_json": "json_schema",
    "choice": "choice",
    "guided_choice": "choice",
    "ebnf": "ebnf",
    "guided_grammar": "ebnf",
    "structural_tag": "structural_tag",
}
"""A client's field, and ours."""
_STRUCTURED: Final = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
    "structural_tag": "structural_tag",
}
"""The same for those of `structured_outputs`."""


def requested_grammar(
    request: OpenAIRequest, response_format: ResponseFormat | None = None
) -> tuple[GrammarSpec | None, dict[str, str]]:
    """(the grammar, if one is wanted; {our name of its field: the client's}). Raises RequestError naming the field."""
    given: list[tuple[str, str, Any]] = [
        (name, ours, value) for name, ours in _ALIASES.items() if (value := getattr(request, name)) is not None
    ]
    if request.structured_outputs is not None:
        given += _structured(request.structured_outputs)
    wanted = None if response_format is None else _wanted(response_format)
    if wanted is not None:
        given.append(("response_format", *wanted))
    if len(given) > 1:
        one, other = given[0][0], given[1][0]
        raise RequestError(f"{one} and {other} exclude each other: an output has one grammar", param=other)
    whitespace = {WHITESPACE: request.json_whitespace}
    if not given:
        return grammar_spec(whitespace), {}
    name, ours, value = given[0]
    return grammar_spec({ours: value} | whitespace, {ours: name}), {ours: name}


def _structured(wanted: StructuredOutputs) -> list[tuple[str, str, Any]]:
    """(the client's field, ours, its value) of each grammar in vLLM's `structured_outputs`."""
    prefix = "structured_outputs."
    for name in ("disable_additional_properties", "whitespace_pattern"):
        if getattr(wanted, name):
            raise RequestError(f"{prefix}{name} is not supported", param=prefix + name, code="unsupported_value")
    given = [
        (prefix + name, ours, value)
        for name, ours in _STRUCTURED.items()
        if (value := getattr(wanted, name)) is not None
    ]
    if wanted.json_object:
        given.append((f"{prefix}json_object", "json_schema", {"type": "object"}))
    if not given:
        raise RequestError("structured_outputs names no grammar", param="structured_outputs")
    return given


def _wanted(wanted: ResponseFormat) -> tuple[str, Any] | None:
    """(our field, its value) of a response_format, None for plain text."""
    match wanted.type:
        case "text":
            return None
        case "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema is None:
                raise _refused("response_format of type json_schema needs json_schema.schema", "invalid_value")
            return "json_schema", wanted.json_schema.schema
        case "json_object":
            return "json_schema", {"type": "object"}
        case "structural_tag":
            return "structural_tag", {"structures": wanted.structures, "triggers": wanted.triggers}
        case _:
            raise _refused(f"response_format {wanted.type[:64]} is not supported")


def _refused(text: str, code: str = "unsupported_value") -> RequestError:
    return RequestError(text, param="response_format", code=code)
