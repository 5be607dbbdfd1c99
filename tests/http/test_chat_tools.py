"""Tools and thoughts in chat completions, by OpenAI's client, against a fake engine that says what a test tells it."""

import json

import msgspec
import pytest

from actorserve.actors.messages import Chunks

pytestmark = pytest.mark.anyio
USER = [{"role": "user", "content": "Hi"}]


def tool(name, **more):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("weather", description="Of a city"), tool("time")]
NAMED = {"type": "function", "function": {"name": "time"}}
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
ANSWER = f"<think>\nHm.\n</think>\n\nLet me see.\n{WEATHER}\n{TIME}"


@pytest.fixture
def setting(fakes):
    return {"model": fakes.READING}


async def gathered(stream):
    """What a stream's choice 0 comes to: content, thoughts, calls, finish reason."""
    content, thoughts, calls, finish = "", "", [], None
    async for frame in stream:
        for choice in frame.choices:
            delta = choice.delta
            content += delta.content or ""
            thoughts += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                if call.id:
                    assert (call.index, call.type) == (len(calls), "function")
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
            finish = choice.finish_reason or finish
    return content, thoughts, calls, finish


async def test_calls_and_thoughts_whole_and_streamed(rig, client, fakes):
    fakes.say(rig, ANSWER)
    reply = await client.chat.completions.create(model="", messages=USER, tools=TOOLS)
    (choice,) = reply.choices
    message = choice.message
    assert (choice.finish_reason, message.content, message.reasoning_content) == ("tool_calls", "Let me see.", "Hm.")
    calls = [[call.function.name, call.function.arguments] for call in message.tool_calls]
    assert calls == [["weather", '{"city": "Łódź"}'], ["time", "{}"]]
    assert len({call.id for call in message.tool_calls}) == 2
    stream = await client.chat.completions.create(model="", messages=USER, tools=TOOLS, stream=True)
    assert await gathered(stream) == ("Let me see.", "Hm.", calls, "tool_calls")
    for generate in rig.text.generates:
        assert {"<tool_call>", "</tool_call>", "<think>", "</think>"} <= set(generate.prompt.shown)
        assert (generate.prompt.opens, generate.grammar) == (("<think>",), None)
        assert json.loads(generate.prompt.payload)["tools"][0]["function"]["description"] == "Of a city"


async def test_a_call_that_broke_off_is_no_call_to_make(rig, client, fakes):
    fakes.say(rig, WEATHER[:-25], finish="length")
    reply = await client.chat.completions.create(model="", messages=USER, tools=TOOLS)
    assert reply.choices[0].finish_reason == "length"
    fakes.say(rig, WEATHER[:-25], finish="stop")
    reply = await client.chat.completions.create(model="", messages=USER, tools=TOOLS)
    assert reply.choices[0].finish_reason == "stop"


async def test_single_calls(rig, client, fakes):
    fakes.say(rig, ANSWER)
    options = {"model": "", "messages": USER, "tools": TOOLS, "parallel_tool_calls": False}
    reply = await client.chat.completions.create(**options)
    assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["weather"]
    _, _, calls, finish = await gathered(await client.chat.completions.create(**options, stream=True))
    assert ([name for name, _ in calls], finish) == (["weather"], "tool_calls")


async def test_without_tools_nothing_is_a_call(rig, client, fakes):
    fakes.say(rig, ANSWER)
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        reply = await client.chat.completions.create(model="", messages=USER, **options)
        message = reply.choices[0].message
        assert (message.tool_calls, message.reasoning_content) == (None, "Hm.")
        assert message.content == f"Let me see.\n{WEATHER}\n{TIME}"
        assert "tools" not in json.loads(rig.text.generates[-1].prompt.payload)
        assert "<tool_call>" in rig.text.generates[-1].prompt.shown  # qwen3's thoughts may end in it


