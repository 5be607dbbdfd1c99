"""Tool calls: for every cutting of a text the stream's events join to those of the whole; nothing is lost or doubled."""

import json
from itertools import permutations
from typing import Any

import pytest
from chat_texts import counter, cuts, cuttings, run, texts, valid_texts
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plain_tool_parser import plain

from actorserve.models.parse_events import CallArguments, CallEnd, CallStart, Content, Event, parse
from actorserve.models.tool_families import END, TOOL_FAMILIES
from actorserve.models.tool_parser import ToolParser

NAMES = ("hermes", "llama3", "mistral", "deepseekv3", "deepseekv31", "command-r", "pythonic", "json", "qwen3_coder")
each_family = pytest.mark.parametrize("name", NAMES)


def parser(name: str, known: Any = None) -> ToolParser:
    return ToolParser(TOOL_FAMILIES[name], counter(), known)


def calls_of(events: list[Event]) -> list[tuple[str, str, bool]]:
    """(name, arguments, complete) of each call; checks that the events of a call are in order."""
    calls: list[tuple[str, str, bool]] = []
    opened: int | None = None
    for event in events:
        match event:
            case CallStart(index, call_id, name):
                assert opened is None and index == len(calls) and call_id == f"call_{index}"
                opened = index
                calls.append((name, "", False))
            case CallArguments(index, text):
                assert opened == index and text
                calls[index] = (calls[index][0], calls[index][1] + text, False)
            case CallEnd(index, complete):
                assert opened == index
                calls[index] = (*calls[index][:2], complete)
                opened = None
            case _:
                assert opened is None
    assert opened is None
    return calls


def content_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


# ------------------------------------------------------------------ the law


@each_family
@given(data=st.data(), places=cuts, known=st.sampled_from([None, {"f": {}}]))
def test_any_cutting_equals_the_whole(name: str, data: st.DataObject, places: list[int], known: Any) -> None:
    family = TOOL_FAMILIES[name]
    text = data.draw(texts(family.markers, valid_texts(name, family)))
    whole = parse(parser(name, known), text)
    for chunks in cuttings(text, places):
        assert run(parser(name, known), chunks) == whole
    for function, arguments, complete in calls_of(whole):
        assert function in (known or [function])
        if complete:
            assert isinstance(json.loads(arguments), dict)


@each_family
@given(data=st.data(), at=st.integers(0, 300))
def test_no_text_is_lost_or_doubled(name: str, data: st.DataObject, at: int) -> None:
    """A character that is in no markup comes out once, wherever it stands."""
    family = TOOL_FAMILIES[name]  # but in keys that are left out: so here none are
    family = replace(family, keys=replace(family.keys, lone=True, extras=()))
    text = data.draw(texts(family.markers - {"[CALL_ID]"}, valid_texts(name, family)))
    text = text[:at] + "Ω" + text[at:]
    events = parse(ToolParser(family, counter()), text)
    shown = content_of(events) + "".join(function + arguments for function, arguments, _ in calls_of(events))
    assert shown.count("Ω") == 1


@each_family
@given(text=st.text(alphabet="ab1 \n.,<[{🎉", max_size=40))
def test_text_without_calls_is_content(name: str, text: str) -> None:
    assert content_of(parse(parser(name), text)) == text


@each_family
@given(data=st.data())
def test_holds_back_only_what_may_be_markup(name: str, data: st.DataObject) -> None:
    """After a letter in prose nothing is held."""
    family = TOOL_FAMILIES[name]
    text = (
        "So "
        + data.draw(st.lists(st.sampled_from([*family.markers, "a ", "\n"]), max_size=5).map(" q ".join))
        + " zz yy"
    )
    machine = parser(name)
    shown = content_of(machine.feed(text))
    assert shown.endswith("zz yy") and machine.finish() == []


# ------------------------------------------------------------------ each family's forms


@each_family
def test_valid_texts(name: str) -> None:
    for text in valid_texts(name, TOOL_FAMILIES[name]):
        events = parse(parser(name), f"{text}\n")
        calls = calls_of(events)
        assert [call[0] for call in calls] == ["f", "g"][: len(calls)]
        assert calls and all(complete for _, _, complete in calls)
        assert content_of(events) in ("", "Hm.", "Plan.")


