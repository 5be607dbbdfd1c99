"""perf.http: its readers count every event, and its figures are what they say."""

import itertools
import os
import time

import pytest
from served import served

from actorserve.perf import http, sse_readers
from actorserve.perf.sse_readers import first_event, reading


async def numbered(scope, receive, send):
    """Two hundred events, in pieces that are none of the client's business."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for i in range(200):
        body = b'data: {"id":"x","n":%d}\n\n' % i
        for part in (body[:9], body[9:]) if i % 7 else (body,):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


class EndOfScript(Exception):
    """The readers have told all that a test wants to know."""


class Scripted:
    """The readers' control: it asks whenever they look, until all has ended."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []
        self._read, write = os.pipe()
        os.write(write, b"x")
        os.close(write)

    def fileno(self) -> int:
        return self._read

    def recv(self) -> None:
        if self.told and self.told[-1][2] == 2:
            os.close(self._read)
            raise EndOfScript

    def send(self, seen: tuple[int, int, int]) -> None:
        self.told.append(seen)


def test_every_event_is_counted() -> None:
    with served(numbered) as url, reading(url, [http.request_of(url, "/", {})] * 3) as readers:
        readers.wait_until_begun()
        while (seen := readers.seen()).ended < 3:
            time.sleep(0.01)
        assert (seen.events, seen.begun) == (3 * 201, 3)


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_events_are_counted_wherever_they_are_cut(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(sse_readers, "AT_ONCE", at_once)
    asked = Scripted()
    with served(numbered) as url, pytest.raises(EndOfScript):
        sse_readers.read_streams(url, [http.request_of(url, "/", {})] * 2, asked)
    assert asked.told[-1] == (2 * 201, 2, 2)


def test_a_first_event_is_timed_before_the_rest() -> None:
    with served(numbered) as url:
        found = first_event(url, http.request_of(url, "/", {}))
    assert found.sent <= found.first <= time.time()
    assert found.body.count(b"data: ") == 201 and b'"n":199' in found.body


def test_rates_are_events_by_the_cpu_seconds_of_who_sends_them() -> None:
    spent = itertools.count()
    with served(http.bare_app) as url:
        requests = [http.request_of(url, "/", {}) for _ in range(4)]
        found = http.rate(url, requests, 0.2, lambda: 2.0 * next(spent))
    assert found["cpu_seconds"] == 2.0
    assert found["events_per_core"] == found["events"] / 2 > 0
    with served(numbered) as url, pytest.raises(SystemExit, match="ended"):
        http.rate(url, [http.request_of(url, "/", {})], 0.2, lambda: 0.0)


def test_the_report_names_everything() -> None:
    row = {"events": 10.0, "events_per_second": 50.0, "events_per_core": 30_000.0, "cpu_seconds": 0.1}
    ours = {"completions": row, "chat": row, "ttft_ms": 9.0, "ttft_overhead_ms": 2.0, "ttft_overhead_p90_ms": 2.5}
    ours |= {"request_ms": 0.75, "reply_ms": 1.25}
    limit = row | {"events_per_core": 60_000.0}
    text = http.report({"limit": limit, "reference": row, "ours": {1: ours, 2: ours}})
    assert text.count("30,000") == 5 and text.count(" 0.50 ") == 5 and text.count("overhead 2.00 ms") == 2
    assert text.count("to the engine 0.75, from it 1.25") == 2