async def test_unknown_functions_are_text(rig, client, fakes):
    fakes.say(rig, TIME)
    reply = await client.chat.completions.create(model="", messages=USER, tools=[TOOLS[0]])
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (TIME, "stop")


async def test_thoughts_as_the_request_wants_them(rig, client, fakes):
    fakes.say(rig, "<think>\nHm, hm.\n</think>\n\nYes")
    together = {"extra_body": {"stream_reasoning": False}}
    stream = await client.chat.completions.create(model="", messages=USER, stream=True, **together)
    thoughts = [
        thought async for f in stream if (thought := getattr(f.choices[0].delta, "reasoning_content", None)) is not None
    ]
    assert thoughts == ["Hm, hm."]
    apart = {"extra_body": {"separate_reasoning": False}}
    reply = await client.chat.completions.create(model="", messages=USER, **apart)
    assert reply.choices[0].message.content == "<think>\nHm, hm.\n</think>\n\nYes"
    assert not hasattr(reply.choices[0].message, "reasoning_content")


async def test_a_prompt_that_ends_amid_thoughts(rig, client, fakes):
    def script(generate):
        chunk = fakes.chunk(generate.rid, "Hm.</think>Yes", [9], 1, "stop")
        return [Chunks([msgspec.structs.replace(chunk, thinking=True)])]

    rig.text.script = script
    reply = await client.chat.completions.create(model="", messages=USER)
    assert (reply.choices[0].message.reasoning_content, reply.choices[0].message.content) == ("Hm.", "Yes")


@pytest.mark.parametrize(
    ("choice", "parallel", "functions", "many"),
    [
        ("required", None, ["weather", "time"], True),
        ("required", False, ["weather", "time"], False),
        (NAMED, True, ["time"], False),
    ],
)
async def test_calls_that_must_come_are_a_grammar(rig, client, fakes, choice, parallel, functions, many):
    fakes.say(rig, TIME)
    options = {} if parallel is None else {"parallel_tool_calls": parallel}
    reply = await client.chat.completions.create(model="", messages=USER, tools=TOOLS, tool_choice=choice, **options)
    assert reply.choices[0].message.tool_calls[0].function.name == "time"
    grammar = rig.text.generates[0].grammar
    assert grammar.kind == "tool_calls"
    calls = json.loads(grammar.text)
    assert (calls["family"], [f["name"] for f in calls["functions"]], calls["many"]) == ("hermes", functions, many)
    assert calls["functions"][0]["parameters"] == TOOLS[0]["function"]["parameters"]


async def test_grammars_and_tools(rig, client, fakes):
    """A pattern may describe calls; JSON is an answer, whatever it looks like."""
    fakes.say(rig, WEATHER)
    for extra, calls in (({"regex": ".*"}, True), ({"json_schema": {}}, False)):
        reply = await client.chat.completions.create(model="", messages=USER, tools=TOOLS, extra_body=extra)
        assert bool(reply.choices[0].message.tool_calls) is calls


async def test_logprobs_of_markup_are_there(rig, client, fakes):
    fakes.say(rig, WEATHER, size=40, logprobs=[fakes.logprob(9, "x", 0)])
    stream = await client.chat.completions.create(model="", messages=USER, tools=TOOLS, stream=True, logprobs=True)
    count = 0
    async for frame in stream:
        count += len(frame.choices[0].logprobs.content) if frame.choices[0].logprobs else 0
    assert count == -(-len(WEATHER) // 40)


async def test_usage_so_far(rig, client, fakes):
    fakes.say(rig, "abcdef")
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    stream = await client.chat.completions.create(model="", messages=USER, n=2, stream=True, **options)
    *frames, last = [frame.usage.completion_tokens async for frame in stream]
    assert frames == sorted(frames) and frames[0] == 0 and frames[-1] == last == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "search"}]}, "tools[0].type"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("a\n")]}, "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
        ({"tools": [tool("f")] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOLS[0]], "tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
async def test_refused_with_the_field(rig, fields, param):
    reply = await rig.http.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert rig.text.got == []
