"""Programs on the real model: embedded, and behind a real server: their structure, and scores against transformers."""

import re
from pathlib import Path

import httpx
import msgspec
import pytest

import actorserve.lang as sgl
from actorserve.lang.loop import LOOP

CHOICES = (" Paris", " London", " New York City")
QUESTION = "Question: What is the capital of France?\nAnswer:"


@sgl.function
def two_turns(s):
    s += sgl.system("Answer in one sentence.")
    s += sgl.user("What is the capital of France?")
    s += sgl.assistant(sgl.gen("first", max_tokens=12))
    s += sgl.user("And of Italy?")
    with s.assistant():
        s += sgl.gen("second", max_tokens=12)


def test_turns_are_what_the_models_own_template_makes_of_them(engine):
    s = two_turns.run(backend=engine, temperature=0)
    assert "Paris" in s["first"]
    turns = s.messages()[:-1]
    chat = LOOP.call(lambda: engine._engine.chat(turns, temperature=0, max_new_tokens=12))
    meta = s.get_meta_info("second")
    assert (chat.text, chat.prompt_tokens) == (s["second"], meta["prompt_tokens"])
    assert meta["cached_tokens"] > s.get_meta_info("first")["prompt_tokens"], "the first turn is not computed twice"


def test_branches_share_the_prefix(engine):
    @sgl.function
    def tips(s, topic):
        s += "Here are some short tips on how to " + topic + " every single night of the year."
        forks = s.fork(3)
        forks += lambda i: f"\nTip {i + 1}:" + sgl.gen("tip", max_tokens=8, stop="\n")
        forks.join()
        s += "\n".join(s["tip"]) + "\nIn summary," + sgl.gen("summary", max_tokens=8)

    s = tips.run("sleep well", backend=engine, temperature=0)
    assert len(s["tip"]) == 3 and all("\n" not in tip for tip in s["tip"]) and s["summary"]
    assert all(meta["cached_tokens"] >= 15 for meta in s.get_meta_info("tip")["branches"])


def test_outputs_that_must_match(engine):
    class Person(msgspec.Struct):
        name: str
        age: int

    @sgl.function
    def program(s):
        s += "A date: " + sgl.gen("date", regex=r"[0-9]{4}-[0-9]{2}-[0-9]{2}") + "\nA number: "
        s += sgl.gen_int("number", max_tokens=4) + "\nA person as JSON: "
        s += sgl.gen("person", json_schema=Person, max_tokens=60)

    s = program.run(backend=engine, temperature=0.8, seed=1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", s["date"]) and int(s["number"]) is not None
    assert isinstance(s["person"], Person)


def test_streams_of_the_model(engine):
    streamed = two_turns.run(backend=engine, temperature=0, stream=True)
    pieces = list(streamed.text_iter("first"))
    assert len(pieces) > 1 and "".join(pieces) == two_turns.run(backend=engine, temperature=0)["first"]


@pytest.fixture(scope="module")
def expected(smollm):
    """Of each choice: the logprobs of its tokens behind QUESTION, and alone; by transformers."""
    import torch
    from kept_weights import with_kept_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32, attn_implementation="eager")
    model = with_kept_weights(model, smollm)
    prompt = tokenizer(QUESTION)["input_ids"]
    found = []
    for choice in CHOICES:
        ids = tokenizer(choice)["input_ids"]
        with torch.inference_mode():
            behind = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0], -1)
            alone = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        given = [behind[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)]
        found.append((given, [0.0, *(alone[i - 1, ids[i]].item() for i in range(1, len(ids)))]))
    return found


def gains_of(expected):
    """Of each choice: how much likelier its tokens are behind the prompt, on average."""
    return [sum(a - b for a, b in zip(*rows, strict=True)) / len(rows[0]) for rows in expected]


def test_scores_of_choices_are_the_models(engine, expected):
    @sgl.function
    def program(s, method):
        s += QUESTION + sgl.select("answer", CHOICES, choices_method=method)

    means = [sum(given) / len(given) for given, _ in expected]
    gains = gains_of(expected)
    methods = (sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized)
    states = program.run_batch([(method,) for method in methods], backend=engine)
    metas = [s.get_meta_info("answer") for s in states]
    for meta in metas:
        assert meta["normalized_prompt_logprobs"] == pytest.approx(means, abs=1e-3)
        for rows, (given, _) in zip(meta["input_token_logprobs"], expected, strict=True):
            assert [row[0] for row in rows] == pytest.approx(given, abs=1e-3)
    assert metas[2]["normalized_unconditional_prompt_logprobs"] == pytest.approx(gains, abs=1e-3)
    first = max(range(len(CHOICES)), key=lambda i: expected[i][0][0])
    best = [max(range(len(CHOICES)), key=scores.__getitem__) for scores in (means, gains)]
    assert [s["answer"] for s in states] == [CHOICES[best[0]], CHOICES[first], CHOICES[best[1]]]


def character_sheet(s):
    s += "Name: Ann Smith\nAge: 31\nCity: Paris\n\nName: Bob Jones\nAge: 52\nCity: Rome\n\n"
    s += "Name:" + sgl.gen("name", stop="\n", max_tokens=8)
    s += "\nAge:" + sgl.gen("age", stop="\n", max_tokens=8)
    s += "\nCity:" + sgl.gen("city", stop="\n", max_tokens=8)


