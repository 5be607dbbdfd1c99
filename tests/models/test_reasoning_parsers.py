"""Reasoning: the law over all families, no text lost, and a plain reading of whole texts."""

import re

import pytest
from chat_texts import cuts, cuttings, run, texts, trials
from hypothesis import given
from hypothesis import strategies as st

from actorserve.models.parse_events import SPACE, Content, Event, Reasoning, ReasoningEnd, parse
from actorserve.models.reasoning_parser import (
    REASONING_FAMILIES,
    ReasoningFamily,
    ReasoningParser,
    opens_reasoning,
)

NAMES = "deepseek-r1 deepseek-v3 qwen3 mistral granite gemma4 hunyuan_a13b ernie45 cohere_command3".split()
each_family = pytest.mark.parametrize("name", NAMES)


def parts(events: list[Event]) -> tuple[str, str]:
    """(reasoning, content); checks that thoughts come first and end once."""
    order = [type(event) for event in events]
    assert order in [
        wanted[:n]
        for wanted in ([Reasoning, ReasoningEnd, Content], [Content])
        for n in range(len(wanted) + 1)
        if n != 1
    ] + [[Content]]
    shown = {Reasoning: "", Content: ""} | {type(event): event.text for event in events if hasattr(event, "text")}
    return shown[Reasoning], shown[Content]


def plain(family: ReasoningFamily, opened: bool, text: str) -> tuple[str, str]:
    """The slow reference: the whole text by one regular expression, then the tags around the answer taken out."""
    space = rf"[{SPACE}]*"
    opens, closes, interrupts, dropped = (
        "|".join(map(re.escape, tags)) or "(?!)"
        for tags in (family.opens, family.closes, family.interrupts, family.dropped)
    )
    begin = rf"{space}(?:(?:{opens}){space})?" if opened else rf"{space}(?:{opens}){space}"
    end = rf"(?:{space}(?:{closes}){space}|{space}(?={interrupts})|\Z)"
    match = re.match(rf"{begin}(.*?){end}(.*)\Z", text, re.DOTALL)
    thoughts, answer = match.groups() if match else ("", text)
    return thoughts, re.sub(rf"{space}(?:(?:{dropped}){space})+", "", answer)


@each_family
@trials(100)
@given(data=st.data(), places=cuts, opened=st.booleans(), stream=st.booleans())
def test_any_cutting_equals_the_whole(
    name: str, data: st.DataObject, places: list[int], opened: bool, stream: bool
) -> None:
    family = REASONING_FAMILIES[name]
    text = data.draw(texts(family.markers, (f"{family.opens[0]}\nhm\n{family.closes[0]}\n\nyes",)))
    whole = parse(ReasoningParser(family, opened), text)
    for chunks in cuttings(text, places):
        assert run(ReasoningParser(family, opened, stream), chunks) == whole
    assert parts(whole) == plain(family, opened, text)


@each_family
@trials(30)
@given(data=st.data(), at=st.integers(0, 100))
def test_no_text_is_lost_or_doubled(name: str, data: st.DataObject, at: int) -> None:
    family = REASONING_FAMILIES[name]
    text = data.draw(texts(family.markers))
    thoughts, content = parts(parse(ReasoningParser(family), text[:at] + "Ω" + text[at:]))
    assert (thoughts + content).count("Ω") == 1


def test_no_tag_contains_another() -> None:
    for family in REASONING_FAMILIES.values():
        for tags in (family.closes + family.interrupts, family.dropped):
            assert all(a == b or a not in b for a in tags for b in tags)


@pytest.mark.parametrize(
    ("name", "text", "thoughts", "content"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\nyes\n", "hm", "yes\n"),
        ("qwen3", "<think>\n\n</think>\n\nyes", "", "yes"),
        ("qwen3", "yes <think>no</think>", "", "yes <think>no</think>"),
        ("qwen3", "<think>a <tool_call>b", "a", "<tool_call>b"),
        ("qwen3", " yes", "", " yes"),
        ("deepseek-r1", "hm</think>yes", "hm", "yes"),
        ("deepseek-r1", "\n<think>hm</think>yes</think>", "hm", "yes</think>"),
        ("deepseek-r1", "hm \n", "hm \n", ""),
        ("deepseek-r1", "a <think> b</think>c", "a <think> b", "c"),
        ("deepseek-r1", "", "", ""),
        ("granite", "Here's my thought process: hm Here is my response: yes", "hm", "yes"),
        ("hunyuan_a13b", "<think>\nhm\n</think>\n<answer>\nyes\n</answer>", "hm", "yes"),
        ("cohere_command3", "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>", "hm", "yes"),
    ],
)
def test_examples(name: str, text: str, thoughts: str, content: str) -> None:
    for chunks in cuttings(text, []):
        assert parts(run(ReasoningParser(REASONING_FAMILIES[name]), chunks)) == (thoughts, content)


def test_streams_at_once_or_all_together() -> None:
    chunks = ["<think>a", " b", " </thi", "nk> c", "d"]
    streamed, together = (
        ReasoningParser(REASONING_FAMILIES["qwen3"]),
        ReasoningParser(REASONING_FAMILIES["qwen3"], None, False),
    )
    assert [streamed.feed(chunk) for chunk in chunks] == [
        [Reasoning("a")],
        [Reasoning(" b")],
        [],
        [ReasoningEnd(), Content("c")],
        [Content("d")],
    ]
    assert [together.feed(chunk) for chunk in chunks][3] == [Reasoning("a b"), ReasoningEnd(), Content("c")]


def test_holds_back_only_what_may_become_a_tag() -> None:
    assert ReasoningParser(REASONING_FAMILIES["qwen3"]).feed("<tx") == [Content("<tx")]
    assert ReasoningParser(REASONING_FAMILIES["deepseek-r1"]).feed("a </thing") == [Reasoning("a </thing")]


def test_prompts_that_open_reasoning() -> None:
    family = REASONING_FAMILIES["qwen3"]
    assert opens_reasoning(family.opens, "<|assistant|>\n<think>\n")
    assert not opens_reasoning(family.opens, "<|assistant|>\n<think>\n\n</think>\n\n")
