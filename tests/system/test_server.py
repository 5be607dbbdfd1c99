"""The real server with the real model, spoken to by the real openai client."""

import itertools
import json
import math
import threading
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import jsonschema
import openai
import pytest
from browser import open_page
from live_server import LiveServer, wait_until

from actorserve import cli

if TYPE_CHECKING:
    from playwright.sync_api import Route

QUESTION = "What is the capital of France?"


def test_a_chat_answers(server: LiveServer) -> None:
    reply = server.chat(QUESTION, temperature=0, max_tokens=20)
    assert reply.choices[0].message.content == "The capital of France is Paris."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.completion_tokens == 8


def test_a_stream_is_the_same_text_token_by_token(server: LiveServer) -> None:
    whole = server.chat("Tell me about the sea.", temperature=0, max_tokens=40)
    with server.client() as client:
        stream = client.chat.completions.create(
            model="", messages=[{"role": "user", "content": "Tell me about the sea."}], temperature=0, max_tokens=40,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 40
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert len(chunks) > 10, "tokens come as they are made"


def test_n_choices_differ_and_a_seed_repeats_them(server: LiveServer) -> None:
    def texts() -> list[str | None]:
        reply = server.chat("Invent a name.", n=3, seed=5, max_tokens=12, temperature=1.0)
        assert [c.index for c in reply.choices] == [0, 1, 2]
        return [c.message.content for c in reply.choices]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_stop_strings_never_show(server: LiveServer) -> None:
    reply = server.chat(QUESTION, temperature=0, max_tokens=20, stop=[" is P"])
    assert reply.choices[0].message.content == "The capital of France"
    assert reply.choices[0].finish_reason == "stop"


def test_logprobs_have_the_chosen_token_on_top_when_greedy(server: LiveServer) -> None:
    reply = server.chat(QUESTION, temperature=0, max_tokens=20, logprobs=True, top_logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert (
        "".join(t.token for t in logprobs.content if not t.token.startswith("<|")) == reply.choices[0].message.content
    )
    for t in logprobs.content:
        assert len(t.top_logprobs) == 3
        assert t.top_logprobs[0].token == t.token
        assert 0 >= t.logprob == pytest.approx(t.top_logprobs[0].logprob)


def test_logprobs_of_a_prompt_are_the_same_everywhere(server: LiveServer) -> None:
    """/generate, computed and from the cache; a completion that echoes; /v1/score. Equal to transformers' elsewhere."""
    text = "The quick brown fox jumps over the lazy dog. \N{HOT BEVERAGE} The quick brown fox"
    none = {"max_new_tokens": 0}
    wanted = {"return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        body = {"text": [text, text[:60]], "sampling_params": none, **wanted}
        metas = [[reply["meta_info"] for reply in http.post("/generate", json=body).json()] for _ in range(2)]
        ids = [row[1] for row in metas[0][0]["input_token_logprobs"]]
        body = {"text": text, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "token_ids_logprob": ids[:3]}
        named = http.post("/generate", json=body | {"return_logprob": True}).json()["meta_info"]
        body = {"query": text[:30], "items": [text[30:], text[30:40]], "label_token_ids": ids[:3]}
        scores = http.post("/v1/score", json=body).json()["scores"]
    for cold, warm in zip(*metas, strict=True):
        assert warm["cached_tokens"] == warm["prompt_tokens"] - 1 == len(warm["input_token_logprobs"]) - 1
        assert [row[1:] for row in cold["input_token_logprobs"]] == [row[1:] for row in warm["input_token_logprobs"]]
        logprobs = [logprobs_of(meta) for meta in (cold, warm)]
        assert logprobs[0][0] is None is logprobs[1][0]
        assert logprobs[0][1:] == pytest.approx(logprobs[1][1:], abs=1e-4)
    with server.client() as client:
        reply = client.completions.create(model="", prompt=text, max_tokens=0, echo=True, logprobs=2)
    (choice,) = reply.choices
    assert choice.text == text and choice.logprobs is not None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(logprobs_of(metas[0][0])[1:], abs=1e-4)
    offsets = choice.logprobs.text_offset
    assert offsets == sorted(offsets) and text[offsets[3] :].startswith(choice.logprobs.tokens[3])
    (rows,) = named["output_token_ids_logprobs"]
    assert [row[1] for row in rows] == ids[:3]
    assert scores[0] == pytest.approx([math.exp(row[0]) for row in rows], abs=1e-4)


def logprobs_of(meta: dict[str, Any]) -> list[float | None]:
    return [row[0] for row in meta["input_token_logprobs"]]


def test_completions_and_token_prompts(server: LiveServer) -> None:
    with server.client() as client:
        by_text = client.completions.create(model="", prompt="Once upon a time", max_tokens=8, temperature=0)
        ids = httpx.post(
            server.url + "/generate",
            json={"text": "Once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 8}},
            timeout=60,
        ).json()
        assert ids["text"] == by_text.choices[0].text
        assert by_text.usage is not None and ids["meta_info"]["prompt_tokens"] == by_text.usage.prompt_tokens


def test_the_next_turn_of_a_chat_prefills_only_the_new_text(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "My name is Ada. " * 20 + "Greet me."}]
    previous = 0
    for turn in range(3):
        with server.client() as client:
            reply = client.chat.completions.create(model="", messages=messages, temperature=0, max_tokens=24)  # type: ignore[arg-type]
        usage = reply.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        if turn:
            # All of the previous turn but its last token, whose KV was never needed, and the end-of-turn newline.
            assert cached >= previous - 2, (cached, previous)
        previous = usage.total_tokens
        messages.append({"role": "assistant", "content": reply.choices[0].message.content or ""})
        messages.append({"role": "user", "content": "And again, please."})


def test_sharers_of_a_prefix_compute_it_once(server: LiveServer) -> None:
    ids = [100 + i % 900 for i in range(1000)]
    before = server.metrics()["actorserve_prefilled_tokens_total"]
    prompts = [[*ids, 2000 + i, 3000 + i, 4000 + i] for i in range(64)]
    with server.client() as client:
        reply = client.completions.create(model="", prompt=prompts, max_tokens=2, temperature=0)
    assert len(reply.choices) == 64

    def prefilled() -> float:
        return server.metrics()["actorserve_prefilled_tokens_total"] - before

    wait_until(lambda: prefilled() > 0, 5, "statistics arrive")
    server.assert_pages_add_up()
    assert prefilled() <= 1.05 * (1000 + 64 * 3)


def test_errors_have_openais_shape(server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        server.chat(QUESTION, temperature=-1)
    assert bad.value.param == "temperature"
    with server.client() as client, pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as long:
        server.chat("word " * 9000)
    assert long.value.code == "context_length_exceeded"


def test_a_client_that_leaves_frees_its_pages(server: LiveServer) -> None:
    body = {"text": "Count to a thousand: one, two,", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    with httpx.stream("POST", server.url + "/generate", json={**body, "stream": True}, timeout=60) as reply:
        next(reply.iter_lines())
    wait_until(lambda: server.metrics()["actorserve_running_requests"] == 0, 20, "a stream's request is aborted")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/generate", json=body, timeout=1.0)
    wait_until(lambda: server.metrics()["actorserve_running_requests"] == 0, 20, "a plain request is aborted")


def test_many_clients_at_once_get_their_own_answers(server: LiveServer) -> None:
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        options = {"temperature": 0, "max_new_tokens": 16}
        text = f"The number {i} is followed by the number"
        reply = httpx.post(server.url + "/generate", json={"text": text, "sampling_params": options}, timeout=120)
        answers[i] = reply.json()["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    alone: dict[int, str] = dict(answers)
    answers.clear()
    for i in (0, 7, 23):
        ask(i)
        # bfloat16: a batch may round differently, but never another request's text
        assert answers[i].split()[:1] == alone[i].split()[:1]


def test_streams_of_generate_are_cumulative(server: LiveServer) -> None:
    body = {"text": "Once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 12}, "stream": True}
    texts = []
    with httpx.stream("POST", server.url + "/generate", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                texts.append(json.loads(line[6:])["text"])
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts)) and len(texts) > 3


def test_health_and_ready(server: LiveServer) -> None:
    assert server.get("/health").status_code == server.get("/ready").status_code == 200


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "strict": True}},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_that_must_come_do(server: LiveServer, choice: object, stream: bool) -> None:
    """Also hot: the model has no say in it."""
    options = {"temperature": 1.2, "seed": 3, "max_tokens": 100, "parallel_tool_calls": False}
    with server.client() as client:
        reply = client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": "Hello!"}],
            tools=TOOLS,
            tool_choice=choice,
            stream=stream,
            **options,
        )  # type: ignore[call-overload]
        if stream:
            deltas = [call for c in reply for call in c.choices[0].delta.tool_calls or ()]
            name, arguments = deltas[0].function.name, "".join(call.function.arguments for call in deltas)
        else:
            assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == ("tool_calls", None)
            (call,) = reply.choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
    if name == "get_weather":
        jsonschema.validate(json.loads(arguments), WEATHER)
    else:
        assert (name, arguments, choice) == ("get_time", "{}", "required")


def test_a_call_of_the_models_own_accord(server: LiveServer) -> None:
    """It sees how it is done; the parser finds the call in free text, and the next turn shows it to the template."""
    messages: list[dict[str, object]] = []
    for city in ("Rome", "Berlin", "Oslo"):
        call = json.dumps({"name": "get_weather", "arguments": {"city": city, "unit": "C"}})
        messages += [{"role": "user", "content": f"Weather in {city}?"}, {"role": "assistant", "content": call}]
    messages.append({"role": "user", "content": "Weather in Paris?"})
    with server.client() as client:
        options: dict[str, object] = {"model": "", "tools": TOOLS, "temperature": 0, "max_tokens": 60}
        (choice,) = client.chat.completions.create(messages=messages, **options).choices  # type: ignore[call-overload]
        assert choice.finish_reason == "tool_calls"
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Paris", "unit": "C"}
        messages.append(choice.message.model_dump(exclude_none=True))
        messages.append({"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "21 C, sunny"})
        (last,) = client.chat.completions.create(messages=messages, **options).choices  # type: ignore[call-overload]
    assert last.finish_reason in ("stop", "length", "tool_calls")


def test_an_impossible_tool_is_refused_where_it_stands(server: LiveServer) -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"enum": []}}, "required": ["a"]}},
    }
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat("x", tools=[tool], tool_choice="required")
    assert caught.value.param == "tools" and "/0/parameters" in caught.value.message


