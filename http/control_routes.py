"""SGLang's routes beside /generate: tokens of texts, orders to the engine, and what it says of itself.

Routed by app.py. Invariant: nothing here starts a generation; health comes from what the actors report, never from a
probe request.
"""

import functools
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import msgspec

from ..actors.conversation import chat_prompt
from ..actors.messages import Action, Prompt, TextPrompt
from ..errors import RequestError
from .control_types import (
    PROFILE_FIELDS,
    AbortRequest,
    DetokenizeReply,
    DetokenizeRequest,
    GenerationState,
    PauseRequest,
    ProfileRequest,
    ProfileState,
    TokenizeReply,
    TokenizeRequest,
    WeightsReply,
    WeightsRequest,
)
from .error_replies import decode_body
from .exchange import Exchange
from .native import split_ids
from .protocol import EngineVersion, Health, ModelDescription, encode
from .service import Service

PLAIN: Final = b"text/plain; charset=utf-8"
_tokenize_decoder: Final = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder: Final = msgspec.json.Decoder(DetokenizeRequest)
_abort_decoder: Final = msgspec.json.Decoder(AbortRequest)
_profile_decoder: Final = msgspec.json.Decoder(ProfileRequest)
_weights_decoder: Final = msgspec.json.Decoder(WeightsRequest)
_pause_decoder: Final = msgspec.json.Decoder(PauseRequest)
_PAUSES: Final[dict[str, Action]] = {"abort": "pause_abort", "retract": "pause_retract", "in_place": "pause"}


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Serve POST /tokenize: token ids of a text, of a list of texts, or of a conversation."""
    request = decode_body(_tokenize_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if request.chat_template is not None:
        raise RequestError("chat_template is not supported", param="chat_template", code="unsupported_value")
    longest = service.model.context_length
    if isinstance(request.prompt, list):
        service.check_batch(len(request.prompt), "prompt")
        lists = [await _ids(service, TextPrompt(text), request) for text in request.prompt]
        reply = TokenizeReply(lists, [len(ids) for ids in lists], longest)
    else:
        prompt = TextPrompt(request.prompt) if request.prompt is not None else _conversation(request)
        ids = await _ids(service, prompt, request)
        reply = TokenizeReply(ids, len(ids), longest)
    await exchange.reply(encode(reply))


async def detokenize(service: Service, exchange: Exchange) -> None:
    """Serve POST /detokenize: the text of token ids, or of each of several lists of them."""
    request = decode_body(_detokenize_decoder, await exchange.body(service.config.max_body_bytes))
    service.check_model(request.model)
    ids, lists = split_ids(request.tokens, "tokens")
    service.check_batch(len(lists or ()), "tokens")
    for token in ids + [token for one in lists or () for token in one]:
        if not 0 <= token < service.model.vocab_size:
            raise RequestError(f"token ids must be between 0 and {service.model.vocab_size - 1}", param="tokens")
    texts = [
        await service.client.questions.detokenize(one, request.skip_special_tokens)
        for one in ([ids] if lists is None else lists)
    ]
    await exchange.reply(encode(DetokenizeReply(texts[0] if lists is None else texts)))


async def flush_cache(service: Service, exchange: Exchange) -> None:
    """Serve /flush_cache and /reset_prefix_cache: empty the prefix cache; 400 while there are requests."""
    await service.client.questions.order("flush_cache")
    await exchange.reply(b"Cache flushed.\n", content_type=PLAIN)


async def abort_request(service: Service, exchange: Exchange) -> None:
    """Serve POST /abort_request: end the requests with a `rid` (or reply id), or all; what they said is sent."""
    request = decode_body(_abort_decoder, await exchange.body(service.config.max_body_bytes))
    if not request.abort_all and not request.rid:
        raise RequestError("give the rid to abort, or abort_all: true", param="rid")
    service.client.abort(None if request.abort_all else request.rid)
    await exchange.reply(b"", content_type=PLAIN)


async def pause_generation(service: Service, exchange: Exchange) -> None:
    """Serve POST /pause_generation. New requests wait until /continue_generation."""
    body = await exchange.body(service.config.max_body_bytes)
    request = decode_body(_pause_decoder, body) if body else PauseRequest()
    await service.client.questions.order(_PAUSES[request.mode])
    await exchange.reply(encode(GenerationState("paused", request.mode)))


async def continue_generation(service: Service, exchange: Exchange) -> None:
    """Serve POST /continue_generation."""
    await service.client.questions.order("continue")
    await exchange.reply(encode(GenerationState("running")))


async def start_profile(service: Service, exchange: Exchange) -> None:
    """Serve /start_profile: trace what the executors do, by torch's profiler; 409 while one runs."""
    body = await exchange.body(service.config.max_body_bytes)
    request = decode_body(_profile_decoder, body) if body else ProfileRequest()
    _refuse(request, "output_dir", "start_step", "profile_by_stage")
    wanted = {name: value for name in PROFILE_FIELDS if (value := getattr(request, name)) is not None}
    await service.client.questions.order("start_profile", encode(wanted).decode())
    await exchange.reply(encode(ProfileState("profiling")))


