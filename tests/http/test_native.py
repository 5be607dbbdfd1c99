"""/generate: SGLang's protocol against a fake engine."""

import itertools
import json

import numpy as np
import pytest
from msgspec.structs import replace

from actorserve.actors.messages import (
    Chunks,
    GrammarSpec,
    ImageFile,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    VideoFile,
)
from actorserve.http.native import Rows
from actorserve.sampler.params import SamplingParams

pytestmark = pytest.mark.anyio
TEXT = "Hello wörld and moon"


def frames(body: str) -> list[object]:
    parts = body.split("\n\n")
    assert parts[-1] == "" and all(part.startswith("data: ") for part in parts[:-1])
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts[:-1]]


async def test_text(rig):
    reply = await rig.http.post(
        "/generate", json={"text": "Hi", "rid": "mine", "sampling_params": {"max_new_tokens": 9}}
    )
    body = reply.json()
    assert reply.status_code == 200
    latency = body["meta_info"].pop("e2e_latency")
    assert 0 < latency < 20
    assert body == {
        "text": TEXT,
        "output_ids": [10, 11, 12, 13],
        "meta_info": {
            "id": "mine",
            "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": 7,
            "completion_tokens": 4,
            "cached_tokens": 3,
        },
    }
    (generate,) = rig.text.generates
    assert generate.prompt == TextPrompt("Hi")
    assert (generate.n, generate.params.max_new_tokens, generate.params.logprobs) == (1, 9, None)


async def test_image_data(rig):
    file = ImageFile(b"\x01\x02\x03", "image_data")
    await rig.http.post("/generate", json={"text": "Hi", "image_data": "AQID"})
    await rig.http.post("/generate", json={"text": ["a", "b"], "image_data": [None, ["AQID", "AQID"]]})
    await rig.http.post("/generate", json={"text": ["a", "b"], "image_data": "AQID"})  # one of all, as in SGLang
    await rig.http.post("/generate", json={"text": ["a", "b"], "image_data": []})
    images = [generate.prompt.images for generate in rig.text.generates]
    assert images == [(file,), (), (file, file), (file,), (file,), (), ()]


async def test_video_data(rig):
    """A video is a list of frames; what a prompt has is one, or a list of them."""
    frame, jpeg = "AQID", "data:video/jpeg;base64,AQID,AQID"
    image = ImageFile(b"\x01\x02\x03", "video_data")
    one, two = (VideoFile((image,) * n, "video_data") for n in (1, 2))
    for asked, wanted in (
        ({"text": "Hi", "video_data": [frame, frame]}, [(two,)]),
        ({"text": "Hi", "video_data": [[frame], [frame, frame]]}, [(one, two)]),
        ({"text": "Hi", "video_data": jpeg}, [(two,)]),
        ({"text": "Hi", "video_data": [jpeg, [frame]]}, [(two, one)]),
        ({"text": ["a", "b"], "video_data": [None, [frame]]}, [(), (one,)]),
        ({"text": ["a", "b"], "video_data": [[[frame]], jpeg]}, [(one,), (two,)]),
    ):
        await rig.http.post("/generate", json=asked)
        found = rig.text.generates[-len(wanted) :]
        assert [generate.prompt.videos for generate in found] == wanted


async def test_put_and_defaults(rig):
    reply = await rig.http.put("/generate", json={"text": "Hi"})
    assert reply.json()["text"] == TEXT
    params = rig.text.generates[0].params
    assert (params.max_new_tokens, params.temperature, params.top_k, params.stop) == (128, 1.0, -1, ())


async def test_input_ids_become_int32(rig):
    await rig.http.post("/generate", json={"input_ids": [1, 2, 999]})
    prompt = rig.text.generates[0].prompt
    assert isinstance(prompt, TokenPrompt)
    assert np.frombuffer(prompt.ids, np.int32).tolist() == [1, 2, 999]


