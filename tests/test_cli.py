"""The command line: flags, help, every way to end. The engine itself is a stand-in here."""

import contextlib
import io
import json
import os
import shlex
import signal
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from actorserve import cli, serve
from actorserve.actors.supervisor import GiveUp
from actorserve.config import EngineConfig, ModelInfo, Pooling
from actorserve.display import Display
from actorserve.errors import StartupError
from actorserve.flags import config_from


def parse(line: str) -> EngineConfig:
    parser, run = cli.build_parsers()
    return config_from(parser.parse_args(["run", *shlex.split(line)]), run)


def test_no_flags_is_the_default() -> None:
    assert parse("") == EngineConfig()


def test_every_field_has_its_flag() -> None:
    """A field added to EngineConfig must be a flag, with the field's name."""
    _, run = cli.build_parsers()
    help_text = run.format_help()
    for name in EngineConfig.__struct_fields__:
        assert f"--{name.replace('_', '-')}" in help_text


def test_values() -> None:
    config = parse(
        "--model /m --tp 2 --disable-radix-cache --schedule-policy dfs-weight --mem-fraction-static .5 "
        "--chunked-prefill-size -1 --context-length 100 --host ::1 --port 0"
    )
    assert config == EngineConfig(
        model="/m",
        tp_size=2,
        disable_radix_cache=True,
        schedule_policy="dfs-weight",
        mem_fraction_static=0.5,
        chunked_prefill_size=-1,
        context_length=100,
        host="::1",
        port=0,
    )
    assert parse("--model-path /m --tensor-parallel-size 3") == EngineConfig(model="/m", tp_size=3)
    assert parse("--dp 3") == parse("--data-parallel-size 3") == parse("--dp-size 3") == EngineConfig(dp_size=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run --port x", "argument --port: invalid int value: 'x'"),
        ("run --port 65536", "argument --port: expected `int` <= 65535, not 65536"),
        ("run --tp 0", "argument --tp-size: expected `int` >= 1, not 0"),
        ("run --mem-fraction-static 1.0", "argument --mem-fraction-static: expected `float` < 1.0"),
        ("run --window-ms nan", "argument --window-ms: expected"),
        ("run --drain-timeout inf", "argument --drain-timeout: inf is no number of a certain size"),
        ("run --random-seed 99999999999999999999", "argument --random-seed: 99999999999999999999 is too large"),
        ("run --schedule-policy best", "argument --schedule-policy: invalid choice: 'best'"),
        ("run --modle x", "unrecognized arguments: --modle x"),
        ("run --disable-radix", "unrecognized arguments: --disable-radix"),
        ("run --host", "argument --host: expected one argument"),
        ("serve", "invalid choice: 'serve'"),
        ("run --tp 2", "--tp-size 2 does not divide 9 attention heads and 3 KV heads; possible: 3, 9"),
        ("run --model /no/where", "--model /no/where: no such file or folder"),
        ("run --model org/a/b", "no such file or folder"),
        ("run --host no.such.host.invalid", "--host no.such.host.invalid is not an address of this machine"),
        ("run --host 203.0.113.1", "cannot listen on 203.0.113.1"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    if "--port" not in line:
        line = line.replace("run", "run --port 0")
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(line))
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert message in err
    assert err.startswith("actorserve: ")
    assert err.count("\n") == 1
    assert out == ""


def test_port_in_use(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.command(["run", "--port", str(port)]) == 2
    expected = f"actorserve: cannot listen on 127.0.0.1 port {port}: Address already in use; pass another --port\n"
    assert capfd.readouterr().err == expected


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command(["version"]) == 0
    assert capsys.readouterr().out == "actorserve 0.1.0\n"
    assert cli.command([]) == 2
    assert "actorserve run --model DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.command(["run", "-h"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    places = [text.index(f"\n{group}:\n") for group in ("model", "server", "device and memory", "scheduling", "actors")]
    assert places == sorted(places)
    assert "port to listen on; 0 picks a free one (default: 30000)" in text
    assert max(map(len, text.splitlines())) <= 110


# ------------------------------------------------------------------ running

MODEL = ModelInfo(
    name="it's", path="/m", model_type="llama", vocab_size=9, context_length=8, eos_ids=(), has_chat_template=True
)
Behaviour = Callable[["Stand"], Any]


class Stand:
    """In the Supervisor's place: reports that it is up, and then does what the test wants."""

    behaviour: Behaviour

    def __init__(self, topology: Any, config: EngineConfig, model: ModelInfo, on_event: Any) -> None:
        self.topology, self.on_event = topology, on_event
        self.stop = trio.Event()

    async def run(self) -> None:
        self.on_event("spawn", "exec.0", "", 0.0)
        self.on_event("progress", "exec.0", "exec.0: weights", 0.5)
        self.on_event("up", "", "", 0.0)
        await type(self).behaviour(self)

    def request_stop(self, drain: float = 0.0) -> None:
        self.stop.set()


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], int]]:
    """Run `actorserve run --port 0` with a Stand of the given behaviour; returns the exit code."""
    monkeypatch.setattr(serve, "resolve_model", lambda config, progress: MODEL)
    monkeypatch.setattr(serve, "configure_logging", lambda node, level: None)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests may have it ignored

    def run(behaviour: Behaviour) -> int:
        monkeypatch.setattr(serve, "Supervisor", type("Case", (Stand,), {"behaviour": staticmethod(behaviour)}))
        return cli.command(["run", "--port", "0"])

    yield run
    signal.signal(signal.SIGHUP, hangup)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_in_order(number: int, stand: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async def behaviour(engine: Stand) -> None:
        os.kill(os.getpid(), number)
        await engine.stop.wait()

    assert stand(behaviour) == 0
    out, err = capsys.readouterr()
    assert "serves it's on http://127.0.0.1:" in out
    assert err == "starting the actors\nstarting exec.0: weights\n"


def test_nohup(stand: Any) -> None:
    """A server that is to outlive its terminal does."""

    async def behaviour(engine: Stand) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        with trio.move_on_after(0.05):
            await engine.stop.wait()
        assert not engine.stop.is_set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stand(behaviour) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(number: int, code: int, stand: Any) -> None:
    async def behaviour(engine: Stand) -> None:
        os.kill(os.getpid(), number)
        await engine.stop.wait()
        os.kill(os.getpid(), number)
        await trio.sleep_forever()

    assert stand(behaviour) == code


def test_giving_up(stand: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async def behaviour(engine: Stand) -> None:
        raise GiveUp("exec.0 failed 4 times: killed by signal 9")

    assert stand(behaviour) == 1
    assert "gave up: exec.0 failed 4 times" in capsys.readouterr().err


def test_an_actor_that_cannot_start(stand: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async def behaviour(engine: Stand) -> None:
        raise StartupError("not enough memory for one page")

    assert stand(behaviour) == 2
    assert capsys.readouterr().err.endswith("actorserve: not enough memory for one page\n")


def test_stopped_while_the_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[bool] = []

    def resolve(config: EngineConfig, progress: Any) -> ModelInfo:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)
        raise AssertionError

    monkeypatch.setattr(serve, "resolve_model", resolve)
    monkeypatch.setattr(serve, "configure_logging", lambda node, level: None)
    assert cli.command(["run", "--port", "0"]) == 0
    assert cleaned


def test_line_to_paste() -> None:
    """It must survive a shell, also with a quote in the model's name."""
    command = shlex.split(serve.greeting(MODEL, "http://h:1").strip().splitlines()[-1])
    assert command[:3] == ["curl", "-N", "http://h:1/v1/chat/completions"]
    body = json.loads(command[command.index("-d") + 1])
    assert (body["model"], body["stream"], body["messages"][0]["role"]) == ("it's", True, "user")
    for task, path in (("embed", "embeddings"), ("classify", "classify")):
        pooling = Pooling(kind="last", task=task, width=4)
        said = serve.greeting(msgspec.structs.replace(MODEL, pooling=pooling), "http://h:1")
        command = shlex.split(said.strip().splitlines()[-1])
        assert command[2] == f"http://h:1/v1/{path}" and "actorserve chat" not in said
        assert json.loads(command[command.index("-d") + 1]).keys() == {"model", "input"}


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:"),
        ("localhost", "http://localhost:"),
        ("::1", "http://[::1]:"),
        ("::", "http://[::1]:"),
    ],
)
def test_address_shown(host: str, url: str) -> None:
    with serve.listen("127.0.0.1", 0) as listener:
        assert serve.base_url(host, listener) == f"{url}{listener.getsockname()[1]}"


