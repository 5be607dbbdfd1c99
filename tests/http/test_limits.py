"""docs/limits.md: its tables say what the flags say, and every row of them is tried just above its limit."""

import asyncio
import io
import json
import re
import socket
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import msgspec
import numpy as np
import PIL.Image
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from actorserve.actors import fetch, image_fields, image_store
from actorserve.actors.client import token_prompt
from actorserve.actors.conversation import MAX_DEPTH
from actorserve.actors.fsm_worker import MEMORY, Compiler
from actorserve.actors.messages import (
    Cancel,
    ChatPrompt,
    Chunk,
    Chunks,
    Generate,
    GrammarSpec,
    ImageFile,
    Refused,
    TextPrompt,
    TokenPrompt,
    VideoFile,
)
from actorserve.actors.prompts import MOST_LOGPROBS, Prompts, check_start
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import ActorserveError
from actorserve.flags import GROUPS
from actorserve.fsm.budget import Budget
from actorserve.fsm.compiler import compile_pattern
from actorserve.http import connection, parse_routes
from actorserve.http.chat_tools import MAX_TOOLS
from actorserve.http.error_replies import decode_body
from actorserve.http.json_depth import MAX_JSON_DEPTH, too_deep
from actorserve.http.rerank import MAX_REPEATED, _pairs
from actorserve.http.score import ScoreRequest, _prompts
from actorserve.models import images, sandbox
from actorserve.models.control import ControlTokens
from actorserve.models.template import MAX_MESSAGES, ChatTemplate, decode_chat
from actorserve.models.tokenizer import COMPOSED
from actorserve.sampler import params
from actorserve.sampler.params import SamplingParams

pytestmark = pytest.mark.anyio
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "limits.md"
USER = [{"role": "user", "content": "Hi"}]
CHAT = {"messages": USER}


class Row(NamedTuple):
    limit: str
    default: str
    flag: str
    error: str


def rows() -> list[Row]:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    found = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]
    return [row for row in found if row.limit != "limit"]


FIXED = {
    "bytes of a reply that wait for its reader": connection.SEND_BUFFER + (64 << 10),  # and uvicorn's buffer
    "requests sent ahead of replies": connection.MAX_PIPELINED,
    "bytes around each of a chunked body's": connection.OVERHEAD,
    "nesting of JSON": MAX_JSON_DEPTH,
    "nesting of template arguments and tool calls": MAX_DEPTH,
    "messages of a chat": MAX_MESSAGES,
    "tools of a chat": MAX_TOOLS,
    "characters or tokens of a score's query, times its items": MAX_REPEATED,
    "characters of a cross-encoder's query, times its documents": MAX_REPEATED,
    "characters of a text for the parsers' routes": parse_routes.MAX_CHARS,
    "`token_ids_logprob`": params.MAX_LISTED,
    "logprobs of a prompt's tokens": MOST_LOGPROBS,
    "stop strings": params.MAX_STOP_STRINGS,
    "characters of a stop string": params.MAX_STOP_CHARS,
    "`stop_token_ids`": params.MAX_STOP_IDS,
    "entries of `logit_bias`": params.MAX_BIASES,
    "bytes of their files together": image_fields.MOST_BYTES,
    "the longer side to the shorter": images.MOST_ASPECT,
    "bytes of an image as the model takes it": images.MOST_BYTES,
    "bytes of such images of all requests": image_store.HELD_BYTES,
    "redirects of an image's address": fetch.MOST_REDIRECTS,
    "prompts whose images are fetched at once": fetch.MOST_AT_ONCE,
    "CPU seconds of a chat template": sandbox.RENDER_SECONDS,
    "characters that it makes": sandbox.MAX_CHARS,
    "bytes that the compiler may take beside the tokenizer's tables": MEMORY,
    "characters of a regular expression": Budget().pattern,
}
COMPUTED = {"--max-connections", "--context-length"}


