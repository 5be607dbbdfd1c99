"""OpenAI's and Anthropic's APIs as backends, and API speculative execution: against a stand-in that counts."""

import json
import subprocess
import sys

import httpx
import msgspec
import pytest
from openai_stand_in import StandIn, stand_in, tokens
from starlette.responses import StreamingResponse

import actorserve.lang as sgl
from actorserve.errors import EngineDown, Overloaded, RequestError
from actorserve.lang.http_calls import _retry_after
from actorserve.lang.speculation import Ahead, Sampling

SHEET = "Make a character.\nName: Hermione Granger\nAge: 17\nJob: witch of note\nEnd"
REPLY = "Name: Hermione Granger\nAge: 17\nJob: witch of note"


@pytest.fixture(scope="module")
def server():
    with stand_in() as server:
        yield server


@pytest.fixture
def api(server):
    server.__init__(url=server.url)
    return server


def openai(api: StandIn, **options):
    return sgl.OpenAI(options.pop("model", "model"), base_url=api.url + "/v1", api_key="key", max_retries=1, **options)


def body_of_sheet(s):
    s += "Make a character.\n"
    s += "Name:" + sgl.gen("name", stop="\n", max_tokens=8)
    s += "\nAge:" + sgl.gen("age", stop="\n", max_tokens=8)
    s += "\nJob:" + sgl.gen("job", stop="\n", max_tokens=2)


def body_of_chat_sheet(s, last="\nJob:"):
    s += sgl.user("Make a character.")
    s += sgl.assistant(
        "Name:" + sgl.gen("name", stop="\n") + "\nAge:" + sgl.gen("age", stop="\n") + last + sgl.gen("job")
    )


NAMES = ("name", "age", "job")


def test_completion_models_answer_several_gens_by_one_call(api):
    api.script = SHEET
    backend = openai(api, is_chat_model=False)
    plain = sgl.function(body_of_sheet).run(backend=backend, temperature=0)
    assert plain.text() == "Make a character.\nName: Hermione Granger\nAge: 17\nJob: witch of" and len(api.bodies) == 3
    sent = api.prompt_tokens
    api.__init__(url=api.url, script=SHEET)
    fast = sgl.function(body_of_sheet, num_api_spec_tokens=64).run(backend=backend, temperature=0)
    assert fast.text() == plain.text() and [fast[n] for n in NAMES] == [plain[n] for n in NAMES]
    assert len(api.bodies) == 1 and api.bodies[0]["max_tokens"] == 64 and "stop" not in api.bodies[0]
    report = fast.get_meta_info("job")["speculation"]
    assert report == {"calls": 1, "hits": 2, "misses": 0, "tokens_saved": sent - api.prompt_tokens}
    assert fast.get_meta_info("job")["finish_reason"] == {"type": "length"}, "the limit of 2 tokens holds"


def test_a_text_that_the_program_does_not_go_along_with_is_asked_for_again(api):
    @sgl.function(num_api_spec_tokens=64)
    def program(s, label):
        s += "Make a character.\nName:" + sgl.gen("name", stop="\n")
        s += label + sgl.gen("rest", stop="\n")

    api.script = SHEET
    backend = openai(api, is_chat_model=False)
    assert program.run("\nAge:", backend=backend)["rest"] == " 17" and len(api.bodies) == 1
    api.script = "Make a character.\nName: Hermione Granger\nPet: cat\n"
    first = program.run("\nPet:", backend=backend)
    assert first["rest"] == " cat" and len(api.bodies) == 2
    scripts = iter([SHEET, "Make a character.\nName: Hermione Granger\nPet: owl\n"])
    api.script = lambda body: next(scripts)
    s = program.run("\nPet:", backend=backend)
    assert s["rest"] == " owl" and len(api.bodies) == 4
    assert s.get_meta_info("rest")["speculation"] == {"calls": 2, "hits": 0, "misses": 1, "tokens_saved": 0}


