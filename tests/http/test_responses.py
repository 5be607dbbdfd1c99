"""/v1/responses by OpenAI's client, against a fake engine that says what a test tells it."""

import json

import openai
import pytest

pytestmark = pytest.mark.anyio
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
ANSWER = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"


@pytest.fixture
def setting(fakes):
    return {"model": fakes.READING}


def template_input(rig):
    return json.loads(rig.text.generates[-1].prompt.payload)


def seen(url):
    return [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]


async def test_image(rig, client):
    await client.responses.create(model="fake-model", input=seen("data:image/png;base64,AQID"))
    assert [image.data for image in rig.text.generates[0].prompt.images] == [b"\x01\x02\x03"]
    assert template_input(rig)["messages"] == [{"role": "user", "content": [{"type": "image"}]}]


async def test_create(rig, client, fakes):
    fakes.say(rig, "Yes, 42")
    reply = await client.responses.create(
        model="fake-model", input="Is it?", instructions="Be brief", max_output_tokens=9, temperature=0.5,
        metadata={"a": "b"},
    )  # fmt: skip
    assert (reply.output_text, reply.status, reply.model, reply.metadata) == (
        "Yes, 42",
        "completed",
        "fake-model",
        {"a": "b"},
    )
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.input_tokens_details.cached_tokens) == (
        7,
        3,
        3,
    )
    assert template_input(rig)["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Is it?"},
    ]
    params = rig.text.generates[0].params
    assert (params.max_new_tokens, params.temperature) == (9, 0.5)


async def test_thoughts_and_calls_are_items(rig, client, fakes):
    fakes.say(rig, ANSWER)
    reply = await client.responses.create(model="", input="Weather?", tools=[TOOL])
    thoughts, message, call = reply.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", "Hm.")
    assert (message.type, message.content[0].text) == ("message", "Let me see.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Łódź"})
    assert template_input(rig)["tools"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_stream_says_what_the_response_is(rig, client, fakes, size):
    fakes.say(rig, ANSWER, size=size)
    stream = await client.responses.create(model="", input="Weather?", tools=[TOOL], stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type, events[-1].type] == [
        "response.created", "response.in_progress", "response.completed",
    ]  # fmt: skip
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    said: dict = {}
    for event in events:
        if event.type.endswith(".delta"):
            said[event.output_index] = said.get(event.output_index, "") + event.delta
    assert said == {0: "Hm.", 1: final.output_text, 2: final.output[2].arguments}
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in final.output]
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    assert added == [item.id for item in final.output]


async def test_the_clients_own_stream_helper(rig, client, fakes):
    fakes.say(rig, ANSWER)
    async with client.responses.stream(model="", input="Weather?", tools=[TOOL]) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert (final.output_text, final.output[2].name) == ("Let me see.", "weather")


async def test_a_conversation_goes_on(rig, client, fakes):
    fakes.say(rig, CALL)
    first = await client.responses.create(model="", input="Weather?", instructions="Be brief", tools=[TOOL])
    fakes.say(rig, "Sunny")
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "21 C"}
    second = await client.responses.create(model="", input=[result], previous_response_id=first.id, tools=[TOOL])
    assert (second.output_text, second.previous_response_id) == ("Sunny", first.id)
    user, call, tool = template_input(rig)["messages"]
    assert (user["content"], tool["content"], tool["tool_call_id"]) == ("Weather?", "21 C", call["tool_calls"][0]["id"])
    await client.responses.create(model="", input="And now?", previous_response_id=second.id)
    assert [m["role"] for m in template_input(rig)["messages"]] == ["user", "assistant", "tool", "assistant", "user"]


async def test_items_of_the_client_itself(rig, client, fakes):
    """Whoever keeps the conversation sends the output back as input."""
    fakes.say(rig, ANSWER)
    first = await client.responses.create(model="", input="Weather?", tools=[TOOL], store=False)
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items.append({"type": "function_call_output", "call_id": first.output[2].call_id, "output": "21 C"})
    await client.responses.create(model="", input=items, tools=[TOOL])
    user, assistant, tool = template_input(rig)["messages"]
    assert (assistant["content"], len(assistant["tool_calls"])) == ([{"type": "text", "text": "Let me see."}], 1)
    assert (user["role"], tool["role"]) == ("user", "tool")


async def test_stored_responses(rig, client, fakes):
    fakes.say(rig, "Yes")
    made = await client.responses.create(model="", input="Is it?")
    assert (await client.responses.retrieve(made.id)).model_dump() == made.model_dump()
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(made.id)
    await client.responses.delete(made.id)
    for again in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            await again(made.id)
    unkept = await client.responses.create(model="", input="Is it?", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="", input="And?", previous_response_id=unkept.id)


async def test_a_cut_response_is_incomplete(rig, client, fakes):
    fakes.say(rig, "Yes and", finish="length")
    reply = await client.responses.create(model="", input="Is it?")
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    stream = await client.responses.create(model="", input="Is it?", stream=True)
    assert [event.type async for event in stream][-1] == "response.incomplete"


async def test_formats_and_choices_travel(rig, client, fakes):
    fakes.say(rig, "5")
    form = {"type": "json_schema", "name": "n", "schema": {"type": "integer"}, "strict": True}
    await client.responses.create(model="", input="x", text={"format": form})
    assert rig.text.generates[0].grammar.text == '{"type":"integer"}'
    await client.responses.create(
        model="", input="x", tools=[TOOL], tool_choice={"type": "function", "name": "weather"}
    )
    assert rig.text.generates[1].grammar.kind == "tool_calls"


def test_the_store_is_bounded(monkeypatch):
    from actorserve.errors import RequestError
    from actorserve.http import response_store

    monkeypatch.setattr(response_store, "MOST_BYTES", 25)
    store = response_store.ResponseStore()
    for name in "abc":
        store.put(name, response_store.Stored(b"", [], 10))
    with pytest.raises(RequestError):
        store.get("a")
    store.delete("b")
    store.put("d", response_store.Stored(b"", [], 10))
    assert store.get("c") and store.get("d")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "x", "max_output_tokens": -1}, "max_output_tokens"),
        ({"input": "x", "temperature": 101}, "temperature"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": seen("file:///etc/passwd")}, "input[0].content[0].image_url"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "top_logprobs": 3}, "top_logprobs"),
    ],
)
async def test_refused_with_the_field(rig, body, param):
    reply = await rig.http.post("/v1/responses", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert rig.text.got == []
