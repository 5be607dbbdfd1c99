"""/v1/responses: OpenAI's newer protocol on top of the chat path: create, stream, retrieve, cancel, delete.

Routed by app.py. Invariant: a response is a chat completion of one choice, so what holds for those (tools, thoughts,
grammars, errors) holds here; one that is stored is the one that was sent.
"""

import time
import uuid
from typing import Final

import msgspec

from ..actors.conversation import ChatMessage
from ..errors import RequestError
from .error_replies import decode_body
from .exchange import Exchange
from .openai import renamed, submitted_chat
from .protocol import encode
from .response_store import Stored
from .response_types import CHAT_NAMES, REFUSED, DeletedResponse, Response, ResponseRequest, chat_request
from .response_writer import ResponseWriter
from .service import Service
from .sse import send_output

_decoder: Final = msgspec.json.Decoder(ResponseRequest)


async def create(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/responses."""
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    for name in REFUSED:
        if getattr(request, name):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_value")
    before: list[ChatMessage] = []
    if request.previous_response_id is not None:
        before = service.responses.get(request.previous_response_id, "previous_response_id", exchange.owner).messages
    with renamed(CHAT_NAMES):
        chat = chat_request(request, before)
        turns = chat.messages[request.instructions is not None :]
        response = _begun(service, request)

        def keep(finished: Response, turn: ChatMessage) -> None:
            if finished.store:
                body, messages = encode(finished), [*turns, turn]
                size = len(body) + sum(len(encode(message)) for message in messages)
                service.responses.put(finished.id, Stored(body, messages, size), exchange.owner)

        with submitted_chat(service, chat, response.id) as (stream, reading):
            writer = ResponseWriter(response, stream, reading, keep)
            await send_output(exchange, stream, writer, bool(request.stream))


async def retrieve(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/responses/{id}: a response that was stored."""
    await exchange.reply(service.responses.get(exchange.path_id, owner=exchange.owner).body)


async def cancel(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/responses/{id}/cancel: 400, for nothing runs in the background; 404 for an unknown id."""
    service.responses.get(exchange.path_id, owner=exchange.owner)
    what = "only a response that runs in the background can be cancelled; close its connection, or POST /abort_request"
    raise RequestError(what, param="response_id", code="unsupported_value")


async def delete(service: Service, exchange: Exchange) -> None:
    """Serve DELETE /v1/responses/{id}."""
    service.responses.delete(exchange.path_id, exchange.owner)
    await exchange.reply(encode(DeletedResponse(exchange.path_id)))


def _begun(service: Service, request: ResponseRequest) -> Response:
    """The object before there is output."""
    usual = service.model.sampling
    return Response(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        status="in_progress",
        model=service.model_name,
        output=[],
        instructions=request.instructions,
        previous_response_id=request.previous_response_id,
        max_output_tokens=request.max_output_tokens,
        temperature=usual.get("temperature") if request.temperature is None else request.temperature,
        top_p=usual.get("top_p") if request.top_p is None else request.top_p,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        tool_choice=request.tool_choice or "auto",
        tools=request.tools or [],
        text=request.text or {"format": {"type": "text"}},
        reasoning=request.reasoning,
        metadata=request.metadata or {},
        store=request.store is not False,
    )