def check(name: str, text: str, content: str, *calls: tuple[str, str, bool], known: Any = None) -> None:
    for chunks in cuttings(text, []):
        events = run(parser(name, known), chunks)
        assert (content_of(events), calls_of(events)) == (content, list(calls))


def test_arguments_are_as_the_model_wrote_them() -> None:
    written = '{ "a" :1.50,\n "b":"\\u00e9\\/" , "c": [ ] }'
    check("hermes", f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>', "", ("f", written, True))


def test_raw_line_ends_in_strings_are_escaped() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a":\n"x\ny"}}</tool_call>'
    check("hermes", text, "", ("f", '{"a":\n"x\\ny"}', True))


def test_arguments_before_the_name_in_a_string_or_missing() -> None:
    text = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
    check("hermes", text, "", ("f", '{"a": 1}', True))
    text = r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\\n\"}"}</tool_call>'
    check("hermes", text, "", ("f", r'{"a": "\n"}', True))
    check("hermes", '<tool_call>{"arguments": "{}", "name": "f"}</tool_call>', "", ("f", "{}", True))
    check("hermes", '<tool_call>{"name": "f"}</tool_call>', "", ("f", "{}", True))
    check("hermes", '<tool_call>{"name": "f", "arguments": null, "why": [1]}</tool_call>', "", ("f", "{}", True))


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "f",
        "{}",
        "[]",
        '{"name": 1}',
        '{"name": ""}',
        '{"name": "a\\nb"}',
        '{"name": "\\ud800"}',
        '{"name": "f", "arguments": 1}',
        '{"name": "f", "arguments": "1"}',
        '{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}',
        '{"name": "f", "name": "g"}',
        '{"name": "f",}',
        "{'name': 'f'}",
        '{"arguments": {"a": 01}, "name": "f"}',
        '{"arguments": {"a": NaN}, "name": "f"}',
        '{"arguments": {}, "arguments": {}, "name": "f"}',
        '{"x": ' + "[" * 200 + "]" * 200 + ', "name": "f"}',
    ],
)
def test_malformed_before_the_start_is_content(inner: str) -> None:
    text = f"a\n<tool_call>{inner}</tool_call> b"
    check("hermes", text, text)
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    check("hermes", f"{text}{good}", text, ("g", "{}", True))


def test_broken_after_the_start_ends_the_call() -> None:
    head = '<tool_call>{"name": "f", "arguments": {"a": '
    check("hermes", head + "tru} }", "} }", ("f", '{"a": tru', False))
    check("hermes", head + '"x', "", ("f", '{"a": "x', False))  # the text ended
    check("hermes", head + "1}", "", ("f", '{"a": 1}', True))  # after the arguments: the call can be made
    check("hermes", head + '1}, "x": oops', ', "x": oops', ("f", '{"a": 1}', True))
    check("hermes", head + "1}} then", "then", ("f", '{"a": 1}', True))
    inner = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    check("hermes", head + inner, "", ("f", '{"a": ', False), ("g", "{}", True))


def test_whitespace_next_to_calls_is_markup() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    one = ("f", "{}", True)
    check("hermes", f" a \n{call}\n\n{call} \n b\n", " a" + "b\n", one, one)
    check("hermes", f" \n{call}\n", "", one)
    check("hermes", "a \n", "a \n")
    check("hermes", "a \n<tool_call> \n", "a \n<tool_call> \n")


def test_unknown_functions() -> None:
    text = '<tool_call>{"name": "h", "arguments": {}}</tool_call>'
    check("hermes", text, "", ("h", "{}", True))
    check("hermes", text, text, known={"f": {}})
    check("pythonic", "[f(), h()]", "[f(), h()]", known={"f": {}})
    check("mistral", "[TOOL_CALLS]h[ARGS]{}", "[TOOL_CALLS]h[ARGS]{}", known={"f": {}})