def test_the_table_says_what_the_flags_say() -> None:
    defaults = {name: getattr(EngineConfig(), name) for name in EngineConfig.__struct_fields__}
    names = list(defaults)
    firsts = [names.index(first) for first in GROUPS]
    start = names.index("max_queued_requests")
    group = names[start : next(i for i in firsts if i > start)]
    flags = {row.flag.strip("`") for row in rows()} - {"fixed"}
    assert {"--" + name.replace("_", "-") for name in group} <= flags, "a limit of the command line lacks a row"
    for row in rows():
        if row.flag == "fixed":
            assert row.default == str(FIXED[row.limit]), row
        elif (flag := row.flag.strip("`")) in COMPUTED:
            assert defaults[flag[2:].replace("-", "_")] is None
        else:
            assert row.default == str(defaults[flag[2:].replace("-", "_")]), row


# ------------------------------------------------------------------ a case for each row: (status, code) above the limit

SMALL = {
    "max_connections": 3,
    "max_headers": 12,
    "max_header_bytes": 2000,
    "client_timeout": 0.2,
    "max_body_bytes": 1 << 20,
    "max_file_bytes": 1000,
    "max_batch_prompts": 3,
    "max_n": 4,
    "max_logprobs": 2,
    "max_grammar_bytes": 100,
    "max_queued_requests": 20,
    "max_queued_bytes": 200_000,
}


JSON_VALUES = st.recursive(
    st.none() | st.text('a"\\[]{}\n', max_size=4), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


def depth(value):
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(value=JSON_VALUES, most=st.integers(0, 6))
def test_depth_is_told_before_parsing(value, most):
    assert too_deep(json.dumps(value).encode(), most) == (depth(value) > most)


class Answer(NamedTuple):
    status: int
    code: str | None


def told(reply):
    """Of an httpx reply."""
    assert reply.status_code >= 400, (reply.status_code, reply.text[:200])
    error = reply.json()["error"]
    assert error["message"] and error["type"]
    return Answer(reply.status_code, error["code"])


def raised(call, *args):
    """Of what raises."""
    with pytest.raises(ActorserveError) as caught:
        call(*args)
    return Answer(caught.value.status, caught.value.code)


async def dial(rig):
    return await asyncio.open_connection("127.0.0.1", int(rig.base.rpartition(":")[2]))


async def sent(rig, *parts):
    """What the server says to these bytes, until it closes."""
    reader, writer = await dial(rig)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0)
    text = await reader.read()
    writer.close()
    return answer_in(text)


def answer_in(text):
    head, _, body = text.rpartition(b"\r\n\r\n")
    assert b"connection: close" in head
    return Answer(int(head.rpartition(b"HTTP/1.1 ")[2][:3]), json.loads(body)["error"]["code"])


async def post(rig, path="/v1/chat/completions", **body):
    return told(await rig.http.post(path, json=CHAT | body if path.endswith("chat/completions") else body))


async def connections(rig):
    await rig.http.aclose()
    held = [await dial(rig) for _ in range(3)]
    answer = await sent(rig)
    for _, writer in held:
        writer.close()
    return answer


async def headers(rig):
    return await sent(rig, b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 13 + b"\r\n")