async def test_all_sampling_parameters_arrive(rig):
    given = {
        "max_new_tokens": 5, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1,
        "frequency_penalty": 0.2, "presence_penalty": 0.3, "repetition_penalty": 1.1, "stop": "END", "stop_regex": "a+",
        "stop_token_ids": [5, 6], "ignore_eos": True, "no_stop_trim": True, "skip_special_tokens": False,
        "spaces_between_special_tokens": False, "seed": 77, "logit_bias": {"3": -5}, "n": 2,
    }  # fmt: skip
    await rig.http.post("/generate", json={"text": "x", "sampling_params": given, "cache_salt": "me", "priority": -3})
    (generate,) = rig.text.generates
    assert (generate.n, generate.cache_salt, generate.priority) == (2, "me", -3)
    assert generate.arrival_ns > 0
    params = generate.params
    for name, value in given.items():
        if name not in ("n", "stop", "stop_regex", "logit_bias", "stop_token_ids"):
            assert getattr(params, name) == value, name
    assert params.stop_regex == ("a+",)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("END",), (5, 6), {3: -5.0})


async def test_batch_of_texts_and_parameters(rig):
    body = {
        "text": ["a", "b"],
        "sampling_params": [{"temperature": 0}, {"temperature": 1, "n": 2}],
        "rid": ["r0", "r1"],
    }
    replies = (await rig.http.post("/generate", json=body)).json()
    assert [r["meta_info"]["id"] for r in replies] == ["r0", "r1", "r1"]
    assert [r["text"] for r in replies] == [TEXT] * 3
    assert "index" not in replies[0]
    first, second = rig.text.generates
    assert (first.params.temperature, second.params.temperature, second.n) == (0, 1, 2)
    assert second.rid == first.rid + 1


async def test_batch_of_one_is_a_list(rig):
    assert len((await rig.http.post("/generate", json={"text": ["a"]})).json()) == 1
    assert len((await rig.http.post("/generate", json={"input_ids": [[1, 2]]})).json()) == 1
    assert len((await rig.http.post("/generate", json={"text": "a", "sampling_params": {"n": 2}})).json()) == 2


async def test_logprobs(rig):
    body = {"text": "a", "return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    meta = (await rig.http.post("/generate", json=body)).json()["meta_info"]
    assert meta["output_token_logprobs"][1] == [-1.1, 11, " wörld"]
    assert meta["output_top_logprobs"][1] == [[-1.1, 11, "alt0"], [-2.1, 12, "alt1"]]
    meta = (await rig.http.post("/generate", json={"text": "a", "return_logprob": True})).json()["meta_info"]
    assert meta["output_token_logprobs"][0] == [-1.0, 10, None]
    assert "output_top_logprobs" not in meta
    assert [g.params.logprobs for g in rig.text.generates] == [2, 0]


async def test_the_token_that_ended_it_has_a_row(rig):
    """As in SGLang, whose clients read off the rows which tokens there were; chats have the text's only."""
    end, script = TokenLogprob(2, -0.5, b"</s>", []), rig.text.script

    def ended(generate):
        *most, last = script(generate)
        return [*most, Chunks([replace(chunk, ids=[*chunk.ids, 2], end_logprobs=[end]) for chunk in last.chunks])]

    rig.text.script = ended
    for stream in (False, True):
        reply = await rig.http.post("/generate", json={"text": "a", "return_logprob": True, "stream": stream})
        last = frames(reply.text)[-2] if stream else reply.json()
        rows = last["meta_info"]["output_token_logprobs"]
        assert [row[1] for row in rows] == last["output_ids"] == [10, 11, 12, 13, 2]
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True}
    (choice,) = (await rig.http.post("/v1/chat/completions", json=body)).json()["choices"]
    assert "".join(item["token"] for item in choice["logprobs"]["content"]) == choice["message"]["content"] == TEXT


