"""The parts that schemas are written with: digits, spelling, lengths, patterns of ECMA-262, formats."""

import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from syntax_walk import as_pattern, walk

from actorserve.fsm.digits import INTEGER_DIGITS, NUMBER, decimals, integers
from actorserve.fsm.ecma import parse_ecma
from actorserve.fsm.errors import PatternError
from actorserve.fsm.formats import FORMATS, REFUSED, format_syntax
from actorserve.fsm.lengths import matches, span, within
from actorserve.fsm.schema_types import TRIVIAL
from actorserve.fsm.spelling import (
    ANY_CHARACTER,
    COMPACT,
    DEFAULT,
    Whitespace,
    any_whitespace,
    choice,
    concat,
    constant,
    indented,
    is_nothing,
    other_strings,
    quoted,
    repeat,
)
from actorserve.fsm.syntax import NOTHING, Chars, Choice, Concat, Node, Repeat, Text, chars

# ------------------------------------------------------------------ digits

LIMITS = [-1234, -1000, -999, -101, -100, -99, -10, -9, -1, 0, 1, 5, 9, 10, 11, 42, 99, 100, 109, 999, 1000, 1100]


@pytest.mark.parametrize("low", [None, *LIMITS])
@pytest.mark.parametrize("high", [None, *LIMITS])
def test_integers_are_those_of_the_range(low: int | None, high: int | None) -> None:
    node = integers(low, high)
    assert node is not None
    matches = re.compile(as_pattern(node)).fullmatch
    for n in [*range(-125, 125), *range(-1240, -990), *range(980, 1110), 12345, -12345, 10**15]:
        inside = (low is None or n >= low) and (high is None or n <= high)
        assert bool(matches(str(n))) == inside, n
    for text in ("-0", "00", "01", "-01", "", "-", "1.0", "+1", "1" * (INTEGER_DIGITS + 1)):
        assert not matches(text)


