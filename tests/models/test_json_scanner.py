"""JsonScanner: it takes what `json` takes, breaks where no continuation can help, and does not mind how text is cut."""

import json
from copy import deepcopy
from typing import Any

import pytest
from chat_texts import cut_at, cuts, trials
from hypothesis import example, given
from hypothesis import strategies as st

from actorserve.models.json_scanner import MAX_DEPTH, JsonScanner

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(alphabet='a"\\\n\x01é🎉'),
    ),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(alphabet='k"', max_size=2), inner)),
    max_leaves=5,
)
pieces = st.lists(
    st.sampled_from([*'{}[]",: \n\x02\\', "-", "0", "17", ".5", "e", "E+2", "tru", "true", "null", "\\u00", "a"])
)


def refuse(word: str) -> Any:
    raise ValueError(word)


DECODER = json.JSONDecoder(strict=False, parse_constant=refuse)


def scan(chunks: list[str]) -> tuple[JsonScanner, int, str]:
    """The scanner, how many characters it took, and what it gave out."""
    scanner, taken, out = JsonScanner(), 0, ""
    for chunk in chunks:
        end = scanner.scan(chunk, 0)
        out += scanner.take()
        taken += end
        if end < len(chunk):
            break
    return scanner, taken, out


@trials(50)
@given(value=values, indent=st.sampled_from([None, 1]), ascii_only=st.booleans(), places=cuts)
def test_takes_every_value(value: Any, indent: int | None, ascii_only: bool, places: list[int]) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    scanner, taken, out = scan(cut_at(text + "]", places))
    assert (scanner.done, taken, out) == (True, len(text), text)


@trials(100)
@given(text=pieces.map("".join), places=cuts)
@example(text='{"a":1,}', places=[])
@example(text="[1 2]", places=[])
@example(text="01", places=[])
@example(text="00", places=[])
def test_takes_what_json_takes(text: str, places: list[int]) -> None:
    scanner, taken, out = scan(cut_at(text + " ", places))
    try:
        value, end = DECODER.raw_decode(text + " ")
    except ValueError:
        assert not scanner.done
    else:
        if isinstance(value, int | float) and not isinstance(value, bool) and not scanner.done:
            assert scanner.broken  # json ends "1.e" after the 1, we see a number that is none
        else:
            assert scanner.done and taken == end
            assert json.loads(out) == value


@trials(50)
@given(text=pieces.map("".join))
def test_what_is_not_broken_can_be_completed(text: str) -> None:
    scanner = JsonScanner()
    scanner.scan(text, 0)
    assert scanner.broken or completable(scanner)


def completable(scanner: JsonScanner) -> bool:
    """Whether a text that opens no more brackets ends the value: by trying all."""
    todo, seen = [scanner], set()
    while todo:
        scanner = todo.pop()
        if scanner.done:
            return True
        for char in '}]":0truefalsn ':
            longer = deepcopy(scanner)
            longer.scan(char, 0)
            longer.take()
            state = repr([getattr(longer, name) for name in JsonScanner.__slots__])
            if not longer.broken and state not in seen:
                seen.add(state)
                todo.append(longer)
    return False


@pytest.mark.parametrize("text", '] nul1 + 1.x "\\x "\\u12g {"a"1 {a [, [1,] tR N {"a":1,}'.split())
def test_breaks_at_the_first_wrong_character(text: str) -> None:
    scanner, taken, _ = scan([text])
    assert scanner.broken and taken == len(text) - 1


def test_depth() -> None:
    assert not scan(["[" * MAX_DEPTH])[0].broken
    assert scan(["[" * (MAX_DEPTH + 1)])[0].broken