def generate(server: LiveServer, **body: object) -> dict[str, object]:
    return httpx.post(server.url + "/generate", json=body, timeout=120).json()  # type: ignore[no-any-return]


def test_tokens_of_a_chat_are_its_prompt(server: LiveServer) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    made = httpx.post(server.url + "/tokenize", json={"messages": messages}, timeout=60).json()
    reply = server.chat(QUESTION, temperature=0, max_tokens=20)
    assert reply.usage is not None and reply.usage.prompt_tokens == made["count"] == len(made["tokens"])
    greedy = {"temperature": 0, "max_new_tokens": 20}
    assert (
        generate(server, input_ids=made["tokens"], sampling_params=greedy)["text"] == reply.choices[0].message.content
    )
    shown = {"tokens": made["tokens"], "skip_special_tokens": False}
    text = httpx.post(server.url + "/detokenize", json=shown, timeout=60).json()["text"]
    assert text.endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")


def test_a_flushed_cache_is_empty(server: LiveServer) -> None:
    ids = list(range(500, 600))
    params = {"max_new_tokens": 1}

    def cached() -> object:
        return generate(server, input_ids=ids, sampling_params=params)["meta_info"]["cached_tokens"]  # type: ignore[index]

    cached()
    assert cached() != 0
    server.assert_pages_add_up()
    assert server.get("/flush_cache").status_code == 200
    assert cached() == 0


