"""The ASGI application: the route table, and the one place where a handler's exception becomes a reply.

Made by front.py for its Service; tests drive it with a fake engine. Invariant: every request gets exactly one reply,
every error has its protocol's JSON shape, and every reply is counted.
"""

import functools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from ..actors.client import Client
from ..config import EngineConfig
from ..errors import ActorserveError, RequestError
from ..lang import remote
from . import (
    batch_types,
    batches,
    chat_types,
    control_routes,
    control_types,
    embedding_types,
    embeddings,
    engine_view,
    files,
    loads,
    message_types,
    messages,
    native,
    native_types,
    openai,
    openai_types,
    openapi,
    page,
    parse_routes,
    programs,
    protocol,
    rerank,
    response_types,
    responses,
    resume,
    score,
    timelines,
)
from .access import Access, access_log
from .api_keys import Headers, KeyRing, read_keys
from .error_replies import (
    ANTHROPIC_ERRORS,
    OPENAI_ERRORS,
    ErrorShape,
    InternalError,
    error_body,
    error_headers,
    route_error,
)
from .exchange import ClientGone, Exchange, Outlet
from .metrics import CONTENT_TYPE
from .protocol import ModelCard, ModelList, encode
from .service import Service
from .tenants import Tenant, TenantClient, tenants_of
from .tracing import Finished, Tracer, request_headers

log = logging.getLogger("actorserve.http")
Handler: TypeAlias = Callable[[Service, Exchange], Awaitable[None]]


class Endpoint:
    """A handler as an ASGI application; `route` is its name in the metrics."""

    def __init__(self, service: Service, route: str, served: "Served", gate: "Gate") -> None:
        self._service = service
        self._route = route
        self._served = served
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._served.event is None:
            await self._answer(scope, receive, send, outlet=scope["state"].get("outlet"))
        elif resume.header(scope, b"last-event-id"):
            await self._answer(scope, receive, send, self._resume)
        elif resume.wants_log(scope, self._service.config.resumable_streams):
            log, body_read = self._service.streams.open(self._answer, scope, receive)
            await self._service.streams.follow(log, -1, send, resume.client_left(receive, body_read))
        else:
            await self._answer(scope, receive, send, outlet=scope["state"].get("outlet"))

    async def _resume(self, service: Service, exchange: Exchange) -> None:
        last = resume.header(exchange.scope, b"last-event-id").decode("latin-1")
        log, number = service.streams.find(last, exchange.owner)
        await service.streams.follow(log, number, exchange.relay, resume.client_left(exchange.receive_any))

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        handler: Handler | None = None,
        outlet: Outlet | None = None,
    ) -> None:
        """Let the request in, have the handler reply, turn what it raises into a reply."""
        exchange = Exchange(scope, receive, send, self._served.errors, outlet)
        client: TenantClient | None = None
        began_ns = time.time_ns()
        try:
            client = self._gate.admit(exchange, self._served)
            if self._served.event is not None and handler is None and not exchange.inside:
                client.check_room()  # of a body that cannot be served nothing is read
            await (handler or self._served.handler)(replace(self._service, client=client), exchange)
        except ClientGone as gone:
            exchange.status = gone.status
        except ActorserveError as error:
            await exchange.fail(error)
        except Exception:
            log.exception("%s failed", self._route)
            await exchange.fail(InternalError())
        finally:
            if client is not None:
                exchange.state["tokens"] = client.close()
            self._service.metrics.count(self._route, exchange.status or ClientGone.status)
            if self._service.tracer is not None and client is not None and scope["method"] != "GET":
                self._trace(self._service.tracer, exchange, client, began_ns)

    def _trace(self, tracer: Tracer, exchange: Exchange, client: TenantClient, began_ns: int) -> None:
        state = exchange.state
        finished = Finished(
            method=exchange.scope["method"],
            route=self._route,
            headers=request_headers(exchange.scope["headers"]),
            began_ns=began_ns,
            ended_ns=time.time_ns(),
            status=exchange.status or ClientGone.status,
            request_id=state.get("request_id", ""),
            key=state.get("key"),
            names=tuple(client.names),
            tokens=state["tokens"],
        )
        tracer.finished(replace(self._service, client=client), finished)


