"""The OpenAI routes, driven by OpenAI's own client over a real socket, against a fake engine."""

import json

import msgspec
import numpy as np
import openai
import pytest

from actorserve.actors.messages import Chunks, GrammarSpec, ImageFile, Refused, TextPrompt, VideoFile

pytestmark = pytest.mark.anyio
TEXT = "Hello wörld and moon"
USER = [{"role": "user", "content": "Hi"}]
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}}}
TAG = {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}
TAG_TEXT = '{"structures":[{"begin":"<f>","schema":{},"end":"</f>"}],"triggers":["<f"]}'


def template_input(rig) -> dict:
    return json.loads(rig.text.generates[-1].prompt.payload)


# ------------------------------------------------------------------ chat


async def test_chat(rig, client):
    reply = await client.chat.completions.create(model="fake-model", messages=USER)
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model, reply.system_fingerprint) == ("chat.completion", "fake-model", None)
    (choice,) = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", TEXT, None)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 4, 11)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert template_input(rig) == {"messages": [{"role": "user", "content": "Hi"}]}
    params = rig.text.generates[0].params
    assert (params.temperature, params.max_new_tokens, params.logprobs) == (1.0, None, None)


async def test_chat_raw_reply_has_openai_fields_only(rig):
    reply = (await rig.http.post("/v1/chat/completions", json={"messages": USER})).json()
    assert set(reply) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert set(reply["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": TEXT, "refusal": None}


async def test_chat_stream(rig, client):
    stream = await client.chat.completions.create(
        model="fake-model", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({(c.id, c.created, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(c.choices[0].delta.content for c in middle) == TEXT
    assert all(c.choices[0].delta.role is None and c.choices[0].finish_reason is None for c in middle)
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (usage.choices, usage.usage.completion_tokens, usage.usage.prompt_tokens_details.cached_tokens) == ([], 4, 3)


async def test_chat_stream_without_usage_has_no_usage_field(rig):
    reply = await rig.http.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    *events, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event[6:]) for event in events)


async def test_chat_n(rig, client):
    reply = await client.chat.completions.create(model="fake-model", messages=USER, n=3, seed=5)
    assert [(c.index, c.message.content) for c in reply.choices] == [(i, TEXT) for i in range(3)]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (7, 12)
    (generate,) = rig.text.generates
    assert (generate.n, generate.params.seed) == (3, 5)


async def test_chat_n_stream(rig, client):
    stream = await client.chat.completions.create(model="fake-model", messages=USER, n=2, stream=True)
    texts, reasons = {0: "", 1: ""}, {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == ({0: TEXT, 1: TEXT}, {0: "stop", 1: "stop"})


async def test_chat_logprobs(rig, client):
    reply = await client.chat.completions.create(model="fake-model", messages=USER, logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert [(t.token, t.logprob) for t in content][:2] == [("Hello", -1.0), (" wörld", -1.1)]
    assert bytes(content[1].bytes).decode() == " wörld"
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("alt0", -1.0), ("alt1", -2.0)]
    assert rig.text.generates[0].params.logprobs == 2
    stream = await client.chat.completions.create(model="fake-model", messages=USER, logprobs=True, stream=True)
    tokens = [t.token async for c in stream for choice in c.choices if choice.logprobs for t in choice.logprobs.content]
    assert tokens == ["Hello", " wörld", " and", " moon"]
    assert rig.text.generates[1].params.logprobs == 0


async def test_logprobs_of_broken_characters_and_infinities(rig, client, fakes):
    def script(generate):
        item = fakes.logprob(5, "x", 0)
        half = type(item)(5, float("-inf"), b"\xc3", [(6, -0.5, b"\xb6")])
        rest = type(item)(6, -0.5, b"\xb6", [])
        return [Chunks([fakes.chunk(generate.rid, "ö", [5, 6], 2, "length", logprobs=[half, rest])])]

    rig.text.script = script
    reply = await client.chat.completions.create(model="fake-model", messages=USER, logprobs=True, top_logprobs=1)
    half, rest = reply.choices[0].logprobs.content
    assert (half.token, half.logprob, half.bytes, rest.bytes) == (r"bytes:\xc3", -9999.0, [0xC3], [0xB6])
    reply = await client.completions.create(model="fake-model", prompt="p", logprobs=1)
    legacy = reply.choices[0].logprobs
    assert legacy.tokens == [r"bytes:\xc3", r"bytes:\xb6"]
    assert legacy.text_offset == [0, 0]
    assert legacy.top_logprobs == [{r"bytes:\xb6": -0.5}, {}]


async def test_chat_parameters_and_extras_arrive(rig, client):
    await client.chat.completions.create(
        model="fake-model", messages=USER, max_completion_tokens=9, max_tokens=5, temperature=0.3, top_p=0.8,
        stop=["a", "b"], presence_penalty=0.1, frequency_penalty=-0.2, logit_bias={"5": 3}, seed=-1, user="u",
        metadata={"ignored": "1"},
        extra_body={
            "top_k": 4, "min_p": 0.2, "repetition_penalty": 1.3, "min_tokens": 2, "stop_token_ids": [8],
            "ignore_eos": True, "skip_special_tokens": False, "cache_salt": "me", "priority": 4, "unknown": [1],
        },
    )  # fmt: skip
    (generate,) = rig.text.generates
    p = generate.params
    assert (generate.cache_salt, generate.priority) == ("me", 4)
    assert (p.max_new_tokens, p.min_new_tokens, p.temperature, p.top_p, p.top_k, p.min_p) == (9, 2, 0.3, 0.8, 4, 0.2)
    assert (p.stop, p.stop_token_ids, p.logit_bias, p.ignore_eos) == (("a", "b"), (8,), {5: 3.0}, True)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.1, -0.2, 1.3)
    assert (p.skip_special_tokens, p.seed) == (False, -1)


async def test_what_is_left_out_the_model_says(fakes):
    """In the routes of OpenAI and Anthropic, field by field; not in /generate, whose defaults are fixed."""
    usual = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    async with fakes.open_rig(msgspec.structs.replace(fakes.MODEL, sampling=usual)) as rig:
        for route, body in (
            ("/v1/chat/completions", {"messages": USER}),
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/messages", {"model": "fake-model", "messages": USER, "max_tokens": 5}),
            ("/v1/responses", {"input": "Hi"}),
        ):
            for given in ({}, {"temperature": 0, "top_p": 0.5}):
                reply = await rig.http.post(route, json=body | given)
                assert reply.status_code == 200, reply.text
                params = rig.text.generates[-1].params
                assert {name: getattr(params, name) for name in usual} == usual | given
        assert (reply.json()["temperature"], reply.json()["top_p"]) == (0, 0.5)
        assert (await rig.http.post("/v1/responses", json=body)).json()["temperature"] == 0.7
        await rig.http.post("/generate", json={"text": "Hi"})
        assert rig.text.generates[-1].params.temperature == 1.0


async def test_chat_messages_arrive(rig, client):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "So"},
    ]
    await client.chat.completions.create(
        model="fake-model",
        messages=messages,
        extra_body={"continue_final_message": True, "chat_template_kwargs": {"thinking": False}},
    )
    sent = template_input(rig)
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "So"},
    ]
    assert sent["continue_final_message"] is True
    assert "add_generation_prompt" not in sent
    assert sent["chat_template_kwargs"] == {"thinking": False}