def test_port_can_be_taken_again_at_once() -> None:
    """After a restart, connections of the last run must not keep the port."""
    with serve.listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), listener.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_RDWR)
    with serve.listen(*address):
        pass


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        return None


def test_bars_on_a_terminal_vanish(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Display() as display:
        for done in (0, 50_000_000, 100_000_000):
            display.transfer("download", done, 100_000_000)
        display.event("progress", "exec.0", "exec.0: weights", 0.5)
        display.event("ready", "exec.0", "", 0.0)
        display.greet("hello")
        display.event("progress", "exec.0", "exec.0: weights", 0.1)
    assert "downloading the embedded model" in terminal.text
    assert "starting exec.0: weights" in terminal.text
    assert not terminal.text.rpartition("\r")[2].strip(), "a bar was left on the screen"
    assert capsys.readouterr().out == "hello\n"


def test_plain_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for done in range(5):
            display.transfer("convert", done, 10_000_000)
        display.transfer("wait", 0, 0)
        display.event("spawn", "exec.0", "", 0.0)
        for _ in range(3):
            display.event("progress", "exec.0", "exec.0: compiling kernels (once)", 1.0)
        display.event("stopping", "", "", 0.0)
        display.event("down", "front.0", "left", 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "converting the model (once) (10 MB)", "waiting for another process that prepares this model",
        "starting the actors", "starting exec.0: compiling kernels (once)",
    ]  # fmt: skip


def test_python_m(tmp_path: Path) -> None:
    import subprocess

    done = subprocess.run([sys.executable, "-m", "actorserve", "version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "actorserve 0.1.0\n")


def test_interrupted_while_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from actorserve import __main__ as begin

    class Slow(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "actorserve.cli", Slow("actorserve.cli"))
    with pytest.raises(SystemExit) as ended:
        begin.main()
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("plan --length 9 | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("plan --length 9 > /dev/full", 2, "actorserve: cannot write: No space left on device\n"),
        ("doctor >&- --port 0", 0, ""),
        ("complete <&-", 2, "actorserve: the prompt is empty: give it as an argument or on stdin\n"),
        ("chat --url http://127.0.0.1:9 2>&-", 2, ""),
    ],
)
def test_streams_of_any_kind(ending: str, code: int, said: str, tmp_path: Path) -> None:
    """Closed, full, or read no more: no traceback, and none of Python's own complaints at its end."""
    import subprocess

    line = f"{sys.executable} -m actorserve {ending}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=buffered)
    assert (done.returncode, done.stderr) == (code, said)


def test_what_the_locale_cannot_spell(monkeypatch: pytest.MonkeyPatch) -> None:
    out, given = io.BytesIO(), io.BytesIO(b"caf\xc3\xa9 \xff\n")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(given, encoding="utf-8"))
    cli.prepare_streams()
    print(input(), flush=True)
    assert out.getvalue() == b"caf? ?\n"


def test_nobody_reads_the_greeting(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`actorserve run | head -1`, or a full disk: the engine goes on."""

    async def behaviour(engine: Stand) -> None:
        return None

    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr("sys.stderr", full)
        assert stand(behaviour) == 0
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


@pytest.mark.parametrize("name", ["run", "chat", "complete", "bench", "doctor", "plan"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.command([name, "-h"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert out.startswith(f"usage: actorserve {name}") and max(map(len, out.splitlines())) <= 110


def test_bench_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command(["bench", "--base-url", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.startswith("actorserve: cannot read http://127.0.0.1:9")
    with pytest.raises(SystemExit) as ended:
        cli.command(["bench", "--num-prompts", "0"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "actorserve bench -h" in err
