"""RuntimeEndpoint against an SGLang server's protocol, by a stand-in; ours is in test_real_model.py."""

import json

import pytest
from openai_stand_in import tokens
from served import served
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

import actorserve.lang as sgl
from actorserve.lang.loop import LOOP

LOGPROBS = {" yes": -3.0, " sir": -0.5, " no": -2.5}
ALONE = {" sir": -4.0}


class SglServer:
    """`/generate` as SGLang answers it, in shapes that its servers gave. A token is a word; its id is its length."""

    def __init__(self):
        self.bodies, self.flushed = [], 0

    async def info(self, request):
        name = "meta/Llama-3-8B-Instruct"
        return JSONResponse(
            {"model_path": name, "tokenizer_path": name, "is_generation": True, "preferred_sampling_params": None,
             "weight_version": "default", "has_image_understanding": False, "model_type": "llama"}
        )  # fmt: skip

    async def server_info(self, request):
        return JSONResponse({"model_path": "meta/Llama-3-8B-Instruct", "tp_size": 1, "version": "0.5.3"})

    async def flush(self, request):
        self.flushed += 1
        return PlainTextResponse("Cache flushed.\nPlease check backend logs for more details.\n")

    async def generate(self, request):
        body = await request.json()
        self.bodies.append(body)
        if body.get("return_logprob") and not body["sampling_params"]["max_new_tokens"]:
            return JSONResponse([self.scored(body, i) for i in range(len(body.get("text", body.get("input_ids"))))])
        meta = {
            "id": "5c0a", "finish_reason": {"type": "stop", "matched": 128009}, "weight_version": "default",
            "prompt_tokens": len(tokens(body["text"])), "completion_tokens": 2, "cached_tokens": 0, "e2e_latency": 0.03,
        }  # fmt: skip
        if not body.get("stream"):
            answer, n = {"text": " hello", "output_ids": [5, 9], "meta_info": meta}, body["sampling_params"].get("n", 1)
            return JSONResponse([answer] * n if n > 1 else answer)
        frames = [f"data: {json.dumps({'text': text, 'meta_info': meta})}\n\n" for text in (" he", " hello")]
        return StreamingResponse(iter([*frames, "data: [DONE]\n\n"]), media_type="text/event-stream")

    def scored(self, body, i):
        if "text" in body:
            words = tokens(body["text"][i])[body["logprob_start_len"] :]
            rows = [[LOGPROBS.get(word, -9.0), len(word), word] for word in words]
        else:
            words = {4: [" yes", " sir"], 3: [" no"]}[body["input_ids"][i][0]]
            rows = [[ALONE.get(word), len(word), None] for word in words]
        return {"text": "", "meta_info": {"input_token_logprobs": rows}}


@pytest.fixture(params=["", "get_"], ids=["new", "old"])
def server(request):
    """Routes under the names of today's servers, or of older ones."""
    server = SglServer()
    routes = [
        Route(f"/{request.param}model_info", server.info),
        Route(f"/{request.param}server_info", server.server_info),
        Route("/generate", server.generate, methods=["POST"]),
        Route("/flush_cache", server.flush, methods=["POST"]),
    ]
    with served(Starlette(routes=routes)) as server.url:
        yield server


def test_a_program_on_an_sglang_server(server):
    @sgl.function
    def program(s):
        s += sgl.user("hi")
        s += sgl.assistant(sgl.gen("a", max_tokens=3, stop_token_ids=[5], seed=4, ebnf='root ::= "x"'))
        s += sgl.gen("b", n=2)

    backend = sgl.RuntimeEndpoint(server.url, api_key="key")
    s = program.run(backend=backend, temperature=0.5, priority=2)
    assert (s["a"], s["b"]) == (" hello", [" hello", " hello"]) and s.get_meta_info("a")["prompt_tokens"] > 0
    body = server.bodies[0]
    assert body["text"].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n") and body["priority"] == 2
    expected = {"max_new_tokens": 3, "stop_token_ids": [5], "temperature": 0.5, "sampling_seed": 4}
    assert expected.items() <= body["sampling_params"].items() and "<|eot_id|>" in body["sampling_params"]["stop"]
    assert list(program.run(backend=backend, stream=True).text_iter("a")) in ([" he", "llo"], [" hello"])
    assert sgl.flush_cache(backend) is True and server.flushed == 1
    assert sgl.get_server_info(backend)["version"] == "0.5.3" and not backend.takes_programs
    LOOP.call(backend.cache_prefix, "prefix")
    assert server.bodies[-1] == {"text": "prefix", "sampling_params": {"max_new_tokens": 0}}


@pytest.mark.parametrize(
    "method, chosen",
    [
        (sgl.token_length_normalized, " yes sir"),
        (sgl.greedy_token_selection, " no"),
        (sgl.unconditional_likelihood_normalized, " yes sir"),
    ],
)
def test_choices_are_scored_by_logprobs_of_the_prompt(server, method, chosen):
    @sgl.function
    def program(s):
        s += "Is it so?" + sgl.select("a", [" yes sir", " no"], choices_method=method)

    s = program.run(backend=sgl.RuntimeEndpoint(server.url))
    assert s["a"] == chosen
    meta = s.get_meta_info("a")
    assert meta["normalized_prompt_logprobs"] == [-1.75, -2.5], "the prompt's last token does not count"
    if method is sgl.unconditional_likelihood_normalized:
        assert meta["normalized_unconditional_prompt_logprobs"] == [(-3.0 + (-0.5 + 4.0)) / 2, -2.5]
