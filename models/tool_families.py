"""How model families write tool calls: one table of states each, which ToolParser walks through.

A family is data: markers that begin a region of calls, and states that say which literal or reader may come next.
Whitespace may stand before every literal and reader. Invariants that tool_parser.py relies on: no opener of a family
contains another one, and of what may come next in a state no two can begin alike.
"""

from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from .call_readers import ArgumentsReader, CallKeys, CallReader, NameReader
from .call_sink import CallSink, Reader
from .literal_readers import PythonReader, XmlReader

END: Final = "end"
"""The state after the last one."""

ReaderKind: TypeAlias = Literal["call", "arguments", "name", "word", "python", "xml"]


class State(Struct, frozen=True):
    """What may come next: a literal, with the state after it; or what a reader reads, with the state after it."""

    literals: tuple[tuple[str, str], ...] = ()
    reader: ReaderKind | None = None
    then: str = END


class ToolFamily(Struct, frozen=True):
    """`openers`: marker -> state after it. `bare`: what an output may begin with to be a call without a marker.

    A state that cannot go on ends the region; closing markers that models forget need no state of their own for that.
    """

    states: dict[str, State]
    openers: dict[str, str] = {}
    bare: dict[str, str] = {}
    keys: CallKeys = CallKeys()

    @property
    def markers(self) -> frozenset[str]:
        """All literals; those that are special tokens must be shown by the detokenizer."""
        return frozenset(self.openers) | {text for state in self.states.values() for text, _ in state.literals}

    def reader(self, kind: ReaderKind, sink: CallSink) -> Reader:
        match kind:
            case "call":
                return CallReader(sink, self.keys)
            case "arguments":
                return ArgumentsReader(sink)
            case "name":
                return NameReader(sink)
            case "word":
                return NameReader(sink, is_name=False)
            case "python":
                return PythonReader(sink)
            case "xml":
                return XmlReader(sink)


def _list(close: str) -> dict[str, State]:
    """[call, call]: what follows the bracket; `close` is the state after it."""
    return {
        "item": State(reader="call", then="separator"),
        "separator": State(literals=((",", "item"), ("]", close))),
    }


HERMES: Final = ToolFamily(  # <tool_call>{"name": ..., "arguments": ...}</tool_call>
    openers={"<tool_call>": "call"},
    states={"call": State(reader="call", then="close"), "close": State(literals=(("</tool_call>", END),))},
)

LLAMA3: Final = ToolFamily(  # <|python_tag|>{"name": ..., "parameters": ...}; {...}   or without the tag
    openers={"<|python_tag|>": "call"},
    bare={"{": "call"},
    states={
        "call": State(reader="call", then="next"),
        "next": State(literals=((";", "call"), ("<|python_tag|>", "call")), reader="call", then="next"),
    },
    keys=CallKeys(lone=True),
)

MISTRAL: Final = ToolFamily(  # [TOOL_CALLS] [{...}, ...]   [TOOL_CALLS]name[ARGS]{...}   [TOOL_CALLS]name{...}
    openers={"[TOOL_CALLS]": "open"},
    states={
        "open": State(literals=(("[", "item"),), reader="name", then="named"),
        "named": State(literals=(("[ARGS]", "arguments"), ("[CALL_ID]", "id")), reader="arguments"),
        "id": State(reader="word", then="identified"),
        "identified": State(literals=(("[ARGS]", "arguments"),)),
        "arguments": State(reader="arguments"),
        **_list(END),
    },
)

_BEGIN, _CALL, _SEP, _CALL_END, _FINISH = (
    f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)

DEEPSEEK_V3: Final = ToolFamily(  # BEGIN CALL function SEP name \n```json\n {...} \n``` CALL_END ... FINISH
    openers={_BEGIN: "each", _CALL: "kind"},
    states={
        "each": State(literals=((_CALL, "kind"),)),
        "kind": State(literals=(("function", "separator"),)),
        "separator": State(literals=((_SEP, "name"),)),
        "name": State(reader="name", then="fence"),
        "fence": State(literals=(("```json", "arguments"),)),
        "arguments": State(reader="arguments", then="fenced"),
        "fenced": State(literals=(("```", "ended"), (_CALL_END, "more"))),
        "ended": State(literals=((_CALL_END, "more"),)),
        "more": State(literals=((_CALL, "kind"), (_FINISH, END))),
    },
)

DEEPSEEK_V31: Final = ToolFamily(  # BEGIN CALL name SEP {...} CALL_END ... FINISH
    openers={_BEGIN: "each", _CALL: "name"},
    states={
        "each": State(literals=((_CALL, "name"),)),
        "name": State(reader="name", then="separator"),
        "separator": State(literals=((_SEP, "arguments"),)),
        "arguments": State(reader="arguments", then="ended"),
        "ended": State(literals=((_CALL_END, "more"),)),
        "more": State(literals=((_CALL, "name"), (_FINISH, END))),
    },
)

COMMAND_R: Final = ToolFamily(  # Action: ```json [{"tool_name": ..., "parameters": ...}] ```   <|START_ACTION|> [...]
    openers={"<|START_ACTION|>": "action", "Action:": "fence"},
    states={
        "action": State(literals=(("[", "item"),)),
        "fence": State(literals=(("```json", "action"),)),
        "close": State(literals=(("<|END_ACTION|>", END), ("```", END))),
        **_list("close"),
    },
    keys=CallKeys(names=("tool_name", "name"), arguments=("parameters", "arguments")),
)

PYTHONIC: Final = ToolFamily(  # [f(a=1), g(b="x")]   or between Llama 4's <|python_start|> and <|python_end|>
    openers={"<|python_start|>": "list", "<|python_tag|>": "list"},
    bare={"[": "list"},
    states={
        "list": State(reader="python", then="close"),
        "close": State(literals=(("<|python_end|>", END),)),
    },
)

JSON: Final = ToolFamily(  # {"name": ..., "arguments": ...}   or an array of them, first thing in the output
    bare={"{": "single", "[": "array"},
    states={"single": State(reader="call"), "array": State(literals=(("[", "item"),)), **_list(END)},
    keys=CallKeys(names=("name", "tool_name"), lone=True),
)

QWEN3_CODER: Final = ToolFamily(  # <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
    openers={"<tool_call>": "call", "<function=": "function"},
    states={
        "call": State(literals=(("<function=", "function"),)),
        "function": State(reader="xml", then="close"),
        "close": State(literals=(("</tool_call>", END),)),
    },
)

TOOL_FAMILIES: Final = MappingProxyType(
    {
        "hermes": HERMES,
        "qwen": HERMES,
        "qwen25": HERMES,
        "llama3": LLAMA3,
        "llama3_json": LLAMA3,
        "llama4_json": LLAMA3,
        "mistral": MISTRAL,
        "deepseekv3": DEEPSEEK_V3,
        "deepseek_v3": DEEPSEEK_V3,
        "deepseekv31": DEEPSEEK_V31,
        "deepseek_v31": DEEPSEEK_V31,
        "command-r": COMMAND_R,
        "cohere_command3": COMMAND_R,
        "pythonic": PYTHONIC,
        "llama4_pythonic": PYTHONIC,
        "json": JSON,
        "qwen3_coder": QWEN3_CODER,
        "qwen3_xml": QWEN3_CODER,
        "step3p5": QWEN3_CODER,
        "mimo": QWEN3_CODER,
    }
)
"""The names that --tool-call-parser takes, which are SGLang's and vLLM's."""
