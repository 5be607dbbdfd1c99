"""Tool calls that are certain: the texts with which a model of a family calls the given functions, as a language.

The HTTP front asks for one (`Calls`) when a request's tool_choice leaves no other answer, the grammar compiler builds
it. Invariant: ToolParser of the same family reads every text of the language as calls and nothing else, each of
them complete and with arguments that validate against its function's schema.
"""

from types import MappingProxyType
from typing import Any, Final

from msgspec import Struct

from ..fsm.json_schema import arguments_syntax, function_call_syntax
from ..fsm.spelling import choice, concat, repeat
from ..fsm.syntax import Node, Text


class Function(Struct, frozen=True, omit_defaults=True):
    """A function that may be called; `parameters` is a JSON schema, absent: it takes none."""

    name: str
    parameters: dict[str, Any] | None = None


class Calls(Struct, frozen=True):
    """What a GrammarSpec of kind "tool_calls" says, as JSON. `many`: one call or more; else exactly one."""

    family: str
    functions: list[Function]
    many: bool


class Form(Struct, frozen=True):
    """How a family writes calls: `begin`, calls with `between` between them, `end`.

    A call is an object with these two `keys`; or without keys: `head`, the name, `middle`, the arguments, `tail`.
    Of the forms that a parser takes, the one that the models write.
    """

    begin: str = ""
    end: str = ""
    between: str = ""
    keys: tuple[str, str] | None = None
    head: str = ""
    middle: str = ""
    tail: str = ""


_OBJECT: Final = ("name", "arguments")
_BEGIN, _CALL, _SEP, _CALL_END, _FINISH = (
    f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)
_HERMES: Final = Form("<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n", _OBJECT)
_LLAMA3: Final = Form("", "", "; ", ("name", "parameters"))
_COMMAND_R: Final = Form("Action: ```json\n[", "]\n```", ", ", ("tool_name", "parameters"))
_DEEPSEEK_V3: Final = Form(
    _BEGIN, _FINISH, "\n", head=f"{_CALL}function{_SEP}", middle="\n```json\n", tail=f"\n```{_CALL_END}"
)
_DEEPSEEK_V31: Final = Form(_BEGIN, _FINISH, "", head=_CALL, middle=_SEP, tail=_CALL_END)

FORMS: Final = MappingProxyType(
    {
        "hermes": _HERMES,
        "qwen": _HERMES,
        "qwen25": _HERMES,
        "llama3": _LLAMA3,
        "llama3_json": _LLAMA3,
        "llama4_json": _LLAMA3,
        "mistral": Form("[TOOL_CALLS] [", "]", ", ", _OBJECT),
        "deepseekv3": _DEEPSEEK_V3,
        "deepseek_v3": _DEEPSEEK_V3,
        "deepseekv31": _DEEPSEEK_V31,
        "deepseek_v31": _DEEPSEEK_V31,
        "command-r": _COMMAND_R,
        "cohere_command3": _COMMAND_R,
        "json": Form("[", "]", ", ", _OBJECT),
    }
)
"""By the names of --tool-call-parser. Families whose arguments are no JSON are not here: see `certain_family`."""


def certain_family(name: str) -> str:
    """The family in which a model of family `name` writes calls that must come.

    Python's literals and XML have no exact form of a JSON schema; there the calls are a JSON array, as SGLang and vLLM
    ask every model for.
    """
    return name if name in FORMS else "json"


def calls_syntax(calls: Calls) -> Node:
    """The language. Raises what schema_to_syntax raises, pointers beginning at the array of functions."""
    form = FORMS[calls.family]
    tools: list[dict[str, Any]] = [
        {"name": f.name} if f.parameters is None else {"name": f.name, "parameters": f.parameters}
        for f in calls.functions
    ]
    if form.keys is not None:
        call = function_call_syntax(tools, keys=form.keys)
    else:
        call = choice(
            concat(Text(form.head + tool["name"] + form.middle), arguments_syntax(tool, i), Text(form.tail))
            for i, tool in enumerate(tools)
        )
    more = repeat(concat(Text(form.between), call), 0, None if calls.many else 0)
    return concat(Text(form.begin), call, more, Text(form.end))