@pytest.mark.parametrize("how", [{"stop_regex": "[0-9]"}, {"frequency_penalty": 1.0}, {"presence_penalty": 0.5}])
def test_what_looks_at_all_that_a_call_draws_is_asked_for_gen_by_gen(api, how):
    """Penalties count what a call has drawn, and a regular expression ends it: each call for itself."""

    said = {"a:": " 1; b: 2; end", "a: 1; b:": " 1; end"}
    api.script = lambda body: body["prompt"] + said[body["prompt"]]

    def body_of(s):
        s += "a:" + sgl.gen("a", stop=";", max_tokens=4)
        s += "; b:" + sgl.gen("b", stop=";", max_tokens=4)

    backend = openai(api, is_chat_model=False, continues=True)
    plain = sgl.function(body_of).run(backend=backend, temperature=0, **how)
    fast = sgl.function(body_of, num_api_spec_tokens=64).run(backend=backend, temperature=0, **how)
    assert plain.text() == fast.text() and len(api.bodies) == 4


@pytest.mark.parametrize("temperature", [0, 1])
def test_branches_share_what_is_ahead_only_where_it_is_certain(api, temperature):
    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += "Make a character.\nName:" + sgl.gen("name", stop="\n")
        forks = s.fork(2)
        forks += "\nAge:" + sgl.gen("age", stop="\n")
        forks.join()

    api.script = SHEET
    s = program.run(backend=openai(api, is_chat_model=False), temperature=temperature)
    assert s["age"] == [" 17", " 17"] and len(api.bodies) == (1 if temperature == 0 else 3)


def test_batches_keep_what_is_ahead_apart(api):
    @sgl.function(num_api_spec_tokens=64)
    def program(s, i):
        s += sgl.user(f"q{i}")
        s += sgl.assistant("a:" + sgl.gen("a", stop=";") + "; b:" + sgl.gen("b"))

    api.replies = {f"q{i}": f"a: {i}; b: {i * i}" for i in range(20)}
    states = program.run_batch([(i,) for i in range(20)], backend=openai(api))
    assert [(s["a"], s["b"]) for s in states] == [(f" {i}", f" {i * i}") for i in range(20)]
    assert len(api.bodies) == 20


def test_chat_models_answer_a_block_by_one_call(api):
    api.replies = {"Make a character.": REPLY}
    program = sgl.function(body_of_chat_sheet, num_api_spec_tokens=64)
    s = program.run(backend=openai(api))
    assert [s[n] for n in NAMES] == [" Hermione Granger", " 17", " witch of note"]
    assert s.messages()[-1] == {"role": "assistant", "content": REPLY} and len(api.bodies) == 1
    report = s.get_meta_info("job")["speculation"]
    assert (report["calls"], report["hits"], report["misses"]) == (1, 2, 0) and report["tokens_saved"] > 0


def test_anthropic_answers_a_block_by_one_call(api):
    """It has no logprobs: its words are told apart by the program's stop strings, and limits by its count of tokens."""
    program = sgl.function(body_of_chat_sheet, num_api_spec_tokens=64)
    api.replies = lambda body: REPLY
    s = program.run(backend=sgl.Anthropic("claude-x", base_url=api.url))
    assert [s[n] for n in NAMES] == [" Hermione Granger", " 17", " witch of note"] and len(api.bodies) == 1
    assert api.bodies[0]["max_tokens"] == 128 and "stop_sequences" not in api.bodies[0]


def test_a_variable_of_an_open_block_can_be_read(api):
    @sgl.function(num_api_spec_tokens=64)
    def program(s):
        s += sgl.user("Make a character.")
        with s.assistant():
            s += "Name:" + sgl.gen("name", stop="\n")
            return s["name"]

    api.replies = {"Make a character.": REPLY}
    assert program.run(backend=openai(api)).ret_value == " Hermione Granger"


def test_a_block_that_does_not_match_is_tried_again_and_then_fails_clearly(api):
    replies = iter([REPLY.replace("Age", "Years"), "no", REPLY])
    api.replies = lambda body: next(replies)
    program = sgl.function(body_of_chat_sheet, num_api_spec_tokens=64)
    s = program.run(backend=openai(api))
    assert s["age"] == " 17" and s.get_meta_info("age")["speculation"]["misses"] == 2
    api.replies = lambda body: "no"
    with pytest.raises(sgl.ProgramError, match="continues=True"):
        program.run(backend=openai(api))["age"]
    with pytest.raises(RequestError, match="stream"):
        program.run(backend=openai(api), stream=True)


