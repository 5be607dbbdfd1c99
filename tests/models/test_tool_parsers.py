"""Tool calls, family by family: valid forms, malformed ones, and what the tables promise."""

from itertools import permutations
from typing import Any

import pytest
from chat_texts import cuttings, run, valid_texts
from tool_calls import calls_of, content_of, each_family, parser

from actorserve.models.parse_events import CallArguments, CallEnd, CallStart, Content, parse
from actorserve.models.tool_families import END, TOOL_FAMILIES


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


def test_a_short_xml_parameter_after_a_long_one() -> None:
    chunks = ["<function=f><parameter=a>" + "x" * 50, "</parameter><parameter=b>1</parameter></function>"]
    assert calls_of(run(parser("qwen3_coder"), chunks)) == [("f", f'{{"a": "{"x" * 50}", "b": 1}}', True)]


def test_a_list_that_does_not_become_calls_is_not_held_for_long() -> None:
    assert parser("pythonic").feed("[" + "f" * 300) == [Content("[" + "f" * 300)]


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
