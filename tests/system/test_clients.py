"""Clients that people use, against the real server with the real model.

Those that weigh much are in the extra `clients`; a test whose client is not there says so and is skipped.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from live_server import LiveServer
from pydantic import BaseModel, Field

pytestmark = pytest.mark.anyio
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
USER: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Weather(BaseModel):
    """Get the weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=3)


def name_of(server: LiveServer) -> str:
    return str(server.get("/v1/models").json()["data"][0]["id"])


# ------------------------------------------------------------------ openai


async def test_openai_at_once(server: LiveServer) -> None:
    """The asynchronous client: whole, streamed, and its helpers that put streams together, all at once."""
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def whole() -> str | None:
            reply = await client.chat.completions.create(model="", messages=USER, temperature=0, max_tokens=20)
            return reply.choices[0].message.content

        async def streamed() -> str:
            stream = await client.chat.completions.create(
                model="", messages=USER, temperature=0, max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def helped() -> str | None:
            options: Any = {"model": "", "messages": USER, "temperature": 0, "max_tokens": 20}
            async with client.chat.completions.stream(**options) as stream:
                kinds = {event.type async for event in stream}
                assert {"chunk", "content.delta", "content.done"} <= kinds
                return (await stream.get_final_completion()).choices[0].message.content

        async def responded() -> str:
            async with client.responses.stream(model="", input=QUESTION, temperature=0) as stream:
                kinds = {event.type async for event in stream}
                assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
                return (await stream.get_final_response()).output_text

        assert await asyncio.gather(whole(), streamed(), helped(), responded()) == [ANSWER] * 4


def test_openai_parses(server: LiveServer) -> None:
    """Structured outputs by a type: of a chat, of tools, of a response."""
    with server.client() as client:
        options: Any = {"model": "", "messages": USER, "temperature": 0, "max_tokens": 60}
        chat = client.chat.completions.parse(**options, response_format=Weather)
        assert isinstance(chat.choices[0].message.parsed, Weather)
        tools = [openai.pydantic_function_tool(Weather)]
        called = client.chat.completions.parse(**options, tools=tools, tool_choice="required")
        (call,) = called.choices[0].message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Weather)
        response = client.responses.parse(model="", input=QUESTION, text_format=Weather, max_output_tokens=60)
        assert isinstance(response.output_parsed, Weather)


def test_openai_files_and_batches(server: LiveServer) -> None:
    body = {"messages": USER, "temperature": 0, "max_tokens": 20}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    wrong = line | {"custom_id": "two", "body": body | {"temperature": -1}}
    content = "".join(json.dumps(x) + "\n" for x in (line, wrong)).encode()
    with server.client() as client:
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        assert client.files.content(file.id).read() == content
        assert file.id in [one.id for one in client.files.list(purpose="batch")]
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
        )
        while batch.status not in ("completed", "failed"):
            batch = client.batches.retrieve(batch.id)
        assert batch.output_file_id and batch.error_file_id and batch.metadata == {"a": "b"}
        good = json.loads(client.files.content(batch.output_file_id).text)
        assert good["response"]["body"]["choices"][0]["message"]["content"] == ANSWER
        bad = json.loads(client.files.content(batch.error_file_id).text)
        assert (bad["custom_id"], bad["response"]["body"]["error"]["param"]) == ("two", "temperature")
        for name in (batch.output_file_id, batch.error_file_id, file.id):
            assert client.files.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_openai_through_node(server: LiveServer, tmp_path: Path) -> None:
    """The npm client; the package is fetched where there is node and a registry."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no node here")
    script = shutil.copy(Path(__file__).parent / "openai_client.mjs", tmp_path)
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", "openai@6"]
    if subprocess.run(command, cwd=tmp_path, timeout=120, capture_output=True).returncode:
        pytest.skip("npm cannot fetch its openai package here")
    done = subprocess.run([node, script, server.url], cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all good\n"), done.stderr


# ------------------------------------------------------------------ others


async def test_anthropic_asynchronously(server: LiveServer) -> None:
    """A tool's input, streamed; see test_server.py for the rest."""
    tool: Any = {"name": "weather", "input_schema": Weather.model_json_schema() | {"additionalProperties": False}}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    asked: Any = {"messages": USER, "model": "", "max_tokens": 99, "tools": [tool], "tool_choice": choice}
    async with (
        anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client,
        client.messages.stream(**asked) as stream,
    ):
        pieces = [event.partial_json async for event in stream if event.type == "input_json"]
        final = await stream.get_final_message()
    (block,) = final.content
    assert block.type == "tool_use" and len(pieces) > 1
    assert Weather.model_validate(block.input) == Weather.model_validate_json("".join(pieces))


def test_langchain(server: LiveServer) -> None:
    chat_models = pytest.importorskip("langchain_openai", reason="the extra `clients` is not installed")
    model = chat_models.ChatOpenAI(
        base_url=server.url + "/v1", api_key="none", model=name_of(server), temperature=0, max_tokens=60, max_retries=0
    )
    assert model.invoke(QUESTION).content == ANSWER
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == ANSWER
    assert isinstance(model.with_structured_output(Weather, method="json_schema").invoke(QUESTION), Weather)
    (call,) = model.bind_tools([Weather], tool_choice="any", strict=True).invoke(QUESTION).tool_calls
    assert call["name"] == "Weather" and Weather.model_validate(call["args"])
    assert [reply.content for reply in model.batch([QUESTION, QUESTION])] == [ANSWER, ANSWER]


def test_the_llm_command(server: LiveServer, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="the extra `clients` is not installed")
    model = {"model_id": "ours", "model_name": name_of(server), "api_base": server.url + "/v1", "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, input="")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert llm("-m", "ours", QUESTION, "-o", "temperature", "0") == ANSWER
    assert llm("-m", "ours", QUESTION, "-o", "temperature", "0", "--no-stream") == ANSWER


TASK = """
task: ours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
QUIZ = [
    ("The capital of France is", [" Paris", " a banana", " seven"], 0),
    ("The sun rises in the", [" purple", " east", " carpet"], 1),
    ("Two plus two is", [" France", " under", " four"], 2),
]


def test_lm_eval(server: LiveServer, smollm: str, tmp_path: Path) -> None:
    """Loglikelihoods of a task's choices, by its `local-completions`: token ids, echo, logprobs."""
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `clients` is not installed")
    del lm_eval
    data = tmp_path / "data.jsonl"
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUIZ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ours.yaml").write_text(TASK.replace("DATA", json.dumps(str(data))))
    arguments = f"model={name_of(server)},base_url={server.url}/v1/completions,tokenizer={smollm},max_retries=1"
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments,
        "--include_path", str(tmp_path), "--tasks", "ours", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["ours"]["acc,none"] == 1.0