class Gate:
    """Who comes in, and as whom."""

    def __init__(self, client: Client, keys: KeyRing) -> None:
        self._client = client
        self._keys = keys
        self._tenants = tenants_of(keys)

    def check_key(self, headers: Headers) -> None:
        """Raise RequestError (401) where keys are needed and this request brings none."""
        if self._keys:
            self._keys.key_of(headers)

    def admit(self, exchange: Exchange, served: "Served") -> TenantClient:
        """Return the engine as the request may use it. Raises RequestError: 401, 403."""
        if exchange.inside:
            tenant = self._tenants.get(exchange.owner) or Tenant()  # the key may be gone
            return TenantClient(self._client, tenant, limited=False)
        tenant = self._tenants[""]
        if self._keys and not served.open:
            tenant = self._tenants[self._keys.key_of(exchange.scope["headers"]).name]
            exchange.state["key"] = tenant.name
        if served.admin and not tenant.admin:
            raise RequestError("this takes the API key of an admin", code="permission_denied", status=403)
        exchange.owner = tenant.name
        return TenantClient(self._client, tenant)


async def models(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/models."""
    await exchange.reply(encode(ModelList([_card(service)])))


async def model(service: Service, exchange: Exchange) -> None:
    """Serve GET /v1/models/{id}."""
    service.check_model(exchange.path_id)
    await exchange.reply(encode(_card(service)))


async def metrics(service: Service, exchange: Exchange) -> None:
    """Serve GET /metrics."""
    await exchange.reply(service.metrics.render(service.client.reports()), content_type=CONTENT_TYPE)


async def api_document(service: Service, exchange: Exchange) -> None:
    """Serve GET /openapi.json: this API, described."""
    await exchange.reply(described(service.config.root_path))


class Served(NamedTuple):
    """A route: how it is reached, who answers, and the types of its bodies (see openapi.Operation)."""

    paths: tuple[str, ...]
    methods: tuple[str, ...]
    handler: Handler
    request: Any = None
    reply: Any = None
    event: Any = None
    errors: ErrorShape = OPENAI_ERRORS
    open: bool = False
    """Answers without an API key, too."""
    admin: bool = False
    """Takes an admin's key: it touches others' requests."""
    query: Any = None
    form: Any = None
    required: bool = True


GET, POST = ("GET",), ("POST",)
_p, _c, _t, _e = protocol, control_routes, control_types, embedding_types
_n, _o, _h = native_types, openai_types, chat_types
ROUTES: tuple[Served, ...] = (
    Served(
        ("/generate",), ("POST", "PUT"), native.generate, _n.GenerateRequest,
        _n.GenerateReply | list[_n.GenerateReply], _n.GenerateReply,
    ),
    Served(("/v1/completions",), POST, openai.completions, _o.CompletionRequest, _o.Completion, _o.Completion),
    Served(
        ("/v1/chat/completions",), POST, openai.chat_completions, _h.ChatRequest, _h.ChatCompletion,
        _h.ChatCompletionChunk,
    ),
    Served(
        ("/v1/responses",), POST, responses.create, response_types.ResponseRequest, response_types.Response,
        dict[str, Any],
    ),
    Served(("/v1/responses/{id}",), GET, responses.retrieve, reply=response_types.Response),
    Served(("/v1/responses/{id}",), ("DELETE",), responses.delete, reply=response_types.DeletedResponse),
    Served(("/v1/responses/{id}/cancel",), POST, responses.cancel, reply=response_types.Response),
    Served(("/v1/programs",), POST, programs.run, remote.ProgramRequest, remote.ProgramReply),
    Served(("/v1/embeddings",), POST, embeddings.embeddings, _e.EmbeddingRequest, _e.EmbeddingReply),
    Served(
        ("/encode",), ("POST", "PUT"), embeddings.encode_prompts, _e.EncodeRequest,
        _e.EncodeReply | list[_e.EncodeReply],
    ),
    Served(
        ("/judge", "/classify"), ("POST", "PUT"), embeddings.judge, _e.JudgeRequest,
        _e.EncodeReply | list[_e.EncodeReply],
    ),
    Served(("/v1/classify",), POST, embeddings.classify, _e.ClassifyRequest, _e.ClassifyReply),
    Served(("/v1/rerank", "/rerank", "/v2/rerank"), POST, rerank.rerank, rerank.RerankRequest, rerank.RerankReply),
    Served(
        ("/v1/score", "/score"), POST, score.score, score.ScoreRequest,
        score.ScoreReply | score.PairScores,
    ),
    Served(
        ("/v1/messages",), POST, messages.create, message_types.MessageRequest, message_types.Message,
        dict[str, Any], ANTHROPIC_ERRORS,
    ),
    Served(
        ("/v1/messages/count_tokens",), POST, messages.count_tokens, message_types.CountRequest,
        message_types.TokenCount, errors=ANTHROPIC_ERRORS,
    ),
    Served(("/v1/files",), POST, files.upload, reply=batch_types.FileObject, form=batch_types.UploadForm),
    Served(("/v1/files",), GET, files.list_files, reply=batch_types.FileList, query=batch_types.FileQuery),
    Served(("/v1/files/{id}",), GET, files.retrieve, reply=batch_types.FileObject),
    Served(("/v1/files/{id}",), ("DELETE",), files.delete, reply=batch_types.DeletedFile),
    Served(("/v1/files/{id}/content",), GET, files.content),
    Served(("/v1/batches",), POST, batches.create, batch_types.BatchRequest, batch_types.Batch),
    Served(("/v1/batches",), GET, batches.list_batches, reply=batch_types.BatchList, query=batch_types.BatchQuery),
    Served(("/v1/batches/{id}",), GET, batches.retrieve, reply=batch_types.Batch),
    Served(("/v1/batches/{id}/cancel",), POST, batches.cancel, reply=batch_types.Batch),
    Served(("/v1/models",), GET, models, reply=_p.ModelList),
    Served(("/v1/models/{id:path}",), GET, model, reply=_p.ModelCard),
    Served(("/tokenize", "/v1/tokenize"), POST, _c.tokenize, _t.TokenizeRequest, _t.TokenizeReply),
    Served(("/detokenize", "/v1/detokenize"), POST, _c.detokenize, _t.DetokenizeRequest, _t.DetokenizeReply),
    Served(
        ("/parse_function_call",), POST, parse_routes.parse_function_call, parse_routes.ParseCallsRequest,
        parse_routes.ParsedCalls,
    ),
    Served(
        ("/separate_reasoning",), POST, parse_routes.separate_reasoning, parse_routes.SeparateRequest,
        parse_routes.Separated,
    ),
    Served(("/flush_cache", "/reset_prefix_cache"), ("GET", "POST"), _c.flush_cache, admin=True),
    Served(("/abort_request",), POST, _c.abort_request, _t.AbortRequest),
    Served(
        ("/pause_generation",), POST, _c.pause_generation, _t.PauseRequest, _t.GenerationState, admin=True,
        required=False,
    ),
    Served(("/continue_generation",), POST, _c.continue_generation, reply=_t.GenerationState, admin=True),
    Served(
        ("/start_profile",), ("GET", "POST"), _c.start_profile, _t.ProfileRequest, _t.ProfileState, admin=True,
        required=False,
    ),
    Served(("/stop_profile",), ("GET", "POST"), _c.stop_profile, reply=_t.ProfileState, admin=True),
    Served(
        ("/update_weights_from_disk", "/update_weights"), POST, _c.update_weights, _t.WeightsRequest, _t.WeightsReply,
        admin=True,
    ),
    Served(("/model_info", "/get_model_info"), GET, _c.model_info, reply=_p.ModelDescription),
    Served(("/server_info", "/get_server_info", "/get_server_args"), GET, _c.server_info, reply=dict[str, Any]),
    Served(("/health", "/health_generate"), GET, _c.health, reply=_p.Health, open=True),
    Served(("/ping",), ("GET", "POST"), _c.health, reply=_p.Health, open=True),
    Served(("/ready",), GET, _c.ready, reply=_p.Health, open=True),
    Served(("/version",), GET, _c.engine_version, reply=_p.EngineVersion),
    Served(("/v1/loads",), GET, loads.loads, reply=loads.Loads, query=loads.LoadQuery),
    Served(("/get_load",), GET, loads.get_load, reply=list[loads.OldLoad]),
    Served(("/load",), GET, loads.server_load, reply=loads.ServerLoad),
    Served(("/metrics",), GET, metrics),
    Served(("/openapi.json",), GET, api_document, reply=dict[str, Any]),
    Served(("/v1/requests/{id}/timeline",), GET, timelines.timeline, reply=timelines.TimelineReply),
    Served(("/v1/engine/stats",), GET, engine_view.engine_stats, reply=engine_view.EngineStats),
    Served(("/",), GET, page.index, open=True),
)  # fmt: skip


BATCHED: Final = tuple(path for r in ROUTES for path in r.paths if path in batch_types.ENDPOINTS)
"""What the lines of batches may ask for."""


@functools.cache
def described(root_path: str) -> bytes:
    """Return the OpenAPI document."""
    operations = [
        openapi.Operation(
            path,
            r.methods,
            _summary(r.handler),
            r.request,
            r.required,
            r.reply,
            r.event,
            r.errors.type,
            r.query,
            r.form,
        )
        for r in ROUTES
        for path in r.paths
    ]
    return encode(openapi.document(operations, "actorserve", control_routes.package_version(), root_path))


def build_app(service: Service) -> ASGIApp:
    """Return the application for one front. Raises StartupError for what the configuration names and is not there."""
    config = service.config
    assert isinstance(service.client, Client)
    gate = Gate(service.client, read_keys(config))

    async def no_route(request: Request, error: HTTPException) -> Response:
        said: ActorserveError = route_error(error.status_code, request.method, request.scope["path"])
        headers = dict(error.headers or {})
        try:
            gate.check_key(request.scope["headers"])
        except RequestError as refusal:  # who brings no key learns nothing of the routes
            said, headers = refusal, {name.decode(): value.decode() for name, value in error_headers(refusal)}
        service.metrics.count("none", said.status)
        return Response(error_body(said), said.status, headers=headers, media_type="application/json")

    routes = []
    for served in ROUTES:
        for path in served.paths:
            endpoint = Endpoint(service, path, served, gate)
            routes.append(Route(path, endpoint, methods=list(served.methods)))
            if path in BATCHED:
                service.batch_endpoints[path] = endpoint
    router = Router(routes, redirect_slashes=False)  # a redirected POST loses its body in many clients

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's application without its layers, each of which would be passed at each event."""
        scope["app"] = app  # then the router raises what it has no route for
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            await (await no_route(Request(scope), error))(scope, receive, send)

    log = access_log(config.access_log)
    return Access(_with_cors(app, config), config.root_path, log)


def _with_cors(app: ASGIApp, config: EngineConfig) -> ASGIApp:
    if config.cors_origins is None:
        return app
    origins = [origin.strip() for origin in config.cors_origins.split(",")]
    shown = ["x-request-id", "retry-after"]
    return CORSMiddleware(app, origins, allow_methods=["*"], allow_headers=["*"], expose_headers=shown)


def _summary(handler: Handler) -> str:
    """The first sentence of its docstring, without what the path says already."""
    text = (handler.__doc__ or "").split("\n")[0]
    return text.partition(": ")[2] or text


def _card(service: Service) -> ModelCard:
    root = service.config.model or service.model_name
    return ModelCard(service.model_name, service.started, service.model.context_length, root)
