"""Grammars of chats whose model thinks first: the front tells them apart, against a fake engine."""

import json

import pytest

pytestmark = pytest.mark.anyio
USER = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


@pytest.fixture
def setting(fakes):
    return {"model": fakes.THINKING}


async def test_an_answer_after_thoughts(rig, client, fakes):
    fakes.say(rig, '<think>\nHm.\n</think>\n\n{"a": 1}')
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    reply = await client.chat.completions.create(model="", messages=USER, response_format=schema)
    assert (reply.choices[0].message.reasoning_content, reply.choices[0].message.content) == ("Hm.", '{"a": 1}')
    generate = rig.text.generates[0]
    assert generate.grammar.thoughts == fakes.THINKING.thoughts
    assert generate.prompt.opens == ("<think>",)


async def test_calls_that_must_come_after_thoughts(rig, client, fakes):
    fakes.say(rig, f"<think>Hm.</think>{CALL}")
    reply = await client.chat.completions.create(model="", messages=USER, tools=TOOLS, tool_choice="required")
    message = reply.choices[0].message
    assert (message.reasoning_content, message.tool_calls[0].function.name) == ("Hm.", "time")
    assert rig.text.generates[0].grammar.thoughts == fakes.THINKING.thoughts


@pytest.mark.parametrize("extra", [{"separate_reasoning": False}, {"continue_final_message": True}])
async def test_an_answer_without_thoughts(rig, client, fakes, extra):
    """They are not told apart; or the client has begun the answer."""
    fakes.say(rig, "12")
    messages = [*USER, {"role": "assistant", "content": "It is "}] if "continue_final_message" in extra else USER
    more = {"regex": "[0-9]+"} | extra
    reply = await client.chat.completions.create(model="", messages=messages, extra_body=more)
    assert reply.choices[0].message.content == "12"
    assert rig.text.generates[0].grammar.thoughts is None


async def test_thoughts_without_an_answer_may_come_back(rig, client, fakes):
    """Clients send the message that they got, also one that was cut amid its thoughts: its content is null."""
    fakes.say(rig, "<think>Hm.")
    message = (await client.chat.completions.create(model="", messages=USER)).choices[0].message.model_dump()
    assert (message["content"], message["reasoning_content"]) == (None, "Hm.")
    await client.chat.completions.create(model="", messages=[*USER, message, *USER])
    turn = json.loads(bytes(rig.text.generates[1].prompt.payload))["messages"][1]
    assert turn == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
