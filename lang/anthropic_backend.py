"""Anthropic's Messages API as a backend. A turn that has begun is continued: the API takes an assistant's message last.

Invariant: as in openai_backend.py, nothing that a program asks for is dropped silently.
"""

import os
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from ..errors import RequestError
from .backend import Backend, Reply
from .checks import matching
from .context import Context
from .expressions import Sampling
from .http_calls import Http, stopped
from .templates import get_chat_template
from .tools import call_text

VERSION: Final = "2023-06-01"
IDLE: Final = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "ignore_eos": False,
    "min_new_tokens": 0,
    "n": 1,
}
"""Parameters that the API does not have, and their values without effect."""
NEVER: Final = "stop_regex ebnf stop_token_ids priority seed logit_bias return_logprob".split()


class Anthropic(Backend):
    """A model behind Anthropic's API."""

    is_chat_model = True
    takes_pictures = True
    takes_tools = True
    tells_tokens = False

    def __init__(
        self,
        model_name: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        """The key and the address that are not given come from ANTHROPIC_API_KEY and ANTHROPIC_BASE_URL."""
        super().__init__(model_name, get_chat_template("claude"))
        key = api_key or os.environ.get("ANTHROPIC_API_KEY", "")
        address = base_url or os.environ.get("ANTHROPIC_BASE_URL", "https://api.anthropic.com")
        headers = {"x-api-key": key, "anthropic-version": VERSION}
        self._http = Http(address, headers, timeout, max_retries)

    async def generate(self, context: Context, sampling: Sampling) -> Reply:
        body = self._body(context, sampling)
        if sampling.regex is not None or sampling.json_schema is not None:
            return await matching(lambda: self._call(body), sampling)
        return await self._call(body)

    async def _call(self, body: dict[str, Any]) -> Reply:
        answer = await self._http.post("/v1/messages", body)
        calls = [call_text(part["name"], part["input"]) for part in answer["content"] if part["type"] == "tool_use"]
        text = calls[0] if calls else "".join(part["text"] for part in answer["content"] if part["type"] == "text")
        return Reply([text], {"id": answer.get("id"), **_meta(answer.get("stop_reason"), answer.get("usage") or {})})

    async def stream(self, context: Context, sampling: Sampling) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        if sampling.tools is not None:
            raise self._cannot("stream calls of tools")
        if sampling.regex is not None or sampling.json_schema is not None:
            raise RequestError("a stream cannot be checked against a regular expression or a schema", param="stream")
        reason: str | None = None
        usage: dict[str, Any] = {}
        async for event in self._http.events("/v1/messages", self._body(context, sampling) | {"stream": True}):
            match event["type"]:
                case "message_start":
                    usage = event["message"].get("usage") or {}
                case "content_block_delta" if event["delta"]["type"] == "text_delta":
                    yield event["delta"]["text"], _meta(None, usage)
                case "message_delta":
                    reason, usage = event["delta"].get("stop_reason"), usage | (event.get("usage") or {})
                    yield "", _meta(reason, usage)
                case "error":
                    raise stopped(event["error"])

    def _body(self, context: Context, sampling: Sampling) -> dict[str, Any]:
        for name in NEVER:
            if getattr(sampling, name):
                raise self._cannot(f"take {name}")
        for name, idle in IDLE.items():
            if getattr(sampling, name) not in (None, idle):
                raise self._cannot(f"take {name}")
        messages, _ = context.conversation()
        body: dict[str, Any] = {
            "model": self.name,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.top_p != 1.0 else None,
            "top_k": sampling.top_k if sampling.top_k != -1 else None,
            "stop_sequences": list(sampling.stop or ()) or None,
            "system": "\n\n".join(m["content"] for m in messages if m["role"] == "system") or None,
            "messages": [_turn(message) for message in messages if message["role"] != "system"],
        }
        if sampling.tools is not None:
            body |= {
                "tools": [_tool(tool["function"]) for tool in msgspec.json.decode(sampling.tools)],
                "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            }
        return {name: value for name, value in body.items() if value is not None}


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    """A function in Anthropic's form."""
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {"name": function["name"], "description": function.get("description") or "", "input_schema": schema}


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """A message in Anthropic's form."""
    if isinstance(message["content"], str):
        return message
    return {"role": message["role"], "content": [_part(part) for part in message["content"]]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    url = part["image_url"]["url"]
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, _, data = url[5:].partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def _meta(reason: str | None, usage: dict[str, Any]) -> dict[str, Any]:
    finish = {"max_tokens": "length", "end_turn": "stop", "stop_sequence": "stop"}.get(reason or "", reason)
    return {
        "finish_reason": None if reason is None else {"type": finish},
        "prompt_tokens": usage.get("input_tokens"),
        "completion_tokens": usage.get("output_tokens"),
    }
