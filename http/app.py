"""The ASGI application: the route table, and the one place where a handler's exception becomes a reply.

Made by front.py for its Service; tests drive it with a fake engine. Invariant: every request gets exactly one reply,
every error has OpenAI's JSON shape, and every reply is counted.
"""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..errors import ActorserveError
from . import (
    control_routes,
    control_types,
    engine_view,
    native,
    openai,
    openapi,
    page,
    protocol,
    response_types,
    responses,
    score,
)
from .error_replies import InternalError, error_body, route_error
from .exchange import ClientGone, Exchange
from .metrics import CONTENT_TYPE
from .protocol import ModelCard, ModelList, encode
from .service import Service

log = logging.getLogger("actorserve.http")
Handler: TypeAlias = Callable[[Service, Exchange], Awaitable[None]]


class Endpoint:
    """A handler as an ASGI application; `route` is its name in the metrics."""

    def __init__(self, service: Service, route: str, handler: Handler) -> None:
        self._service = service
        self._route = route
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._handler(self._service, exchange)
        except ClientGone as gone:
            exchange.status = gone.status
        except ActorserveError as error:
            await exchange.fail(error)
        except Exception:
            log.exception("%s failed", self._route)
            await exchange.fail(InternalError())
        finally:
            self._service.metrics.count(self._route, exchange.status or ClientGone.status)


async def models(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/models."""
    await exchange.reply(encode(ModelList([_card(service)])))


async def model(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/models/{id}."""
    service.check_model(exchange.scope["path_params"]["id"])
    await exchange.reply(encode(_card(service)))


async def metrics(service: Service, exchange: Exchange) -> None:
    """Serve GET /metrics."""
    await exchange.reply(service.metrics.render(service.client.stats), content_type=CONTENT_TYPE)


async def api_document(service: Service, exchange: Exchange) -> None:
    """Serve GET /openapi.json: this API, described."""
    await exchange.reply(described())


class Served(NamedTuple):
    """A route: how it is reached, who answers, and the types of its bodies (see openapi.Operation)."""

    paths: tuple[str, ...]
    methods: tuple[str, ...]
    handler: Handler
    request: Any = None
    reply: Any = None
    event: Any = None


GET, POST = ("GET",), ("POST",)
_p, _c, _t = protocol, control_routes, control_types
ROUTES: tuple[Served, ...] = (
    Served(
        ("/generate",), ("POST", "PUT"), native.generate, _p.GenerateRequest,
        _p.GenerateReply | list[_p.GenerateReply], _p.GenerateReply,
    ),
    Served(("/v1/completions",), POST, openai.completions, _p.CompletionRequest, _p.Completion, _p.Completion),
    Served(
        ("/v1/chat/completions",), POST, openai.chat_completions, _p.ChatRequest, _p.ChatCompletion,
        _p.ChatCompletionChunk,
    ),
    Served(
        ("/v1/responses",), POST, responses.create, response_types.ResponseRequest, response_types.Response,
        dict[str, Any],
    ),
    Served(("/v1/responses/{id}",), GET, responses.retrieve, reply=response_types.Response),
    Served(("/v1/responses/{id}",), ("DELETE",), responses.delete, reply=response_types.DeletedResponse),
    Served(("/v1/responses/{id}/cancel",), POST, responses.cancel, reply=response_types.Response),
    Served(("/v1/score", "/score"), POST, score.score, score.ScoreRequest, score.ScoreReply),
    Served(("/v1/models",), GET, models, reply=_p.ModelList),
    Served(("/v1/models/{id:path}",), GET, model, reply=_p.ModelCard),
    Served(("/tokenize", "/v1/tokenize"), POST, _c.tokenize, _t.TokenizeRequest, _t.TokenizeReply),
    Served(("/detokenize", "/v1/detokenize"), POST, _c.detokenize, _t.DetokenizeRequest, _t.DetokenizeReply),
    Served(("/flush_cache",), ("GET", "POST"), _c.flush_cache),
    Served(("/abort_request",), POST, _c.abort_request, _t.AbortRequest),
    Served(("/pause_generation",), POST, _c.pause_generation, _t.PauseRequest, _t.GenerationState),
    Served(("/continue_generation",), POST, _c.continue_generation, reply=_t.GenerationState),
    Served(("/model_info", "/get_model_info"), GET, _c.model_info, reply=_p.ModelDescription),
    Served(("/server_info", "/get_server_info"), GET, _c.server_info, reply=dict[str, Any]),
    Served(("/health", "/health_generate"), GET, _c.health, reply=_p.Health),
    Served(("/ready",), GET, _c.ready, reply=_p.Health),
    Served(("/metrics",), GET, metrics),
    Served(("/openapi.json",), GET, api_document, reply=dict[str, Any]),
    Served(("/v1/engine/stats",), GET, engine_view.engine_stats, reply=engine_view.EngineStats),
    Served(("/",), GET, page.index),
)  # fmt: skip


@functools.cache
def described() -> bytes:
    """Return the OpenAPI document."""
    operations = [
        openapi.Operation(path, r.methods, _summary(r.handler), r.request, r.reply, r.event)
        for r in ROUTES
        for path in r.paths
    ]
    return encode(openapi.document(operations, "actorserve", control_routes.package_version()))


def build_app(service: Service) -> Starlette:
    """Return the application for one front."""

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.count("none", error.status_code)
        body = error_body(route_error(error.status_code, request.method, request.url.path))
        return Response(body, error.status_code, headers=error.headers, media_type="application/json")

    routes = [
        Route(path, Endpoint(service, path, r.handler), methods=list(r.methods)) for r in ROUTES for path in r.paths
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: no_route})
    app.router.redirect_slashes = False  # a redirected POST loses its body in many clients
    return app


def _summary(handler: Handler) -> str:
    """The first sentence of its docstring, without what the path says already."""
    text = (handler.__doc__ or "").split("\n")[0]
    return text.partition(": ")[2] or text


def _card(service: Service) -> ModelCard:
    return ModelCard(service.model_name, service.started, service.model.context_length)
