"""A stand-in for OpenAI's API on a real port: it continues a script, and counts calls and prompt tokens.

A token is a word with the space before it. `script` holds for completions: a prompt that is the beginning of it is
continued by the rest. `replies` hold for chat: the answer to the last message. Both may be functions of the request.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from served import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def tokens(text: str) -> list[str]:
    return re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)


@dataclass
class StandIn:
    script: Any = ""
    replies: Any = None
    with_logprobs: bool = True
    failures: list[int] = field(default_factory=list)
    """Statuses of the next answers."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    url: str = ""
    call: tuple[str, Any] | None = None
    """The function and the arguments with which requests with tools are answered."""

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.headers.append(dict(request.headers))
        self.paths.append(str(request.url).removeprefix(self.url))
        if self.failures:
            error = {"error": {"message": "as told", "code": "told", "param": "model"}}
            return JSONResponse(error, self.failures.pop(0), {"retry-after": "0"})
        self.bodies.append(body)
        if request.url.path.endswith("/messages"):
            return self.anthropic(body)
        chat = "messages" in body
        text = self.said(body)
        words, finish = self.cut(text, body)
        prompt = body.get("prompt") or "".join(str(m["content"]) for m in body["messages"])
        self.prompt_tokens += len(tokens(prompt))
        if body.get("stream"):
            return StreamingResponse(self.stream(words, finish, chat), media_type="text/event-stream")
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        said = "".join(words)
        choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
        if body.get("tools") and self.call:
            name, arguments = self.call
            choice["message"] = {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                ],
            }
        if self.with_logprobs and body.get("logprobs") is not None:
            rows = [{"token": word, "logprob": -1.0} for word in words]
            choice["logprobs"] = {"content": rows} if chat else {"tokens": words, "token_logprobs": [-1.0] * len(words)}
        usage = {"prompt_tokens": len(tokens(prompt)), "completion_tokens": len(words)}
        return JSONResponse({"id": "x", "choices": [choice], "usage": usage})

    def said(self, body: dict[str, Any]) -> str:
        if "messages" not in body:
            script = self.script(body) if callable(self.script) else self.script
            assert script.startswith(body["prompt"]), body["prompt"]
            return str(script[len(body["prompt"]) :])
        return self.replies(body) if callable(self.replies) else self.replies[body["messages"][-1]["content"]]

    def cut(self, text: str, body: dict[str, Any]) -> tuple[list[str], str]:
        words = tokens(text)[: body.get("max_tokens") or body.get("max_completion_tokens")]
        finish = "stop" if len(words) == len(tokens(text)) else "length"
        said = "".join(words)
        places = [said.find(stop) for stop in body.get("stop") or () if stop in said]
        return (tokens(said[: min(places)]), "stop") if places else (words, finish)

    def stream(self, words: list[str], finish: str, chat: bool) -> Iterator[str]:
        for i, word in enumerate(words):
            choice = {"index": 0, "finish_reason": finish if i == len(words) - 1 else None}
            choice |= {"delta": {"content": word}} if chat else {"text": word}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    def anthropic(self, body: dict[str, Any]) -> Response:
        text = self.said(body)
        if body.get("tools") and self.call:
            use = {"type": "tool_use", "id": "c", "name": self.call[0], "input": self.call[1]}
            return JSONResponse({"content": [{"type": "text", "text": "I will."}, use], "stop_reason": "tool_use"})
        if not body.get("stream"):
            usage = {"input_tokens": 7, "output_tokens": 2}
            return JSONResponse(
                {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "usage": usage}
            )
        events = [
            {"type": "message_start", "message": {"usage": {"input_tokens": 7}}},
            *({"type": "content_block_delta", "delta": {"type": "text_delta", "text": word}} for word in tokens(text)),
            {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 2}},
        ]
        lines = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
        return StreamingResponse(iter(lines), media_type="text/event-stream")


@contextmanager
def stand_in(answer: Any = None) -> Iterator[StandIn]:
    """The server, until the block ends. `answer`: another handler than StandIn's."""
    server = StandIn()
    app = Starlette(routes=[Route("/{path:path}", answer or server.answer, methods=["POST"])])
    with served(app) as server.url:
        yield server
