"""The JSON bodies of /v1/responses, and a request's meaning as a chat completion.

Used by responses.py. Invariant: as in protocol.py, what changes the result is honoured or refused by name.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

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
from .protocol import Priority, Refusable, Seed, Temperature, Tokens, TopP


class InputPart(Struct, frozen=True):
    """A piece of a message: input_text and input_image of the user, output_text of the model."""

    type: str
    text: str | None = None
    image_url: str | None = None
    """A data: address."""


class InputItem(Struct, frozen=True):
    """A message, a call that the model made, what came of one, or thoughts (which are left out)."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ResponseTool(Struct, frozen=True, omit_defaults=True):
    """Only functions; tools that a server runs by itself are not there."""

    type: Literal["function"]
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:/-]+$", max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Struct, frozen=True):
    type: Literal["function"]
    name: str


class TextFormat(Struct, frozen=True):
    """`response_format` of a chat completion, written flat."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: bool | dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, frozen=True):
    format: TextFormat | None = None


class ReasoningOptions(Struct, frozen=True):
    effort: str | None = None


class ResponseRequest(Struct, frozen=True, kw_only=True):
    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    background: Refusable = None
    conversation: Refusable = None
    prompt: Refusable = None
    top_logprobs: Refusable = None
    max_tool_calls: Refusable = None


REFUSED: Final = ("background", "conversation", "prompt", "top_logprobs", "max_tool_calls")

CHAT_NAMES: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Fields of the chat completion, and what they are called here."""


class CachedTokens(Struct, frozen=True):
    cached_tokens: int


class ReasoningTokens(Struct, frozen=True):
    """Thoughts are not counted apart from the rest: 0."""

    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Response(Struct, frozen=True, kw_only=True):
    """OpenAI's object. The request's fields come back in it; `output` has messages, calls and thoughts in order."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[ResponseTool]
    text: Any
    reasoning: Any
    metadata: dict[str, str]
    store: bool
    usage: ResponseUsage | None = None


class DeletedResponse(Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


def chat_request(request: ResponseRequest, before: list[ChatMessage]) -> ChatRequest:
    """The chat completion that a request means, after the turns `before`. Raises RequestError naming the field."""
    turns = before + input_messages(request.input)
    if request.instructions is not None:
        turns = [ChatMessage("system", request.instructions), *turns]
    choice = request.tool_choice
    if isinstance(choice, ResponseToolChoice):
        choice = NamedToolChoice("function", FunctionName(choice.name))  # type: ignore[assignment]
    effort = request.reasoning.effort if request.reasoning else None
    return ChatRequest(
        messages=turns,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        tools=[Tool("function", _function(tool)) for tool in request.tools or ()],
        tool_choice=choice,  # type: ignore[arg-type]
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_format(request.text),
        reasoning_effort=effort,
        chat_template_kwargs=request.chat_template_kwargs,
        cache_salt=request.cache_salt,
        priority=request.priority,
    )


def input_messages(given: str | list[InputItem]) -> list[ChatMessage]:
    """The input as turns. Calls belong to the assistant's turn before them."""
    if isinstance(given, str):
        return [ChatMessage("user", given)]
    turns: list[ChatMessage] = []
    for i, item in enumerate(given):
        match item.type:
            case "message":
                if item.role is None:
                    raise RequestError("a message needs a role", param=f"input[{i}].role")
                turns.append(ChatMessage(item.role, _content(item.content, f"input[{i}].content")))
            case "function_call":
                call = _call(item, i)
                if turns and turns[-1].role == "assistant":
                    calls = [*(turns[-1].tool_calls or ()), call]
                    turns[-1] = msgspec.structs.replace(turns[-1], tool_calls=calls)
                else:
                    turns.append(ChatMessage("assistant", tool_calls=[call]))
            case "function_call_output":
                content = _content(item.output, f"input[{i}].output")
                turns.append(ChatMessage("tool", content, tool_call_id=item.call_id))
            case "reasoning":
                continue
    return turns


def _call(item: InputItem, i: int) -> dict[str, Any]:
    if item.name is None or item.arguments is None:
        field = "name" if item.name is None else "arguments"
        raise RequestError(f"a function_call needs {field}", param=f"input[{i}].{field}")
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


def _content(content: str | list[InputPart] | None, where: str) -> str | list[ContentPart]:
    if content is None or isinstance(content, str):
        return content or ""
    return [_part(part, f"{where}[{j}]") for j, part in enumerate(content)]


def _part(part: InputPart, where: str) -> ContentPart:
    if part.type == "input_image" and part.image_url is not None:
        return ContentPart("image_url", image_url=ImageUrl(part.image_url), field=f"{where}.image_url")
    if part.type not in ("input_text", "output_text", "text") or part.text is None:
        what = f"content of type {part.type[:64]} is not supported; served: texts, and input_image with image_url"
        raise RequestError(what, param=where, code="unsupported_value")
    return ContentPart("text", part.text)


def _function(tool: ResponseTool) -> FunctionDefinition:
    return FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict)


def _format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    wanted = text.format
    return ResponseFormat(wanted.type, JsonSchemaFormat(wanted.schema, wanted.name, wanted.description, wanted.strict))
