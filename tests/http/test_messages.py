"""/v1/messages by Anthropic's client, against a fake engine that says what a test tells it."""

import json

import anthropic
import pytest

from actorserve.actors.messages import Chunks, GrammarSpec, ImageFile, Refused

pytestmark = pytest.mark.anyio
TOOL = {"name": "weather", "description": "Of a city", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
ANSWER = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"
ASKED = {"model": "fake-model", "max_tokens": 50, "messages": [{"role": "user", "content": "Weather?"}]}


@pytest.fixture
def setting(fakes):
    return {"model": fakes.READING}


@pytest.fixture
async def claude(rig):
    plain = anthropic.DefaultAsyncHttpxClient(verify=False)
    async with anthropic.AsyncAnthropic(
        base_url=rig.base, api_key="none", max_retries=0, timeout=20, http_client=plain
    ) as opened:
        yield opened


def template_input(rig):
    return json.loads(rig.text.generates[-1].prompt.payload)


def blocks(message):
    return [block.model_dump(exclude_none=True) for block in message.content]


async def test_create(rig, claude, fakes):
    fakes.say(rig, "Yes, 42")
    message = await claude.messages.create(
        **ASKED, system="Be brief", stop_sequences=["a", "b"], metadata={"user_id": "u"},
        extra_body={"temperature": 0.5, "top_k": 4, "top_p": 0.9},
    )  # fmt: skip
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("Yes, 42", "end_turn", None)
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake-model")
    assert message._request_id.startswith("req_")
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 3, 3)
    assert template_input(rig)["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Weather?"},
    ]
    params = rig.text.generates[0].params
    assert (params.max_new_tokens, params.temperature, params.top_k, params.top_p) == (50, 0.5, 4, 0.9)
    assert params.stop == ("a", "b")


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_stream_adds_up_to_the_message(rig, claude, fakes, size):
    fakes.say(rig, ANSWER, size=size)
    whole = await claude.messages.create(**ASKED, tools=[TOOL])
    assert blocks(whole) == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": whole.content[2].id, "name": "weather", "input": {"city": "Łódź"}},
    ]
    assert whole.stop_reason == "tool_use"
    async with claude.messages.stream(**ASKED, tools=[TOOL]) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_message()
    assert blocks(final) == [*blocks(whole)[:2], blocks(whole)[2] | {"id": final.content[2].id}]
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", whole.usage.output_tokens)
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens) == (4, 3)
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert [kinds.count(f"content_block_{end}") for end in ("start", "stop")] == [3, 3]


async def test_the_events_on_the_wire(rig, fakes):
    fakes.say(rig, "Yes")
    lines = (await rig.http.post("/v1/messages", json=ASKED | {"stream": True})).text.split("\n\n")
    names = [line.partition("\n")[0] for line in lines if line]
    assert names == [
        f"event: {name}"
        for name in (
            "message_start ping content_block_start content_block_delta content_block_stop message_delta message_stop"
        ).split()
    ]


