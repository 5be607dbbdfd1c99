"""The page at / and the route behind its picture, over a real socket, against a fake engine."""

import asyncio
import base64
import hashlib
import re
import shutil
import subprocess
from importlib import resources

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


STAGE = """
class Element {
  value = ""; textContent = ""; hidden = true; children = []; dataset = {}; style = {};
  get classList() { return {toggle() {}, add() {}, remove() {}}; }
  get firstChild() { return new Element(); }
  querySelectorAll() { return []; }
}
const CALLS = "append prepend replaceChildren remove setAttribute addEventListener focus observe";
for (const name of CALLS.split(" "))
  Element.prototype[name] = () => {};
const elements = {}, heard = [];
globalThis.document = new Element();
Object.assign(document, {hidden: true, createElement: () => new Element(), createElementNS: () => new Element(),
  documentElement: new Element(), body: new Element(), getElementById: id => elements[id] ??= new Element()});
globalThis.matchMedia = () => ({matches: false, addEventListener() {}});
globalThis.sessionStorage = globalThis.localStorage = {getItem: () => null};
globalThis.ResizeObserver = Element;
let painted = false;
globalThis.requestAnimationFrame = () => painted = true;
globalThis.cancelAnimationFrame = () => {};
globalThis.innerWidth = 0;
globalThis.fetch = async (path, {body, signal}) => {
  heard.push(JSON.parse(body).messages.map(turn => turn.role + ": " + turn.content));
  const start = stream => {
    stream.enqueue(new TextEncoder().encode('data: {"choices": [{"delta": {"content": "A"}}]}\\n\\n'));
    signal.addEventListener("abort", () => stream.error(signal.reason));
  };
  return {ok: true, body: new ReadableStream({start})};
};
const until = async condition => { while (!condition()) await new Promise(setImmediate); };
async function say(text) {
  elements.prompt.value = text;
  painted = false;
  elements.send.onclick();
  await until(() => painted);
}
"""
ACTION = """
(async () => {
  await say("one");
  elements.send.onclick();  // stop
  await until(() => !running);
  await say("two");
  elements.clear.onclick();  // while an answer comes
  await until(() => !running);
  await say("three");
  console.log(JSON.stringify(heard));
  process.exit();
})();
"""


def test_an_answer_that_is_cut_is_of_its_own_chat():
    """Stopped, it is a turn like others; of a chat that was cleared meanwhile nothing comes into the next."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here")
    text = resources.files("actorserve.http").joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    done = subprocess.run([node, "-e", STAGE + script + ACTION], capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    first, second, third = msgspec.json.decode(done.stdout)
    assert (first, second) == (["user: one"], ["user: one", "assistant: A", "user: two"])
    assert third == ["user: three"]


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
