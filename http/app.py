"""The ASGI application: the route table, and the one place where a handler's exception becomes a reply.

Made by front.py for its Service; tests drive it with a fake engine. Invariant: every request gets exactly one reply,
every error has OpenAI's JSON shape, and every reply is counted.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..errors import ActorserveError
from . import control_routes, native, openai
from .error_replies import InternalError, error_body, route_error
from .exchange import ClientGone, Exchange
from .metrics import CONTENT_TYPE
from .protocol import ModelCard, ModelList, encode
from .service import Service

log = logging.getLogger("actorserve.http")
Handler: TypeAlias = Callable[[Service, Exchange], Awaitable[None]]

HINT = """actorserve is serving {model}.

  curl {base}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Hello!"}}]}}'

Routes: /v1/chat/completions /v1/completions /v1/models /generate /get_model_info /health /ready /metrics
"""


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


async def index(service: Service, exchange: Exchange) -> None:
    """Serve GET /: a hint for people."""
    host = dict(exchange.scope["headers"]).get(b"host", b"").decode("latin-1")
    base = f"http://{host or f'{service.config.host}:{service.config.port}'}"
    text = HINT.format(model=service.model_name, base=base)
    await exchange.reply(text.encode(), content_type=b"text/plain; charset=utf-8")


ROUTES: tuple[tuple[str, tuple[str, ...], Handler], ...] = (
    ("/generate", ("POST", "PUT"), native.generate),
    ("/v1/completions", ("POST",), openai.completions),
    ("/v1/chat/completions", ("POST",), openai.chat_completions),
    ("/v1/models", ("GET",), models),
    ("/v1/models/{id:path}", ("GET",), model),
    ("/tokenize", ("POST",), control_routes.tokenize),
    ("/v1/tokenize", ("POST",), control_routes.tokenize),
    ("/detokenize", ("POST",), control_routes.detokenize),
    ("/v1/detokenize", ("POST",), control_routes.detokenize),
    ("/flush_cache", ("GET", "POST"), control_routes.flush_cache),
    ("/abort_request", ("POST",), control_routes.abort_request),
    ("/pause_generation", ("POST",), control_routes.pause_generation),
    ("/continue_generation", ("POST",), control_routes.continue_generation),
    ("/model_info", ("GET",), control_routes.model_info),
    ("/get_model_info", ("GET",), control_routes.model_info),
    ("/server_info", ("GET",), control_routes.server_info),
    ("/get_server_info", ("GET",), control_routes.server_info),
    ("/health", ("GET",), control_routes.health),
    ("/health_generate", ("GET",), control_routes.health),
    ("/ready", ("GET",), control_routes.ready),
    ("/metrics", ("GET",), metrics),
    ("/", ("GET",), index),
)


def build_app(service: Service) -> Starlette:
    """Return the application for one front."""

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.count("none", error.status_code)
        body = error_body(route_error(error.status_code, request.method, request.url.path))
        return Response(body, error.status_code, headers=error.headers, media_type="application/json")

    routes = [Route(path, Endpoint(service, path, handler), methods=list(methods)) for path, methods, handler in ROUTES]
    app = Starlette(routes=routes, exception_handlers={HTTPException: no_route})
    app.router.redirect_slashes = False  # a redirected POST loses its body in many clients
    return app


def _card(service: Service) -> ModelCard:
    return ModelCard(service.model_name, service.started, service.model.context_length)
