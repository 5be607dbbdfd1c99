"""Both parsers in a row, their names, the guess from a template, and the reply in OpenAI's fields."""

import json
from typing import Any

import pytest
from chat_texts import counter, cuts, cuttings, run, texts, trials, valid_texts
from hypothesis import given
from hypothesis import strategies as st

from actorserve.errors import StartupError
from actorserve.models.chat_reply import ChatReply
from actorserve.models.detokenize import Detokenizers
from actorserve.models.parse_events import CallArguments, CallEnd, Content, Event, Reasoning, joined, parse
from actorserve.models.parsers import ChatParser, Guess, guess, names, random_id, reasoning_parser, tool_parser
from actorserve.models.tokenizer import load_tokenizer
from actorserve.models.tool_families import TOOL_FAMILIES

TEXT = (
    '<think>\nWhich city?\n</think>\n\nLet me see.\n<tool_call>\n{"name": "f", "arguments": {"city": "Łódź 🎉"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


def chat_parser(tools: str | None = "hermes", reasoning: str | None = "qwen3", stream: bool = True) -> ChatParser:
    return ChatParser(
        reasoning_parser(reasoning, stream_reasoning=stream) if reasoning else None,
        tool_parser(tools, counter()) if tools else None,
    )


def assembled(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """What an OpenAI client puts together from a stream."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for delta in deltas:
        for key in ("content", "reasoning_content"):
            if key in delta:
                message[key] = (message.get(key) or "") + delta[key]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({key: value for key, value in call.items() if key != "index"})
                calls[-1]["function"] = dict(call["function"])
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message


class Piece(str):
    """A text that cannot be added to one by one, for each time copies all that was there before."""

    def __add__(self, other: str) -> str:
        raise AssertionError("joined piece by piece")

    __radd__ = __add__


def test_joining_is_linear() -> None:
    pieces = [Piece("a"), Piece("b"), Piece("c")]
    events: list[Event] = [
        *map(Reasoning, pieces),
        *map(Content, pieces),
        *(CallArguments(0, piece) for piece in pieces),
        *(CallArguments(1, piece) for piece in pieces),
        CallEnd(0, True),
        CallEnd(1, True),
        Content(Piece("d")),
    ]
    assert joined(events) == [
        Reasoning("abc"), Content("abc"), CallArguments(0, "abc"), CallArguments(1, "abc"), CallEnd(0, True),
        CallEnd(1, True), Content("d"),
    ]  # fmt: skip
    assert joined(iter(())) == []


# ------------------------------------------------------------------ the law for both


@pytest.mark.parametrize("tools", ["hermes", "llama3", "command-r", None])
@pytest.mark.parametrize("reasoning", ["qwen3", "deepseek-r1", None])
@trials(40)
@given(data=st.data(), places=cuts, stream=st.booleans())
def test_streamed_replies_are_the_whole_reply(
    tools: str | None, reasoning: str | None, data: st.DataObject, places: list[int], stream: bool
) -> None:
    family = TOOL_FAMILIES[tools or "hermes"]
    markers = family.markers | {"<think>", "</think>"}
    text = data.draw(texts(markers, (TEXT, *valid_texts(tools or "hermes", family))))
    whole = ChatReply()
    whole.add(parse(chat_parser(tools, reasoning), text))
    for chunks in cuttings(text, places):
        parser, reply, deltas = chat_parser(tools, reasoning, stream), ChatReply(), []
        for chunk in chunks:
            deltas += reply.add(parser.feed(chunk))
        deltas += reply.add(parser.finish())
        assert reply.message() == whole.message()
        assert assembled(deltas) | {"content": None} == whole.message() | {"content": None}
        assert (assembled(deltas)["content"] or "") == (whole.message()["content"] or "")
        assert reply.finish_reason("stop") == whole.finish_reason("stop")


@pytest.mark.real
def test_token_by_token_of_a_real_tokenizer(smollm: str) -> None:
    tokenizer = load_tokenizer(smollm)
    ids = tokenizer.encode(TEXT)
    detokenizer = Detokenizers(tokenizer).new([], skip_special_tokens=False)
    chunks = [*map(detokenizer.push, ids), detokenizer.finish()]
    assert "".join(chunks) == TEXT and len(chunks) > 60
    assert run(chat_parser(), chunks) == parse(chat_parser(), TEXT)


# ------------------------------------------------------------------ the reply


def reply_of(events: list[Event]) -> ChatReply:
    reply = ChatReply()
    reply.add(events)
    return reply


def test_message() -> None:
    reply = reply_of(parse(chat_parser(), TEXT))
    function = {"name": "f", "arguments": '{"city": "Łódź 🎉"}'}
    assert reply.message() == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Which city?",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": function},
            {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_deltas() -> None:
    deltas = ChatReply().add(parse(chat_parser(), TEXT))
    function = {"name": "f", "arguments": ""}
    assert deltas[:4] == [
        {"reasoning_content": "Which city?"},
        {"content": "Let me see."},
        {"tool_calls": [{"index": 0, "id": "call_0", "type": "function", "function": function}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "Łódź 🎉"}'}}]},
    ]


def test_content_is_null_only_beside_calls_or_thoughts() -> None:
    assert reply_of(parse(chat_parser(), "")).message() == {"role": "assistant", "content": ""}
    assert reply_of(parse(chat_parser(), "<think>hm")).message()["content"] is None
    assert reply_of(parse(chat_parser(None, None), "<think>hm")).message()["content"] == "<think>hm"


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (TEXT, "stop", "tool_calls"),
        (TEXT, "length", "length"),
        (TEXT, "abort", "abort"),
        ("hello", "stop", "stop"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', "length", "length"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', "stop", "stop"),  # nothing that a client could call
        ('<tool_call>{"name": "f", "arguments": {"a": 1}', "stop", "tool_calls"),
    ],
)
def test_finish_reason(text: str, finish: str, reason: str) -> None:
    assert reply_of(parse(chat_parser(), text)).finish_reason(finish) == reason


# ------------------------------------------------------------------ names and guesses


def test_every_name_makes_a_parser() -> None:
    assert {"hermes", "qwen25", "llama3", "mistral", "deepseekv3", "pythonic", "qwen3_coder"} <= set(names().tools)
    for name in names().tools:
        tool_parser(name).feed("x")
    for name in names().reasoning:
        reasoning_parser(name).feed("x")
    with pytest.raises(StartupError, match=r"--tool-call-parser 'nope' is unknown; there are: .*hermes"):
        tool_parser("nope")
    with pytest.raises(StartupError, match="--reasoning-parser"):
        reasoning_parser("nope")


def test_random_ids_differ() -> None:
    assert len({random_id() for _ in range(50)}) == 50
    assert random_id().startswith("call_")


CLOSE = "{{ content.split('</think>')[-1] }}"
GENERATE = "{% if add_generation_prompt %}{{ '<|assistant|>\n"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (
            "{{ '<tool_call>' }}" + CLOSE + GENERATE + "' }}{% if not enable_thinking %}<think></think>",
            ("hermes", "qwen3"),
        ),
        ("{{ '<tool_call>' }}" + CLOSE + GENERATE + "<think>\n' }}{% endif %}", ("hermes", "qwen3-thinking")),
        ("<tool_call>\n<function=example>", ("qwen3_coder", None)),
        ("<tool_call>{{ name }}<arg_key>", (None, None)),
        ("<｜tool▁calls▁begin｜> ```json " + CLOSE + GENERATE + "<think>\n' }}", ("deepseekv3", "deepseek-r1")),
        ("<｜tool▁calls▁begin｜>" + CLOSE + GENERATE + "' }}{% if thinking %}<think>", ("deepseekv31", "deepseek-v3")),
        ("[TOOL_CALLS] [THINK]", ("mistral", "mistral")),
        ("<|START_ACTION|><|START_THINKING|>", ("command-r", "cohere_command3")),
        ("<|python_tag|>", ("llama3", None)),
        ("[func_name1(params_name1=params_value1...)]", ("pythonic", None)),
        ("{{ message.content }}", (None, None)),
    ],
)
def test_guess(template: str, wanted: tuple[str | None, str | None]) -> None:
    assert guess(template) == Guess(*wanted)
    assert set(wanted) <= {None, *names().tools, *names().reasoning}


def test_arguments_are_json() -> None:
    reply = reply_of(parse(chat_parser(), TEXT))
    assert [json.loads(call["function"]["arguments"]) for call in reply.message()["tool_calls"]] == [
        {"city": "Łódź 🎉"},
        {},
    ]