def test_llama3() -> None:
    f, g = '{"name": "f", "parameters": {}}', '{"name": "g", "arguments": {"a": 1}}'
    check("llama3", f" {f} ; {g}\n{f}", "", ("f", "{}", True), ("g", '{"a": 1}', True), ("f", "{}", True))
    check("llama3", f"{f}; and", "; and", ("f", "{}", True))
    check("llama3", f"I say {f}", f"I say {f}")
    check("llama3", f"I say <|python_tag|>{f}", "I say", ("f", "{}", True))
    check("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}')
    check("llama3", '{"name": "Bob"}', '{"name": "Bob"}')


def test_mistral_call_ids_are_left_out() -> None:
    check("mistral", 'a [TOOL_CALLS]f[CALL_ID]x1[ARGS]{"a": 1}', "a", ("f", '{"a": 1}', True))


def test_a_json_answer_is_shown_at_its_first_other_key() -> None:
    machine = parser("json")
    assert machine.feed('{"na') == []
    assert machine.feed('me": "f", "age":') == []
    assert machine.feed(" ") == []
    assert machine.feed("3") == [Content('{"name": "f", "age": 3')]


def test_pythonic_values() -> None:
    text = """[a.b(x=[1, -2.5, (True, None)], y={"k": 'it\\'s'}, z="é" "\\d")]"""
    check("pythonic", text, "", ("a.b", '{"x": [1, -2.5, [true, null]], "y": {"k": "it\'s"}, "z": "é\\\\d"}', True))


@pytest.mark.parametrize(
    "source",
    [
        "[f(1)]",
        "[f(a=g())]",
        "[f(a=b)]",
        "[f(a=1+1)]",
        "[f(a=1, a=2)]",
        "[f(**{})]",
        "[f(a={1: 2})]",
        "[f(a={*[]})]",
        "[f(a=1e999)]",
        "[f(a=b'x')]",
        "[f(a=f'{b}')]",
        "[f(a=1j)]",
        "[f(a=...)]",
        "[f()(a=1)]",
        "[f(a=1), 2]",
        "[f(a=1}]",
        "[f(a=1).x]",
        "[f(a=0x" + "f" * 9000 + ")]",
        "[f(a=" + "[" * 90 + "]" * 90 + ")]",
        "[f(a=" + "-" * 50_000 + "1)]",
        "[f(a=1" + "-1" * 50_000 + ")]",
        "[" + "f" * 300 + "()]",
        "[link](url)",
    ],
)
def test_python_that_is_no_list_of_calls_with_literals(source: str) -> None:
    events = parse(parser("pythonic"), source)
    assert events == [Content(source)]


def test_xml_values_by_schema() -> None:
    properties = {"s": {"type": "string"}, "n": {"type": ["string", "null"]}, "i": {"type": "integer"}}
    text = "<function=f>" + "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n"
        for key, value in [("s", "1"), ("n", "null"), ("i", "1"), ("j", "NaN"), ("k", "True"), ("l", '["\\ud800"]')]
    )
    arguments = '{"s": "1", "n": null, "i": 1, "j": "NaN", "k": true, "l": ["\\ud800"]}'
    check("qwen3_coder", f"{text}</function>", "", ("f", arguments, True), known={"f": {"properties": properties}})


def test_xml_parameters_come_one_by_one() -> None:
    machine = parser("qwen3_coder")
    assert machine.feed("<tool_call>\n<function=f>\n<para") == []
    assert machine.feed("meter=a>x</parameter>") == [CallStart(0, "call_0", "f"), CallArguments(0, '{"a": "x"')]
    assert machine.feed("\n<parameter=b>half") == []
    assert machine.finish() == [CallEnd(0, False), Content("\n<parameter=b>half")]


# ------------------------------------------------------------------ what the tables promise


@each_family
def test_tables(name: str) -> None:
    family = TOOL_FAMILIES[name]
    assert all(a not in b for a, b in permutations(family.openers, 2))
    for state in family.states.values():
        assert all(not a.startswith(b) for (a, _), (b, _) in permutations(state.literals, 2))
        targets = {then for _, then in state.literals} | ({state.then} if state.reader else set())
        assert targets <= {END, *family.states}
    assert {*family.openers.values(), *family.bare.values()} <= set(family.states)