async def test_logprobs_of_prompts_and_of_named_tokens(rig):
    wanted = {"return_logprob": True, "return_text_in_logprobs": True, "logprob_start_len": 2, "top_logprobs_num": 1}
    body = {"text": "a", "token_ids_logprob": [7, 8]} | wanted
    meta = (await rig.http.post("/generate", json=body)).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 22, "\ufffd"], [-2.3, 23, " te"], [-2.4, 24, "a"]]
    assert meta["input_top_logprobs"] == [None, [[-2.3, 23, "alt0"]], [[-2.4, 24, "alt0"]]]
    first, *rest = meta["input_token_ids_logprobs"]
    assert first is None and [[row[1:] for row in rows] for rows in rest] == [[[7, "named"], [8, "named"]]] * 2
    assert rest[0][1][0] == pytest.approx(-0.23 - 0.08)
    assert len(meta["output_token_ids_logprobs"]) == len(meta["output_token_logprobs"]) == 4
    body = {"text": ["a", "b"], "return_logprob": [True, False], "token_ids_logprob": [[5], [6, 7]], "stream": True}
    reply = await rig.http.post("/generate", json=body | {"logprob_start_len": [0, 0]})
    last = {event["index"]: event["meta_info"] for event in frames(reply.text)[:-1]}
    assert len(last[0]["input_token_logprobs"]) == 5 and len(last[0]["output_token_ids_logprobs"][0]) == 1
    assert not any("logprobs" in name for name in last[1]), "they were not asked for"
    params = [g.params for g in rig.text.generates]
    assert [p.logprob_start_len for p in params] == [2, 0, -1]
    assert [p.token_ids_logprob for p in params] == [(7, 8), (5,), ()]


async def test_nan_logprob_is_null(rig, fakes):
    def script(generate):
        odd = fakes.logprob(5, "x", 0)
        odd = type(odd)(odd.token, float("nan"), odd.text, [])
        return [Chunks([fakes.chunk(generate.rid, "x", [5], 1, "length", logprobs=[odd])])]

    rig.text.script = script
    meta = (await rig.http.post("/generate", json={"text": "a", "return_logprob": True})).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[None, 5, None]]
    assert meta["finish_reason"] == {"type": "length", "matched": None, "length": 1}


