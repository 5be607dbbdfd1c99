"""When what happened to a request: GET /v1/requests/{id}/timeline, and in replies with `"timeline": true`.

The scheduler knows (actors/timeline.py), whether or not somebody asked for it beforehand; this makes JSON of it. Used
by the routes that generate, and by tracing.py. Invariant: a client sees the timelines of its own API key only.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Final, Literal

from msgspec import Struct

from ..actors.messages import TimelineView, WindowView
from ..errors import ActorserveError, RequestError
from .protocol import encode

if TYPE_CHECKING:
    from .exchange import Exchange
    from .service import Service

ANSWER_SECONDS: Final = 5.0


class TimelineWindow(Struct, frozen=True):
    """A window of k steps that computed something of the request; `end` is null while it is on its way.

    `rows`: requests that decoded in it; `prompt_tokens`: what it computed of prompts, of all requests.
    """

    window: int
    k: int
    rows: int
    prompt_tokens: int
    start: float
    end: float | None


class RequestTimeline(Struct, frozen=True):
    """One continuation. `arrival` is Unix time, the others are seconds since then; null: it has not happened.

    tokenized: the prompt was tokens; queued: the scheduler had it; admitted: it got a place in the batch;
    prefill_start: its first chunk was sent to the executor; prefill_end: all of its prompt was computed. `windows` are
    the newest, and `windows_dropped` counts those before them. After a scheduler's death a timeline begins anew.
    """

    index: int
    arrival: float
    tokenized: float | None
    queued: float | None
    admitted: float | None
    prefill_start: float | None
    prefill_end: float | None
    first_token: float | None
    finished: float | None
    prompt_tokens: int
    cached_tokens: int
    retractions: int
    windows: list[TimelineWindow]
    windows_dropped: int


class TimelineReply(Struct, frozen=True):
    """The continuations of one request; at most 128 of them."""

    id: str
    choices: list[RequestTimeline]
    object: Literal["request.timeline"] = "request.timeline"


async def timeline(service: "Service", exchange: "Exchange") -> None:
    """Serve GET /v1/requests/{id}/timeline: of one of the latest 2,048, by its reply's id or its rid."""
    views = await service.client.timelines(exchange.path_id)
    if not views:
        what = "there is no request of this id among the latest"
        raise RequestError(what, param="id", code="request_not_found", status=404)
    await exchange.reply(encode(TimelineReply(exchange.path_id, described(views))))


async def timeline_of(service: "Service", name: str) -> list[RequestTimeline]:
    """Return what is known of a request that this server answers; an engine that does not say is no error."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return described(await service.client.timelines(name))
    except (ActorserveError, TimeoutError):
        return []


def described(views: list[TimelineView]) -> list[RequestTimeline]:
    """Return the engine's timelines as clients see them."""
    first = min((view.rid for view in views), default=0)
    offset_ns = time.time_ns() - time.monotonic_ns()
    return [_described(view, view.rid - first, offset_ns) for view in views]


def _described(view: TimelineView, index: int, offset_ns: int) -> RequestTimeline:
    def since(at_ns: int) -> float | None:
        return (at_ns - view.arrival_ns) / 1e9 if at_ns else None

    def window(w: WindowView) -> TimelineWindow:
        start = (w.start_ns - view.arrival_ns) / 1e9
        return TimelineWindow(w.window, w.k, w.rows, w.prompt_tokens, start, since(w.end_ns))

    return RequestTimeline(
        index,
        (view.arrival_ns + offset_ns) / 1e9,
        since(view.tokenized_ns),
        since(view.queued_ns),
        since(view.admitted_ns),
        since(view.prefill_start_ns),
        since(view.prefill_end_ns),
        since(view.first_token_ns),
        since(view.ended_ns),
        view.prompt_tokens,
        view.cached_tokens,
        view.retractions,
        [window(w) for w in view.windows],
        view.dropped,
    )