def test_speculation_on_the_engine_gives_the_same_text(engine):
    plain = sgl.function(character_sheet).run(backend=engine, temperature=0)
    fast = sgl.function(character_sheet, num_api_spec_tokens=32).run(backend=engine, temperature=0)
    assert fast.text() == plain.text()
    assert fast.get_meta_info("city")["speculation"]["hits"] == 2


def test_the_introductions_programs_run(engine, monkeypatch):
    """All snippets one after another, on the shared engine instead of one of their own."""
    text = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(sgl, "Engine", lambda: engine)
    monkeypatch.setattr(engine, "shutdown", lambda: None)
    names: dict[str, object] = {"__name__": "introduction"}
    try:
        for block in blocks:
            exec(block, names)
    finally:
        sgl.set_default_backend(None)
    assert len(blocks) == 11 and names["trace"].reason is None
    assert names["piece"] and names["state"].local_reason is not None, "what the blocks left"


def test_a_server_of_our_own(smollm, expected):
    @sgl.function
    def program(s, method):
        s += QUESTION + sgl.select("answer", CHOICES, choices_method=method)

    with sgl.Runtime(smollm, max_total_tokens=8192) as runtime:
        s = two_turns.run(backend=runtime, temperature=0)
        assert "Paris" in s["first"] and s.get_meta_info("second")["cached_tokens"] > 20
        assert "".join(two_turns.run(backend=runtime, temperature=0, stream=True).text_iter("first")) == s["first"]
        assert program.run(sgl.greedy_token_selection, backend=runtime)["answer"] == " Paris"
        gains = program.run(sgl.unconditional_likelihood_normalized, backend=runtime).get_meta_info("answer")
        assert gains["normalized_unconditional_prompt_logprobs"] == pytest.approx(gains_of(expected), abs=1e-3)
        completions = sgl.OpenAI("", is_chat_model=False, base_url=f"{runtime.url}/v1")
        meta = program.run(sgl.token_length_normalized, backend=completions).get_meta_info("answer")
        means = [sum(given) / len(given) for given, _ in expected]
        assert meta["normalized_prompt_logprobs"] == pytest.approx(means, abs=1e-3)
        programs_run_on_the_server(runtime)
        speculation_saves_calls(runtime, completions)


def answered(runtime, *routes):
    """How often the server has answered, by route and status."""
    text = httpx.get(runtime.url + "/metrics").text
    rows = re.findall(r'http_requests_total\{route="(/[^"]+)",status="(\d+)"\} (\S+)', text)
    return {(route, status): float(count) for route, status, count in rows if route in routes}


def speculation_saves_calls(runtime, completions):
    """At temperature 0 the text is the same, by a third of the calls and with fewer prompt tokens."""
    counts, texts, sent = [], [], []
    for tokens in (None, 32):
        before = answered(runtime, "/v1/completions").get(("/v1/completions", "200"), 0)
        s = sgl.function(character_sheet, tokens).run(backend=completions, temperature=0)
        texts.append(s.text())
        counts.append(answered(runtime, "/v1/completions")[("/v1/completions", "200")] - before)
        metas = [s.get_meta_info(name) for name in ("name", "age", "city")]
        sent.append(sum(meta.get("prompt_tokens", 0) for meta in metas))
    assert texts[0] == texts[1] and counts == [3, 1] and sent[1] < sent[0] / 2
    speculation = metas[-1]["speculation"]
    assert speculation["hits"] == 2 and speculation["tokens_saved"] == sent[0] - sent[1]


def programs_run_on_the_server(runtime):
    """The same text and variables as here, by one request; what is wrong comes back as it would here."""

    @sgl.function
    def tips(s, topic):
        s += sgl.user("Here is a question about " + topic + ". Is it healthy?")
        with s.assistant():
            s += "I say" + sgl.select("healthy", [" yes", " no"])
        if s["healthy"] == " yes":
            s += sgl.user("Why?")
        else:
            s += sgl.user("Why not?")
        forks = s.fork(2)
        forks += lambda i: sgl.assistant(f"Reason {i + 1}:" + sgl.gen("reason", max_tokens=6, stop="\n"))
        forks.join()
        s += sgl.assistant("First:" + s["reason"][0] + sgl.gen("end", max_tokens=4, regex="[a-z ]+"))
        return [s["healthy"], s["reason"]]

    here = tips.run("sleep", backend=runtime, temperature=0)
    here.sync()
    before = answered(runtime, "/v1/programs", "/generate")
    there = tips.run("sleep", backend=runtime, temperature=0, remote=True)
    assert there.text() == here.text() and there.messages() == here.messages() and there.remote
    assert there.ret_value == [here["healthy"], here["reason"]] and there["end"] == here["end"]
    after = answered(runtime, "/v1/programs", "/generate")
    assert after.pop(("/v1/programs", "200")) == 1 and after == before, "nothing but one request"
    assert all(meta["cached_tokens"] > 20 for meta in there.get_meta_info("reason")["branches"])

    with pytest.raises(sgl.ProgramError, match="variable 'x'"):
        sgl.function(lambda s: s.__iadd__("a" + sgl.gen("x", top_p=7))).run(backend=runtime, remote=True)["x"]
    for body, param in (
        ({"program": [{"type": "Loop"}]}, "program[0].type"),
        ({"program": [{"type": "Append", "state": 1, "nodes": []}]}, "program"),
        ({}, "program"),
    ):
        reply = httpx.post(runtime.url + "/v1/programs", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