async def test_chat_with_images(rig, client):
    url = "data:image/png;base64,AQID"
    parts = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
    await client.chat.completions.create(model="fake-model", messages=[{"role": "user", "content": parts}])
    prompt = rig.text.generates[0].prompt
    assert prompt.images == (ImageFile(b"\x01\x02\x03", "messages[0].content[1].image_url"),)
    content = [{"type": "text", "text": "Look:"}, {"type": "image"}]
    assert template_input(rig) == {"messages": [{"role": "user", "content": content}]}


deep: list = []
for _ in range(40):
    deep = [deep]
ASSISTANT = [*USER, {"role": "assistant", "content": "a"}]


def filmed(url, **more):
    return [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url, **more}}]}]


async def test_chat_with_videos_and_addresses(rig, client):
    """Frames in vLLM's form and in Qwen's, and images that the text actor is to fetch."""
    png, jpeg, at = "data:image/png;base64,AQID", "data:video/jpeg;base64,AQID,BAUG", "https://example.com/a.png"
    parts = [
        filmed(jpeg)[0]["content"][0],
        {"type": "video", "video": [png, at], "fps": 4},
        {"type": "image_url", "image_url": {"url": at}},
    ]
    await client.chat.completions.create(model="fake-model", messages=[{"role": "user", "content": parts}])
    prompt = rig.text.generates[0].prompt
    fields = [f"messages[0].content[{i}].{kind}" for i, kind in enumerate(("video_url", "video", "image_url"))]
    first = VideoFile((ImageFile(b"\x01\x02\x03", fields[0]), ImageFile(b"\x04\x05\x06", fields[0])), fields[0])
    second = VideoFile((ImageFile(b"\x01\x02\x03", fields[1]), ImageFile(b"", fields[1], at)), fields[1], 0.25)
    assert prompt.videos == (first, second)
    assert prompt.images == (ImageFile(b"", fields[2], at),)
    content = [{"type": "video"}, {"type": "video"}, {"type": "image"}]
    assert template_input(rig)["messages"] == [{"role": "user", "content": content}]


