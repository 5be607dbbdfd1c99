"""/v1/programs: what the front makes of a program; what programs mean is in tests/lang/test_remote.py."""

import asyncio
import json

import pytest

from actorserve.actors.messages import Cancel, Generate, TextPrompt, Unpin

pytestmark = pytest.mark.anyio


def gen(state: int, name: str, text: str = "") -> dict[str, object]:
    nodes = [{"type": "Literal", "text": text}, {"type": "Gen", "name": name, "sampling": {"max_new_tokens": 4}}]
    return {"type": "Append", "state": state, "nodes": nodes, "line": "mine.py:7"}


BRANCHES = {
    "program": [
        gen(0, "top", "top: "),
        {"type": "Branch", "state": 0, "branches": [1, 2, 3]},
        *(gen(i, "x", f" {i}") for i in (1, 2, 3)),
        {"type": "Merge", "state": 0, "branches": [1, 2, 3]},
        {"type": "Return", "leaf": 4, "values": [{"type": "Reference", "state": 0, "name": "x", "path": [1]}]},
    ],
    "defaults": {"temperature": 0.25, "seed": 3},
}
SAID = "Hello wörld and moon"


async def test_a_program_is_one_request_and_many_of_the_engine(rig):
    reply = (await rig.http.post("/v1/programs", json=BRANCHES)).json()
    assert (reply["text"], reply["leaf"], reply["returned"]) == ("top: " + SAID, 4, [SAID])
    assert reply["variables"]["x"]["value"] == [SAID] * 3 and reply["error"] is None
    drawing = [m for m in rig.text.generates if m.params.max_new_tokens]
    prompts = [m.prompt.text for m in drawing]
    assert prompts == ["top: "] + [f"top: {SAID} {i}" for i in (1, 2, 3)]
    assert {(m.params.temperature, m.params.max_new_tokens, m.params.seed) for m in drawing} == {(0.25, 4, 3)}
    (commit,) = [m for m in rig.text.generates if not m.params.max_new_tokens]
    assert commit.prompt == TextPrompt("top: " + SAID), "the branches' prefix, once"
    assert (await rig.http.get("/model_info")).json()["runs_programs"] is True


async def test_what_a_program_comes_back_to_is_pinned_until_it_does_not(rig):
    used = set()
    for _ in range(2):
        rig.text.got.clear()
        assert (await rig.http.post("/v1/programs", json=BRANCHES)).json()["error"] is None
        pins = {m.prompt.text: m.pin for m in rig.text.generates}
        top, *branches = [pins[text] for text in ("top: ", *(f"top: {SAID} {i}" for i in (1, 2, 3)))]
        assert pins["top: " + SAID] == top, "the text before the branches takes the place of what led there"
        released = [i for m in await rig.text.wait_for(Unpin, 4) for i in m.pins]
        assert released == [*branches, top], "the branches' as soon as they are joined"
        assert len(set(released)) == 4 and 0 not in released and used.isdisjoint(released)
        used |= set(released)


@pytest.mark.parametrize("setting", [{"max_queued_requests": 2}])
async def test_a_program_waits_for_room_that_it_takes_itself(rig):
    reply = (await rig.http.post("/v1/programs", json=BRANCHES)).json()
    assert reply["variables"]["x"]["value"] == [SAID] * 3


async def test_a_client_that_leaves_ends_all_of_its_program(rig):
    def silent_branches(generate: Generate):
        return [] if generate.prompt.text[-1].isdigit() else fine(generate)

    fine, rig.text.script = rig.text.script, silent_branches
    post = asyncio.create_task(rig.http.post("/v1/programs", json=BRANCHES))
    await rig.text.wait_for(Generate, 5)
    post.cancel()
    cancels = await rig.text.wait_for(Cancel, 3)
    assert {c.rid for c in cancels} == {m.rid for m in rig.text.generates if m.prompt.text[-1].isdigit()}
    assert not rig.front.client.table
    (unpin,) = await rig.text.wait_for(Unpin, 1)
    assert set(unpin.pins) == {m.pin for m in rig.text.generates}, "nothing of it stays pinned"


async def test_errors_are_in_the_reply_with_the_programs_line(rig):
    program = {"program": [gen(0, "a"), {"type": "Append", "state": 0, "nodes": [
        {"type": "Gen", "name": "b", "sampling": {"top_p": 7}}], "line": "mine.py:9"}]}  # fmt: skip
    reply = (await rig.http.post("/v1/programs", json=program)).json()
    error = reply["variables"]["b"]["error"]
    assert reply["variables"]["a"]["value"] == SAID and reply["error"] == error
    assert (error["line"], error["status"], error["param"]) == ("mine.py:9", 400, "top_p")
    assert error["message"].startswith("variable 'b': ") and error["message"].endswith("(mine.py:9)")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "program"),
        ({"program": [{"type": "Loop"}]}, "program[0].type"),
        ({"program": [gen(2, "x")]}, "program"),
        ({"program": [], "defaults": {"temperature": "hot"}}, "defaults.temperature"),
        ({"program": [], "template": {"name": "x"}}, "template.roles"),
    ],
)
async def test_bodies_that_are_wrong(rig, body, param):
    reply = await rig.http.post("/v1/programs", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert rig.text.got == []


async def test_a_program_that_is_nested_as_deeply_as_a_body_may_be(rig):
    condition = (
        '{"type":"If","condition":{"left":{"type":"Reference","state":0,"name":"x"},"operator":"truth"},"then":['
    )
    depth = 60
    body = '{"program":[' + condition * depth + "]}" * depth + "]}"
    reply = await rig.http.post("/v1/programs", content=body)
    assert reply.status_code == 200 and "no variable 'x'" in json.dumps(reply.json()["error"]), reply.text


async def test_a_key_may_run_programs_of_more_calls_than_it_may_have_at_once(fakes, tmp_path):
    (tmp_path / "keys.toml").write_text('[[keys]]\nname = "ann"\nkey = "sk-ann"\nmax_concurrency = 1\n')
    async with fakes.open_rig(api_key_file=str(tmp_path / "keys.toml")) as rig:
        headers = {"authorization": "Bearer sk-ann"}
        reply = (await rig.http.post("/v1/programs", json=BRANCHES, headers=headers)).json()
        assert reply["variables"]["x"]["value"] == [SAID] * 3
        assert (await rig.http.post("/v1/programs", json=BRANCHES)).status_code == 401
        assert len({m.cache_salt for m in rig.text.generates}) == 1 and rig.text.generates[0].cache_salt
