"""The page at / and the route behind its picture, over a real socket, against a fake engine."""

import asyncio
import base64
import hashlib
import re

import msgspec
import pytest

from actorserve.actors.messages import Look
from actorserve.http import engine_view

pytestmark = pytest.mark.anyio
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


async def test_browsers_get_the_page_and_others_the_hint(rig):
    page = await rig.http.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text.startswith("<!doctype html>") and page.headers["vary"] == "accept"
    hint = await rig.http.get("/")
    assert hint.headers["content-type"].startswith("text/plain") and "fake-model" in hint.text


async def test_the_policy_allows_this_script_and_style_only(rig):
    page = await rig.http.get("/", headers=BROWSER)
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


async def test_the_page_is_whole_and_knows_nothing_of_the_server(rig):
    """It works without other hosts, and anybody may have it: what needs a key is asked for with one."""
    text = (await rig.http.get("/", headers=BROWSER)).text
    addresses = set(re.findall(r"https?://[^\s'\"<)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "names of XML, which nobody fetches"
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](?!data:)", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\son\w+=[\"']| style=[\"']", text)
    assert "fake-model" not in text


async def test_engine_stats(rig, fakes):
    reply = await rig.http.get("/v1/engine/stats")
    assert reply.headers["cache-control"] == "no-store"
    stats = msgspec.json.decode(reply.content, type=engine_view.EngineStats)
    assert (stats.model, stats.page_size, stats.status, stats.reason) == ("fake-model", 16, "ok", None)
    assert stats.scheduler == msgspec.structs.asdict(fakes.STATS)
    assert [(a.name, a.up, a.epoch) for a in stats.actors] == [
        ("exec.0", False, 0),
        ("sched", True, 2),
        ("text", True, 0),
    ]
    assert [(lane.target, lane.up, lane.waiting, lane.sent, lane.full) for lane in stats.lanes] == [
        ("sched", True, 3, 70, 1),
        ("exec.0", False, 0, 0, 0),
    ]
    assert [(n.id, n.parent, n.tokens, n.pages, n.locks, n.hits) for n in stats.tree.nodes][1] == (2, 1, 40, 3, 1, 4)
    (request,) = stats.requests
    assert (request.stage, request.prompt, request.generated, request.limit) == ("decode", 7, 2, 20)
    (look,) = [m for m in rig.text.got if isinstance(m, Look)]
    assert (look.nodes, look.requests) == (engine_view.NODES, engine_view.REQUESTS), "the answer is bounded"


async def test_who_asks_at_once_shares_a_look(rig, monkeypatch):
    monkeypatch.setattr(engine_view, "FRESH_SECONDS", 3600.0)
    replies = await asyncio.gather(*(rig.http.get("/v1/engine/stats") for _ in range(8)))
    assert all(reply.json()["tree"]["total"] == 1 for reply in replies)
    assert sum(isinstance(m, Look) for m in rig.text.got) == 1
    monkeypatch.setattr(engine_view, "FRESH_SECONDS", -1.0)
    await rig.http.get("/v1/engine/stats")
    assert sum(isinstance(m, Look) for m in rig.text.got) == 2


async def test_an_engine_that_is_down_is_an_answer(rig, monkeypatch):
    monkeypatch.setattr(engine_view, "FRESH_SECONDS", -1.0)
    monkeypatch.setattr(engine_view, "LOOK_SECONDS", 0.05)
    rig.text.mute = True
    silent = (await rig.http.get("/v1/engine/stats")).json()
    assert (silent["status"], silent["lanes"], silent["tree"]["nodes"]) == ("unavailable", [], [])
    assert "does not answer" in silent["reason"] and silent["scheduler"]["running"] == 2
    rig.kill_text()
    reply = await rig.http.get("/v1/engine/stats")
    assert (reply.status_code, reply.json()["status"], reply.json()["scheduler"]) == (200, "unavailable", None)
