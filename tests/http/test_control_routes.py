"""SGLang's routes beside /generate, over a real socket, against a fake engine."""

import asyncio
import itertools
import json

import pytest

from actorserve.actors.messages import Abort, Chunks, Generate, Order, Tokenize

pytestmark = pytest.mark.anyio
USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_tokenize(rig, path):
    one = (await rig.http.post(path, json={"prompt": "aé"})).json()
    assert one == {"tokens": [1, 97, 233], "count": 3, "max_model_len": 512}
    many = (await rig.http.post(path, json={"prompt": ["a", "bc"], "add_special_tokens": False})).json()
    assert (many["tokens"], many["count"]) == ([[97], [98, 99]], [1, 2])
    await rig.http.post(path, json={"messages": USER, "add_generation_prompt": False})
    asked = [m for m in rig.text.got if isinstance(m, Tokenize)][-1]
    assert json.loads(asked.prompt.payload) == {"messages": USER, "add_generation_prompt": False}


async def test_detokenize(rig):
    assert (await rig.http.post("/detokenize", json={"tokens": [97, 233]})).json() == {"text": "aé"}
    assert (await rig.http.post("/v1/detokenize", json={"tokens": [[97], [98]]})).json() == {"text": ["a", "b"]}
    assert (await rig.http.post("/detokenize", json={"tokens": []})).json() == {"text": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [1000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1, [2]]}, "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/abort_request", {}, "rid"),
        ("/pause_generation", {"mode": "softly"}, "mode"),
    ],
)
async def test_refused_with_the_field(rig, path, body, param):
    reply = await rig.http.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_orders(rig):
    assert (await rig.http.get("/flush_cache")).text == "Cache flushed.\n"
    assert (await rig.http.post("/reset_prefix_cache")).text == "Cache flushed.\n"
    assert (await rig.http.post("/pause_generation")).json() == {"status": "paused", "mode": "abort"}
    for mode in ("retract", "in_place"):
        assert (await rig.http.post("/pause_generation", json={"mode": mode})).json()["mode"] == mode
    assert (await rig.http.post("/continue_generation")).json() == {"status": "running"}
    actions = [m.action for m in rig.text.got if isinstance(m, Order)]
    assert actions == ["flush_cache", "flush_cache", "pause_abort", "pause_retract", "pause", "continue"]
    rig.text.busy = True
    refused = await rig.http.post("/flush_cache")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_idle")
    assert rig.front.client.questions._open == {}


async def test_questions_are_asked_again_and_end_with_the_engine(rig):
    rig.text.answer = lambda message: Chunks([])  # no answer
    asking = asyncio.create_task(rig.http.post("/flush_cache"))
    await rig.text.wait_for(Order)
    rig.kill_text()
    rig.revive_text()
    first, again = await rig.text.wait_for(Order, 2)
    assert first == again
    rig.front._end_requests()
    assert (await asking).status_code == 503


async def test_abort_by_name(rig, fakes):
    rig.text.script = lambda generate: []
    bodies = [{"text": "a", "rid": "first"}, {"text": ["b", "c"], "rid": ["second", "third"]}]
    asking = [asyncio.create_task(rig.http.post("/generate", json=body)) for body in bodies]
    chat = asyncio.create_task(rig.http.post("/v1/chat/completions", json={"messages": USER}))
    rids = {g.prompt.text: g.rid for g in await rig.text.wait_for(Generate, 4) if hasattr(g.prompt, "text")}
    assert (await rig.http.post("/abort_request", json={"rid": "third"})).status_code == 200
    assert [a.rid for a in await rig.text.wait_for(Abort)] == [rids["c"]]
    rig.text.got = []
    await rig.http.post("/abort_request", json={"abort_all": True})
    aborts = await rig.text.wait_for(Abort, 4)
    rig.text.say(Chunks([fakes.chunk(a.rid, "so far", [9], 1, "abort") for a in aborts]))
    first, second = [(await task).json() for task in asking]
    assert (first["text"], first["meta_info"]["finish_reason"]["type"]) == ("so far", "abort")
    assert [reply["meta_info"]["id"] for reply in second] == ["second", "third"]
    assert (await chat).json()["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info", "/get_server_args"])
async def test_server_info(rig, path):
    info = (await rig.http.get(path)).json()
    assert (info["served_model_name"], info["max_queued_requests"], info["status"]) == ("fake-model", 300, "ok")
    assert info["internal_states"][0]["pages_total"] == 100


async def test_other_names(rig):
    assert (await rig.http.get("/model_info")).json() == (await rig.http.get("/get_model_info")).json()
    assert (await rig.http.get("/health_generate")).json()["status"] == "ok"
    assert (await rig.http.get("/ping")).json() == (await rig.http.post("/ping")).json() == {
        "status": "ok", "reason": None
    }  # fmt: skip
    version = (await rig.http.get("/version")).json()["version"]
    assert version == (await rig.http.get("/server_info")).json()["version"] != ""
    (card,) = (await rig.http.get("/v1/models")).json()["data"]
    assert card == (await rig.http.get("/v1/models/fake-model")).json()
    assert (card["id"], card["root"], card["parent"], card["max_model_len"]) == ("fake-model", "fake-model", None, 512)
    assert not [m for m in rig.text.got if isinstance(m, Generate)]


