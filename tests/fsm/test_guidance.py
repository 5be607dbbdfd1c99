"""What llguidance's matchers are given, and what they let through: all of it, on random walks too, was asked for."""

import ast
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammars import PATTERNS, bytes_vocabulary, longest_first

from actorserve.fsm.errors import EmptyLanguage, GrammarError, MatcherError, NotRegular
from actorserve.fsm.gbnf import parse_gbnf, rules_to_lark, rules_to_syntax
from actorserve.fsm.guidance import ebnf_grammar, grammar_of, json_grammar
from actorserve.fsm.matcher import Matcher, Matchers
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.shapes import SchemaError, Unsupported
from actorserve.fsm.structural_tag import tag_grammar

WORDS = ('{"', '": ', '", "', '"}', "true", "null", '"value"', "next", "Hello", " the", "日本", "<f", '="', "(1", "))")
TOKENS = bytes_vocabulary(*WORDS, "<|tool|>")
EOS, TOOL = len(TOKENS) - 1, len(TOKENS) - 2
ENCODE = longest_first([None if i == TOOL else token for i, token in enumerate(TOKENS)])
MATCHERS = Matchers([token or b"<end>" for token in TOKENS], [TOOL, EOS], [EOS], ENCODE)


def allowed(matcher: Matcher) -> np.ndarray:
    """The tokens that may come next."""
    mask = np.zeros(MATCHERS.words, np.int32)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def accepts(grammar: str, text: str, ids: list[int] | None = None) -> bool:
    """Whether a text is let through, and may end there."""
    matcher = MATCHERS.new(grammar)
    for token in ENCODE(text) if ids is None else ids:
        if token not in allowed(matcher):
            return False
        matcher.consume([token])
    return EOS in allowed(matcher)


def walk(grammar: str, rng: random.Random, closing: str = '"]})', most: int = 400) -> str | None:
    """A random text that ends, None if it does not soon."""
    matcher, data = MATCHERS.new(grammar), b""
    for _ in range(most):
        choices = allowed(matcher).tolist()
        assert TOOL not in choices
        if EOS in choices and rng.random() < 0.5:
            return data.decode()
        ends = [t for t in choices if TOKENS[t] in [c.encode() for c in closing]]
        token = rng.choice(ends if ends and rng.random() < 0.6 else choices)
        if token == EOS:
            return data.decode()
        matcher.consume([token])
        data += TOKENS[token] or b""
    return None


LIST = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                       "required": ["kids"]}},
    "$ref": "#/$defs/node",
}  # fmt: skip
HAS_A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HAS_B = {"type": "object", "properties": {"b": {"$ref": "#"}}, "required": ["b"]}
MAY_HAVE_B = {"type": "object", "properties": {"b": {"type": "integer"}}}
SCHEMAS: list[Any] = [
    LIST, TREE, True, {"type": "object"}, {"type": "object", "additionalProperties": {"type": "array"}},
    {"type": "object", "patternProperties": {"^x": {"type": "boolean"}}, "additionalProperties": False},
    {"allOf": [{"properties": {"a": {}}, "required": ["a"]}, {"type": "object"}]},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:40])
def test_every_walk_validates(schema: Any) -> None:
    grammar, rng, ended = json_grammar(schema), random.Random(1), 0
    for _ in range(12):
        text = walk(grammar, rng)
        if text is None:
            continue
        ended += 1
        value = json.loads(text)
        jsonschema.validate(value, schema)
        assert not re.search(r'^\s|\s$|\n|\t|  |[\[{] | [\]}]| ,|" :', re.sub(r'"[^"]*"', '""', text)), "one spelling"
    assert ended >= 4


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (LIST, '{"value": 1, "next": {"value": -2, "next": null}}', True),
        (LIST, '{"value":1, "next": null}', False),
        (LIST, '{"value": 1,  "next": null}', False),
        (LIST, '{"value": 1, "next": null, "more": 1}', False),  # not declared: as json_schema.py leaves it out
        ({**LIST, "additionalProperties": True}, '{"value": 1, "next": null, "more": 1}', True),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '{"a": 1, "b": 2}', True),
        ({"type": "object", "x-guidance": {"whitespace_flexible": True}}, '{ "a": 1}', False),
        ({"type": "object", "x-guidance": {"whitespace_pattern": " *"}}, '{ "a": 1}', False),
        (True, '[{}, "日本", null, 1.5e3]', True),
        ({"uniqueItems": False, "minContains": 2, "then": False, "propertyNames": True}, '[1, 1, {"a": {}}]', True),
        ({"items": {"type": "integer", "minimum": 2**53 + 1}}, f"[{2**53}]", False),
        ({"items": {"type": "integer", "minimum": 2**53 + 1}}, f"[{2**53 + 2}]", True),
        ({"items": {"type": "integer", "maximum": 2**53 + 3}}, f"[{2**53 + 4}]", False),
        ({"items": {"type": "integer", "maximum": 10**20}}, "[10]", True),
        ({"default": 2**64}, "[10]", True),
        ({"items": {"$ref": "#/$defs/a~1b%25"}, "$defs": {"a/b%": {"type": "array"}}}, "[[10]]", True),
        ({"items": {"enum": [2**53, "a"]}}, f"[{2**53}]", True),
        ({"items": {"format": "date"}}, '["2024-02-29", 5]', True),
        ({"items": {"format": "date"}}, '["0000-01-01"]', False),
        ({"items": {"format": "date-time"}}, '["2024-02-29T23:59:60Z"]', False),
        ({"items": {"format": "date", "pattern": "^2"}}, '["2024-02-29"]', True),
        ({"items": {"format": "date", "pattern": "^2"}}, '["1999-02-28"]', False),
        ({"items": {"format": "date", "pattern": "^2"}}, '["2024-02-30"]', False),
        ({"items": {"format": "int32"}}, '["a", 1]', True),  # nobody defined it
        ({"oneOf": [HAS_A, HAS_B]}, '{"b": {"a": 1}}', True),
        ({"oneOf": [HAS_A, HAS_B]}, '{"a": 1, "b": {"a": 1}}', False),
        ({"type": ["array"], "items": {"pattern": r"^a.$|b\d"}}, '["ab", "xb3x"]', True),
        ({"type": ["array"], "items": {"pattern": r"^a.$|b\d"}}, '["a\u2028"]', False),
    ],
)
def test_the_spelling(schema: Any, text: str, fits: bool) -> None:
    assert accepts(json_grammar(schema), text) is fits


