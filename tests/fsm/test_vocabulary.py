"""TokenizerTables against the obvious ways to compute them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.fsm.vocabulary import TokenizerTables, build_tables

VOCABULARIES = st.lists(
    st.one_of(st.none(), st.binary(max_size=4), st.text("abc", max_size=4).map(str.encode)), max_size=40
)


def nodes(tables: TokenizerTables) -> dict[int, bytes]:
    """The path to each node."""
    paths = {0: b""}
    for node in range(1, len(tables.parent)):
        paths[node] = paths[int(tables.parent[node])] + bytes([tables.byte[node]])
    return paths


@settings(max_examples=200, deadline=None)
@given(VOCABULARIES, st.lists(st.integers(0, 45), max_size=3))
def test_tables(tokens: list[bytes | None], eos: list[int]) -> None:
    tables = build_tables(tokens, eos)
    usable = {i: token for i, token in enumerate(tokens) if token and i not in eos}
    assert tables.eos == tuple(sorted({i for i in eos if i < len(tokens)}))
    assert tables.order.tolist() == sorted(usable, key=lambda i: (usable[i], i))
    assert [tables.token_bytes(i) for i in range(-1, len(tokens) + 1)] == [
        None, *(usable.get(i) for i in range(len(tokens))), None
    ]  # fmt: skip
    paths = nodes(tables)
    assert len(set(paths.values())) == len(paths)
    assert {p for t in usable.values() for p in (t[:n] for n in range(len(t) + 1))} | {b""} == set(paths.values())
    assert [paths[n] for n in tables.node.tolist()] == [usable[i] for i in tables.order.tolist()]
    for depth, (first, last) in enumerate(zip(tables.levels, tables.levels[1:], strict=False)):
        assert all(len(paths[node]) == depth for node in range(first, last))
    assert tables.levels[-1] == len(paths)
    for prefix in {b"", b"a", b"ab", b"\xff", *usable.values()}:
        longer = [i for i in tables.order.tolist() if usable[i].startswith(prefix) and usable[i] != prefix]
        assert tables.longer(prefix).tolist() == longer
    for i in range(len(tokens)):
        assert tables.has_longer[i] == (i in usable and len(tables.longer(usable[i])) > 0)
    assert np.flatnonzero(tables.alone).tolist() == sorted({t[0] for t in usable.values() if len(t) == 1})


def test_fingerprint_tells_tokenizers_apart() -> None:
    base: list[bytes | None] = [b"a", b"bc", None, b"d"]
    prints = {
        build_tables(tokens, eos).fingerprint
        for tokens, eos in [
            (base, [2]), (base, []), (base, [0]), ([*base, None], [2]), ([b"ab", b"c", None, b"d"], [2]),
            ([b"bc", b"a", None, b"d"], [2]),
        ]
    }  # fmt: skip
    assert len(prints) == 6
    assert build_tables(list(base), [2]).fingerprint == build_tables(base, [2]).fingerprint


def test_words() -> None:
    assert [build_tables([b"a"] * n, []).words for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
