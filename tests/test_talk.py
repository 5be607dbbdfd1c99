"""Whom terminal commands talk to, `actorserve complete`, `actorserve chat`: against a stand-in server, and scripts."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai_stand_in import StandIn, stand_in

from actorserve import cli
from actorserve.chat import Chat, Paint
from actorserve.errors import EngineDown, RequestError
from actorserve.talk import Figures, Message, Options, Piece, Server


@pytest.fixture(scope="module")
def api() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def server(api: StandIn) -> StandIn:
    api.script, api.replies = "Once upon a time there was a fox.", {"Hi": "Hello there, you."}
    api.failures.clear(), api.bodies.clear(), api.headers.clear()
    return api


# ------------------------------------------------------------------ a server


def test_answers_come_in_pieces(server: StandIn) -> None:
    partner = Server(server.url, key="sesame", model="m")
    pieces = list(partner.chat([{"role": "user", "content": "Hi"}], {"temperature": 0.5, "max_tokens": 3}))
    assert "".join(piece.text for piece in pieces) == "Hello there,"
    assert len(pieces) > 2 and [p.finish for p in pieces if p.finish] == ["length"]
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["max_tokens"], body["stream"]) == ("m", 0.5, 3, True)
    assert server.headers[0]["authorization"] == "Bearer sesame"
    text = "".join(piece.text for piece in Server(server.url + "/v1", model="m").complete("Once upon", {}))
    assert text == " a time there was a fox."


def test_a_schema_goes_as_openai_has_it(server: StandIn) -> None:
    list(Server(server.url, model="m").chat([{"role": "user", "content": "Hi"}], {"json_schema": {"type": "object"}}))
    wanted = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert server.bodies[0]["response_format"] == {"type": "json_schema", "json_schema": wanted}
    assert "json_schema" not in server.bodies[0]


def test_refusals_are_errors_with_the_servers_words(server: StandIn) -> None:
    partner = Server(server.url, model="m")
    server.failures[:] = [400, 401]
    with pytest.raises(RequestError, match="the server answers 400: as told") as refused:
        list(partner.complete("Once", {}))
    assert (refused.value.param, refused.value.status) == ("model", 400)
    with pytest.raises(RequestError, match=r"401: as told \(give --api-key"):
        list(partner.complete("Once", {}))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid:1"])
def test_nobody_there(url: str) -> None:
    with pytest.raises(EngineDown, match=r"nobody answers at http://.*actorserve run"):
        Server(url)


def test_what_is_no_server() -> None:
    with pytest.raises(RequestError, match="not an http"):
        Server("localhost:30000")


def test_figures() -> None:
    figures = Figures()
    figures.take(Piece("a", "", 1, 40, 36))
    figures.take(Piece("b", "", 5, 40, 36))
    figures.take(Piece("", "", 5, 40, 36, "length"))
    figures.began, figures.first, figures.last = 10.0, 10.5, 12.5
    line = "5 tokens, 2.0 tokens/s, first after 0.50 s, 36 of 40 prompt tokens cached, cut at max_tokens"
    assert figures.line() == line
    assert Figures().line() == ""


# ------------------------------------------------------------------ actorserve complete


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    code = cli.command(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_complete(server: StandIn, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    at = ["--url", server.url, "--model", "m"]
    code, out, err = run(["complete", "Once upon", *at, "--max-tokens", "3", "--stats"], capsys)
    assert (code, out) == (0, " a time there\n") and "first after" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert run(["complete", "--system", "Brief.", "--stop", ",", *at], capsys) == (0, "Hello there\n", "")
    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "Brief."},
        {"role": "user", "content": "Hi"},
    ]
    (tmp_path / "schema.json").write_text('{"type": "string"}')
    run(["complete", "--chat", "Hi", "--json-schema", str(tmp_path / "schema.json"), *at], capsys)
    assert server.bodies[2]["response_format"]["json_schema"]["schema"] == {"type": "string"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["x", "--url", "http://127.0.0.1:9"], "nobody answers"),
        (["x", "--model", "m", "--url", "http://[::1"], "--url http://[::1: not an http(s) address"),
        (["x", "--model", "m", "--url", "http://host:99999"], "--url http://host:99999: not an http(s) address"),
        (["x", "--model", "m", "--api-key", "a\nb"], "--api-key has what no key has"),
        (["x", "--json-schema", "/no/such"], "--json-schema /no/such: No such file"),
        ([""], "the prompt is empty"),
        (["", "--local", "Once upon"], "--local took 'Once upon' for the model"),
    ],
)
def test_complete_fails_in_one_line(flags: list[str], message: str, capsys: Any) -> None:
    code, out, err = run(["complete", *flags], capsys)
    assert (code, out) == (2, "")
    assert err.startswith("actorserve: ") and message in err and err.count("\n") == 1


def test_who_reads_may_leave(server: StandIn, monkeypatch: Any) -> None:
    """`actorserve complete ... | head -c 3` ends without a word."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    assert cli.command(["complete", "Once", "--url", server.url, "--model", "m"]) == 0


# ------------------------------------------------------------------ actorserve chat


