"""Texts that a model may write, and ways to cut them into chunks, for the tests of the parsers of chat output."""

import itertools
import re
from collections.abc import Callable
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from actorserve.models.parse_events import Event, Parser, joined
from actorserve.models.tool_families import ToolFamily

TOKEN = re.compile(r" ?[A-Za-z]{1,5}|\d| ?[^\sA-Za-z\d]{1,3}|\s+")
"""About what a BPE token of SmolLM2 spans."""

FRAGMENTS = (
    *'{}[]",;:\\<>()=`|.',
    *("\n", " ", "\n\n", "x", "f", "Action", "function", "```json", "```", "true", "nul", "-1.5e3", "0", "é🎉"),
    *('{"', '"}', "}}", '"name"', '"arguments"', '"parameters": ', '"f"', ": ", ", ", '\\"', "\\u00e9", "[]", "{}"),
    *(
        '{"name": "f", "arguments": {"a": 1}}',
        '{"parameters": {"b": [null, "]}"]}, "name": "g"}',
        '{"a": {"b": "x\ny"}}',
    ),
    *('{"tool_name": "f", "parameters": {}}', '{"name": "f", "arguments": "{\\"a\\": 2}"}', '[{"name": "h"}]'),
    *(
        '[f(a=1, b="x]")',
        "]",
        "[f(), g(x=-2.5)]",
        "f(a={'k': [1, (2,)]})",
        "f>",
        "a>1",
        "<parameter=a>\n1\n</parameter>",
    ),
)


def trials(count: int) -> settings:
    """That many random texts; how long they take decides nothing."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def counter() -> Callable[[], str]:
    ids = itertools.count()
    return lambda: f"call_{next(ids)}"


def texts(markers: frozenset[str], valid: tuple[str, ...] = ()) -> st.SearchStrategy[str]:
    """Markup, whole and cut off, JSON, Python and prose in any order; and texts that are valid but for one place."""
    marks = sorted(markers) or ["<think>"]
    cut = st.sampled_from(marks).flatmap(lambda mark: st.integers(1, len(mark)).map(lambda n: mark[:n]))
    piece = st.one_of(
        st.sampled_from(marks), st.sampled_from(FRAGMENTS), cut, *([st.sampled_from(valid)] if valid else [])
    )
    mixed = st.lists(piece, max_size=14).map("".join)
    if not valid:
        return mixed
    place = st.integers(0, max(map(len, valid)))
    harmed = st.builds(
        lambda text, at, drop, extra: text[:at] + extra + text[at + drop :],
        st.lists(st.sampled_from(valid), min_size=1, max_size=3).map("\n".join),
        place,
        st.sampled_from([0, 0, 1, 3, 1000]),
        piece,
    )
    return st.one_of(mixed, harmed)


cuts = st.lists(st.integers(0, 400), max_size=20)


def cut_at(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def run(parser: Parser, chunks: list[str]) -> list[Event]:
    return joined([event for chunk in chunks for event in parser.feed(chunk)] + parser.finish())


def cuttings(text: str, places: list[int]) -> list[list[str]]:
    """The given one, one character at a time, and tokens."""
    tokens = [text[a:b] for a, b in pairwise([*(match.start() for match in TOKEN.finditer(text)), len(text)])]
    assert "".join(tokens) == text
    return [cut_at(text, places), list(text), tokens]


def valid_texts(name: str, family: ToolFamily) -> tuple[str, ...]:
    """A text with calls in each of the family's forms."""
    begin, call, sep, end, finish = (
        f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
    )
    forms = {
        "hermes": ('<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>',),
        "llama3": (
            '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
            '<|python_tag|>{"name": "f", "parameters": {"a": [true]}}',
        ),
        "mistral": (
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]',
            '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": {}}',
        ),
        "deepseekv3": (
            f'Hm.\n{begin}{call}function{sep}f\n```json\n{{"a": 1}}\n```{end}\n'
            f"{call}function{sep}g\n```json\n{{}}\n```{end}{finish}",
        ),
        "deepseekv31": (f'Hm.{begin}{call}f{sep}{{"a": "x"}}{end}{call}g{sep}{{}}{end}{finish}',),
        "command-r": (
            'Plan.\nAction: ```json\n[\n    {"tool_name": "f", "parameters": {"a": 1}}\n]\n```',
            '<|START_ACTION|>[{"tool_name": "f", "parameters": {}},{"tool_name": "g", "parameters": {}}]<|END_ACTION|>',
        ),
        "pythonic": ('[f(a=1, b="it\'s ]"), g()]', "<|python_start|>[f(a={'k': None})]<|python_end|>"),
        "json": (
            '{"name": "f", "arguments": {"a": 1}}',
            '[{"name": "f", "parameters": {}}, {"name": "g", "arguments": {}}]',
        ),
        "qwen3_coder": (
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n<x>\n</parameter>\n</function>\n</tool_call>",
        ),
    }
    return forms[name]
