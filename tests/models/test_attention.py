"""Paged attention against a float64 loop over tokens, on random layouts; and the grouping of decode rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actorserve.models import attention
from actorserve.models.attention import SPLIT_TOKENS, TorchAttention, TorchPlan, group_by_length
from actorserve.models.batch import Batch, Chunk
from actorserve.models.kv_cache import KVCache
from actorserve.models.spec import Spec

PAGE = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 10**9], ids=["matmul", "flash"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode rows through either arithmetic, whatever their number."""
    monkeypatch.setattr(attention, "MATMUL_TOKENS", request.param)


def make_spec(
    heads: int = 6, kv_heads: int = 2, head_dim: int = 64, window: int | None = None, **fields: object
) -> Spec:
    windows = (None, window) if window else ()
    return Spec(10, 8, 2, heads, kv_heads, head_dim, 8, windows=windows, **fields)  # type: ignore[arg-type]


def case(
    spec: Spec, decode: list[int], chunks: list[tuple[int, int]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Batch, KVCache, Tensor]:
    """A batch of decode rows of these lengths and chunks (start, length) on permuted pages; foreign slots are NaN."""
    generator = torch.Generator().manual_seed(seed)
    lengths = decode + [start + length for start, length in chunks]
    needs = [-(-length // PAGE) for length in lengths]
    pool = torch.randperm(sum(needs) + 3, generator=generator, dtype=torch.int32)
    kv = KVCache(spec, sum(needs) + 3, PAGE, CPU, dtype)
    kv.storage.fill_(float("nan"))
    tables = list(pool[: sum(needs)].split(needs))
    for table, length in zip(tables, lengths, strict=True):
        slots = (table.long()[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length]
        shape = (spec.layers, length, 2, spec.kv_heads, spec.head_dim)
        kv.storage[:, slots] = torch.randn(shape, generator=generator).to(dtype)
    width = max(needs[: len(decode)], default=1) + 1
    rows = torch.full((len(decode), width), int(pool[-1]), dtype=torch.int32)
    for row, table in enumerate(tables[: len(decode)]):
        rows[row, : len(table)] = table
    tokens = len(decode) + sum(length for _, length in chunks)
    q = torch.randn(tokens, spec.heads, spec.head_dim, generator=generator).to(dtype)
    empty = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        ids=empty,
        positions=empty,
        kv_slots=empty,
        decode_tables=rows,
        decode_lengths=torch.tensor(decode, dtype=torch.int32),
        max_decode_length=max(decode, default=0),
        logit_rows=None,
        chunks=[
            Chunk(start, length, table) for (start, length), table in zip(chunks, tables[len(decode) :], strict=True)
        ],
    )
    return batch, kv, q


def reference(batch: Batch, kv: KVCache, spec: Spec, layer: int, q: Tensor) -> Tensor:
    """Attention one token and one head at a time, float64; [T, H * D]."""
    queries: list[tuple[Tensor, int]] = [
        (table, int(length) - 1) for table, length in zip(batch.decode_tables, batch.decode_lengths, strict=True)
    ]
    queries += [(chunk.pages, chunk.start + i) for chunk in batch.chunks for i in range(chunk.length)]
    out = torch.zeros(q.shape, dtype=torch.float64)
    window = spec.window(layer)
    keys, values = kv.k[layer].double(), kv.v[layer].double()
    for token, (table, position) in enumerate(queries):
        seen = torch.arange(0 if window is None else max(0, position - window + 1), position + 1)
        slots = table[seen // PAGE].long() * PAGE + seen % PAGE
        for head in range(spec.heads):
            scores = keys[slots, head // spec.group] @ q[token, head].double() * spec.attention_scale
            if spec.attn_softcap is not None:
                scores = spec.attn_softcap * torch.tanh(scores / spec.attn_softcap)
            out[token, head] = scores.softmax(0) @ values[slots, head // spec.group]
    return out.flatten(1)


def check(spec: Spec, decode: list[int], chunks: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> None:
    batch, kv, q = case(spec, decode, chunks, dtype)
    plan = TorchAttention().plan(batch, kv, spec)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for layer in range(spec.layers):
        out = plan.run(layer, q)
        assert out.shape == (q.shape[0], spec.heads * spec.head_dim)
        assert out.dtype == dtype
        assert (out.double() - reference(batch, kv, spec, layer, q)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (7, 1), (16, 2)], ids=["g1", "g4", "g7", "g8"])
@pytest.mark.usefixtures("both_ways")
def test_decode_rows_and_chunks(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    spec = make_spec(heads, kv_heads, head_dim)
    check(spec, [37], [], dtype)
    check(spec, [1, 16, 17], [(0, 5), (30, 20)], dtype)
    check(spec, [33, 40, 2, 48, 16, 15, 31, 1, 12], [], dtype)


@pytest.mark.parametrize("window", [1, 5, 16, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.usefixtures("both_ways")
def test_windows_and_softcap(window: int, softcap: float | None) -> None:
    spec = make_spec(window=window, attn_softcap=softcap, scale=0.2)
    check(spec, [3, 50, 17], [(0, 45), (41, 7), (3, 1)])
    check(spec, [9, 30, 41, 42, 60, 1, 5, 6], [])


@pytest.mark.usefixtures("both_ways")
def test_equal_lengths_need_no_mask() -> None:
    for rows in (1, 4, 20):
        check(make_spec(), [21] * rows, [])


@pytest.mark.usefixtures("both_ways")
def test_split_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are brought back into their order after grouping, also beside a chunk."""
    monkeypatch.setattr(attention, "SPLIT_TOKENS", 20)
    lengths = [5, 60, 6, 61, 30, 5, 59, 31]
    assert len(group_by_length(lengths)) >= 3
    check(make_spec(window=25), lengths, [])
    check(make_spec(window=25), lengths, [(0, 4), (17, 9)])


@pytest.mark.usefixtures("both_ways")
def test_padded_to_the_hosts_bound() -> None:
    """What runs on a GPU: one group, wider than any row, lengths unknown to the host."""
    for window in (None, 24):
        spec = make_spec(window=window)
        batch, kv, q = case(spec, [20, 3, 33], [])
        width = 48 if window is None else window
        group = attention._decode_group(batch, slice(0, 3), width, True, kv, spec, window)
        plan = TorchPlan({spec.window(1): [group]}, kv, spec)
        assert (plan.run(1, q).double() - reference(batch, kv, spec, 1, q)).abs().max() < 2e-6


@pytest.mark.usefixtures("both_ways")
def test_strided_queries() -> None:
    """The decoder passes a view into its fused qkv rows."""
    spec = make_spec()
    batch, kv, q = case(spec, [20, 3, 33], [(0, 4)])
    wide = torch.full((q.shape[0], spec.heads + 4, spec.head_dim), float("nan"))
    wide[:, : spec.heads] = q
    plan = TorchAttention().plan(batch, kv, spec)
    assert torch.equal(plan.run(0, wide[:, : spec.heads]), plan.run(0, q))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=64))
def test_grouping_covers_every_row_once(lengths: list[int]) -> None:
    groups = group_by_length(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    padding = sum(max(lengths[row] for row in group) * len(group) for group in groups)
    assert padding + SPLIT_TOKENS * (len(groups) - 1) <= max(lengths) * len(lengths)
    if len(groups) == 1:
        assert groups[0] == list(range(len(lengths)))