@given(st.integers(-(10**30), 10**30), st.integers(0, 10**6), st.data())
def test_wide_ranges(low: int, width: int, data: st.DataObject) -> None:
    high = low + data.draw(st.integers(0, 10 ** data.draw(st.integers(0, 31))))
    node = integers(low, high)
    assert node is not None
    for n in (low, high, low - 1, high + 1, data.draw(st.integers(low, high)), (low + high) // 2, 0, -low, low + width):
        assert matches(node, str(n)) == (low <= n <= high)


@pytest.mark.parametrize("multiple", [2, 4, 5, 8, 10, 20, 25, 50, 100, 125, 500, 1000])
@pytest.mark.parametrize(("low", "high"), [(None, None), (-1003, 1001), (1, 99), (7, 3001), (-50, -10), (990, None)])
def test_multiples(multiple: int, low: int | None, high: int | None) -> None:
    node = integers(low, high, multiple)
    assert node is not None
    found = re.compile(as_pattern(node)).fullmatch
    for n in [*range(-1100, 1100), 123456, 10**12, 3000, 3001]:
        inside = (low is None or n >= low) and (high is None or n <= high)
        assert bool(found(str(n))) == (inside and n % multiple == 0), n


@pytest.mark.parametrize("multiple", [3, 6, 7, 12, 2**20])
def test_multiples_that_last_digits_do_not_decide(multiple: int) -> None:
    assert integers(None, None, multiple) is None


bound = st.one_of(st.none(), st.decimals(-1200, 1200, places=3), st.sampled_from([0, 1, -1, 10, 100]).map(Decimal))


@settings(max_examples=150, deadline=None)
@given(bound, st.booleans(), bound, st.booleans(), st.data())
def test_decimals_are_those_of_the_range(
    low: Decimal | None, low_open: bool, high: Decimal | None, high_open: bool, data: st.DataObject
) -> None:
    node = decimals(low, low_open, high, high_open)
    assert node is not None
    near = [
        b + d for b in (low, high, Decimal(0)) if b is not None for d in map(Decimal, ("0", "0.001", "-0.001", "1"))
    ]
    some = data.draw(st.lists(st.decimals(-2000, 2000, places=2), min_size=3, max_size=3))
    for value in (*near, *some):
        above = low is None or value > low or (value == low and not low_open)
        below = high is None or value < high or (value == high and not high_open)
        for text in {f"{value:f}", f"{value.normalize():f}", f"{value:f}" + "0" * ("." in f"{value:f}")}:
            sign = text.startswith("-") and not value
            assert matches(node, text) == (above and below and not sign), text
    for text in ("-0", "-0.0", "1.", ".5", "01.5", "1e1", "1.5E-3", "0." + "1" * 11):
        assert not matches(node, text)


def test_decimals_stay_on_their_side_as_doubles() -> None:
    """No text of the range rounds onto an open bound."""
    draw = random.Random(1)
    for text in ("0.3", "99999.99999", "123456.7", "0.000000001", "1000000000.1"):
        node = decimals(None, False, Decimal(text), True)
        assert node is not None
        whole = text.split(".")[0]
        for _ in range(300):
            below = walk(node, draw)
            assert float(below) < float(text)
        for digits in range(1, 12):
            near = f"{Decimal(text) - Decimal(10) ** -digits:f}"
            assert not matches(node, near) or float(near) < float(text), whole


@pytest.mark.parametrize("low", ["1e20", "0.12345678901234567", "999999999999999.5"])
def test_decimals_that_doubles_do_not_tell_apart(low: str) -> None:
    assert decimals(Decimal(low), False, None, False) is None


def test_free_numbers() -> None:
    for value in (0, -1, 1.5, 1e22, -6.02e-23, 0.30000000000000004, 2**53, 1e-99):
        assert matches(NUMBER, json.dumps(value))
    draw = random.Random(2)
    for _ in range(500):
        assert abs(json.loads(walk(NUMBER, draw))) < float("inf")
    for text in ("01", "1.", ".5", "+1", "1e", "1e100", "NaN", "Infinity", "- 1", "1" * 17):
        assert not matches(NUMBER, text)


# ------------------------------------------------------------------ spelling


def test_each_character_has_the_spelling_of_json_dumps() -> None:
    string = quoted(ANY_CHARACTER)
    codes = [*range(0x300), 0x2028, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    for c in map(chr, codes):
        assert matches(string, json.dumps(c, ensure_ascii=False))
    for text in ('"\\/"', '"\\u0041"', '"\\u0022"', '"\\u001F"', '"\n"', '"""', '"\\"', '""', '"ab"', '"\\x"'):
        assert not matches(string, text)


@given(st.text(max_size=3), st.sets(st.text('ab"\\\n', max_size=3), max_size=4))
def test_other_strings(text: str, words: set[str]) -> None:
    node = quoted(other_strings(words))
    for sample in (text, *words, *(word + "a" for word in words), *(word[:-1] for word in words)):
        assert matches(node, json.dumps(sample, ensure_ascii=False)) == (sample not in words)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@given(json_values)
def test_constants_are_what_json_dumps_writes(value: Any) -> None:
    assert constant(value, DEFAULT) == Text(json.dumps(value, ensure_ascii=False))
    assert constant(value, COMPACT) == Text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    for width in (0, 2):
        assert constant(value, indented(width)) == Text(json.dumps(value, ensure_ascii=False, indent=width))
    pattern = re.compile(as_pattern(constant(value, any_whitespace(4))))
    assert pattern.fullmatch(json.dumps(value, ensure_ascii=False, indent=1)) or isinstance(value, list | dict)
    assert pattern.fullmatch(json.dumps(value, ensure_ascii=False, separators=(" , ", "\n:\t")))


def test_whitespace_is_bounded() -> None:
    for wrong in (lambda: any_whitespace(0), lambda: any_whitespace(65), lambda: indented(65), lambda: indented(-1)):
        with pytest.raises(ValueError):
            wrong()
    assert Whitespace() == DEFAULT
    node = constant([1], any_whitespace(2))
    assert matches(node, "[ \n1\t\r]")
    assert not matches(node, "[   1]")


def test_joining_keeps_the_empty_language_visible() -> None:
    a, nothing = Text("a"), Chars(())
    assert all(is_nothing(n) for n in (concat(a, NOTHING), concat(nothing, a), choice([]), choice([nothing, NOTHING])))
    assert is_nothing(repeat(nothing, 1, None)) and is_nothing(repeat(a, 2, 1))
    assert repeat(nothing, 0, 5) == Text("") == concat() == repeat(a, 0, 0)
    assert concat(a, Text(""), concat(a, Chars(((98, 98),)), a), a) == Concat(
        (Text("aa"), Chars(((98, 98),)), Text("aa"))
    )
    assert choice([a, a, choice([Text("b"), a])]) == Choice((a, Text("b")))
    assert repeat(a, 1, 1) == a == choice([a, nothing])


# ------------------------------------------------------------------ lengths

letters = st.sampled_from([Text("a"), Text("ab"), Text(""), chars([(97, 99)]), Text("abc")])
trees = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Concat(tuple(parts))),
        st.lists(inner, max_size=3).map(lambda options: Choice(tuple(options))),
        st.builds(Repeat, inner, st.just(0), st.sampled_from([None, 1, 3])),
        st.builds(Repeat, inner, st.sampled_from([1, 2]), st.sampled_from([None, 2, 4])),
    ),
    max_leaves=6,
)


@given(trees, st.text("abc", max_size=7))
def test_matches_is_fullmatch(node: Node, text: str) -> None:
    assert matches(node, text) == bool(re.fullmatch(as_pattern(node), text))


