"""The JSON bodies of /v1/messages (Anthropic), and a request's meaning as a chat completion.

Used by messages.py. Invariant: as in protocol.py, what changes the result is honoured or refused by name. Fields that
change nothing here (metadata, service_tier, cache_control: every prefix is cached) are dropped.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

from ..actors.conversation import ChatMessage, ContentPart, ImageUrl
from ..errors import RequestError
from .chat_types import (
    ChatRequest,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from .protocol import Priority, Refusable, Seed, StopStrings, Temperature, TopK, TopP

MaxTokens: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 31)]


class ImageSource(Struct, frozen=True):
    """An image in base64, or its address."""

    type: Literal["base64", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Block(Struct, frozen=True):
    """A piece of a turn: text, image, thinking, redacted_thinking, tool_use or tool_result; others are refused by
    name."""

    type: str
    source: ImageSource | None = None
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None


class MessageTurn(Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class MessageTool(Struct, frozen=True):
    """A function of the client; tools that a server runs by itself have other types, and are not there."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:/-]+$", max_length=128)]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None


class MessageToolChoice(Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, frozen=True):
    """Told to the chat template, as `enable_thinking`, `thinking` and `thinking_budget`; the model may disregard it.

    `display: "omitted"` leaves the text of thoughts out of the reply.
    """

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: MaxTokens | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, frozen=True):
    type: Literal["json_schema"]
    schema: bool | dict[str, Any]


class OutputConfig(Struct, frozen=True):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Struct, frozen=True, kw_only=True):
    """The fields that the prompt follows from."""

    messages: list[MessageTurn]
    model: str
    system: str | list[Block] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    container: Refusable = None
    mcp_servers: Refusable = None


class MessageRequest(CountRequest, frozen=True, kw_only=True):
    max_tokens: MaxTokens
    stop_sequences: StopStrings | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    cache_salt: str | None = None
    priority: Priority | None = None


REFUSED: Final = ("container", "mcp_servers")

CHAT_NAMES: Final = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "tool_choice.function.name": "tool_choice.name",
}
"""Fields of the chat completion, and what they are called here."""


class MessageUsage(Struct, frozen=True):
    """The prompt's tokens are input_tokens + cache_read_input_tokens."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Message(Struct, frozen=True, kw_only=True):
    """Anthropic's object. `content`: blocks of thinking, text and tool_use, in the order in which they were said."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(Struct, frozen=True):
    input_tokens: int


def chat_request(request: CountRequest) -> ChatRequest:
    """The chat completion that a request means. Raises RequestError naming the field.

    A last turn of the assistant is one that the model goes on with.
    """
    turns = [] if request.system is None else [ChatMessage("system", _texts(request.system, "system"))]
    for i, turn in enumerate(request.messages):
        turns += _turns(turn, f"messages[{i}].content")
    if not request.messages:
        raise RequestError("messages is empty", param="messages")
    choice = request.tool_choice
    output = request.output_config or OutputConfig()
    chat = ChatRequest(
        messages=turns,
        tools=[Tool("function", _function(tool)) for tool in request.tools or ()],
        tool_choice=_choice(choice),
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
        response_format=None
        if output.format is None
        else ResponseFormat("json_schema", JsonSchemaFormat(output.format.schema)),
        reasoning_effort=output.effort,
        continue_final_message=turns[-1].role == "assistant",
        chat_template_kwargs=_template_arguments(request),
    )
    return _sampled(chat, request) if isinstance(request, MessageRequest) else chat


def _sampled(chat: ChatRequest, request: MessageRequest) -> ChatRequest:
    """With the fields that say how to go on."""
    thinking = request.thinking
    if thinking is not None and thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise RequestError("thinking of type enabled needs budget_tokens", param="thinking.budget_tokens")
        if thinking.budget_tokens >= request.max_tokens:
            raise RequestError("budget_tokens must be below max_tokens", param="thinking.budget_tokens")
    return msgspec.structs.replace(
        chat,
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        cache_salt=request.cache_salt,
        priority=request.priority,
    )