async def test_stream_is_cumulative(rig):
    reply = await rig.http.post("/generate", json={"text": "a", "stream": True, "return_logprob": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = frames(reply.text)
    assert done == "[DONE]"
    texts = [e["text"] for e in events]
    assert texts[-1] == TEXT
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert events[-1]["output_ids"] == [10, 11, 12, 13]
    assert len(events[-1]["meta_info"]["output_token_logprobs"]) == 4
    assert [e["meta_info"]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}
    assert "index" not in events[0]


async def test_batch_stream_has_index(rig):
    body = {"text": ["a", "b"], "stream": True, "sampling_params": {"n": 2}}
    *events, _ = frames((await rig.http.post("/generate", json=body)).text)
    last = {e["index"]: e["text"] for e in events}
    assert last == dict.fromkeys(range(4), TEXT)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": []}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1], []]}, "input_ids"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"input_ids": [1000]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [1 << 40]}, "input_ids"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "temprature"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "temperature"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "top_p"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "sampling_params": {"n": 0}}, "n"),
        ({"text": "a", "sampling_params": {"n": 129}}, "n"),
        ({"text": "a", "sampling_params": {"logit_bias": {"x": 1}}}, "logit_bias"),
        ({"text": "a", "sampling_params": {"logit_bias": {"1000": 1}}}, "logit_bias"),
        ({"text": "a", "sampling_params": {"stop_token_ids": [1000]}}, "stop_token_ids"),
        ({"text": "a", "sampling_params": {"seed": 1 << 63}}, "seed"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [1000]}, "token_ids_logprob"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [1] * 129}, "token_ids_logprob"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [1, [2]]}, "token_ids_logprob"),
        ({"text": ["a", "b"], "return_logprob": True, "token_ids_logprob": [[1]]}, "token_ids_logprob"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"text": ["a", "b"], "rid": "one"}, "rid"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "video_data": "AQID"}, "video_data"),
        ({"text": "a", "video_data": [["AQID"], "AQID"]}, "video_data"),
        ({"text": ["a", "b"], "video_data": ["AQID"]}, "video_data"),
        ({"text": "a", "image_data": "file:///etc/passwd"}, "image_data"),
        ({"text": ["a", "b"], "image_data": ["AQID"]}, "image_data"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "priority": 1 << 50}, "priority"),
    ],
)
async def test_refused_with_the_field(rig, body, param):
    reply = await rig.http.post("/generate", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"]
    assert rig.text.got == []
    assert rig.front.client.table == {}


async def test_grammars(rig):
    params = {"regex": "a+", "max_new_tokens": 5}
    reply = (await rig.http.post("/generate", json={"text": "x", "sampling_params": params})).json()
    assert rig.text.generates[0].grammar == GrammarSpec("regex", "a+")
    assert (reply["meta_info"]["forced_tokens"], reply["meta_info"]["jumps"]) == (0, 0)
    assert reply["meta_info"]["valid"] is False
    body = {"text": ["x", "y"], "sampling_params": [{"json_schema": '{"type": "null"}'}, {}]}
    replies = (await rig.http.post("/generate", json=body)).json()
    assert [g.grammar for g in rig.text.generates[1:]] == [GrammarSpec("json_schema", '{"type":"null"}'), None]
    assert "jumps" in replies[0]["meta_info"] and "jumps" not in replies[1]["meta_info"]
    assert "valid" in replies[0]["meta_info"] and "valid" not in replies[1]["meta_info"]
    for given, policy in (("compact", "compact"), ({"any": 3}, "any 3"), ({"indent": 2}, "indent 2")):
        params = {"json_schema": '{"type": "null"}', "json_whitespace": given}
        await rig.http.post("/generate", json={"text": "x", "sampling_params": params})
        assert rig.text.generates[-1].grammar == GrammarSpec("json_schema", '{"type":"null"}', policy)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"ebnf": ["root ::= a"]}, "ebnf"),
        ({"structural_tag": {"type": "tag"}}, "structural_tag"),
        ({"ebnf": "root ::= a", "structural_tag": {}}, "structural_tag"),
        ({"whitespace_pattern": " *"}, "whitespace_pattern"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"json_schema": "nonsense"}, "json_schema"),
        ({"choice": "a"}, "choice"),
        ({"regex": "a", "json_whitespace": "compact"}, "json_whitespace"),
        ({"json_whitespace": "compact"}, "json_whitespace"),
        ({"json_schema": {}, "json_whitespace": "airy"}, "json_whitespace"),
        ({"json_schema": {}, "json_whitespace": {"any": 0}}, "json_whitespace"),
        ({"json_schema": {}, "json_whitespace": {"any": 1000}}, "json_whitespace"),
        ({"json_schema": {}, "json_whitespace": {"any": -1}}, "json_whitespace"),
        ({"json_schema": {}, "json_whitespace": {"any": 1, "indent": 1}}, "json_whitespace"),
    ],
)
async def test_bad_grammars_are_refused(rig, params, param):
    reply = await rig.http.post("/generate", json={"text": "x", "sampling_params": params})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert rig.text.got == []


class Uncopied(list):
    """Rows so far; a prompt may have a million of them, which none of the next ones may copy."""

    def __getitem__(self, key):
        assert not isinstance(key, slice)
        return super().__getitem__(key)


def test_rows_of_logprobs_are_added_in_constant_time():
    rows = Rows(tokens=Uncopied())
    params = SamplingParams(logprobs=1)
    for logprob in (float("nan"), -1.0, float("nan")):
        rows.add([TokenLogprob(5, logprob, b"a", [(5, logprob, b"a")])], params, with_text=True)
    assert rows.tokens[1] == (-1.0, 5, "a") and len(rows.tokens) == 3
    assert [top is None for top in rows.top] == [True, False, False], "nothing came before the first"
