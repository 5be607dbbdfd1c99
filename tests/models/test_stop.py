"""Stop strings: the result does not depend on how the text was cut, and equals a search of the whole."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actorserve.models.stop import StopMatcher

texts = st.text(alphabet="ab\n🎉", max_size=40)
stops = st.lists(st.text(alphabet="ab\n🎉", min_size=1, max_size=5), min_size=1, max_size=4)


def whole(text: str, stops: list[str], trim: bool) -> tuple[str, str | None]:
    """The slow reference: read character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)] if trim else text[:end], stop
    return text, None


@given(text=texts, stops=stops, cuts=st.lists(st.integers(0, 40), max_size=20), trim=st.booleans())
def test_any_cutting_equals_the_whole(text: str, stops: list[str], cuts: list[int], trim: bool) -> None:
    matcher = StopMatcher(stops, trim)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = "".join(matcher.feed(text[a:b]) for a, b in pairwise(edges)) + matcher.finish()
    assert (shown, matcher.matched) == whole(text, stops, trim)


@given(text=texts, stops=stops)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    """What is held back could still become a stop string."""
    matcher = StopMatcher(stops)
    shown = ""
    for i, character in enumerate(text):
        shown += matcher.feed(character)
        if matcher.matched is not None:
            break
        held = text[len(shown) : i + 1]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("text", "stops", "shown", "matched"),
    [
        ("abcd", ["abcd", "bc"], "a", "bc"),  # the one that is complete first
        ("xab", ["ab", "b"], "x", "ab"),  # both end here: the longest
        ("xab", ["a", "ab"], "x", "a"),  # "a" is complete before "ab"
        ("aab", ["ab"], "a", "ab"),
        ("stop", ["stop"], "", "stop"),
        ("no", ["n\n"], "no", None),
    ],
)
def test_which_match_counts(text: str, stops: list[str], shown: str, matched: str | None) -> None:
    for pieces in ([text], list(text)):
        matcher = StopMatcher(stops)
        assert "".join(map(matcher.feed, pieces)) + matcher.finish() == shown
        assert matcher.matched == matched


def test_nothing_after_a_match() -> None:
    matcher = StopMatcher(["."])
    assert [matcher.feed(t) for t in ("a.b", "c")] == ["a", ""]
    assert matcher.finish() == ""
