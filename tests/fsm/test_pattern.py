"""Our dialect is that of `re`: what is accepted, what is refused, and what matches."""

import random
import re
import warnings

import grammars
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.fsm.budget import Budget
from actorserve.fsm.compiler import compile_bytes
from actorserve.fsm.errors import EmptyLanguage, PatternError
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.syntax import Node
from actorserve.fsm.utf8 import ByteDfa

CHARACTERS = [*map(chr, range(0x250)), *"κΣσςſKåÅİıßẞǅΩ日本語🎉\u0301\u2028\u3000\u0660\ud7ff\ue000\U0010ffff"]
TEXTS = [
    "", *"ab\n\\\"{}[]x", "aa", "ab", "abc", "abcd", "aab", "abab", "xyz", "hello", "HELLO", "Hello", "ac", "b",
    "aaa", "a{}",
    "a{x}", "a{1", "{a}", "straSSe", "STRAßE", "STRAẞE", "01", "0", "255.255.1.0", "é", "É", "日本",
    "日本語", "🎉", "a\n",
    "true", "3.14e-7", "-0", "The quick brown fox", "orderId", "order", '"a\\"b"', '"abc"', "\0", "\x07", "A", "\b",
    "\t\n\r\f\v\a", ".*+?()[]{}|^$", "k", "K", "K", "x and x", "im_startim_end", "\x85", "\xa0", "a_1", "٣", "ǅ",
    "İ", "ſ",
]  # fmt: skip


def automaton(node: Node) -> ByteDfa | None:
    try:
        return compile_bytes(node, Budget())
    except EmptyLanguage:
        return None


def matches(dfa: ByteDfa | None, text: str) -> bool:
    state = -1 if dfa is None else dfa.walk(0, text.encode())
    return dfa is not None and state >= 0 and bool(dfa.final[state])


def mutations(text: str, rng: random.Random) -> list[str]:
    """Texts near this one."""
    found = []
    for _ in range(8):
        place = rng.randrange(len(text) + 1)
        cut = rng.choice([0, 1, 2])
        found.append(text[:place] + rng.choice(["", *"ab\n0 é日"]) + text[place + cut :])
    return found


def agrees(pattern: str, rng: random.Random) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        standard = re.compile(pattern)
    dfa = automaton(parse_pattern(pattern))
    texts = [*TEXTS, *grammars.PATTERNS[:10]]
    texts += [m for text in texts for m in mutations(text, rng)[:2]]
    for text in texts:
        assert matches(dfa, text) == (standard.fullmatch(text) is not None), (pattern, text)
    for character in CHARACTERS:
        assert matches(dfa, character) == (standard.fullmatch(character) is not None), (pattern, character)


@pytest.mark.parametrize("pattern", grammars.PATTERNS)
def test_agrees_with_re(pattern: str) -> None:
    agrees(pattern, random.Random(pattern))


def test_agrees_with_re_on_generated_patterns() -> None:
    for pattern in grammars.random_patterns(60):
        agrees(pattern, random.Random(pattern))


@pytest.mark.parametrize(
    ("pattern", "name", "position"),
    [
        ("ab(?=c)", "look-ahead (?=", 2),
        ("(?!c)x", "look-ahead (?!", 0),
        ("a(?<=a)", "look-behind (?<=", 1),
        ("a(?<!a)", "look-behind (?<!", 1),
        ("(a)\\1", "back-reference \\1", 3),
        ("(?P<n>a)(?P=n)", "back-reference (?P=", 8),
        ("a\\b", "word boundary \\b", 1),
        ("\\Ba", "word boundary \\B", 0),
        ("a*+", "possessive", 1),
        ("a{1,2}+", "possessive", 1),
        ("(?>a)", "atomic group", 0),
        ("(a)(?(1)b|c)", "conditional", 3),
        ("(?m)a", "flag 'm'", 2),
        ("(?x)a", "flag 'x'", 2),
        ("a^b", "^ is supported only at the very beginning", 1),
        ("a$b", "$ is supported only at the very end", 1),
        ("(a$)b", "$ is supported only at the very end", 2),
        ("(^a)*", "an anchor inside a repeated group", 0),
        ("(a$)?", "an anchor inside a repeated group", 0),
        ("(" * 101 + ")" * 101, "nested groups", 100),
        ("a{99999999999}", "repetition number is too large", 1),
    ],
)
def test_what_no_automaton_can_do_is_named(pattern: str, name: str, position: int) -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern(pattern)
    assert name in caught.value.message
    assert caught.value.position == position
    assert f"position {position}" in caught.value.message
    assert caught.value.status == 400


MALFORMED = [
    "(", ")", "a)", "(a", "[", "[a", "[]", "[^]", "*", "+a", "?", "a**", "a*{2}", "{1}", "(*a)", "|*", "a|+", "^*",
    "$+", "\\",
    "[\\", "\\x", "\\x1", "\\u12", "\\U0000000", "\\U00110000", "\\q", "[\\q]", "\\8", "[\\8]", "[z-a]", "[a-\\d]",
    "[\\d-z]",
    "(?", "(?P", "(?P<", "(?P<>a)", "(?P<1>a)", "(?P<n>a)(?P<n>b)", "(?P<n", "(?z)", "(?<n>a)", "(?i", "(?i-)",
    "(?-i)a",
    "(?#", "a{3,2}", "\\N{NO SUCH NAME}", "\\N", "a(?i)b", "[\\A]", "[\\B]", "\\777", "[\\400]", "(?-)", "(?i-s)a",
    "(?:", "(?-a:b)", "(?au)a", "(?i-i:a)", "(?i-:a)",
]  # fmt: skip


@pytest.mark.parametrize("pattern", MALFORMED)
def test_malformed_for_both(pattern: str) -> None:
    with pytest.raises(re.error):
        re.compile(pattern)
    with pytest.raises(PatternError) as caught:
        parse_pattern(pattern)
    assert caught.value.position is not None and 0 <= caught.value.position <= len(pattern)


@settings(max_examples=examples(400, 150), deadline=None)
@given(st.text("ab09(|)[]{},*+?.^$\\-dwsnxAZ:iP<>#=!é", max_size=10))
def test_any_text_is_read_as_re_reads_it(pattern: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            standard = re.compile(pattern)
    except (re.error, OverflowError):
        with pytest.raises(PatternError):
            parse_pattern(pattern)
        return
    try:
        node = parse_pattern(pattern)
    except PatternError as error:
        assert "supported" in error.message, "what re takes is refused only for what it is"
        return
    dfa = automaton(node)
    for text in TEXTS[:30]:
        assert matches(dfa, text) == (standard.fullmatch(text) is not None), (pattern, text)


@pytest.mark.parametrize(
    "source", ["k", "ſ", "İ", "ß", "[a-z]", "[^a-z]", "[Ā-ſ]", "\\w", "[^\\W_]", "[Α-Ω]", "ǆ", "[^k]"]
)
@pytest.mark.parametrize("flags", ["(?i)", "(?ia)"])
def test_ignoring_case(source: str, flags: str) -> None:
    standard = re.compile(flags + source)
    dfa = automaton(parse_pattern(flags + source))
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x11000), *range(0x1E900, 0x1E950)]):
        if character.lower() != character.upper() or character < "ÿ":
            assert matches(dfa, character) == (standard.fullmatch(character) is not None), character