# ------------------------------------------------------------------ the meaning, by a plain reference

words = st.sampled_from(["So", " then", "\n", " ", "[1]", "{", "é", " <b>", ";", "``", "f(a)"])
prose = st.lists(words, max_size=4).map("".join)
keys = st.sampled_from(["a", "b_1", "c"])
strings = st.one_of(
    st.text(max_size=6), st.sampled_from(["</tool_call>", "[TOOL_CALLS]", '"}]', "it's", "\\", "```", "\n"])
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 999), st.sampled_from([0.5, -1e-7]), strings)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(keys, inner, max_size=2)),
    max_leaves=4,
)
arguments_of = st.dictionaries(keys, values, max_size=3)
functions = st.sampled_from(["f", "get_weather", "a.b"])


@st.composite
def written(draw: st.DrawFn, name: str) -> str:
    """One region of calls in a family's form, with whitespace as models vary it."""
    calls = draw(st.lists(st.tuples(functions, arguments_of), min_size=1, max_size=3))
    indent = draw(st.sampled_from([None, 2]))
    space = draw(st.sampled_from(["", " ", "\n"]))

    def dump(value: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=draw(st.booleans()))

    def objects(key: str = "name", parameters: str = "arguments") -> list[Any]:
        return [{key: f, parameters: a} for f, a in calls]

    bar = "<｜tool▁"
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>{space}{dump(item)}{space}</tool_call>" for item in objects())
        case "llama3":
            return draw(st.sampled_from(["<|python_tag|>", "", space])) + f"{space};{space}".join(
                map(dump, objects(parameters="parameters"))
            )
        case "mistral":
            if draw(st.booleans()):
                return f"[TOOL_CALLS]{space}{dump(objects())}"
            return "".join(f"[TOOL_CALLS]{f}{draw(st.sampled_from(['[ARGS]', '']))}{dump(a)}" for f, a in calls)
        case "deepseekv3":
            each = [
                f"{bar}call▁begin｜>function{bar}sep｜>{f}\n```json\n{dump(a)}\n```{bar}call▁end｜>" for f, a in calls
            ]
            return f"{bar}calls▁begin｜>{space.join(each)}{bar}calls▁end｜>"
        case "deepseekv31":
            each = [f"{bar}call▁begin｜>{f}{bar}sep｜>{dump(a)}{bar}call▁end｜>" for f, a in calls]
            return f"{bar}calls▁begin｜>{space.join(each)}{bar}calls▁end｜>"
        case "command-r":
            begin, end = draw(st.sampled_from([("Action: ```json\n", "\n```"), ("<|START_ACTION|>", "<|END_ACTION|>")]))
            return begin + dump(objects("tool_name", "parameters")) + end
        case "pythonic":
            each = [f"{f}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for f, a in calls]
            begin, end = draw(st.sampled_from([("", ""), ("<|python_start|>", "<|python_end|>")]))
            return f"{begin}[{f',{space}'.join(each)}]{end}"
        case "json":
            return dump(objects() if draw(st.booleans()) else objects()[0])
    each = []
    for f, a in calls:
        inner = "".join(f"<parameter={key}>\n{dump(value)}\n</parameter>\n" for key, value in a.items())
        each.append(f"<tool_call>{space}<function={f}>\n{inner}</function>{space}</tool_call>")
    return "\n".join(each)


@each_family
@given(data=st.data())
def test_meaning(name: str, data: st.DataObject) -> None:
    """Calls with prose around them, and markup that leads nowhere, mean what the plain reference reads."""
    opener = st.sampled_from([*TOOL_FAMILIES[name].openers, ""]).map(lambda opener: opener and f" {opener}. ")
    parts = data.draw(st.lists(st.one_of(prose, opener, written(name)), min_size=1, max_size=4))
    text = "".join(parts)
    content, calls = plain(name, text)
    events = parse(parser(name), text)
    assert content_of(events) == content
    found = calls_of(events)
    assert [(function, json.loads(arguments)) for function, arguments, _ in found] == calls
    assert all(complete for _, _, complete in found)