async def test_the_conversation_goes_on(rig, claude, fakes):
    fakes.say(rig, ANSWER)
    first = await claude.messages.create(**ASKED, tools=[TOOL])
    result = {"type": "tool_result", "tool_use_id": first.content[2].id, "content": "21 C"}
    failed = result | {"content": [{"type": "text", "text": "no such city"}], "is_error": True}
    turns = [
        *ASKED["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, failed, {"type": "text", "text": "And?"}]},
    ]
    fakes.say(rig, "Sunny")
    await claude.messages.create(**ASKED | {"messages": turns}, tools=[TOOL])
    _, assistant, good, bad, user = template_input(rig)["messages"]
    assert (assistant["content"], assistant["reasoning_content"]) == ("Let me see.", "Hm.")
    (call,) = assistant["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Łódź"}
    assert (good["role"], good["content"], good["tool_call_id"]) == ("tool", "21 C", call["id"])
    assert bad["content"] == "Error: no such city"
    assert user["content"] == [{"type": "text", "text": "And?"}]


async def test_a_begun_answer_is_continued(rig, claude, fakes):
    fakes.say(rig, " sunny")
    turns = [*ASKED["messages"], {"role": "assistant", "content": "It is"}]
    await claude.messages.create(**ASKED | {"messages": turns})
    assert template_input(rig)["continue_final_message"] is True


async def test_why_it_ended(rig, claude, fakes):
    for finish, matched, reason in (("length", None, "max_tokens"), ("stop", "END", "stop_sequence")):
        fakes.say(rig, "Yes", finish=finish, matched=matched)
        message = await claude.messages.create(**ASKED, stop_sequences=["END"])
        assert (message.stop_reason, message.stop_sequence) == (reason, matched)
    fakes.say(rig, CALL[:60], finish="length")
    cut = await claude.messages.create(**ASKED, tools=[TOOL])
    assert (cut.stop_reason, cut.content[0].input) == ("max_tokens", {})


@pytest.mark.parametrize(
    ("choice", "kind"),
    [({"type": "auto"}, None), ({"type": "any"}, "tool_calls"), ({"type": "tool", "name": "weather"}, "tool_calls")],
)
async def test_tool_choice(rig, claude, fakes, choice, kind):
    fakes.say(rig, CALL + CALL)
    once = choice | {"disable_parallel_tool_use": True}
    for given, calls in ((choice, 2), (once, 1)):
        message = await claude.messages.create(**ASKED, tools=[TOOL], tool_choice=given)
        grammar = rig.text.got[-1].grammar
        assert (grammar and grammar.kind) == kind
        if kind is None:
            assert len(message.content) == calls
    await claude.messages.create(**ASKED, tools=[TOOL], tool_choice={"type": "none"})
    assert "tools" not in template_input(rig)


async def test_thinking_is_told_to_the_template(rig, claude, fakes):
    fakes.say(rig, "<think>\nHm.\n</think>\n\nYes")
    await claude.messages.create(**ASKED, thinking={"type": "disabled"})
    assert template_input(rig)["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    on = {"type": "enabled", "budget_tokens": 20, "display": "omitted"}
    message = await claude.messages.create(**ASKED, thinking=on)
    told = template_input(rig)["chat_template_kwargs"]
    assert (told["enable_thinking"], told["thinking_budget"]) == (True, 20)
    assert [b.type for b in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == ""


async def test_a_schema_for_the_answer(rig, claude, fakes):
    fakes.say(rig, "5")
    form = {"type": "json_schema", "schema": {"type": "integer"}}
    await claude.messages.create(**ASKED, output_config={"format": form, "effort": "low"})
    assert rig.text.got[-1].grammar == GrammarSpec("json_schema", '{"type":"integer"}')
    assert template_input(rig)["chat_template_kwargs"] == {"reasoning_effort": "low"}


async def test_count_tokens(rig, claude):
    count = await claude.messages.count_tokens(
        model="fake-model", messages=ASKED["messages"], system="Be brief", tools=[TOOL]
    )
    assert count.input_tokens == len("1chat")
    assert json.loads(rig.text.got[0].prompt.payload)["tools"][0]["function"]["name"] == "weather"


def image(source):
    result = {"type": "tool_result", "tool_use_id": "1", "content": "x"}
    return [{"role": "user", "content": [result, {"type": "image", "source": source}]}]


async def test_image(rig, claude):
    source = {"type": "base64", "media_type": "image/png", "data": "AQID"}
    await claude.messages.create(**ASKED | {"messages": image(source)})
    prompt = rig.text.generates[0].prompt
    assert prompt.images == (ImageFile(b"\x01\x02\x03", "messages[0].content[1].source.data"),)
    assert template_input(rig)["messages"][1] == {"role": "user", "content": [{"type": "image"}]}


BAD = [
    ({"messages": []}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": None}, "max_tokens"),
    ({"temperature": 101}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source"),
    ({"messages": image({"type": "base64"})}, "messages[0].content[1].source.data"),
    ({"messages": image({"type": "base64", "data": "?"})}, "messages[0].content[1].source.data"),
    ({"messages": image({"type": "url", "url": "file:///etc/passwd"})}, "messages[0].content[1].source"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].id"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0]"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "thinking.budget_tokens"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
]


async def test_refused_with_the_field_in_anthropics_shape(rig):
    for change, field in BAD:
        reply = await rig.http.post("/v1/messages", json=ASKED | change)
        body = reply.json()
        assert (reply.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
        assert body["error"]["message"].startswith(field)
    assert rig.text.got == []


async def test_errors_by_status(rig, claude, fakes):
    with pytest.raises(anthropic.NotFoundError) as missing:
        await claude.messages.create(**ASKED | {"model": "other"})
    assert missing.value.body["error"]["type"] == "not_found_error"
    rig.text.script = lambda generate: [Refused(generate.rid, 1, 503, "engine_unavailable", "down")]
    with pytest.raises(anthropic.InternalServerError) as down:
        await claude.messages.create(**ASKED)
    assert (down.value.status_code, down.value.body["error"]["type"]) == (503, "overloaded_error")


async def test_an_error_ends_a_stream(rig, fakes):
    def script(generate):
        begun = Chunks([fakes.chunk(generate.rid, "Yes", [9], 1)])
        return [begun, Refused(generate.rid, 1, 503, "engine_unavailable", "the scheduler died")]

    rig.text.script = script
    text = (await rig.http.post("/v1/messages", json=ASKED | {"stream": True})).text
    assert text.endswith(
        'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"the scheduler died"}}\n\n'
    )