def test_a_block_that_does_not_match_is_done_call_by_call_where_the_server_continues(api):
    def reply(body):
        assert body["continue_final_message"] is True
        return {"Name:": " Ann\n", "Name: Ann\nAge:": " 3\n", "Name: Ann\nAge: 3\nJob:": " x"}[
            body["messages"][-1]["content"]
        ]

    replies = iter(["no", *[None] * 3])
    api.replies = lambda body: next(replies) or reply(body)
    program = sgl.function(body_of_chat_sheet, num_api_spec_tokens=64)
    s = program.run(backend=openai(api, continues=True), temperature=0)
    assert [s[n] for n in NAMES] == [" Ann", " 3", " x"] and len(api.bodies) == 4


def ahead(text: str, ends: list[int] | None, count: int, finished: bool = False) -> Ahead:
    return Ahead(text, ends, count, 10, finished, Sampling())


@pytest.mark.parametrize(
    "what, expected",
    [
        ((ahead("ab cd.", [2, 5, 6], 3), ["."], 9), ("ab cd", "stop")),
        ((ahead("ab cd.", [2, 5, 6], 3), ["."], 2), ("ab cd", "length")),
        ((ahead("ab cd.", [2, 5, 6], 3), ["."], 0), ("", "length")),
        ((ahead("ab cd", [2, 5], 2), ["."], 9), None),
        ((ahead("ab cd", [2, 5], 2, True), ["."], 9), ("ab cd", "stop")),
        ((ahead("ab cd.", None, 99), ["."], 9), ("ab cd", "stop")),
        ((ahead("ab cd.", None, 99), ["."], 5), None),
        ((ahead("ab cd.", None, 3), ["."], 5), ("ab cd", "stop")),
        ((ahead("a.b,", [1, 2, 3, 4], 4), [",", "."], 9), ("a", "stop")),
    ],
)
def test_what_a_call_of_its_own_would_have_drawn(what, expected):
    """Token limits hold, and nothing is answered that is not known."""
    text, *limits = what
    assert text.copy().take_gen(*limits) == expected


def test_servers_that_do_not_tell_tokens_are_asked_for_what_is_wanted(api):
    api.script, api.with_logprobs = SHEET, False
    s = sgl.function(body_of_sheet, num_api_spec_tokens=64).run(backend=openai(api, is_chat_model=False))
    assert [s[n] for n in NAMES] == [" Hermione Granger", " 17", " witch of"]


