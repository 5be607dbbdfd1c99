"""The JSON-Schema-Test-Suite (draft 2020-12, 383 groups): of what compiles nothing invalid is let through, by tables or
by llguidance, and what is valid but left out is in the list of docs/json_schema.md. Groups of which neither can have
the schema exactly are refused."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from grammars import bytes_vocabulary
from syntax_walk import as_pattern

from actorserve.fsm.errors import GrammarError
from actorserve.fsm.guidance import json_grammar
from actorserve.fsm.json_schema import schema_to_syntax
from actorserve.fsm.matcher import Matchers
from actorserve.fsm.spelling import DEFAULT

FILE = Path(__file__).parent.parent / "data" / "json_schema_test_suite.jsonl"
GROUPS: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text(encoding="utf-8").split("\n")[1:-1]]
"""{"file", "name", "schema", "tests": [[what it is, value, whether it is valid], ...]}; the licence is before them."""
assert len(GROUPS) == 383
TOKENS = [token or b"<end>" for token in bytes_vocabulary()]
EOS = len(TOKENS) - 1
MATCHERS = Matchers(TOKENS, [EOS], [EOS], lambda text: list(text.encode()))

SPELLED_OTHERWISE = {
    "same object with different property order is valid", "float zero is valid", "float one is valid", "[0.0] is valid",
    "[1.0] is valid", "integer -2 is valid", "float is valid", "a float with zero fractional part is an integer",
}  # fmt: skip
"""Another order of members, `1.0` for `1`."""
UNDECLARED = {
    "additional properties are allowed", "allOf", "valid", "both anyOf valid (complex)",
    "doesn't invalidate other properties",
}  # fmt: skip
"""Members that silence would admit."""


def left_out(group: dict[str, Any], name: str, value: Any) -> bool:
    """Whether the documentation says that this valid value is not generated."""
    if group["file"] == "format":
        return "is only an annotation" in name
    if group["file"] in ("const", "enum", "type"):
        return name in SPELLED_OTHERWISE
    return name in UNDECLARED and group["file"] in ("additionalProperties", "allOf", "anyOf", "properties")


def counted(group: dict[str, Any], accepts: Any) -> Counter[str]:
    """What became of the values of a group."""
    found: Counter[str] = Counter()
    for name, value, valid in group["tests"]:
        taken = accepts(json.dumps(value, ensure_ascii=False))
        assert valid or not taken, f"{group['name']}, {name}: {value!r} is let through"
        assert taken or not valid or left_out(group, name, value), f"{group['name']}, {name}: {value!r} is left out"
        found["valid" if valid else "invalid"] += 1
        found["left out"] += valid and not taken
    return found


def has_tables(group: dict[str, Any]) -> bool:
    try:
        schema_to_syntax(group["schema"])
    except GrammarError:
        return False
    return True


def test_tables() -> None:
    found: Counter[str] = Counter()
    for group in filter(has_tables, GROUPS):
        matches = re.compile(as_pattern(schema_to_syntax(group["schema"]))).fullmatch
        found += counted(group, matches) + Counter(groups=1)
    assert found == {"groups": 52, "valid": 73, "invalid": 114, "left out": 10}


def test_llguidance() -> None:
    """What has no tables."""
    found: Counter[str] = Counter()
    for group in GROUPS:
        if has_tables(group):
            continue
        try:
            first = MATCHERS.new(json_grammar(group["schema"], DEFAULT))
        except GrammarError:
            continue

        def accepts(text: str, first: Any = first) -> bool:
            matcher, ids = first.copy()._matcher, list(text.encode())
            return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

        found += counted(group, accepts) + Counter(groups=1)
    assert found["groups"] >= 116 and found["invalid"] >= 114 and found["left out"] <= 16, found


@pytest.mark.parametrize("group", [g for g in GROUPS if g["file"] == "not"], ids=lambda g: g["name"])
def test_what_neither_has_is_refused(group: dict[str, Any]) -> None:
    with pytest.raises(GrammarError):
        schema_to_syntax(group["schema"])
    with pytest.raises(GrammarError):
        json_grammar(group["schema"], DEFAULT)