@pytest.mark.parametrize(
    ("schema", "error", "pointer"),
    [
        ({"type": "object", "properties": {"a": {"maxLenght": 3}}}, Unsupported, "/properties/a/maxLenght"),
        ({"$defs": {"a": {"pattern": "(?=a)"}}, "items": {"$ref": "#/$defs/a"}}, Unsupported, "/$defs/a/pattern"),
        ({"items": {"uniqueItems": True}}, Unsupported, "/items/uniqueItems"),
        ({"anyOf": [True, {"if": {"type": "null"}}]}, Unsupported, "/anyOf/1/if"),
        ({"items": {"minProperties": 2}}, Unsupported, "/items/minProperties"),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, Unsupported, "/exclusiveMinimum"),
        ({"items": {"const": {"a": [2**53 + 1]}}}, Unsupported, "/items/const/a/0"),
        ({"items": {"enum": [1, 1e20]}}, Unsupported, "/items/enum/1"),  # as an integer it would become 2**63 - 1
        ({"items": {"enum": [-(2**63)]}}, Unsupported, "/items/enum/0"),  # which ends the process
        ({"items": {"minimum": 10**400}}, Unsupported, "/items/minimum"),
        ({"default": 10**400}, Unsupported, ""),
        ({"items": {"$ref": "#/x-a"}, "x-a": {"type": "array", "foo": 1}}, Unsupported, "/items/$ref"),
        ({"patternProperties": {"a": {}}, "required": 5}, SchemaError, "/required"),
        ({"$defs": {"a": {"properties": {}, "required": [["a"]]}}}, SchemaError, "/$defs/a/required"),
        ({"items": {"format": "iri"}}, Unsupported, "/items/format"),
        ({"oneOf": [HAS_A, MAY_HAVE_B]}, Unsupported, "/oneOf/1"),  # {"a": 1} is in both: silence admits it
        ({"type": "string", "minLength": 3, "maxLength": 2}, SchemaError, ""),
        ({"type": "objekt"}, SchemaError, "/type"),
        (False, SchemaError, ""),
    ],
)
def test_what_llguidance_would_pass_over_is_refused(schema: Any, error: type[SchemaError], pointer: str) -> None:
    with pytest.raises(error) as caught:
        json_grammar(schema)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize("pattern", PATTERNS[::9])
def test_patterns_mean_the_same(pattern: str) -> None:
    node, rng = parse_pattern(pattern), random.Random(2)
    try:
        grammar = grammar_of(node)
        MATCHERS.new(grammar)
    except EmptyLanguage:
        return
    for _ in range(4):
        text = walk(grammar, rng, most=60)
        assert text is None or re.fullmatch(pattern, text) is not None


# ------------------------------------------------------------------ GBNF

ARITHMETIC = """
root ::= expr   # a sum
expr ::= term (("+" | "-") term)*
term ::= num | "(" expr ")"
num  ::= [1-9] [0-9]{0,3}
"""


def test_arithmetic() -> None:
    grammar, rng, ended = ebnf_grammar(ARITHMETIC), random.Random(3), 0
    for _ in range(30):
        text = walk(grammar, rng, closing=")")
        if text is not None:
            ended += 1
            ast.parse(text, mode="eval")
    assert ended > 20
    assert accepts(grammar, "((1+2)-33)") and not accepts(grammar, "(1+2") and not accepts(grammar, "01")
    with pytest.raises(NotRegular, match="expr calls itself"):
        rules_to_syntax(parse_gbnf(ARITHMETIC))


