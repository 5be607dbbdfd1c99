"""`actorserve batch`: what it answers, and that it goes on where it was stopped. The engine is a stand-in."""

import asyncio
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from actorserve import batch, cli
from actorserve.actors.client import Client
from actorserve.actors.messages import Chunk, Chunks, Generate, Stats
from actorserve.actors.stream import LoopWakeup
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import EngineDown

MODEL = ModelInfo(name="fake", path="/m", model_type="llama", vocab_size=9, context_length=99, eos_ids=())


class StandIn:
    """In Engine's place: says "yes" to every prompt, until `most` were asked; then it is down."""

    asked: list[str] = []  # noqa: RUF012
    most = 1000
    up = True

    def __init__(self, **settings: Any) -> None:
        self.config, self.model = EngineConfig(), MODEL
        self.client = Client(self, self.config, MODEL, new_wakeup=LoopWakeup)
        self.client.replicas[0] = Stats(*[0] * 13, 0.0, True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.client.fail_all(EngineDown("closed"))

    @property
    def _client(self) -> Client:
        if len(self.asked) >= self.most:
            raise EngineDown("the engine is gone")
        return self.client

    def post(self, message: object) -> None:
        if isinstance(message, Generate) and len(self.asked) < self.most:
            self.asked.append(message.prompt.text)  # type: ignore[union-attr]
            chunk = Chunk(message.rid, "yes", [1], [], "stop", None, 1, 1, 0)
            asyncio.get_running_loop().call_soon(self.client.receive, Chunks([chunk]), "text")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """Run the command on these lines; (exit code, what the output has)."""
    monkeypatch.setattr(batch, "Engine", StandIn)
    monkeypatch.setattr(batch, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(StandIn, "asked", [])
    monkeypatch.setattr(StandIn, "most", 1000)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def run(lines: list[Any]) -> tuple[int, list[dict[str, Any]]]:
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = cli.command(["batch", "-i", str(source), "-o", str(target)])
        return code, [json.loads(line) for line in target.read_text().splitlines()]

    return run


def line(i: int, **body: Any) -> dict[str, Any]:
    return {"custom_id": f"n{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"p{i}", **body}}


def test_answers_and_refusals(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run([line(0), line(1, temperature=-1), line(2)])
    by_name = {one["custom_id"]: one["response"] for one in output}
    assert code == 1 and len(output) == 3
    assert by_name["n0"]["body"]["choices"][0]["text"] == "yes"
    assert (by_name["n1"]["status_code"], by_name["n1"]["body"]["error"]["param"]) == (400, "temperature")
    assert "1 requests were refused" in capsys.readouterr().err


def test_it_goes_on_where_it_was_stopped(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line(i) for i in range(9)]
    StandIn.most = 4
    code, output = run(lines)
    assert (code, len(output)) == (1, 4)
    assert "the same command goes on" in capsys.readouterr().err
    with (tmp_path / "out.jsonl").open("a") as cut:
        cut.write('{"id":"batch_req_x", "custom_id": "n8", "respo')  # a crash amid a line
    StandIn.most = 1000
    code, output = run(lines)
    assert code == 0
    assert sorted(one["custom_id"] for one in output) == [f"n{i}" for i in range(9)]
    assert sorted(StandIn.asked) == [f"p{i}" for i in range(9)]
    assert run(lines)[0] == 0 and len(StandIn.asked) == 9


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(0), line(0)], "in.jsonl, line 2: custom_id 'n0' comes twice"),
        ([{**line(0), "url": "/v1/models"}], "line 1: url must be /v1/completions or"),
        ([[]], "line 1: invalid request"),
    ],
)
def test_input_that_is_refused(run: Any, lines: list[Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lines) == (2, [])
    assert message in capsys.readouterr().err
    assert StandIn.asked == []


def test_nothing_of_anybody_else_is_lost(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the requests, where they are named twice, nor a file that happens to have no end of its last line."""
    target = tmp_path / "out.jsonl"
    for text, message in ((json.dumps(line(0)), "is the input"), ("my notes", "no answer of a batch")):
        target.write_text(text)
        source = target if "input" in message else tmp_path / "in.jsonl"
        if source != target:
            source.write_text(json.dumps(line(0)))
        assert cli.command(["batch", "-i", str(source), "-o", str(target)]) == 2
        assert message in capsys.readouterr().err
        assert target.read_text() == text
    assert StandIn.asked == []


def test_pipes_are_refused(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(line(0)))
    os.mkfifo(tmp_path / "pipe")
    for files in ([source, tmp_path / "pipe"], [tmp_path / "pipe", source]):
        assert cli.command(["batch", "-i", str(files[0]), "-o", str(files[1])]) == 2
        err = capsys.readouterr().err
        assert "pipe is a pipe or a device" in err and err.count("\n") == 1


def test_a_full_disk_is_one_line(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what was answered before it counts when the command goes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = [line(i) for i in range(9)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 2
    assert re.search(r"actorserve: \S*out.jsonl.*: File too large", capsys.readouterr().err.splitlines()[-1])
    code, output = run(lines)
    assert code == 0 and sorted(one["custom_id"] for one in output) == [f"n{i}" for i in range(9)]


def test_files_that_cannot_be_used(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.command(["batch", "-i", str(tmp_path / "none"), "-o", str(tmp_path / "out")])
    assert ended.value.code == 2 and "No such file" in capsys.readouterr().err
    (tmp_path / "out.jsonl").write_text("text\n")
    with pytest.raises(json.JSONDecodeError):
        run([line(0)])
    assert "has a line that is no answer" in capsys.readouterr().err
