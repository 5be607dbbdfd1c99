"""perf.http: its client counts every event, and its figures are what they say."""

import asyncio
import itertools

import pytest
from served import served

from actorserve.perf import http


async def numbered(scope, receive, send):
    """Two hundred events, in pieces that are none of the client's business."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for i in range(200):
        body = b'data: {"id":"x","n":%d}\n\n' % i
        for part in (body[:9], body[9:]) if i % 7 else (body,):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def test_every_event_is_counted() -> None:
    async def count(url: str) -> list[http.Counter]:
        async with http.streaming(url, [http.request_of(url, "/", {})] * 3) as counters:
            await asyncio.gather(*(counter.ended for counter in counters))
        return counters

    with served(numbered) as url:
        counters = asyncio.run(count(url))
    assert [counter.events for counter in counters] == [201] * 3
    assert all(counter.sent <= counter.first for counter in counters)
    assert b'"n":199' in counters[0].tail


def test_rates_are_events_by_the_cpu_seconds_of_who_sends_them() -> None:
    spent = itertools.count()
    with served(http.bare_app) as url:
        requests = [http.request_of(url, "/", {}) for _ in range(4)]
        found = asyncio.run(http.rate(url, requests, 0.2, lambda: 2.0 * next(spent)))
    assert found["cpu_seconds"] == 2.0
    assert found["events_per_core"] == found["events"] / 2 > 0
    with served(numbered) as url, pytest.raises(SystemExit, match="ended"):
        asyncio.run(http.rate(url, [http.request_of(url, "/", {})], 0.2, lambda: 0.0))


def test_the_report_names_everything() -> None:
    row = {"events": 10.0, "events_per_second": 50.0, "events_per_core": 30_000.0, "cpu_seconds": 0.1}
    ours = {"completions": row, "chat": row, "ttft_ms": 9.0, "ttft_overhead_ms": 2.0, "ttft_overhead_p90_ms": 2.5}
    limit = row | {"events_per_core": 60_000.0}
    text = http.report({"limit": limit, "reference": row, "ours": {1: ours, 2: ours}})
    assert text.count("30,000") == 5 and text.count(" 0.50 ") == 5 and text.count("overhead 2.00 ms") == 2
