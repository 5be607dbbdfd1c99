"""When what happened to a request: its route, and what replies say of it, against a fake engine."""

import json
import time

import pytest

from actorserve.actors.messages import AskTimelines

pytestmark = pytest.mark.anyio
USER = [{"role": "user", "content": "Hi"}]


def check(one, index=0):
    """What the fake engine says: a millisecond for each thing that happens."""
    assert one["index"] == index
    assert abs(one["arrival"] - time.time()) < 60
    stages = ("tokenized", "queued", "admitted", "prefill_start", "prefill_end", "first_token")
    assert [one[name] for name in stages] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005, 0.006])
    assert one["finished"] is None
    assert (one["prompt_tokens"], one["cached_tokens"], one["retractions"], one["windows_dropped"]) == (7, 3, 1, 2)
    first, second = one["windows"]
    assert first == {"window": 7, "k": 1, "rows": 3, "prompt_tokens": 40, "start": 0.005, "end": 0.009}
    assert (second["k"], second["end"]) == (4, None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "n": 2}),
        ("/v1/chat/completions", {"messages": USER, "n": 2}),
        ("/v1/messages", {"messages": USER, "model": "fake-model", "max_tokens": 5}),
        ("/v1/responses", {"input": "a"}),
        ("/generate", {"text": "a", "rid": "mine"}),
    ],
)
async def test_every_request_has_one(rig, path, body):
    reply = (await rig.http.post(path, json=body)).json()
    assert "timeline" not in reply and "timeline" not in reply.get("meta_info", {})
    name = reply.get("id") or reply["meta_info"]["id"]
    found = (await rig.http.get(f"/v1/requests/{name}/timeline")).json()
    assert (found["id"], found["object"], len(found["choices"])) == (name, "request.timeline", body.get("n", 1))
    for index, one in enumerate(found["choices"]):
        check(one, index)


async def test_an_unknown_request(rig):
    reply = await rig.http.get("/v1/requests/nobody/timeline")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "request_not_found")


@pytest.mark.parametrize("api", ["completions", "chat/completions"])
async def test_in_openais_replies(rig, api):
    body = {"prompt": "a"} if api == "completions" else {"messages": USER}
    body |= {"n": 2, "timeline": True}
    whole = (await rig.http.post(f"/v1/{api}", json=body)).json()
    for index, one in enumerate(whole["timeline"]):
        check(one, index)
    text = (await rig.http.post(f"/v1/{api}", json=body | {"stream": True})).text
    *frames, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert not any("timeline" in frame for frame in frames)
    assert (last["choices"], len(last["timeline"])) == ([], 2) and "usage" not in last
    options = {"include_usage": True}
    text = (await rig.http.post(f"/v1/{api}", json=body | {"stream": True, "stream_options": options})).text
    *frames, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert last["usage"]["completion_tokens"] == 8 and len(last["timeline"]) == 2


async def test_in_native_replies(rig):
    body = {"text": ["a", "b"], "rid": ["same", "same"], "sampling_params": {"n": 2}, "timeline": True}
    replies = (await rig.http.post("/generate", json=body)).json()
    for place, reply in enumerate(replies):
        check(reply["meta_info"]["timeline"], place)  # four requests of one name
    assert len([m for m in rig.text.got if isinstance(m, AskTimelines)]) == 1
    text = (await rig.http.post("/generate", json={"text": "a", "stream": True, "timeline": True})).text
    *frames, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert not any("timeline" in frame["meta_info"] for frame in frames)
    check(last["meta_info"]["timeline"])


async def test_an_engine_that_does_not_know_fails_no_request(rig):
    rig.text.named = lambda asked: []
    reply = (await rig.http.post("/generate", json={"text": "a", "timeline": True})).json()
    assert (reply["text"], reply["meta_info"]["timeline"]) == ("Hello wörld and moon", None)
    reply = (await rig.http.post("/v1/completions", json={"prompt": "a", "timeline": True})).json()
    assert reply["timeline"] == []


async def test_keys_see_their_own(fakes, tmp_path):
    file = tmp_path / "keys.toml"
    keys = [("ann", False), ("bob", False), ("root", True)]
    file.write_text("".join(f'[[keys]]\nname="{n}"\nkey="{n}-secret"\nadmin={str(a).lower()}\n' for n, a in keys))
    async with fakes.open_rig(api_key_file=str(file)) as rig:

        def as_(name):
            return {"headers": {"authorization": f"Bearer {name}-secret"}}

        reply = await rig.http.post("/v1/completions", json={"prompt": "a"}, **as_("ann"))
        path = f"/v1/requests/{reply.json()['id']}/timeline"
        statuses = [(await rig.http.get(path, **as_(name))).status_code for name in ("ann", "bob", "root")]
        assert statuses == [200, 404, 200]
        assert (await rig.http.get(path)).status_code == 401