def _turns(turn: MessageTurn, where: str) -> list[ChatMessage]:
    if turn.role == "assistant":
        return [_assistant(turn.content, where)]
    if turn.role == "system" or isinstance(turn.content, str):
        return [ChatMessage(turn.role, _texts(turn.content, where))]
    turns: list[ChatMessage] = []
    said: list[ContentPart] = []
    for j, block in enumerate(turn.content):
        if block.type == "tool_result":
            turns.append(_tool_result(block, f"{where}[{j}]"))
        elif block.type == "image":
            said.append(_image_part(block, f"{where}[{j}].source"))
        else:
            said.append(_text_part(block, f"{where}[{j}]"))
    return [*turns, ChatMessage("user", said)] if said or not turns else turns


def _tool_result(block: Block, where: str) -> ChatMessage:
    if block.tool_use_id is None:
        raise RequestError("a tool_result needs tool_use_id", param=f"{where}.tool_use_id")
    content = _texts(block.content or "", f"{where}.content")
    text = content if isinstance(content, str) else "".join(part.text or "" for part in content)
    # Templates have no other place for it.
    return ChatMessage("tool", f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id)


def _assistant(content: str | list[Block], where: str) -> ChatMessage:
    if isinstance(content, str):
        return ChatMessage("assistant", content)
    thoughts, said, calls = "", "", list[dict[str, Any]]()
    for j, block in enumerate(content):
        match block.type:
            case "thinking":
                thoughts += block.thinking or ""
            case "redacted_thinking":
                continue
            case "tool_use":
                calls.append(_call(block, f"{where}[{j}]"))
            case _:
                said += _text_part(block, f"{where}[{j}]").text or ""
    return ChatMessage(
        "assistant", said if said or not calls else None, tool_calls=calls or None, reasoning_content=thoughts or None
    )


def _call(block: Block, where: str) -> dict[str, Any]:
    for name in ("id", "name", "input"):
        if getattr(block, name) is None:
            raise RequestError(f"a tool_use needs {name}", param=f"{where}.{name}")
    arguments = msgspec.json.encode(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _texts(content: str | list[Block], where: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    return [_text_part(block, f"{where}[{j}]") for j, block in enumerate(content)]


def _image_part(block: Block, where: str) -> ContentPart:
    source = block.source
    if source is None:
        raise RequestError("an image needs source", param=where)
    if source.type == "url":
        return ContentPart("image_url", image_url=ImageUrl(source.url or ""), field=where)
    if source.data is None:
        raise RequestError("a source of type base64 needs data", param=f"{where}.data")
    url = f"data:{source.media_type or 'image/png'};base64,{source.data}"
    return ContentPart("image_url", image_url=ImageUrl(url), field=f"{where}.data")


def _text_part(block: Block, where: str) -> ContentPart:
    if block.type != "text":
        what = f"a block of type {block.type[:64]} is not supported here; served: text, and image in a user's turn"
        raise RequestError(what, param=where, code="unsupported_value")
    if block.text is None:
        raise RequestError("a text block needs text", param=f"{where}.text")
    return ContentPart("text", block.text)


def _function(tool: MessageTool) -> FunctionDefinition:
    return FunctionDefinition(tool.name, tool.description, tool.input_schema, tool.strict)


def _choice(choice: MessageToolChoice | None) -> Literal["none", "auto", "required"] | NamedToolChoice | None:
    if choice is None:
        return None
    match choice.type:
        case "any":
            return "required"
        case "tool":
            if choice.name is None:
                raise RequestError("tool_choice of type tool needs a name", param="tool_choice.name")
            return NamedToolChoice("function", FunctionName(choice.name))
        case kind:
            return kind


def _template_arguments(request: CountRequest) -> dict[str, Any] | None:
    """Templates of open models know thinking under one of these names."""
    thinking = request.thinking
    if thinking is None:
        return request.chat_template_kwargs
    wanted = thinking.type != "disabled"
    arguments: dict[str, Any] = {"enable_thinking": wanted, "thinking": wanted}
    if thinking.budget_tokens is not None:
        arguments["thinking_budget"] = thinking.budget_tokens
    return arguments | (request.chat_template_kwargs or {})
