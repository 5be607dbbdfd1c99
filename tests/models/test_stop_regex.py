"""Regular expressions that end an output: the result does not depend on how the text was cut, and equals `re`'s."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actorserve.errors import RequestError
from actorserve.models.stop_regex import PatternMatcher

texts = st.text(alphabet="ab1\n🎉", max_size=40)
PATTERNS = ("a+b", "[0-9]{2}", "b(a|1)*b", "\\n\\n", "🎉.a", "(?i)BA", "[^ab]1")
stops = st.lists(st.text(alphabet="ab\n🎉", min_size=1, max_size=4), max_size=2)
patterns = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3)


def whole(text: str, stops: list[str], patterns: list[str], trim: bool) -> tuple[str, str | None]:
    """The slow reference: of all pieces that end here, the first one that matches, as soon as there is one."""
    found = [(re.escape(stop), stop) for stop in stops] + [(pattern, pattern) for pattern in patterns]
    for end in range(1, len(text) + 1):
        for start in range(end):
            for regex, name in found:
                if re.fullmatch(regex, text[start:end]):
                    return text[: start if trim else end], name
    return text, None


@given(
    text=texts, stops=stops, patterns=patterns, cuts=st.lists(st.integers(0, 40), max_size=20), trim=st.booleans()
)  # fmt: skip
def test_any_cutting_equals_the_whole(
    text: str, stops: list[str], patterns: list[str], cuts: list[int], trim: bool
) -> None:
    matcher = PatternMatcher(stops, patterns, trim)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = "".join(matcher.feed(text[a:b]) for a, b in pairwise(edges)) + matcher.finish()
    assert (shown, matcher.matched) == whole(text, stops, patterns, trim)


def test_holds_back_what_may_become_a_match_and_no_more() -> None:
    matcher = PatternMatcher(["STOP"], [r"\n[0-9]+\."])
    shown = [matcher.feed(piece) for piece in ("one\n", "12", " two\n3", "4", ".", "more")]
    assert shown == ["one", "", "\n12 two", "", "", ""] and matcher.matched == r"\n[0-9]+\."
    matcher = PatternMatcher(["STOP"], [r"\n[0-9]+\."])
    assert matcher.feed("a ST") + matcher.feed("OP b") == "a " and matcher.matched == "STOP"
    matcher = PatternMatcher([], ["ab+c"])
    assert [matcher.feed("xab"), matcher.feed("bb"), matcher.finish()] == ["x", "", "abbb"] and not matcher.matched


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a*", "matches the empty text"),
        ("(", "stop_regex '\\('"),
        ("(?=a)b", "look-ahead"),
        ("^a", "searched everywhere"),
        ("(a|b$)", "searched everywhere"),
        ("a\\Z", "searched everywhere"),
        ("[.[]$", "searched everywhere"),
        ("a" * 300, "characters of pattern"),
        ("(a|b)*a(a|b){20}", "dfa states"),
        ("[a-z]{1,900}[0-9]{900}", "nfa states"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        PatternMatcher([], [pattern])
    assert caught.value.param == "stop_regex"


def test_patterns_that_are_too_large_together() -> None:
    """Each is small enough; sixteen of them would take milliseconds a character."""
    with pytest.raises(RequestError, match="1000 dfa states together") as caught:
        PatternMatcher([], [f"[^q]{{{n}}}q" for n in (600, 601)])
    assert caught.value.param == "stop_regex"
    PatternMatcher(["a" * 256] * 16, ["[^q]{600}q", "[^q]{100}q"])


@pytest.mark.parametrize("pattern", ["[$^]", "[]^]", "[^]$]", "\\$\\^", "\\\\A"])
def test_what_is_no_anchor(pattern: str) -> None:
    PatternMatcher([], [pattern])


def test_hostile_patterns_take_no_longer() -> None:
    """`re.search` would need ages for this text."""
    matcher = PatternMatcher([], ["(a|a)*(a|aa)+b"])
    assert matcher.feed("a" * 20_000) == "" and matcher.finish() == "a" * 20_000
