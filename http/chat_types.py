"""The JSON bodies of OpenAI's chats.

Used by openai.py, and by what is served on top of chats. Invariant: as in protocol.py.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ..actors.conversation import ChatMessage
from .openai_types import OpenAIRequest
from .protocol import Refusable, Tokens, TopLogprobs, Usage
from .timelines import RequestTimeline


class JsonSchemaFormat(Struct, frozen=True):
    """`strict` has no effect: an output always matches the whole schema."""

    schema: bool | dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True):
    """`structures` and `triggers` are of the type structural_tag (SGLang)."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class FunctionName(Struct, frozen=True):
    name: str


class FunctionDefinition(Struct, frozen=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:/-]+$", max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedToolChoice(Struct, frozen=True):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(extra_json_schema={"minItems": 1})]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """Passed on to the chat template."""
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    functions: Refusable = None
    audio: Refusable = None
    chat_template: Refusable = None
    """Templates are programs: which one is rendered is the operator's choice (--chat-template)."""


CHAT_REFUSED = ("functions", "audio", "chat_template")


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(Struct, frozen=True):
    """`arguments` is JSON text; in a stream, more of it."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(Struct, frozen=True):
    """`id`, `type` and the name come once, with the first piece of a call."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class AssistantMessage(Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """`valid`: as CompletionChoice's, of the text before tool calls and thoughts were taken out."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    valid: bool | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage
    timeline: list[RequestTimeline] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """`valid`: as ChatChoice's, in the last frame of the choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    valid: bool | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, frozen=True):
    """One frame of a chat stream. `usage`: UNSET unless asked for, then null until the last frame."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None
    timeline: list[RequestTimeline] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In the first frame."""