async def header_bytes(rig):
    one = await sent(rig, b"GET /health HTTP/1.1\r\na: " + b"b" * 2000 + b"\r\n\r\n")
    unfinished = await sent(rig, b"GET /health HTTP/1.1\r\na: ", b"b" * 1500, b"b" * 1500)
    address = await sent(rig, b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\n\r\n")
    assert one == unfinished == address
    return one


async def slow_headers(rig):
    return await sent(rig, b"GET /health HTTP/1.1\r\nhost: x\r\n")


async def slow_body(rig):
    """Also one that goes on too slowly."""
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n"
    first = await sent(rig, head + b"{")
    reader, writer = await dial(rig)
    writer.write(head)

    async def drip():
        while True:
            writer.write(b" ")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    answer = answer_in(await reader.read())
    dripping.cancel()
    writer.close()
    assert answer == first and rig.text.got == []
    return answer


async def slow_reader(rig):
    rig.text.script = lambda generate: []
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", int(rig.base.rpartition(":")[2])))
    body = b'{"prompt": "a", "stream": true, "max_tokens": 100}'
    await asyncio.get_running_loop().sock_sendall(
        narrow, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    (generate,) = await rig.text.wait_for(Generate)
    sending = 0
    while not any(isinstance(m, Cancel) for m in rig.text.got):
        if sending < 400:
            rig.text.say(Chunks([Chunk(generate.rid, "x" * 10_000, [5], [], None, None, 7, 1, 0)]))
            sending += 1
        await asyncio.sleep(0.005)
    (cut,) = [m for m in rig.text.got if isinstance(m, Cancel)]
    assert cut.rid == generate.rid and rig.front.client.table == {}
    narrow.close()
    return None


async def pipelined(rig):
    """The first of them is being answered, so there is no telling: the connection ends."""
    rig.text.script = lambda generate: []
    body = b'{"text": "a"}'
    one = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    reader, writer = await dial(rig)
    writer.write(one * 20)
    assert await reader.read() == b""
    writer.close()
    await until_left(rig)
    return None


async def until_left(rig):
    while rig.front.client.table:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def chunk_overhead(rig):
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n"
    wrong = await sent(rig, head + b"zz\r\n")
    assert wrong == Answer(400, "invalid_http") and not rig.front.client.table
    return await sent(rig, head, *[b"1;" + b"x" * 200 + b"\r\n \r\n"] * 200)


async def body_bytes(rig):
    async def pieces():
        for _ in range(65):
            yield b" " * (1 << 14)

    declared = told(await rig.http.post("/generate", content=b" " * ((1 << 20) + 1)))
    assert told(await rig.http.post("/generate", content=pieces())) == declared
    return declared


async def file_bytes(rig):
    file = {"files": {"file": b"x" * 1001}, "data": {"purpose": "batch"}}
    return told(await rig.http.post("/v1/files", **file))


async def json_depth(rig):
    def nested(depth):
        return b'{"text": "[[[[", "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert (await rig.http.post("/generate", content=nested(MAX_JSON_DEPTH))).status_code == 200
    return told(await rig.http.post("/generate", content=nested(MAX_JSON_DEPTH + 1)))


async def argument_depth(rig):
    deep = {"a": 1}
    for _ in range(MAX_DEPTH):
        deep = {"a": deep}
    return await post(rig, chat_template_kwargs=deep)


async def many_messages(rig):
    payload = msgspec.json.encode({"messages": USER * (MAX_MESSAGES + 1)})
    return raised(decode_chat, payload)


async def many_tools(rig):
    return await post(rig, tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS + 1)])


async def context(rig):
    model = rig.front.service.model
    return raised(Prompts(EngineConfig(), model, None, None).encode, token_prompt([5] * model.context_length, 1000))


class NoTokenizer:
    """Whose `encode` would be the fault."""

    chars_per_token = COMPOSED * 6
    control = ControlTokens([])


async def characters(rig):
    model = rig.front.service.model
    most = model.context_length * COMPOSED * 6
    prompts = Prompts(
        EngineConfig(), model, NoTokenizer(), ChatTemplate("{{ messages[0].content }}", {}, ControlTokens([]))
    )
    chat = ChatPrompt(msgspec.json.encode({"messages": [{"role": "user", "content": "x" * (most + 1)}]}))
    answer = raised(prompts.encode, TextPrompt("x" * (most + 1)))
    assert raised(prompts.encode, chat) == answer
    return answer


async def batches(rig):
    answers = {
        await post(rig, "/generate", text=["a"] * 4),
        await post(rig, "/generate", input_ids=[[1]] * 4),
        await post(rig, "/v1/completions", prompt=["a"] * 4),
        await post(rig, "/v1/score", query="a", items=["b"] * 4, label_token_ids=[1]),
        await post(rig, "/tokenize", prompt=["a"] * 4),
        await post(rig, "/detokenize", tokens=[[1]] * 4),
    }
    (answer,) = answers
    assert (await rig.http.post("/generate", json={"input_ids": [1] * 4})).status_code == 200
    return answer


async def repeated_query(rig):
    return raised(_prompts, ScoreRequest(), "x" * 66_000, ["y"] * 1024, 1000)


async def repeated_text(rig):
    return raised(_pairs, ["x" * 66_000], ["y"] * 1024)


async def parsed_chars(rig):
    body = msgspec.json.encode({"text": "x" * (parse_routes.MAX_CHARS + 1)})
    return raised(decode_body, parse_routes._separate_decoder, body)


