"""Which grammar an OpenAI request asks for: response_format, SGLang's and vLLM's extra fields.

Used by openai.py. Invariant: of all these fields a request has one at most, else it is refused naming a field.
"""

from typing import Any, Final

from ..actors.grammar_fields import WHITESPACE, grammar_spec
from ..actors.messages import GrammarSpec
from ..errors import RequestError
from .protocol import OpenAIRequest, ResponseFormat

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


def requested_grammar(
    request: OpenAIRequest, response_format: ResponseFormat | None = None
) -> tuple[GrammarSpec | None, dict[str, str]]:
    """(the grammar, if one is wanted; {our name of its field: the client's}). Raises RequestError naming the field."""
    given: list[tuple[str, str, Any]] = [
        (name, ours, value) for name, ours in _ALIASES.items() if (value := getattr(request, name)) is not None
    ]
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