def shown(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": shown("data:...")}, "messages[0].content[0].image_url"),
        ({"messages": shown("data:image/png,x")}, "messages[0].content[0].image_url"),
        ({"messages": shown("file:///etc/passwd")}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content[0].video_url"),
        ({"messages": filmed("data:video/mp4;base64,AQID")}, "messages[0].content[0].video_url"),
        ({"messages": filmed([])}, "messages[0].content[0].video_url"),
        ({"messages": filmed("data:video/jpeg;base64,AQID,?")}, "messages[0].content[0].video_url"),
        ({"messages": filmed(["data:image/png;base64,AQID"], fps=0)}, "messages[0].content[0].video_url"),
        ({"messages": filmed(["data:image/png;base64,AQID"], fps=1e-18)}, "messages[0].content[0].video_url"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": USER, "temperature": "hot"}, "temperature"),
        ({"messages": USER, "temperature": -0.5}, "temperature"),
        ({"messages": USER, "top_p": 0}, "top_p"),
        ({"messages": USER, "max_tokens": -1}, "max_tokens"),
        ({"messages": USER, "max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": USER, "min_tokens": -1}, "min_tokens"),
        ({"messages": USER, "n": 0}, "n"),
        ({"messages": USER, "n": 1000}, "n"),
        ({"messages": USER, "logit_bias": {"5": 101}}, "logit_bias"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": USER, "response_format": {"type": "grammar"}}, "response_format"),
        ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format",
        ),
        ({"messages": USER, "json_schema": "{"}, "json_schema"),
        ({"messages": USER, "guided_json": "3"}, "guided_json"),
        ({"messages": USER, "regex": 5}, "regex"),
        ({"messages": USER, "choice": []}, "choice"),
        ({"messages": USER, "guided_choice": []}, "guided_choice"),
        ({"messages": USER, "ebnf": "root ::= a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": USER, "structural_tag": "{"}, "structural_tag"),
        ({"messages": USER, "whitespace_pattern": " *"}, "whitespace_pattern"),
        ({"messages": USER, "structured_outputs": {}}, "structured_outputs"),
        ({"messages": USER, "structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
        ({"messages": USER, "structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"messages": USER, "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (
            {"messages": USER, "structured_outputs": {"regex": "a", "json_object": True}},
            "structured_outputs.json_object",
        ),
        ({"messages": USER, "structured_outputs": {"regex": "a"}, "response_format": SCHEMA_FORMAT}, "response_format"),
        (
            {"messages": USER, "structured_outputs": {"json": {}, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"messages": USER, "allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"messages": USER, "bad_words": ["a"]}, "bad_words"),
        ({"messages": USER, "use_beam_search": True}, "use_beam_search"),
        ({"messages": USER, "regex": "a", "guided_regex": "a"}, "guided_regex"),
        ({"messages": USER, "regex": "a", "response_format": SCHEMA_FORMAT}, "response_format"),
        ({"messages": USER, "continue_final_message": True}, "continue_final_message"),
        (
            {"messages": ASSISTANT, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"messages": USER, "chat_template_kwargs": {"a": deep}}, "chat_template_kwargs"),
    ],
)
async def test_chat_refused_with_the_field(rig, body, param):
    reply = await rig.http.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert "max_new_tokens" not in error["message"]
    assert (rig.text.got, rig.front.client.table) == ([], {})


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"regex": "a+"}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"guided_choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        ({"structural_tag": json.dumps(TAG)}, "structural_tag", TAG_TEXT),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"structured_outputs": {"grammar": 'root ::= "a"', "disable_fallback": True}}, "ebnf", 'root ::= "a"'),
        ({"structured_outputs": {"json": {"type": "integer"}}}, "json_schema", '{"type":"integer"}'),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "json_schema", '{"type":"integer"}'),
        ({"structured_outputs": {"json_object": True, "json": None}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"structural_tag": TAG}}, "structural_tag", TAG_TEXT),
        ({"response_format": TAG}, "structural_tag", TAG_TEXT),
        ({"json_schema": ' {"type":  "integer"}'}, "json_schema", '{"type":"integer"}'),
        ({"guided_json": {"type": "integer"}}, "json_schema", '{"type":"integer"}'),
        ({"response_format": SCHEMA_FORMAT}, "json_schema", '{"type":"integer"}'),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
async def test_grammars_travel_to_the_text_actor(rig, fields, kind, text):
    reply = await rig.http.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert reply.status_code == 200
    grammar = rig.text.generates[0].grammar
    assert (kind, text) == (None, None) if grammar is None else (grammar.kind, grammar.text) == (kind, text)


async def test_replies_say_whether_a_constrained_output_matches(rig):
    """Where the engine knows; in a stream with the finish reason."""
    chat, text = {"messages": USER, "regex": "a+"}, {"prompt": "x", "regex": "a+"}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
        (choice,) = (await rig.http.post(path, json=body)).json()["choices"]
        assert choice["valid"] is False
        (choice,) = (await rig.http.post(path, json=body | {"regex": None})).json()["choices"]
        assert "valid" not in choice
        lines = (await rig.http.post(path, json=body | {"stream": True})).text.split("\n\n")
        frames = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
        assert [f.get("valid") for f in frames] == [None] * (len(frames) - 1) + [False]
        assert frames[-1]["finish_reason"] == "stop"


async def test_names_of_other_servers_mean_the_same(rig):
    body = {"messages": USER, "top_k": 0, "include_stop_str_in_output": True, "bad_words": [], "lora_path": None}
    assert (await rig.http.post("/v1/chat/completions", json=body)).status_code == 200
    params = rig.text.generates[0].params
    assert (params.top_k, params.no_stop_trim) == (-1, True)


async def test_whitespace_travels_with_a_schema(rig):
    body = {"messages": USER, "response_format": SCHEMA_FORMAT, "json_whitespace": {"any": 4}}
    assert (await rig.http.post("/v1/chat/completions", json=body)).status_code == 200
    assert rig.text.generates[0].grammar == GrammarSpec("json_schema", '{"type":"integer"}', "any 4")
    body = {"messages": USER, "json_whitespace": "compact"}
    reply = await rig.http.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "json_whitespace")


async def test_a_refused_grammar_names_the_clients_field(rig):
    text = "json_schema: not is not supported (at /not of the schema)"
    rig.text.script = lambda g: [Refused(g.rid, g.n, 400, "unsupported_json_schema", text, "json_schema")]
    body = {"messages": USER, "response_format": SCHEMA_FORMAT}
    for stream in (False, True):
        reply = await rig.http.post("/v1/chat/completions", json={**body, "stream": stream})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, "response_format", "unsupported_json_schema")
        assert error["message"] == "response_format: not is not supported (at /not of the schema)"


async def test_nulls_mean_defaults(rig):
    names = ("temperature", "top_p", "n", "stop", "stream", "stream_options", "logit_bias", "tools", "response_format")
    reply = await rig.http.post("/v1/chat/completions", json={"messages": USER, **dict.fromkeys(names)})
    assert reply.status_code == 200
    assert rig.text.generates[0].params.temperature == 1.0


# ------------------------------------------------------------------ completions


async def test_completion(rig, client):
    reply = await client.completions.create(model="fake-model", prompt="Once", stop="END", best_of=1)
    assert reply.id.startswith("cmpl-")
    assert (reply.object, reply.choices[0].text, reply.choices[0].finish_reason) == ("text_completion", TEXT, "stop")
    assert (reply.choices[0].logprobs, reply.usage.total_tokens) == (None, 11)
    (generate,) = rig.text.generates
    assert generate.prompt == TextPrompt("Once")
    assert (generate.params.max_new_tokens, generate.params.stop) == (16, ("END",))


async def test_completion_prompts(rig, client):
    reply = await client.completions.create(model="fake-model", prompt=["a", "b"], n=2)
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (14, 16)
    await client.completions.create(model="fake-model", prompt=[5, 6])
    await client.completions.create(model="fake-model", prompt=[[7], [8, 9]])
    prompts = [np.frombuffer(g.prompt.ids, np.int32).tolist() for g in rig.text.generates[2:]]
    assert prompts == [[5, 6], [7], [8, 9]]


async def test_completion_stream_with_usage_and_echo(rig, client):
    stream = await client.completions.create(
        model="fake-model", prompt=["a:", "b:"], stream=True, echo=True, stream_options={"include_usage": True}
    )
    texts, usage = {0: "", 1: ""}, []
    async for chunk in stream:
        assert chunk.object == "text_completion"
        usage.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "a:" + TEXT, 1: "b:" + TEXT}
    assert usage[:-1] == [None] * (len(usage) - 1)
    assert usage[-1].completion_tokens == 8


async def test_completion_echo_and_logprobs(rig, client):
    reply = await client.completions.create(model="fake-model", prompt="a:", echo=True)
    assert reply.choices[0].text == "a:" + TEXT
    reply = await client.completions.create(model="fake-model", prompt=[[97, 58], [98]], n=2, echo=True)
    assert [c.text for c in reply.choices] == ["a:" + TEXT] * 2 + ["b" + TEXT] * 2
    reply = await client.completions.create(model="fake-model", prompt="a", logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs.tokens == ["Hello", " wörld", " and", " moon"]
    assert logprobs.token_logprobs == [-1.0, -1.1, -1.2, -1.3]
    assert logprobs.top_logprobs[0] == {"alt0": -1.0, "alt1": -2.0}
    assert logprobs.text_offset == [0, 5, 11, 15]
    stream = await client.completions.create(model="fake-model", prompt="a", logprobs=0, stream=True)
    offsets = [o async for c in stream for choice in c.choices for o in choice.logprobs.text_offset]
    assert offsets == [0, 5, 11, 15]


async def test_echoed_logprobs(rig, client):
    """Offsets count characters of the echo: a token that is none of its text, or half a character, is 0 long."""
    prompt = "\N{HOT BEVERAGE} tea"
    reply = await client.completions.create(model="fake-model", prompt=prompt, logprobs=1, echo=True)
    whole = reply.choices[0].logprobs
    assert reply.choices[0].text == prompt + TEXT
    assert whole.tokens[:6] == ["<s>", r"bytes:\xe2\x98", r"bytes:\x95", " te", "a", "Hello"]
    assert whole.token_logprobs[:6] == [None, -2.1, -2.2, -2.3, -2.4, -1.0]
    assert whole.top_logprobs[0] is None and whole.top_logprobs[1] == {"alt0": -2.1}
    assert whole.text_offset == [0, 0, 0, 1, 4, 5, 10, 16, 20]
    assert rig.text.generates[0].params.logprob_start_len == 0
    stream = await client.completions.create(model="fake-model", prompt=prompt, logprobs=1, echo=True, stream=True)
    choices = [choice async for chunk in stream for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == prompt + TEXT
    assert [p for choice in choices for p in choice.logprobs.token_logprobs] == whole.token_logprobs
    assert [o for choice in choices for o in choice.logprobs.text_offset] == whole.text_offset
    await client.completions.create(model="fake-model", prompt=prompt, logprobs=1)
    assert rig.text.generates[-1].params.logprob_start_len == -1


CHARACTERS = [1, *map(ord, "Hi")]
"""The fake's token ids of the text "Hi"."""


async def test_token_ids_of_completions(rig):
    """vLLM's and SGLang's field; the prompt's come once a choice, also where a piece has no text."""
    asked = {"prompt": ["Hi", "Hi"], "n": 2, "return_token_ids": True}
    choices = (await rig.http.post("/v1/completions", json=asked)).json()["choices"]
    assert [(c["prompt_token_ids"], c["token_ids"]) for c in choices] == [(CHARACTERS, [10, 11, 12, 13])] * 4
    text = (await rig.http.post("/v1/completions", json=asked | {"stream": True})).text
    events = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    for index in range(4):
        mine = [event for event in events if event["index"] == index]
        assert [event.get("prompt_token_ids") for event in mine] == [CHARACTERS, None, None, None]
        assert [event["token_ids"] for event in mine] == [[10], [11], [12], [13]]
    ids = (await rig.http.post("/v1/completions", json={"prompt": [5, 6], "return_token_ids": True})).json()
    assert len(ids["choices"][0]["prompt_token_ids"]) > 0
    plain = (await rig.http.post("/v1/completions", json={"prompt": "Hi"})).json()["choices"][0]
    assert not {"token_ids", "prompt_token_ids"} & set(plain)


async def test_token_ids_of_chats(rig, fakes):
    asked = {"messages": USER, "n": 2, "return_token_ids": True}
    reply = (await rig.http.post("/v1/chat/completions", json=asked)).json()
    assert reply["prompt_token_ids"] == list(map(ord, "chat"))
    assert [choice["token_ids"] for choice in reply["choices"]] == [[10, 11, 12, 13]] * 2
    text = (await rig.http.post("/v1/chat/completions", json=asked | {"stream": True})).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event.get("prompt_token_ids") for event in events] == [list(map(ord, "chat"))] + [None] * (len(events) - 1)
    for index in range(2):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [token for event in mine for token in event.get("token_ids", [])] == [10, 11, 12, 13]
    async with fakes.open_rig(fakes.READING) as reading:
        fakes.say(reading, "<think>so</think>yes", size=5)
        text = (await reading.http.post("/v1/chat/completions", json=asked | {"n": 1, "stream": True})).text
        events = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
        assert [token for event in events for token in event.get("token_ids", [])] == [9] * 4, "of markup, too"
    rig.text.answer = lambda message: Refused(message.rid, 1, 400, "invalid_image", "no", "messages")
    rig.text.script = lambda generate: []
    refused = await rig.http.post("/v1/chat/completions", json=asked)
    assert (refused.status_code, rig.front.client.table) == (400, {})


async def test_best_of(rig, client, fakes):
    """Per token: a short likely answer is better than a long one of the same total."""

    def script(generate):
        def one(rid, text, token, count):
            logprobs = [fakes.logprob(token, text, 0)] * count
            return fakes.chunk(rid, text, [token] * count, count, "length", logprobs=logprobs)

        rid = generate.rid
        return [Chunks([one(rid, "c", 30, 2), one(rid + 1, "a", 10, 4), one(rid + 2, "b", 20, 1)])]

    rig.text.script = script
    reply = await client.completions.create(model="", prompt=["p", "q"], n=2, best_of=3, echo=True)
    assert [(c.index, c.text) for c in reply.choices] == [(0, "pa"), (1, "pb"), (2, "qa"), (3, "qb")]
    assert (reply.choices[0].logprobs, reply.usage.completion_tokens, reply.usage.prompt_tokens) == (None, 14, 14)
    assert [(g.n, g.params.logprobs) for g in rig.text.generates] == [(3, 0)] * 2
    reply = await client.completions.create(model="", prompt="p", best_of=3, logprobs=1)
    assert reply.choices[0].logprobs.token_logprobs == [-1.0] * 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": [1000]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 129}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ],
)
async def test_completion_refused_with_the_field(rig, body, param):
    reply = await rig.http.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert (rig.text.got, rig.front.client.table) == ([], {})


# ------------------------------------------------------------------ models and errors as the client sees them


async def test_models(rig, client):
    (card,) = (await client.models.list()).data
    assert (card.id, card.object, card.owned_by) == ("fake-model", "model", "actorserve")
    assert (await client.models.retrieve("fake-model")).id == "fake-model"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_errors_are_the_clients_own_classes(rig, client):
    with pytest.raises(openai.NotFoundError, match="`nope` does not exist"):
        await client.chat.completions.create(model="nope", messages=USER)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="fake-model", messages=USER, temperature=101)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    rig.text.script = lambda g: [Refused(g.rid, g.n, 503, "executor_crashed", "twice")]
    with pytest.raises(openai.InternalServerError) as failed:
        await client.chat.completions.create(model="fake-model", messages=USER)
    assert failed.value.status_code == 503