class Parrot:
    """Says the last message again, word by word; an order in it ends the answer in other ways."""

    name, place = "parrot", "here"

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], Options]] = []

    def chat(self, messages: Sequence[Message], options: Options) -> Iterator[Piece]:
        self.asked.append(([*messages], dict(options)))
        for count, word in enumerate(messages[-1]["content"].split(), 1):
            if word == "interrupt":
                raise KeyboardInterrupt
            if word == "fail":
                raise EngineDown("a part of the engine stopped")
            if word == "think":
                yield Piece(thought="hmm", tokens=count)
            else:
                yield Piece(word + " ", "", count, 9, 4)

    def complete(self, prompt: str, options: Options) -> Iterator[Piece]:
        raise AssertionError("chats are not completions")


class Talk:
    """A chat with a Parrot, and what was printed since the last `say`."""

    def __init__(self, system: str = "") -> None:
        self.parrot, self.out = Parrot(), io.StringIO()
        self.chat = Chat(self.parrot, {"temperature": 0.0}, system, Paint(self.out))

    def say(self, line: str) -> str:
        self.out.truncate(self.out.seek(0))
        self.chat.take(line)
        return self.out.getvalue()

    @property
    def history(self) -> list[str]:
        return [turn["content"] for turn in self.chat.turns]


def test_turns_and_settings_reach_the_model() -> None:
    talk = Talk(system="Be brief.")
    assert talk.say("one two").startswith("one two \n2 tokens") and "4 of 9 prompt tokens cached" in talk.out.getvalue()
    talk.say("/temp 0.7")
    talk.say("/max 5")
    talk.say("/set top_p .5")
    talk.say("/set temperature -")
    talk.say("three")
    messages, options = talk.parrot.asked[-1]
    assert options == {"max_tokens": 5, "top_p": 0.5}
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be brief."), ("user", "one two"), ("assistant", "one two "), ("user", "three"),
    ]  # fmt: skip
    assert "hmm\n\nso" in talk.say("think so")


def test_the_history_has_whole_turns_only() -> None:
    talk = Talk()
    assert "a part of the engine stopped" in talk.say("fail")
    talk.say("interrupt")
    assert talk.history == []
    assert "stopped" in talk.say("half interrupt")
    assert talk.history == ["half interrupt", "half "]
    talk.say("more")
    talk.say("/retry")
    assert talk.history == ["half interrupt", "half ", "more", "more "] and len(talk.parrot.asked) == 5
    talk.say("/undo")
    assert talk.history == ["half interrupt", "half "]
    talk.say("/clear")
    assert talk.history == [] and "nothing to take back" in talk.say("/undo")


def test_conversations_are_saved_and_loaded(tmp_path: Path) -> None:
    talk, file = Talk(system="S"), tmp_path / "talk.json"
    talk.say("äh")
    talk.say(f"/save {file}")
    talk.say(f"/save {tmp_path / 'talk.md'}")
    assert (tmp_path / "talk.md").read_text() == "**system**\n\nS\n\n**user**\n\näh\n\n**assistant**\n\näh \n"
    other = Talk()
    other.say(f"/load {file}")
    assert (other.chat.system, other.history) == ("S", ["äh", "äh "])
    for bad in ("{}x", "[3]", "3", '[{"role": 1}]'):
        file.write_text(bad)
        assert "is not a conversation" in other.say(f"/load {file}")
    assert "cannot be read" in other.say("/load /no/such") and "give a file's name" in other.say("/save")
    assert other.history == ["äh", "äh "]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/nope", "no /nope; /help lists"),
        ("/s", "/s may be /system or /set or /save"),
        ("/", "no /"),
        ("/set tempo 3", "no parameter tempo"),
        ("/temp warm", "takes a number, not 'warm'"),
        ("/max 2.5", "takes a whole number"),
        ("/sys", "there is no system prompt"),
        ("/set", "temperature = 0.0"),
        ("/help", "/retry"),
    ],
)
def test_commands_answer(line: str, answer: str) -> None:
    talk = Talk()
    assert answer in talk.say(line)
    assert talk.parrot.asked == [] and talk.chat.open


def test_a_pipe_is_a_conversation(server: StandIn, capsys: Any, monkeypatch: Any) -> None:
    """Without a terminal: no prompts, no colours; several lines are one message between fences, or joined."""
    server.replies = lambda body: f"<{body['messages'][-1]['content']}>"
    monkeypatch.setattr("sys.stdin", io.StringIO('a\n"""b\nc\n"""\nd\\\ne\n"""f"""\n\n/quit\nnever\n'))
    code, out, _ = run(["chat", "--url", server.url, "--model", "m"], capsys)
    assert code == 0 and "\x1b" not in out and "never" not in out
    asked = [body["messages"][-1]["content"] for body in server.bodies]
    assert asked == ["a", "b\nc", "d\ne", "f"]


def test_colours_only_on_a_terminal(monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    Paint(out).note("n")
    assert out.getvalue() == "\x1b[2mn\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Paint(plain).warn("w")
    assert plain.getvalue() == "w\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    dumb = Terminal()
    Paint(dumb).warn("w")
    assert dumb.getvalue() == "w\n"


def test_chat_that_cannot_begin(capsys: Any, tmp_path: Path) -> None:
    code, _, err = run(["chat", "--url", "http://127.0.0.1:9"], capsys)
    assert code == 2 and err.startswith("actorserve: nobody answers") and err.count("\n") == 1