@given(trees, st.integers(0, 5), st.one_of(st.none(), st.integers(0, 6)), st.randoms(use_true_random=False))
def test_within_keeps_the_texts_of_the_lengths(node: Node, low: int, high: int | None, draw: random.Random) -> None:
    found, whole = within(node, low, high), span(node)
    if whole is None:
        assert found == NOTHING
        return
    if "Choice(options=())" in repr(node):
        return  # walk needs trees without dead ends
    texts = {walk(node, draw) for _ in range(20)}
    assert all(whole[0] <= len(text) and (whole[1] is None or len(text) <= whole[1]) for text in texts)
    if found is not None:
        for text in texts:
            assert matches(found, text) == (low <= len(text) and (high is None or len(text) <= high)), text
        if not is_nothing(found):
            assert all(matches(node, text) for text in (walk(found, draw) for _ in range(20)))


# ------------------------------------------------------------------ patterns

PATTERNS = r"""
a|^b|c$ ^a|b$ ^(a|b)$ (^a$)|(^b) a{2,3} ^a{2} [a-c]+ ^[^a]$ \d \D ^\w+$ ^\W+$ a\sb ^\S+$ ^.$ a.c ^$ a*? ^(?:ab)+$
^[\d.]+$ ^[^\d]$ ^[^\w]$ ^[^\s]$ ^[\D]$ ^[\W]$ ^[\S]$ ^[^\D]$ ^[^\S]$ [\x41-\x43] \u0041 \- [\-a] ^\.$ a\/b
""".split()
ODD = ["\x1c", "\x85", "\ufeff", "\u2028", "\u0660", "é", "\u00a0", "_", "A", "a\n", "\n", "\r", "😀"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_what_both_dialects_accept(pattern: str) -> None:
    """Python's search without its `$` before a last newline; and re.ASCII for the classes of ECMA."""
    node = parse_ecma(pattern)
    python, ecma = re.compile(pattern.replace("$", r"\Z")), re.compile(pattern.replace("$", r"\Z"), re.ASCII)
    draw = random.Random(pattern)
    for _ in range(100):
        assert python.search(text := walk(node, draw)), text
    dot = "." in pattern.replace("\\.", "").replace("\\d.", "")
    for text in [*ODD, *("".join(draw.choices("abc1 -.A_/", k=draw.randint(0, 4))) for _ in range(300))]:
        if not python.search(text) or (text.isascii() and not ecma.search(text)):
            assert not matches(node, text), text
        elif text.isascii() and "\x1c" not in text and not dot:
            assert matches(node, text), text


REFUSED_PATTERNS = r"""
(?=a) (?!a) (?<=a) (?<!a) (a)\1 \k<a> \b \B \p{L} (?i)a (?i:a) \A \Z \z \a \07 [] [^] a{,2} a++ a** *a {2} ^* a$b a^b
(^a)b (a$|b)c ((^a))+ (a a) [a [b-a] [a-\d] [\d-z] \ a\ \u{1F600} \uZZZZ \ud800 (?P<n>a) (?>a) a{99999999999} a{3,2}
""".split()


@pytest.mark.parametrize("pattern", [*REFUSED_PATTERNS, "(" * 100 + ")" * 100])
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        parse_ecma(pattern)


# ------------------------------------------------------------------ formats


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_within_those_of_jsonschema(name: str) -> None:
    node = format_syntax(name)
    assert node is not None
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    assert name in checker.checkers
    draw = random.Random(name)
    for _ in range(400):
        text = walk(node, draw)
        assert checker.conforms(text, name), text
        at = draw.randrange(len(text) + 1)  # what the checker refuses must not match after a change either
        altered = (
            text[:at]
            + draw.choice(["", "0", "-", ":", ".", "9", "T", "é", "/", "@"])
            + text[at + draw.choice([0, 1]) :]
        )
        assert checker.conforms(altered, name) or not matches(node, altered), altered


def test_dates_are_those_of_the_calendar() -> None:
    node = format_syntax("date")
    assert node is not None
    found = re.compile(as_pattern(node)).fullmatch
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for year in (0, 1, 4, 100, 400, 1900, 1996, 1999, 2000, 2023, 2024, 9999):
        for month in range(14):
            for day in range(33):
                text = f"{year:04}-{month:02}-{day:02}"
                assert bool(found(text)) == checker.conforms(text, "date"), text


def test_defined_formats_are_known_or_refused() -> None:
    assert set(jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers) <= {*FORMATS, *REFUSED, "idn-email", "color"}
    assert format_syntax("int32") is None
    for name in REFUSED:
        with pytest.raises(LookupError):
            format_syntax(name)


def test_the_documentation_names_what_is_refused() -> None:
    text = (Path(__file__).parents[2] / "docs" / "json_schema.md").read_text(encoding="utf-8")
    assert {name for name in (*TRIVIAL, *REFUSED, *FORMATS, "not", "if") if name not in text} == set()