async def continuations(rig):
    answers = {await post(rig, n=5), await post(rig, "/v1/completions", prompt="a", best_of=5)}
    (answer,) = answers
    refused = (await rig.http.post("/v1/completions", json={"prompt": "a", "best_of": 5})).json()["error"]
    assert refused["param"] == "best_of" and refused["message"].startswith("best_of")
    return answer


async def top_logprobs(rig):
    reply = await rig.http.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 3})
    assert reply.json()["error"]["param"] == "top_logprobs"
    assert await post(rig, "/v1/completions", prompt="a", logprobs=3) == told(reply)
    return told(reply)


async def listed(rig):
    return await post(rig, "/generate", text="a", return_logprob=True, token_ids_logprob=[1] * (params.MAX_LISTED + 1))


async def of_prompts(rig):
    wanted = SamplingParams(logprobs=20, logprob_start_len=0)
    return raised(check_start, wanted, MOST_LOGPROBS // 21 + 1)


async def stops(rig):
    return await post(rig, stop=["a"] * (params.MAX_STOP_STRINGS + 1))


async def stop_chars(rig):
    return await post(rig, stop="a" * (params.MAX_STOP_CHARS + 1))


async def stop_ids(rig):
    return await post(rig, stop_token_ids=[1] * (params.MAX_STOP_IDS + 1))


async def biases(rig):
    return await post(rig, logit_bias={str(i): 1 for i in range(params.MAX_BIASES + 1)})


def with_image(file, read, count=1):
    """What comes of a prompt with images, `read` in the place of an ImageReader."""
    model = ModelInfo(
        name="", path="", model_type="llava", vocab_size=9, context_length=99, eos_ids=(), image_token_id=7
    )
    prompts = Prompts(EngineConfig(), model, None, None, SimpleNamespace(read=read))
    tokens = memoryview(array("i", [7] * count).tobytes())
    return raised(prompts.encode, TokenPrompt(tokens, (ImageFile(file, "image_data"),) * count))


def png(width, height):
    made = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(made, "PNG")
    return made.getvalue()


async def many_images(rig):
    return with_image(b"", None, EngineConfig().max_images + 1)


async def image_bytes(rig):
    return raised(image_fields.checked, [ImageFile(bytes(image_fields.MOST_BYTES + 1), "image_data")])


async def image_pixels(rig):
    return with_image(png(11, 10), lambda file, alone: images.decoded(file, 100))


async def image_aspect(rig):
    return with_image(png(images.MOST_ASPECT + 1, 1), lambda file, alone: images.decoded(file, 10**6))


async def processed_bytes(rig):
    reader = object.__new__(images.ImageReader)
    reader.facts = SimpleNamespace(kind="llava", patched=False, tokens=lambda *_: 1)
    reader._paper = None
    pixels = np.zeros((1, 1, 1, images.MOST_BYTES // 4 + 1), dtype=np.float32)
    reader._processor = lambda images, return_tensors: {"pixel_values": [pixels]}
    return with_image(b"", lambda file, alone: reader._process(SimpleNamespace(height=1, width=1), alone))


async def live_images(rig):
    store = image_store.ImageStore(nbytes=image_store.HELD_BYTES + 1)
    return raised(store.hold, (), [])


async def many_frames(rig):
    model = ModelInfo(
        name="", path="", model_type="", vocab_size=9, context_length=99, eos_ids=(), image_token_id=7, video_token_id=8
    )
    prompts = Prompts(EngineConfig(), model, None, None, SimpleNamespace())
    frames = (ImageFile(b"", ""),) * (EngineConfig().max_video_frames + 1)
    video = VideoFile(frames, "video_data")
    return raised(prompts.encode, TokenPrompt(memoryview(array("i", [8]).tobytes()), videos=(video,)))


async def slow_image(rig):
    return await not_fetched(trio.sleep_forever)


async def many_redirects(rig):
    async def another():
        return fetch.Redirect("/")

    return await not_fetched(another)


async def not_fetched(answer):
    """What comes of an image whose server does this."""

    class Fetcher(fetch.Fetcher):
        async def _get(self, parts, budget):
            return await answer()

    async def main():
        with pytest.raises(ActorserveError) as caught:
            await Fetcher((), 0.1).fetch("http://a.example/", fetch.Budget(1))
        return Answer(caught.value.status, caught.value.code)

    return await asyncio.to_thread(trio.run, main)


async def many_fetches(rig):
    assert fetch.Fetcher((), 1).at_once.total_tokens == fetch.MOST_AT_ONCE


def rendered(source):
    template = ChatTemplate(source, {}, ControlTokens([]))
    return raised(template.render, decode_chat(msgspec.json.encode({"messages": USER})))


async def template_seconds(rig):
    loop = "{% for i in range(9999) %}"
    return rendered(loop * 4 + "{% endfor %}" * 4)


async def template_chars(rig):
    return rendered("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}")


async def grammar_bytes(rig):
    answers = {
        await post(rig, regex="a" * 101),
        await post(rig, response_format={"type": "json_schema", "json_schema": {"schema": {"const": "é" * 50}}}),
        await post(rig, "/generate", text="a", sampling_params={"ebnf": "a" * 101}),
    }
    (answer,) = answers
    return answer


async def grammar_seconds(rig):
    return raised(Budget(seconds=0.0).check)


async def grammar_memory(rig):
    """A compiler that lacks memory answers; see Compiler.compile."""
    compiler = object.__new__(Compiler)
    compiler._made = lambda spec: bytearray(1 << 62)
    failed = compiler.compile(GrammarSpec("regex", "a"))
    return Answer(400, failed.code)


async def pattern_chars(rig):
    return raised(compile_pattern, "a" * (Budget().pattern + 1), None, None, Budget())


async def live_requests(rig):
    rig.text.script = lambda generate: []
    waiting = asyncio.create_task(rig.http.post("/generate", json={"text": ["a"] * 3, "sampling_params": {"n": 4}}))
    await rig.text.wait_for(Generate, 3)
    answer = await post(rig, "/generate", text=["a"] * 3, sampling_params={"n": 3})
    waiting.cancel()
    return answer


async def live_tokens(rig):
    """In the text actor, which knows tokens: test_text.py. Here, what a front makes of its refusal."""
    rig.text.script = lambda g: [Refused(g.rid, g.n, 429, "overloaded", "too many tokens")]
    reply = await rig.http.post("/generate", json={"text": "a"})
    assert int(reply.headers["retry-after"]) >= 1
    return told(reply)


async def live_bytes(rig):
    rig.text.script = lambda generate: []
    body = {
        "text": "a",
        "sampling_params": {"max_new_tokens": 200, "n": 2},
        "return_logprob": True,
        "top_logprobs_num": 1,
    }
    waiting = asyncio.create_task(rig.http.post("/generate", json=body))
    await rig.text.wait_for(Generate)
    answer = await post(rig, "/generate", **body)
    waiting.cancel()
    body["sampling_params"]["n"] = 4
    refused = (await rig.http.post("/generate", json=body)).json()["error"]
    assert (refused["code"], refused["param"]) == ("too_large", "max_new_tokens")
    return answer


CASES = dict(zip([row.limit for row in rows()], (
    connections, headers, header_bytes, slow_headers, slow_body, slow_reader, slow_reader, pipelined, chunk_overhead,
    body_bytes, file_bytes, json_depth, argument_depth, many_messages, many_tools,
    context, characters, batches, repeated_query, repeated_text, parsed_chars, continuations,
    top_logprobs, listed, of_prompts,
    stops, stop_chars, stop_ids, biases,
    many_images, image_bytes, image_pixels, image_aspect, processed_bytes, live_images,
    many_frames, slow_image, many_redirects, many_fetches,
    template_seconds, template_chars, grammar_bytes, grammar_seconds, grammar_memory, pattern_chars,
    live_requests, live_tokens, live_bytes,
), strict=True))  # fmt: skip


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.limit)
async def test_each_limit(fakes, row: Row, tmp_path) -> None:
    case = CASES[row.limit]
    if row.limit.startswith("bytes of a reply"):
        return  # the case of the row above it
    async with fakes.open_rig(**SMALL, data_dir=str(tmp_path / "data")) as rig:
        rig.http.timeout = 20
        answer = await case(rig)
    expected = re.fullmatch(r"(\d+) `(\w+)`", row.error)
    if answer is not None:
        assert expected is not None and answer == Answer(int(expected[1]), expected[2])
