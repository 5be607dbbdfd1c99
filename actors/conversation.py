"""A conversation as clients write it, checked and packed into the ChatPrompt that the text actor renders.

Used by the OpenAI routes and the embedded API. Invariant: what leaves here has the shape of `models.template`'s
ChatRequest; what a template makes of it is the text actor's affair.
"""

from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from ..errors import RequestError
from .image_fields import checked, checked_videos, image_file, video_file
from .messages import ChatPrompt, ImageFile, VideoFile

MAX_DEPTH: Final = 32
"""How deep template arguments and tool calls may be nested."""


class ImageUrl(Struct, frozen=True):
    """An image, by a data: or http(s) address. `detail` has no effect: the model's own processor says how fine it
    looks."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class VideoUrl(Struct, frozen=True):
    """A video, by its frames: data:video/jpeg;base64,FRAME,FRAME,... or a list of images' addresses."""

    url: str | list[str]
    fps: float | None = None
    """Frames of a second."""


class ContentPart(Struct, frozen=True, omit_defaults=True):
    """A piece of a message: type "text"; "image_url", "video_url" or "video" where the model takes images or videos.
    Others are refused by name."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None
    video_url: VideoUrl | str | None = None
    video: str | list[str] | None = None
    """As Qwen's own tools have it: the frames, with `fps` beside."""
    fps: float | None = None
    field: str | None = None
    """Of the request, if another than this one, that errors about the image name."""


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    """One turn. What a template may look at is passed on; other fields are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Payload(Struct, frozen=True, omit_defaults=True):
    """The JSON in a ChatPrompt."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


def chat_prompt(
    messages: list[ChatMessage],
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    tools: list[dict[str, Any]] | None = None,
    shown: tuple[str, ...] = (),
    opens: tuple[str, ...] = (),
) -> ChatPrompt:
    """Return the prompt of a conversation; raises RequestError with the field as `param`.

    `continue_final_message`: the model goes on with the last message, which must be the assistant's, instead of
    beginning a new one. `tools`: as OpenAI writes them, for the template. `shown`, `opens`: as in ChatPrompt.
    """
    if not messages:
        raise RequestError("messages is empty", param="messages")
    if continue_final_message and add_generation_prompt:
        what = "continue_final_message and add_generation_prompt exclude each other"
        raise RequestError(what, param="continue_final_message")
    if continue_final_message and messages[-1].role != "assistant":
        what = "continue_final_message needs a last message of the assistant"
        raise RequestError(what, param="continue_final_message")
    _check_depth(chat_template_kwargs, "chat_template_kwargs")
    _check_depth(tools, "tools")
    images, videos = list[ImageFile](), list[VideoFile]()
    turns = [_checked(message, f"messages[{i}]", images, videos) for i, message in enumerate(messages)]
    payload = Payload(turns, add_generation_prompt, continue_final_message, chat_template_kwargs, tools)
    try:
        encoded = msgspec.json.encode(payload)
        return ChatPrompt(encoded, shown, opens, checked(images), checked_videos(images, videos))
    except (msgspec.EncodeError, TypeError, UnicodeEncodeError) as error:
        raise RequestError(f"the conversation is not JSON: {error}", param="messages") from None


def _checked(message: ChatMessage, where: str, images: list[ImageFile], videos: list[VideoFile]) -> ChatMessage:
    """The turn for the template; its images and videos go to the ends of the lists."""
    if isinstance(message.content, list):
        parts = [_part(part, f"{where}.content[{j}]", images, videos) for j, part in enumerate(message.content)]
        message = msgspec.structs.replace(message, content=parts)
    elif message.content is None and not message.tool_calls:
        if message.role != "assistant" or not message.reasoning_content:
            raise RequestError(f"a message of {message.role} needs content", param=f"{where}.content")
        message = msgspec.structs.replace(message, content="")  # an answer that was cut amid its thoughts comes back
    _check_depth(message.tool_calls, f"{where}.tool_calls")
    # OpenAI's newer name; templates of open models know the older one.
    return msgspec.structs.replace(message, role="system") if message.role == "developer" else message


def _part(part: ContentPart, where: str, images: list[ImageFile], videos: list[VideoFile]) -> ContentPart:
    if part.type == "image_url":
        if part.image_url is None:
            raise RequestError("an image_url part needs image_url", param=f"{where}.image_url")
        url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
        images.append(image_file(url, part.field or f"{where}.image_url"))
        return ContentPart("image")
    if part.type in ("video_url", "video"):
        given = part.video_url if part.type == "video_url" else part.video
        if given is None:
            raise RequestError(f"a {part.type} part needs {part.type}", param=f"{where}.{part.type}")
        frames, fps = (given.url, given.fps) if isinstance(given, VideoUrl) else (given, part.fps)
        videos.append(video_file(frames, part.field or f"{where}.{part.type}", fps))
        return ContentPart("video")
    if part.type != "text":
        served = "served: text; image_url and video_url for models that take images or videos"
        what = f"content of type {part.type[:64]} is not supported; {served}"
        raise RequestError(what, param=where, code="unsupported_value")
    if part.text is None:
        raise RequestError("a text part needs text", param=f"{where}.text")
    return ContentPart("text", part.text)


def _check_depth(value: Any, param: str) -> None:
    if _depth(value) > MAX_DEPTH:
        raise RequestError(f"{param} is nested more than {MAX_DEPTH} deep", param=param)


def _depth(value: Any, level: int = 0) -> int:
    """Return how deep lists and objects are nested in `value`, counting no further than the limit matters."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None or level > MAX_DEPTH:
        return level
    return max((_depth(item, level + 1) for item in inner), default=level + 1)