TEXTS = [
    ('root ::= word "x"\nword ::= [a-z]+', ["abx", "xx"], ["x", "ab"]),  # a greedy lexer would not find the end
    ('root ::= "a" "bc" | "ab" "d"', ["abc", "abd"], ["ab", "abcd"]),
    ('root ::= foo-Bar fooBar\nfoo-Bar ::= "x" |\nfooBar ::= "y"', ["xy", "y"], ["x"]),
    ('root ::= "\\u65e5\\U0000672C" [\\x41-C]? .', ["日本A\n", "日本é"], ["日本"]),
    (r'root ::= "\"\\\n" [^\]"-]{2,}', ['"\\\nab', '"\\\n[é!'], ['"\\\na', '"\\\na-']),
    ('root ::= ("a" | "b"){2} # two\n  "c"{0,1}', ["ab", "bbc"], ["a", "abcc", "c"]),
    ('root ::= "a"{0} ("b" | "c"){0,0} "d"', ["d"], ["ad", "bd"]),
    ('root ::= [-a-c^] "/" [a-]', ["-/a", "^/-", "b/a"], ["d/a", "b/b"]),
]


@pytest.mark.parametrize(("text", "members", "others"), TEXTS)
def test_both_ways_of_gbnf(text: str, members: list[str], others: list[str]) -> None:
    rules = parse_gbnf(text)
    for grammar in (ebnf_grammar(text), rules_to_lark(rules), grammar_of(rules_to_syntax(rules))):
        assert [accepts(grammar, member) for member in members] == [True] * len(members)
        assert [accepts(grammar, other) for other in others] == [False] * len(others)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rule root"), ("root ::= (", "position 10"), ('root ::= "a', "position 9"), ("root ::= x", "no rule x"),
        (r'root ::= "\q"', "escape"), ("root ::= [z-a]", "range"), ('root ::= "a"{3,2}', "at least 3"),
        ('root ::= "a"\nroot ::= "b"', "two rules"), (r'root ::= "\ud800"', "no character"), ("root ::= *", "'*'"),
        ("root ::= " + "(" * 1000, "nested"), ("::= a", "a rule"),
    ],
)  # fmt: skip
def test_malformed_gbnf(text: str, message: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(message)):
        parse_gbnf(text)


# ------------------------------------------------------------------ structural tags

TAG = {
    "structures": [
        {"begin": "<f=a>", "schema": LIST, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "object", "properties": {}}, "end": "</f>"},
        {"begin": "[", "schema": True, "end": "]"},
        {"begin": "<|tool|>x", "schema": {"type": "boolean"}, "end": ""},
    ],
    "triggers": ["<f=", "[", "<|tool|>"],
}


def test_structural_tags() -> None:
    grammar = tag_grammar(TAG, {"<|tool|>": TOOL})
    call = '<f=a>{"value": 1, "next": null}</f>'
    for text in ("", "Hello <f", f"Hello {call}", f"{call}{call} and <f=b>{{}}</f> 日本", "[[1, 2]]!"):
        assert accepts(grammar, text), text
    for text in ("<f=c>", "<f= ", '<f=a>{"value": 1', "<f=b>{}</g>", "[x]", call[:-1], '<f=b>{"a": 1}</f>'):
        assert not accepts(grammar, text), text
    assert accepts(grammar, "", [*ENCODE("so "), TOOL, *ENCODE("xtrue and")])
    assert not accepts(grammar, "", [TOOL, *ENCODE("yes")])


def test_special_tokens_of_any_text_are_triggers() -> None:
    """Mistral's, for one."""
    tag = {"structures": [{"begin": "[TOOL_CALLS]", "schema": True, "end": ""}], "triggers": ["[TOOL_CALLS]"]}
    grammar = tag_grammar(tag, {"[TOOL_CALLS]": TOOL})
    assert accepts(grammar, "", [*ENCODE("so [TOOL_CALLS]"), TOOL, *ENCODE("true and")])
    assert not accepts(grammar, "", [TOOL, *ENCODE("yes")])


def test_a_matcher_that_cannot_go_on() -> None:
    matcher = MATCHERS.new(ebnf_grammar(ARITHMETIC))
    copy = matcher.copy()
    with pytest.raises(MatcherError):
        matcher.consume(ENCODE("1)"))
    with pytest.raises(MatcherError):
        allowed(matcher)
    copy.consume(ENCODE("(1"))
    assert ENCODE(")")[0] in allowed(copy)
    with pytest.raises(GrammarError, match="unknown name"):
        MATCHERS.new(ebnf_grammar('start: "a" b'))
    with pytest.raises(EmptyLanguage):
        allowed(MATCHERS.new(ebnf_grammar("start: start")))
