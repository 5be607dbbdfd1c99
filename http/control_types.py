"""The JSON bodies of SGLang's routes beside /generate: tokens of texts, and orders to the engine.

Used by control_routes.py. Invariant: as in protocol.py, names are SGLang's.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.conversation import ChatMessage
from .chat_types import Tool
from .protocol import Refusable


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


class ProfileRequest(Struct, frozen=True):
    """`num_steps`: it ends by itself after so many. Files go to the server's --profile-dir."""

    num_steps: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    activities: Annotated[list[Literal["CPU", "GPU"]], Meta(min_length=1, max_length=2)] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    output_dir: Refusable = None
    start_step: Refusable = None
    profile_by_stage: Refusable = None


PROFILE_FIELDS: Final = ("num_steps", "activities", "with_stack", "record_shapes")
"""What the executors' profiler is told, as its ProfileOptions."""


class ProfileState(Struct, frozen=True):
    """`file`: in the server's --profile-dir, for Perfetto or chrome://tracing."""

    status: Literal["profiling", "stopped"]
    file: str | UnsetType = UNSET


class WeightsRequest(Struct, frozen=True):
    """`model_path`: a folder under the server's --weights-root, with weights of the shapes that are served."""

    model_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    load_format: Literal["auto", "safetensors"] | None = None
    abort_all_requests: bool = False
    """End running requests, instead of going on with the new weights."""
    flush_cache: Literal[True] | None = None
    """Always: KV of other weights is of no use."""
    is_async: Refusable = None


class WeightsReply(Struct, frozen=True):
    success: bool
    message: str
    num_paused_requests: int = 0


class GenerationState(Struct, frozen=True):
    status: Literal["paused", "running"]
    mode: str | UnsetType = UNSET
