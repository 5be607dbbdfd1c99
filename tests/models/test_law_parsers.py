"""The law of tool calls: for every cutting of a text the joined events are those of the whole; no text is lost.

And what they mean is what a plain reference reads.
"""

import json
from typing import Any

from chat_texts import counter, cuts, cuttings, run, texts, trials, valid_texts
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plain_tool_parser import plain
from tool_calls import calls_of, content_of, each_family, parser

from actorserve.models.parse_events import parse
from actorserve.models.tool_families import TOOL_FAMILIES
from actorserve.models.tool_parser import ToolParser


@each_family
@trials(80)
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
@trials(60)
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
@trials(30)
@given(text=st.text(alphabet="ab1 \n.,<[{🎉", max_size=40))
def test_text_without_calls_is_content(name: str, text: str) -> None:
    assert content_of(parse(parser(name), text)) == text


@each_family
@trials(30)
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


# ------------------------------------------------------------------ the meaning, by a plain reference

words = st.sampled_from(["So", " then", "\n", " ", "[1]", "{", "é", " <b>", ";", "``", "f(a)"])
prose = st.lists(words, max_size=4).map("".join)
keys = st.sampled_from(["a", "b_1", "c"])
strings = st.one_of(
    st.text(alphabet='ab "\\\n\t{}é🎉', max_size=6),
    st.sampled_from(["</tool_call>", "[TOOL_CALLS]", '"}]', "it's", "\\", "```", "\n"]),
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
@trials(50)
@given(data=st.data())
def test_meaning(name: str, data: st.DataObject) -> None:
    """Calls with prose around them, and markup that leads nowhere, mean what the plain reference reads."""
    # No name has a "!": `[TOOL_CALLS]. {` is a call of "." that was cut, of which the reference knows nothing.
    opener = st.sampled_from([*TOOL_FAMILIES[name].openers, ""]).map(lambda opener: opener and f" {opener}! ")
    parts = data.draw(st.lists(st.one_of(prose, opener, written(name)), min_size=1, max_size=4))
    text = "".join(parts)
    content, calls = plain(name, text)
    events = parse(parser(name), text)
    assert content_of(events) == content
    found = calls_of(events)
    assert [(function, json.loads(arguments)) for function, arguments, _ in found] == calls
    assert all(complete for _, _, complete in found)
