"""The meaning of tool calls, slowly and plainly: a whole text at once, with regular expressions, json and ast.

The reference for models/tool_parser.py, for texts whose calls are whole, or go wrong before their arguments begin.
"""

import ast
import json
import re
from collections.abc import Callable
from typing import Any, TypeAlias

Calls: TypeAlias = list[tuple[str, Any]]
Region: TypeAlias = Callable[[str, int], tuple[Calls, int]]
"""Reads calls at a place; raises ValueError or LookupError if there are none."""

WORD = r"[\w.:/-]+"
SPACE = re.compile(r"[ \t\n\r]*")


def refuse(word: str) -> None:
    raise ValueError(word)


def after(pattern: str, text: str, at: int, optional: bool = False) -> int:
    match = re.compile(r"[ \t\n\r]*(?:" + pattern + ")").match(text, at)
    if match is None and not optional:
        raise ValueError
    return match.end() if match else at


def value(text: str, at: int) -> tuple[Any, int]:
    decoder = json.JSONDecoder(strict=False, parse_constant=refuse)
    return decoder.raw_decode(text, SPACE.match(text, at).end())  # type: ignore[union-attr]


def call(item: Any, names: tuple[str, ...] = ("name",)) -> tuple[str, Any]:
    name = next(item[key] for key in names if key in item) if isinstance(item, dict) else refuse("")
    arguments = item.get("arguments", item.get("parameters")) or {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError
    return name, arguments


def hermes(text: str, at: int) -> tuple[Calls, int]:
    item, end = value(text, at)
    return [call(item)], after("</tool_call>", text, end, optional=True)


def llama3(text: str, at: int) -> tuple[Calls, int]:
    item, end = value(text, at)
    calls = [call(item)]
    while True:
        try:
            item, behind = value(text, after(";|", text, end))
            calls.append(call(item))
        except (ValueError, StopIteration):
            return calls, end
        end = behind


def array(text: str, at: int) -> tuple[Calls, int]:
    items, end = value(text, at)
    if not isinstance(items, list) or not items:
        raise ValueError
    return [call(item, ("name", "tool_name")) for item in items], end


def mistral(text: str, at: int) -> tuple[Calls, int]:
    head = re.compile(rf"\s*({WORD})\s*(?:\[ARGS\])?\s*(?={{)").match(text, at)
    if head is None:
        return array(text, at)
    arguments, end = value(text, head.end())
    return [(head[1], arguments)], end


def deepseek(head: str, tail: str) -> Region:
    def region(text: str, at: int) -> tuple[Calls, int]:
        calls: Calls = []
        while (begin := re.compile(rf"\s*<｜tool▁call▁begin｜>{head}").match(text, at)) is not None:
            arguments, at = value(text, begin.end())
            at = after(f"{tail}<｜tool▁call▁end｜>", text, at)
            calls.append((begin[1], arguments))
        if not calls:
            raise ValueError
        return calls, after("<｜tool▁calls▁end｜>", text, at, optional=True)

    return region


def command_r(text: str, at: int) -> tuple[Calls, int]:
    calls, end = array(text, at)
    return calls, after(r"<\|END_ACTION\|>|```", text, end, optional=True)


def pythonic(text: str, at: int) -> tuple[Calls, int]:
    for bracket in re.finditer(r"\]", text):
        try:
            tree = ast.parse(text[at : bracket.end()].strip(), mode="eval")
        except (SyntaxError, ValueError):
            continue
        calls = [
            (ast.unparse(node.func), {k.arg: ast.literal_eval(k.value) for k in node.keywords})
            for node in tree.body.elts
        ]  # type: ignore[attr-defined]
        return calls, after(r"<\|python_end\|>", text, bracket.end(), optional=True)
    raise ValueError


def generic(text: str, at: int) -> tuple[Calls, int]:
    if text[at] == "[":
        return array(text, at)
    item, end = value(text, at)
    return [call(item)], end


def xml(text: str, at: int) -> tuple[Calls, int]:
    function = re.compile(r"\s*<function=([^\s<>]+)>(.*?)</function>", re.S).match(text, at)
    if function is None:
        raise ValueError
    found = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", function[2], re.S)
    arguments = {}
    for key, written in found:
        try:
            arguments[key] = json.loads(written, parse_constant=refuse)
        except ValueError:
            arguments[key] = written
    return [(function[1], arguments)], after("</tool_call>", text, function.end(), optional=True)


REGIONS: dict[str, tuple[str, str, Region]] = {
    # name: openers, what may begin the output without one, and the region after either
    "hermes": ("<tool_call>", "", hermes),
    "llama3": (r"<\|python_tag\|>", "{", llama3),
    "mistral": (r"\[TOOL_CALLS\]", "", mistral),
    "deepseekv3": (
        "<｜tool▁calls▁begin｜>",
        "",
        deepseek(rf"function<｜tool▁sep｜>({WORD})\s*```json\s*(?={{)", r"```\s*"),
    ),
    "deepseekv31": ("<｜tool▁calls▁begin｜>", "", deepseek(rf"({WORD})<｜tool▁sep｜>\s*(?={{)", "")),
    "command-r": (r"<\|START_ACTION\|>|Action:\s*```json", "", command_r),
    "pythonic": (r"<\|python_start\|>", "[", pythonic),
    "json": ("(?!)", "{[", generic),
    "qwen3_coder": ("<tool_call>", "", xml),
}


def plain(name: str, text: str) -> tuple[str, Calls]:
    """The content and the calls (name, arguments as values)."""
    openers, bare, region = REGIONS[name]
    opener = re.compile(openers)
    content, calls, at = "", [], 0
    first = SPACE.match(text).end()  # type: ignore[union-attr]
    begin: tuple[int, int] | None = (first, first) if text[first : first + 1] and text[first] in bare else None
    while True:
        if begin is None:
            found = opener.search(text, at)
            if found is None:
                return content + text[at:], calls
            begin = found.span()
        try:
            new, end = region(text, begin[1])
        except (ValueError, LookupError, StopIteration, AttributeError):
            content, at = content + text[at : begin[1]], begin[1]
        else:
            content += text[at : begin[0]].rstrip(" \t\n\r")
            calls += new
            at = SPACE.match(text, end).end()  # type: ignore[union-attr]
        begin = None