def test_paused_requests_go_on_or_end(server: LiveServer) -> None:
    """A pause amid a greedy answer changes nothing in it, or ends it with what it has."""
    body = {"text": "Once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}}
    whole = generate(server, **body)
    longer = {**body, "sampling_params": {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}}
    for mode in ("in_place", "retract", "abort"):
        asked = (longer if mode == "abort" else body) | {"stream": True}
        with httpx.stream("POST", server.url + "/generate", json=asked, timeout=120) as reply:
            frames = (json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {"))
            next(frames)
            assert httpx.post(server.url + "/pause_generation", json={"mode": mode}, timeout=30).status_code == 200
            waiting = threading.Timer(0.2, lambda: httpx.post(server.url + "/continue_generation", timeout=30))
            waiting.start()
            *_, last = frames
        waiting.join()
        text, finish = last["text"], last["meta_info"]["finish_reason"]["type"]
        if mode == "abort":
            assert finish == "abort" and text
            assert str(whole["text"]).startswith(text) or text.startswith(whole["text"])
        else:
            assert (text, finish) == (whole["text"], "length")


def test_aborted_requests_keep_their_output(server: LiveServer) -> None:
    body = {"text": "One, two,", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}, "rid": "mine"}
    with httpx.stream("POST", server.url + "/generate", json={**body, "stream": True}, timeout=60) as reply:
        frames = (json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {"))
        next(frames)
        httpx.post(server.url + "/abort_request", json={"rid": "another"}, timeout=30)
        httpx.post(server.url + "/abort_request", json={"rid": "mine"}, timeout=30)
        *_, last = frames
    assert last["meta_info"]["finish_reason"]["type"] == "abort" and last["meta_info"]["id"] == "mine"
    assert 0 < last["meta_info"]["completion_tokens"] < 4000


def test_responses_go_on(server: LiveServer) -> None:
    with server.client() as client:
        first = client.responses.create(model="", input=QUESTION, temperature=0, max_output_tokens=20)
        assert first.output_text == "The capital of France is Paris." and first.status == "completed"
        stream = client.responses.create(
            model="", input="Weather there?", previous_response_id=first.id, stream=True, max_output_tokens=60,
            tools=[{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}],
            tool_choice="required", parallel_tool_calls=False,
        )  # fmt: skip
        *_, last = stream
    assert last.type == "response.completed" and last.response.usage is not None
    (call,) = last.response.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), WEATHER)
    assert last.response.usage.input_tokens > first.usage.total_tokens  # type: ignore[union-attr]


NOTING_SPEED = """() => new MutationObserver(() => {
    window.speedWasShown ||= document.querySelector(".live .facts .speed") !== null;
}).observe(document.querySelector("#log"), {childList: true, subtree: true})"""
"""Twelve tokens take a tenth of a second: who looks now and then may miss what is shown meanwhile."""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_chats_and_shows_the_engine(server: LiveServer, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800}
    with open_page(server.url + "/", viewport=size, color_scheme=scheme) as (page, complaints):
        before = page.evaluate("fetch('v1/engine/stats').then(reply => reply.json())")
        page.fill("#prompt", f"Name the {width} seas.")
        page.click("[data-panel=sampling]")
        page.fill("#s-max_tokens", "12")
        page.fill("#s-temperature", "0")  # or it may end sooner
        page.evaluate(NOTING_SPEED)
        page.press("#prompt", "Enter")
        page.wait_for_function("() => window.speedWasShown")  # figures come while it streams
        page.wait_for_selector("#send:has-text('Send')")
        assert page.inner_text(".turn.assistant .text").strip()
        assert "12 tokens" in page.inner_text(".facts") and "prompt tokens cached" in page.inner_text(".facts")
        if width < 900:
            assert not page.is_visible("#engine")
            page.click("#tabs [data-tab=engine]")
        page.wait_for_selector("#state .dot.ok")
        after = page.evaluate("fetch('v1/engine/stats').then(reply => reply.json())")
        assert after["scheduler"]["generated_tokens"] == before["scheduler"]["generated_tokens"] + 12
        sent = [sum(lane["sent"] for lane in view["lanes"] if lane["source"] == "exec.0") for view in (before, after)]
        assert sent[1] > sent[0]
        assert after["tree"]["total"] > before["tree"]["total"]
        page.wait_for_function(shown(".node", after["tree"]["total"]))
        assert page.locator(".actor").count() == len(after["actors"]) == 6
        page.wait_for_function(shown("#chart path", 2))  # the line of what was generated, and its area
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
        assert complaints == []


def shown(selector: str, count: int) -> str:
    """A condition on a page: a function, since its policy lets it evaluate no text."""
    return f"() => document.querySelectorAll('{selector}').length === {count}"


def test_the_page_asks_for_a_key(server: LiveServer) -> None:
    """A server behind something that wants one: the page asks, sends it, and keeps it in the tab."""
    keys: list[str | None] = []
    with open_page("about:blank") as (page, _):

        def gate(route: "Route") -> None:
            keys.append(route.request.headers.get("authorization"))
            if keys[-1] == "Bearer sesame":
                route.continue_()
            else:
                body = json.dumps({"error": {"message": "this server wants an API key"}})
                route.fulfill(status=401, body=body, content_type="application/json")

        page.route("**/v1/**", gate)
        page.goto(server.url + "/")
        page.wait_for_selector("dialog[open]")
        assert "wants an API key" in page.inner_text("dialog")
        page.fill("#key-text", "sesame")
        page.click("#key-save")
        page.wait_for_selector("#state .dot.ok")
        page.reload()
        page.wait_for_selector("#state .dot.ok")
        assert not page.is_visible("dialog")
    assert keys[0] is None and keys[-1] == "Bearer sesame"


def test_the_commands_of_a_terminal(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command(["complete", "--chat", QUESTION, "--url", server.url, "--temperature", "0", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "The capital of France is Paris.\n"
    assert err.startswith("8 tokens") and "prompt tokens cached" in err
    load = ["--num-prompts", "2", "--random-input-len", "8", "--random-output-len", "4", "--warmup-requests", "0"]
    assert cli.command(["bench", "--base-url", server.url, *load]) == 0
    assert "tokens" in capsys.readouterr().out


def test_anthropics_client(server: LiveServer) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]}
    greedy = {"temperature": 0}  # the client has no parameter for it any more
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:
        asked["model"] = client.models.list().data[0].id
        message = client.messages.create(**asked, max_tokens=20, extra_body=greedy)
        assert [block.text for block in message.content if block.type == "text"] == ["The capital of France is Paris."]
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 8)
        prompt = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
        assert client.messages.count_tokens(**asked).input_tokens == prompt
        with client.messages.stream(**asked, max_tokens=20, extra_body=greedy, stop_sequences=[" is P"]) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        assert ("".join(pieces), len(pieces) > 1) == ("The capital of France", True)
        assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", " is P")
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        schema["additionalProperties"] = False
        tool: Any = {"name": "add", "input_schema": schema}
        choice: Any = {"type": "tool", "name": "add"}
        called = client.messages.create(**asked, max_tokens=99, tools=[tool], tool_choice=choice, extra_body=greedy)
        (block,) = called.content
        assert (called.stop_reason, block.type) == ("tool_use", "tool_use")
        assert block.name == "add" and block.input["a"] in (1, 2)


def test_a_stream_goes_on_after_its_connection(server: LiveServer) -> None:
    whole = server.chat(QUESTION, temperature=0, max_tokens=24, extra_body={"ignore_eos": True})
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24, "stream": True}
    url, lines = server.url + "/v1/chat/completions", list[str]()
    resumable = {"x-resumable": "true"}
    with httpx.stream("POST", url, json=body | {"ignore_eos": True}, headers=resumable, timeout=60) as reply:
        for line in reply.iter_lines():
            lines.append(line)
            if len(lines) == 12:  # four events: id, data, nothing
                break
    last = next(line[4:] for line in reversed(lines) if line.startswith("id: "))
    resumed = httpx.post(url, headers={"last-event-id": last}, timeout=60)
    lines += resumed.text.splitlines()
    assert lines[-2] == "data: [DONE]"
    documents = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(d["choices"][0]["delta"].get("content") or "" for d in documents)
    assert text == whole.choices[0].message.content
