"""/v1/messages: Anthropic's protocol on top of the chat path: create, stream, count_tokens.

Routed by app.py. Invariant: a message is a chat completion of one choice, so what holds for those (tools, thoughts,
grammars) holds here; errors have Anthropic's shape.
"""

import uuid
from typing import Final

import msgspec

from ..errors import RequestError
from .chat_tools import plan_tools
from .error_replies import decode_body
from .exchange import Exchange
from .message_types import (
    CHAT_NAMES,
    REFUSED,
    CountRequest,
    Message,
    MessageRequest,
    MessageUsage,
    TokenCount,
    chat_request,
)
from .message_writer import MessageWriter
from .openai import planned_prompt, renamed, submitted_chat
from .openai_grammar import requested_grammar
from .protocol import encode
from .service import Service
from .sse import send_output

_decoder: Final = msgspec.json.Decoder(MessageRequest)
_count_decoder: Final = msgspec.json.Decoder(CountRequest)


async def create(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/messages."""
    request = decode_body(_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    _refuse(request)
    message = Message(id=f"msg_{uuid.uuid4().hex}", model=service.model_name, usage=MessageUsage(0, 0, 0))
    with renamed(CHAT_NAMES), submitted_chat(service, chat_request(request), message.id) as (stream, reading):
        omitted = request.thinking is not None and request.thinking.display == "omitted"
        writer = MessageWriter(message, stream, reading, not omitted)
        await send_output(exchange, stream, writer, bool(request.stream))


async def count_tokens(service: Service, exchange: Exchange) -> None:
    """Serve POST /v1/messages/count_tokens: the prompt's length in tokens."""
    request = decode_body(_count_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    _refuse(request)
    with renamed(CHAT_NAMES):
        chat = chat_request(request)
        grammar, _ = requested_grammar(chat, chat.response_format)
        prompt = planned_prompt(chat, plan_tools(chat, grammar, service.model))
        ids = await service.client.questions.tokenize(prompt)
    await exchange.reply(encode(TokenCount(len(ids))))


def _refuse(request: CountRequest) -> None:
    for name in REFUSED:
        if getattr(request, name):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_value")
