"""The frontend language: programs that call a model many times, fork, join and choose. `import actorserve.lang as sgl`.

The words are SGLang's (Zheng et al., arXiv 2312.07104): a program for it runs here with its import changed. Backends
are imported on first use. docs/language.md is the introduction.
"""

from typing import TYPE_CHECKING, Any

from .api import (
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    gen_int,
    gen_string,
    image,
    repeat,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    var,
    video,
    when,
)
from .backend import aflush_cache, aget_server_info, flush_cache, get_server_info, set_default_backend
from .choices import greedy_token_selection, token_length_normalized, unconditional_likelihood_normalized
from .program import SglFunction, function
from .state import ProgramState, ProgramStateGroup
from .templates import ChatTemplate, register_chat_template
from .tools import ToolCall
from .variables import ProgramError

if TYPE_CHECKING:
    from .anthropic_backend import Anthropic as Anthropic
    from .endpoint import Runtime as Runtime
    from .endpoint import RuntimeEndpoint as RuntimeEndpoint
    from .engine_backend import Engine as Engine
    from .openai_backend import OpenAI as OpenAI

__all__ = [
    "Anthropic",
    "ChatTemplate",
    "Engine",
    "OpenAI",
    "ProgramError",
    "ProgramState",
    "ProgramStateGroup",
    "Runtime",
    "RuntimeEndpoint",
    "SglFunction",
    "ToolCall",
    "aflush_cache",
    "aget_server_info",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "greedy_token_selection",
    "image",
    "register_chat_template",
    "repeat",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "var",
    "video",
    "when",
]

_HOMES = {
    "Anthropic": ".anthropic_backend",
    "Engine": ".engine_backend",
    "OpenAI": ".openai_backend",
    "Runtime": ".endpoint",
    "RuntimeEndpoint": ".endpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