async def test_profiles(rig):
    assert (await rig.http.get("/start_profile")).json() == {"status": "profiling"}
    wanted = {"num_steps": 5, "activities": ["CPU"], "with_stack": True}
    await rig.http.post("/start_profile", json=wanted)
    assert (await rig.http.post("/stop_profile")).json() == {"status": "stopped", "file": "stop_profile"}
    assert [json.loads(m.detail or "{}") for m in rig.text.got if isinstance(m, Order)] == [{}, wanted, {}]
    for field, value in (("output_dir", "/tmp/x"), ("num_steps", 0), ("activities", ["TPU"])):
        refused = await rig.http.post("/start_profile", json={field: value})
        assert refused.status_code == 400 and refused.json()["error"]["param"].startswith(field)


async def test_weights_come_from_one_place_only(fakes, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "good", outside):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (root / "empty").mkdir()
    (root / "link").symlink_to(outside)
    (root / "inner").symlink_to(root / "good")
    names = itertools.cycle(["_from_disk", ""])  # today's and SGLang's first one
    async with fakes.open_rig(weights_root=str(root)) as rig:

        async def ask(path, **more):
            return await rig.http.post(f"/update_weights{next(names)}", json={"model_path": path, **more})

        for path in ("good", str(root / "good"), "inner"):
            assert (await ask(path)).json()["success"] is True
        assert (await ask("good", abort_all_requests=True)).status_code == 200
        orders = [(m.action, m.detail) for m in rig.text.got if isinstance(m, Order)]
        good = str(root / "good")
        assert orders == [("update_weights", good)] * 3 + [("update_weights_abort", good)]
        texts = set()
        for path in (str(outside), "../outside", "link", "empty", "nothing", "a\0b", "x" * 4000, "/etc", "."):
            refused = (await ask(path)).json()["error"]
            assert refused["param"] == "model_path"
            texts.add(refused["message"])
        assert len(texts) == 1, "nobody learns what lies outside"
        assert (await ask("good", is_async=True)).json()["error"]["param"] == "is_async"
        assert (await ask("good", flush_cache=False)).json()["error"]["param"] == "flush_cache"
        assert len([m for m in rig.text.got if isinstance(m, Order)]) == 4


async def test_without_a_root_there_are_no_weights(rig):
    refused = await rig.http.post("/update_weights_from_disk", json={"model_path": "/"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_weights_root")


async def test_loads(rig, fakes):
    """By the scheduler's report: 2 run, 1 waits, 10 of 100 pages of 16 tokens are theirs alone, a step takes 1.5 ms."""
    found = (await rig.http.get("/v1/loads")).json()
    (one,) = found["loads"]
    assert (one["num_running_reqs"], one["num_waiting_reqs"]) == (2, 1)
    assert (one["num_used_tokens"], one["max_total_num_tokens"], one["token_usage"]) == (160, 1600, 0.1)
    assert one["gen_throughput"] == pytest.approx(2 / 1.5e-3) and one["cache_hit_rate"] == 0.6
    assert one["queues"] == {"waiting": 1, "grammar": 1} and found["dp_rank_count"] == 1
    assert (found["aggregate"]["total_reqs"], found["aggregate"]["avg_token_usage"]) == (3, 0.1)
    (core,) = (await rig.http.get("/v1/loads?include=core&dp_rank=0")).json()["loads"]
    assert "queues" not in core and core["max_running_requests"] is None
    assert (await rig.http.get("/load")).json() == {"server_load": 3}
    assert (await rig.http.get("/get_load")).json() == [
        {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": 160}
    ]
    for query, param in (("include=core,disk", "include"), ("dp_rank=1", "dp_rank"), ("dp_rank=a", "dp_rank")):
        refused = await rig.http.get(f"/v1/loads?{query}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    async with fakes.open_rig(max_running_requests=4) as other:
        assert (await other.http.get("/v1/loads")).json()["loads"][0]["utilization"] == 0.5
    rig.front.client.replicas.clear()
    assert (await rig.http.get("/v1/loads")).status_code == 503


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLING = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


async def test_calls_in_a_text(rig, fakes):
    body = {"text": CALLING, "tools": [WEATHER], "tool_call_parser": "hermes"}
    reply = (await rig.http.post("/parse_function_call", json=body)).json()
    (call,) = reply["calls"]
    assert (call["tool_index"], call["name"], json.loads(call["parameters"])) == (0, "weather", {"city": "Ulm"})
    assert reply["normal_text"].strip() == "Let me see."
    del body["tool_call_parser"]
    async with fakes.open_rig(fakes.READING) as reading:
        assert (await reading.http.post("/parse_function_call", json=body)).json() == reply
    long = "word " * 1000  # several pieces
    reply = (
        await rig.http.post("/parse_function_call", json=body | {"text": long, "tool_call_parser": "hermes"})
    ).json()
    assert reply == {"normal_text": long, "calls": []}


async def test_thoughts_in_a_text(rig, fakes):
    body = {"text": "<think>" + "so " * 1000 + "</think>yes", "reasoning_parser": "qwen3"}
    reply = (await rig.http.post("/separate_reasoning", json=body)).json()
    assert (reply["reasoning_text"].strip(), reply["text"]) == (("so " * 1000).strip(), "yes")
    async with fakes.open_rig(fakes.READING) as reading:
        assert (await reading.http.post("/separate_reasoning", json={"text": body["text"]})).json() == reply
    for path, wrong, param in (
        ("/separate_reasoning", {"text": "a"}, "reasoning_parser"),
        ("/separate_reasoning", {"text": "a", "reasoning_parser": "none"}, "reasoning_parser"),
        ("/parse_function_call", {"text": "a", "tools": []}, "tools"),
        ("/parse_function_call", {"text": "a", "tools": [WEATHER], "tool_call_parser": "x"}, "tool_call_parser"),
    ):
        refused = await rig.http.post(path, json=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