async def stop_profile(service: Service, exchange: Exchange) -> None:
    """Serve /stop_profile: end the trace, and name its file in --profile-dir."""
    file = await service.client.questions.order("stop_profile")
    await exchange.reply(encode(ProfileState("stopped", file)))


async def update_weights(service: Service, exchange: Exchange) -> None:
    """Serve POST /update_weights_from_disk, /update_weights: other weights of the same shapes, while requests go on."""
    request = decode_body(_weights_decoder, await exchange.body(service.config.max_body_bytes))
    _refuse(request, "is_async")
    folder = _allowed_folder(service.config.weights_root, request.model_path)
    action: Action = "update_weights_abort" if request.abort_all_requests else "update_weights"
    await service.client.questions.order(action, folder)
    await exchange.reply(encode(WeightsReply(True, "the weights are in use; the prefix cache was emptied")))


def _refuse(request: ProfileRequest | WeightsRequest, *names: str) -> None:
    for name in names:
        if getattr(request, name):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_value")


def _allowed_folder(root: str | None, given: str) -> str:
    """Return a folder with a model in it, inside of --weights-root whatever links say. Raises RequestError."""
    if root is None:
        what = "this server takes no weights from disk; start it with --weights-root FOLDER"
        raise RequestError(what, param="model_path", code="no_weights_root", status=403)
    top = os.path.realpath(root)
    try:
        folder = os.path.realpath(os.path.join(top, given))
        inside = os.path.commonpath([top, folder]) == top
        if inside and os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    except (OSError, ValueError):  # a zero byte, a name that is too long
        pass
    # One text for what is outside and what is not there: nobody learns what else lies on this disk.
    raise RequestError("model_path names no model under the server's --weights-root", param="model_path")


async def model_info(service: Service, exchange: Exchange) -> None:
    """Serve GET /model_info and /get_model_info."""
    config, info = service.config, service.model
    path = config.model or service.model_name
    await exchange.reply(
        encode(
            ModelDescription(
                model_path=path,
                tokenizer_path=config.tokenizer_path or path,
                is_generation=info.pooling is None,
                model_type=info.model_type,
                vocab_size=info.vocab_size,
                context_length=info.context_length,
                has_chat_template=info.has_chat_template,
                tool_call_parser=info.tool_parser,
                reasoning_parser=info.reasoning_parser,
            )
        )
    )


async def server_info(service: Service, exchange: Exchange) -> None:
    """Serve GET /server_info, /get_server_info and /get_server_args: the settings and the schedulers' last reports."""
    states = [msgspec.structs.asdict(stats) for stats in service.client.reports()]
    reply = {
        **msgspec.structs.asdict(service.config),
        "api_key": None if service.config.api_key is None else "(set)",
        "served_model_name": service.model_name,
        "version": package_version(),
        "status": service.readiness().status,
        "internal_states": states or [{}],
    }
    await exchange.reply(encode(reply))


async def engine_version(service: Service, exchange: Exchange) -> None:
    """Serve GET /version."""
    await exchange.reply(encode(EngineVersion(package_version())))


async def health(service: Service, exchange: Exchange) -> None:
    """Serve GET /health, /health_generate and /ping: are all parts of the engine up?"""
    await _reply_health(exchange, service.health())


async def ready(service: Service, exchange: Exchange) -> None:
    """Serve GET /ready: should new requests be sent here?"""
    await _reply_health(exchange, service.readiness())


async def _ids(service: Service, prompt: Prompt, request: TokenizeRequest) -> list[int]:
    return await service.client.questions.tokenize(prompt, request.add_special_tokens)


def _conversation(request: TokenizeRequest) -> Prompt:
    return chat_prompt(
        request.messages or [],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=request.chat_template_kwargs,
        tools=None if request.tools is None else [msgspec.to_builtins(tool) for tool in request.tools],
    )


async def _reply_health(exchange: Exchange, state: Health) -> None:
    headers = [(b"retry-after", b"1")] if state.status != "ok" else []
    await exchange.reply(encode(state), 200 if state.status == "ok" else 503, headers=headers)


@functools.cache
def package_version() -> str:
    """Return the version of this package."""
    try:
        return version("actorserve")
    except PackageNotFoundError:  # run from its source
        return "unknown"