@sgl.function
def ask(s, question="hi", **how):
    s += sgl.system("Be brief.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("a", max_tokens=4, **how))


def test_a_chat_call(api):
    api.replies = {"hi": "one two three four five six"}
    s = ask.run(backend=openai(api), temperature=0.5, stop="z")
    assert s["a"] == "one two three four"
    expected = {"model": "model", "max_tokens": 4, "temperature": 0.5, "top_p": 1.0, "stop": ["z"]}
    assert expected.items() <= api.bodies[0].items() and "logprobs" not in api.bodies[0]
    assert [m["role"] for m in api.bodies[0]["messages"]] == ["system", "user"]
    assert api.headers[0]["authorization"] == "Bearer key" and api.paths == ["/v1/chat/completions"]
    assert s.get_meta_info("a")["finish_reason"] == {"type": "length"}
    assert list(ask.run(backend=openai(api), stream=True).text_iter("a")) and api.bodies[-1]["stream"]
    assert ask.run(backend=openai(api, model="o3-mini"))["a"] and api.bodies[-1]["max_completion_tokens"] == 4


def test_azure(api):
    api.replies = {"hi": "yes"}
    backend = sgl.OpenAI("gpt", is_azure=True, azure_endpoint=api.url, api_key="key", api_version="2024-10-21")
    assert ask.run(backend=backend)["a"] == "yes" and api.headers[0]["api-key"] == "key"
    assert api.paths == ["/openai/deployments/gpt/chat/completions?api-version=2024-10-21"]


class Point(msgspec.Struct):
    x: int


def test_schemas_and_regular_expressions(api):
    @sgl.function
    def program(s, **how):
        s += sgl.user("hi")
        s += sgl.assistant(sgl.gen("a", **how))

    api.replies = {"hi": '{"x":5}'}
    assert program.run(backend=openai(api), json_schema=None)["a"]
    typed = sgl.function(lambda s: s.__iadd__(sgl.user("hi") + sgl.assistant(sgl.gen("a", json_schema=Point))))
    assert typed.run(backend=openai(api))["a"] == Point(5)
    assert api.bodies[-1]["response_format"]["json_schema"]["strict"] is True
    replies = iter(["no", "12", "no", "no", "no", "no"])
    api.replies = lambda body: next(replies)
    number = sgl.function(lambda s: s.__iadd__(sgl.user("hi") + sgl.assistant(sgl.gen("a", regex="[0-9]+"))))
    assert number.run(backend=openai(api))["a"] == "12"
    with pytest.raises(sgl.ProgramError, match="did not say what matches"):
        number.run(backend=openai(api))["a"]


@pytest.mark.parametrize("kind", ["completions", "anthropic"])
@pytest.mark.parametrize("how", [{"json_schema": Point}, {"regex": r'\{"x": [0-9]\}'}])
def test_what_an_api_cannot_be_told_is_checked_and_asked_for_again(api, kind, how):
    program = sgl.function(lambda s: s.__iadd__(sgl.user("hi") + sgl.assistant("So:" + sgl.gen("a", **how))))
    if kind == "anthropic":
        backend = sgl.Anthropic("claude-x", base_url=api.url)
        api.replies = lambda body: next(replies)
    else:
        backend = openai(api, is_chat_model=False)
        api.script = lambda body: body["prompt"] + next(replies)
    for said, found, calls in (
        (['{"x": "no"}', '{"x": 5'], None, 3),
        (['{"x": "no"}', '{"x": 5}'], "a", 2),
        (['{"x": 5}'], "a", 1),
    ):
        replies, api.bodies[:] = iter([*said, *["nothing"] * 3]), []
        if found is None:
            with pytest.raises(sgl.ProgramError, match="did not say what matches"):
                program.run(backend=backend)["a"]
        else:
            assert program.run(backend=backend)["a"] == (Point(5) if "json_schema" in how else '{"x": 5}')
        assert len(api.bodies) == calls and "response_format" not in api.bodies[0]
    replies = iter(["nothing"] * 3)
    api.bodies.clear()
    with pytest.raises(sgl.ProgramError, match="did not say what matches"):
        program.run(backend=backend, temperature=0)["a"]
    assert len(api.bodies) == 1, "the same would come again"
    with pytest.raises(sgl.ProgramError, match="a stream cannot be checked"):
        program.run(backend=backend, stream=True)["a"]


def test_chat_models_choose_greedily_by_response_format(api):
    @sgl.function
    def program(s, method):
        s += sgl.user("hi")
        s += sgl.assistant(sgl.select("a", ["yes", "no"], choices_method=method))

    api.replies = {"hi": '{"choice":"no"}'}
    s = program.run(sgl.greedy_token_selection, backend=openai(api))
    assert s["a"] == "no" and s.messages()[-1]["content"] == "no"
    with pytest.raises(sgl.ProgramError, match="choices_method must be"):
        program.run(sgl.token_length_normalized, backend=openai(api))["a"]


def test_what_the_api_does_not_have_is_refused(api):
    api.replies = {"hi": "yes"}
    for name, value in (("top_k", 5), ("stop_token_ids", [3]), ("stop_regex", "a"), ("ignore_eos", True)):
        with pytest.raises(sgl.ProgramError, match=f"cannot take {name}"):
            ask.run(backend=openai(api), **{name: value})["a"]
    beyond = {"top_k": 5, "stop_regex": "b+", "stop_token_ids": [3], "priority": 2}
    assert ask.run(backend=openai(api, continues=True), **beyond)["a"] and api.bodies[-1]["top_k"] == 5
    sent = [api.bodies[-1][name] for name in ("stop_regex", "stop_token_ids", "priority")]
    assert sent == [["b+"], [3], 2] and "ebnf" not in api.bodies[-1]


def test_grammars_of_our_own_kind(api):
    program = sgl.function(lambda s: s.__iadd__(sgl.user("hi") + sgl.assistant(sgl.gen("a", ebnf='root ::= "yes"'))))
    api.replies = {"hi": "yes"}
    with pytest.raises(sgl.ProgramError, match=r"cannot take ebnf \(a server that does is told by continues=True\)"):
        program.run(backend=openai(api))["a"]
    assert program.run(backend=openai(api, continues=True))["a"] == "yes"
    assert api.bodies[-1]["ebnf"] == 'root ::= "yes"' and "regex" not in api.bodies[-1]


def add(left: int, right: int = 1) -> int:
    """The sum of two numbers."""
    return left + right


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@sgl.function
def calling(s):
    s += sgl.user("hi") + sgl.assistant(sgl.gen("call", tools=[add, WEATHER]))


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_apis_are_told_to_call_a_tool(api, kind):
    api.replies, api.call = {"hi": "no"}, ("add", {"left": 2})
    backend = openai(api) if kind == "openai" else sgl.Anthropic("claude-x", base_url=api.url)
    s = calling.run(backend=backend)
    call = s["call"]
    assert call == sgl.ToolCall("add", {"left": 2}) and add(**call.arguments) == 3
    assert msgspec.json.decode(s.messages()[-1]["content"]) == {"name": "add", "arguments": {"left": 2}}
    body, names = api.bodies[-1], ["add", "weather"]
    parameters = {
        "title": "add",
        "type": "object",
        "properties": {"left": {"type": "integer"}, "right": {"type": "integer", "default": 1}},
        "required": ["left"],
        "additionalProperties": False,
    }
    if kind == "openai":
        assert body["tool_choice"] == "required" and [tool["function"]["name"] for tool in body["tools"]] == names
        assert body["tools"][0]["function"]["parameters"] == parameters and body["parallel_tool_calls"] is False
    else:
        assert body["tool_choice"]["type"] == "any" and [tool["name"] for tool in body["tools"]] == names
        assert body["tools"][0]["input_schema"] == parameters
        assert body["tools"][0]["description"] == "The sum of two numbers."
    with pytest.raises(sgl.ProgramError, match="cannot stream calls of tools"):
        calling.run(backend=backend, stream=True)["call"]
    api.call = None
    with pytest.raises(sgl.ProgramError, match="the output is no ToolCall"):
        calling.run(backend=backend)["call"]


@pytest.mark.parametrize("error", [{"message": "an actor died", "code": 500}, "an actor died"])
def test_an_error_amid_a_stream_is_no_end_of_it(error):
    async def answer(request):
        lines = [{"choices": [{"index": 0, "text": "half"}]}, {"error": error}]
        return StreamingResponse(
            iter([*(f"data: {json.dumps(line)}\n\n" for line in lines), "data: [DONE]\n\n"]),
            media_type="text/event-stream",
        )

    with stand_in(answer) as server:
        program = sgl.function(lambda s: s.__iadd__("a" + sgl.gen("a")))
        s = program.run(backend=openai(server, is_chat_model=False), stream=True)
        with pytest.raises(sgl.ProgramError, match="the server stopped: an actor died") as caught:
            s["a"]
    assert caught.value.status == 502 and s.stream_executor.context.text == "ahalf"


def test_errors_of_servers(api):
    api.replies = {"hi": "yes"}
    api.failures = [503]
    assert ask.run(backend=openai(api))["a"] == "yes", "tried again"
    for statuses, kind in (([400], RequestError), ([429, 429], Overloaded), ([500, 500], EngineDown)):
        api.failures = list(statuses)
        with pytest.raises(sgl.ProgramError, match="as told") as caught:
            ask.run(backend=openai(api))["a"]
        assert isinstance(caught.value.__cause__, kind) and caught.value.status == statuses[0]
    with pytest.raises(sgl.ProgramError, match="cannot be reached"):
        ask.run(backend=sgl.OpenAI("m", base_url="http://127.0.0.1:9/v1", max_retries=0))["a"]


FORKS = """
import os, sys
import actorserve.lang as sgl
backend = sgl.OpenAI("m", base_url=sys.argv[1], is_chat_model=False)
ask = sgl.function(lambda s: s.__iadd__("one " + sgl.gen("a", max_tokens=1)))
print(ask.run(backend=backend)["a"], flush=True)
child = os.fork()
print(ask.run(backend=backend)["a"], "child" if not child else "parent", flush=True)
if child:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ask.run(backend=backend)["a"], flush=True)
os._exit(0)
"""


def test_forked_children_have_a_loop_of_their_own(api):
    api.script = "one two three"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, f"{api.url}/v1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    first, *both, last = found.stdout.splitlines()
    assert (first, sorted(both), last) == ("two", ["two child", "two parent"], "0 two")


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("2", 2.0), ("1.5", 1.5), ("", None), ("-1", None), ("\u00b2", None), ("Wed, 21 Oct 2026 07:28:00 GMT", None)],
)
def test_when_a_server_wants_to_be_asked_again(told, seconds):
    assert _retry_after(httpx.Response(503, headers=[(b"retry-after", told.encode("latin-1"))])) == seconds


