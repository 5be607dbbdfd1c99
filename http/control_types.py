"""The JSON bodies of SGLang's routes beside /generate: tokens of texts, and orders to the engine.

Used by control_routes.py. Invariant: as in protocol.py, names are SGLang's.
"""

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from ..actors.conversation import ChatMessage
from .protocol import Refusable, Tool


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """A text, several texts, or a conversation as in a chat completion."""

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    chat_template: Refusable = None


class TokenizeReply(Struct, frozen=True):
    tokens: Sequence[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[int | list[int]]
    skip_special_tokens: bool = True


class DetokenizeReply(Struct, frozen=True):
    text: str | list[str]


class AbortRequest(Struct, frozen=True):
    """`rid`: of /generate, or the id of an OpenAI reply."""

    rid: str = ""
    abort_all: bool = False


class PauseRequest(Struct, frozen=True):
    """What becomes of running requests: they end with what they have, give their pages back and go on later, or stand
    still."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class GenerationState(Struct, frozen=True):
    status: Literal["paused", "running"]
    mode: str | UnsetType = UNSET
