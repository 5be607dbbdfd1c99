"""What a chat request's tools and reasoning fields mean: what the template gets, which calls must come, how the output
is read.

Used by openai.py. Invariant: calls that must come (tool_choice "required" or a name) are a grammar, so the output is
nothing else; which parsers read an output is settled here, before it begins.
"""

from typing import Any, Final, NamedTuple

import msgspec

from ..actors.messages import GrammarSpec
from ..config import ModelInfo
from ..errors import RequestError
from ..models.call_grammar import Calls, Function, certain_family
from ..models.parse_events import Known
from ..models.parsers import ChatParser, reasoning_family, reasoning_parser, tool_family, tool_parser
from .chat_types import ChatRequest, NamedToolChoice, Tool

MAX_TOOLS: Final = 128
_ANSWERS: Final = ("json_schema", "json_object", "choice")
"""Kinds of grammars for answers; a pattern or the like may as well describe calls."""


class Reading(NamedTuple):
    """How the text of an answer is read. Without names it is content as it stands."""

    tools: str | None = None
    """Family of the tool calls in it."""
    known: Known | None = None
    """Functions that may be called."""
    single: bool = False
    """At most one call is wanted."""
    reasoning: str | None = None
    """Family of the thoughts in it."""
    stream_reasoning: bool = True
    continued: bool = False
    """The output goes on with a message that the client began, which may be amid thoughts or not."""

    @property
    def shown(self) -> tuple[str, ...]:
        """Markers that the detokenizer must not skip."""
        tools = tool_family(self.tools).markers if self.tools else frozenset[str]()
        thoughts = reasoning_family(self.reasoning).markers if self.reasoning else frozenset[str]()
        return tuple(sorted(tools | thoughts))

    @property
    def opens(self) -> tuple[str, ...]:
        """Tags with which thoughts begin."""
        return reasoning_family(self.reasoning).opens if self.reasoning else ()

    def parser(self, thinking: bool) -> ChatParser | None:
        """A parser for one choice; None if there is nothing to find. `thinking`: the prompt ended in an opening tag."""
        if self.tools is None and self.reasoning is None:
            return None
        opened = True if thinking else False if self.continued else None
        thoughts = reasoning_parser(self.reasoning, opened, self.stream_reasoning) if self.reasoning else None
        return ChatParser(thoughts, tool_parser(self.tools, known=self.known) if self.tools else None)


class ToolPlan(NamedTuple):
    """`tools`: for the template. `grammar`: what the output must match, of the tools' or of the request's own."""

    tools: list[dict[str, Any]] | None
    grammar: GrammarSpec | None
    reading: Reading


def plan_tools(request: ChatRequest, grammar: GrammarSpec | None, model: ModelInfo) -> ToolPlan:
    """Decide about a request whose other fields ask for `grammar`. Raises RequestError naming the field."""
    tools = _checked(request.tools or [])
    chosen = _chosen(request, tools)
    continued = bool(request.continue_final_message)
    if not tools or request.tool_choice == "none":
        return ToolPlan(None, _behind_thoughts(grammar, request, model), _free(request, model, grammar, continued))
    shown = [msgspec.to_builtins(tool) for tool in tools]
    if chosen is None:
        reading = _free(request, model, grammar, continued)
        if grammar is None or grammar.kind not in _ANSWERS:
            reading = reading._replace(tools=model.tool_parser, known=_known(tools), single=_single(request))
        return ToolPlan(shown, _behind_thoughts(grammar, request, model), reading)
    if grammar is not None:
        what = "tool_choice demands a call, and another field an output of another form"
        raise RequestError(what, param="tool_choice")
    family = certain_family(model.tool_parser)
    many = not (isinstance(request.tool_choice, NamedToolChoice) or _single(request))
    calls = Calls(family, [Function(t.function.name, t.function.parameters) for t in chosen], many)
    try:
        spec = GrammarSpec("tool_calls", msgspec.json.encode(calls).decode())
    except (TypeError, ValueError, RecursionError, UnicodeError):
        raise RequestError("tools are no JSON of Unicode text", param="tools", code="invalid_type") from None
    reading = _free(request, model, spec, continued)._replace(tools=family, known=_known(chosen))
    return ToolPlan(shown, _behind_thoughts(spec, request, model), reading)


def template_arguments(request: ChatRequest) -> dict[str, Any] | None:
    """The template's further variables."""
    if request.reasoning_effort is None:
        return request.chat_template_kwargs
    return {"reasoning_effort": request.reasoning_effort, **(request.chat_template_kwargs or {})}


def _checked(tools: list[Tool]) -> list[Tool]:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"at most {MAX_TOOLS} tools", param="tools")
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool.function.name
        if name in names or name.endswith("\n"):  # which the pattern's $ lets pass
            what = f"the name {name!r} comes twice" if name in names else "a name ends before the line does"
            raise RequestError(what, param=f"tools[{i}].function.name")
        names.add(name)
    return tools


def _chosen(request: ChatRequest, tools: list[Tool]) -> list[Tool] | None:
    """The functions of which one must be called; None if none must."""
    wanted = request.tool_choice
    if wanted in (None, "none", "auto"):
        return None
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if not isinstance(wanted, NamedToolChoice):
        return tools
    chosen = [tool for tool in tools if tool.function.name == wanted.function.name]
    if not chosen:
        raise RequestError(f"tools has no function {wanted.function.name!r}", param="tool_choice.function.name")
    return chosen


def _free(request: ChatRequest, model: ModelInfo, grammar: GrammarSpec | None, continued: bool) -> Reading:
    """Without tools. What a grammar describes is the answer; there are thoughts before it if they can be told apart."""
    if request.separate_reasoning is False or (grammar is not None and not _thinks(request, model)):
        return Reading()
    streamed = request.stream_reasoning is not False
    return Reading(reasoning=model.reasoning_parser, stream_reasoning=streamed, continued=continued)


def _behind_thoughts(grammar: GrammarSpec | None, request: ChatRequest, model: ModelInfo) -> GrammarSpec | None:
    """The grammar of an output that may begin with thoughts."""
    if grammar is None or not _thinks(request, model):
        return grammar
    return msgspec.structs.replace(grammar, thoughts=model.thoughts)


def _thinks(request: ChatRequest, model: ModelInfo) -> bool:
    """Whether thoughts may come before a grammar: they are told apart, and their tags are tokens."""
    return model.thoughts is not None and request.separate_reasoning is not False and not request.continue_final_message


def _single(request: ChatRequest) -> bool:
    return request.parallel_tool_calls is False


def _known(tools: list[Tool]) -> Known:
    return {tool.function.name: tool.function.parameters or {} for tool in tools}