def test_anthropic(api):
    @sgl.function
    def program(s):
        s += sgl.system("Be brief.")
        s += sgl.user("hi")
        s += sgl.assistant("I say" + sgl.gen("a", max_tokens=9))

    api.replies = {"I say": " good day"}
    backend = sgl.Anthropic("claude-x", base_url=api.url, api_key="key")
    s = program.run(backend=backend, temperature=0.5)
    assert s["a"] == " good day" and s.get_meta_info("a")["prompt_tokens"] == 7
    body = api.bodies[0]
    assert body["system"] == "Be brief." and [m["role"] for m in body["messages"]] == ["user", "assistant"]
    assert api.headers[0]["x-api-key"] == "key" and (body["max_tokens"], body["temperature"]) == (9, 0.5)
    streamed = program.run(backend=backend, stream=True)
    assert "".join(streamed.text_iter("a")) == " good day"
    assert streamed.get_meta_info("a")["finish_reason"] == {"type": "length"}
    with pytest.raises(sgl.ProgramError, match="cannot take min_p"):
        program.run(backend=backend, min_p=0.1)["a"]


def test_several_pictures_in_a_turn(api, tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")

    @sgl.function
    def program(s):
        s += sgl.user(sgl.image(str(tmp_path / "a.png")) + sgl.image("https://host/b.jpg") + "Which?")
        s += sgl.assistant(sgl.gen("a"))

    api.replies = lambda body: "the first"
    assert program.run(backend=openai(api))["a"] == "the first"
    text, first, second = api.bodies[0]["messages"][-1]["content"]
    assert text["text"] == "Which?" and second["image_url"]["url"] == "https://host/b.jpg"
    assert first["image_url"]["url"] == "data:image/png;base64,cGljdHVyZQ=="
    assert program.run(backend=sgl.Anthropic("claude-x", base_url=api.url))["a"] == "the first"
    parts = api.bodies[-1]["messages"][-1]["content"]
    assert parts[1]["source"] == {"type": "base64", "media_type": "image/png", "data": "cGljdHVyZQ=="}
    assert parts[2]["source"] == {"type": "url", "url": "https://host/b.jpg"}
    with pytest.raises(sgl.ProgramError, match="cannot be read"):
        missing = sgl.function(lambda s: s.__iadd__(sgl.user(sgl.image("/nowhere.png"))))
        missing.run(backend=openai(api)).text()


def test_completions_score_choices_by_echo(api):
    """Choice " no" is likelier by its mean; token by token " yes" wins at the first token."""
    rows = {" yes sir": [-1.0, -5.0], " no": [-2.0]}

    @sgl.function
    def program(s, method):
        s += "Is it? " + sgl.select("a", list(rows), choices_method=method)

    async def answer(request):
        prompt = (await request.json())["prompt"]
        words, offset, found = tokens(prompt), 0, []
        for word in words:
            found.append(offset)
            offset += len(word)
        choice = next(c for c in rows if prompt.endswith(c))
        logprobs = [-9.0] * (len(words) - len(rows[choice])) + rows[choice]
        return api_json({"tokens": words, "text_offset": found, "token_logprobs": logprobs})

    from starlette.responses import JSONResponse

    def api_json(logprobs):
        return JSONResponse({"choices": [{"text": "", "logprobs": logprobs}]})

    with stand_in(answer) as server:
        backend = openai(server, is_chat_model=False)
        by_mean = program.run(sgl.token_length_normalized, backend=backend)
        assert by_mean["a"] == " no"
        assert program.run(sgl.greedy_token_selection, backend=backend)["a"] == " yes sir"
        assert by_mean.get_meta_info("a")["normalized_prompt_logprobs"] == [-3.0, -2.0]
