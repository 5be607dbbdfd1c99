"""The parsers of chat output by name: made for one output, both kinds in a row, or guessed from a chat template.

Who serves chat completions makes one ChatParser for each choice. Invariant: whatever the parsers, the joined events of
an output depend on its text alone, not on how it arrived.
"""

import secrets
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from ..errors import StartupError
from .parse_events import Content, Event, Known, NewId, Parser
from .reasoning_parser import REASONING_FAMILIES, ReasoningFamily, ReasoningParser
from .tool_families import TOOL_FAMILIES, ToolFamily
from .tool_parser import ToolParser

Family = TypeVar("Family", ToolFamily, ReasoningFamily)


class Names(NamedTuple):
    """What the two flags take."""

    tools: tuple[str, ...]
    reasoning: tuple[str, ...]


class Guess(NamedTuple):
    """Parsers that fit a chat template; None where none is known to."""

    tools: str | None
    reasoning: str | None


def names() -> Names:
    return Names(tuple(TOOL_FAMILIES), tuple(REASONING_FAMILIES))


def tool_family(name: str) -> ToolFamily:
    """Raises StartupError for a name that is none: it comes from a flag."""
    return _family("--tool-call-parser", name, TOOL_FAMILIES)


def reasoning_family(name: str) -> ReasoningFamily:
    """Raises StartupError for a name that is none: it comes from a flag."""
    return _family("--reasoning-parser", name, REASONING_FAMILIES)


def _family(flag: str, name: str, families: Mapping[str, Family]) -> Family:
    family = families.get(name)
    if family is None:
        raise StartupError(f"{flag} {name!r} is unknown; there are: {', '.join(sorted(families))}")
    return family


def random_id() -> str:
    """A call's id in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def tool_parser(name: str, new_id: NewId = random_id, known: Known | None = None) -> ToolParser:
    """A parser for one output. `known` None: any function name will do. Raises StartupError for an unknown name."""
    return ToolParser(tool_family(name), new_id, known)


def reasoning_parser(name: str, opened: bool | None = None, stream_reasoning: bool = True) -> ReasoningParser:
    """A parser for one output; see ReasoningParser. Raises StartupError for an unknown name."""
    return ReasoningParser(reasoning_family(name), opened, stream_reasoning)


class ChatParser:
    """Thoughts first, then tool calls in what is left. A parser that is None finds nothing.

    `separate_reasoning` false is a ChatParser without a reasoning parser: the thoughts are content, with their tags.
    """

    __slots__ = ("_reasoning", "_tools")

    def __init__(self, reasoning: Parser | None, tools: Parser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def feed(self, text: str) -> list[Event]:
        """Take the next chunk; return what it decides."""
        if self._reasoning is not None:
            return self._find_calls(self._reasoning.feed(text))
        return self._find_calls([Content(text)] if text else [])

    def finish(self) -> list[Event]:
        """The text ended: return what was held back."""
        events = self._find_calls(self._reasoning.finish() if self._reasoning is not None else [])
        return [*events, *self._tools.finish()] if self._tools is not None else events

    def _find_calls(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            found += self._tools.feed(event.text) if isinstance(event, Content) else [event]
        return found


def guess(template: str) -> Guess:
    """Which parsers a model needs, by what its chat template writes. Plain searches, the most telling first."""
    return Guess(_guess_tools(template), _guess_reasoning(template))


def _guess_tools(template: str) -> str | None:
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseekv3" if "```json" in template else "deepseekv31"
    if "<arg_key>" in template or "<|tool_call_begin|>" in template:
        return None  # GLM 4.5 writes <tool_call>, too, and Kimi K2 has a form of its own; both are unknown here
    signs = (
        ("<function=", "qwen3_coder"),
        ("<tool_call>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|START_ACTION|>", "command-r"),
        ("Action:", "command-r"),
        ("func_name1(params", "pythonic"),  # Llama's templates show the model this example
        ("<|python_start|>", "pythonic"),
        ("<|python_tag|>", "llama3"),
        ('{"name": function name, "parameters"', "llama3"),
    )
    return next((name for sign, name in signs if sign in template), None)


def _guess_reasoning(template: str) -> str | None:
    signs = (
        ("<|START_THINKING|>", "cohere_command3"),
        ("[THINK]", "mistral"),
        ("<seed:think>", "seed_oss"),
        ("◁think▷", "kimi"),
        ("<|channel>thought", "gemma4"),
        ("Here is my thought process:", "granite"),
    )
    for sign, name in signs:
        if sign in template:
            return name
    if "</think>" not in template:
        return None
    if "<answer>" in template:
        return "hunyuan_a13b"
    # A template that ends the prompt with the tag does so unless the request can switch thinking off.
    prompt = template.rpartition("add_generation_prompt")[2]
    opened = "<think>" in prompt and "thinking" not in prompt
    if "<tool_call>" in template:
        return "qwen3-thinking" if opened else "qwen3"
    return "deepseek-r1" if opened else "deepseek-v3"
