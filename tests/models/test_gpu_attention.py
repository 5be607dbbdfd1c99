"""The attention backends of GPUs against softmax attention written out in float32; on a CPU, Triton's interpreter."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from actorserve.errors import StartupError
from actorserve.models.attention import TorchAttention, make_backend
from actorserve.models.batch import Batch, Chunk
from actorserve.models.flashinfer_build import when_compiled
from actorserve.models.kv_cache import KVCache
from actorserve.models.rope import inverse_frequencies
from actorserve.models.spec import Rope, Spec

pytest.importorskip("triton")
from actorserve.models.triton_attention import (
    DECODE,
    MOST_PROGRAMS,
    MOST_SPLITS,
    Launch,
    TritonAttention,
    TritonPlan,
    launch_for,
    splits_for,
)
from actorserve.models.triton_ops import TritonOps, Unrotated

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PAGE = 16
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error: of float32 sums, and of 16-bit inputs to the second product."""
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def spec_of(group: int, kv_heads: int, head_dim: int, window: int | None = None, cap: float | None = None) -> Spec:
    return Spec(
        vocab=10, hidden=8, layers=1, heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim, inter=4,
        windows=() if window is None else (window,), attn_softcap=cap,
    )  # fmt: skip


class Case:
    """Sequences in random pages; decode rows pick some, chunks extend others."""

    def __init__(self, spec: Spec, dtype: torch.dtype, decode: list[int], chunks: list[tuple[int, int]], seed: int = 0):
        torch.manual_seed(seed)
        self.spec = spec
        self.lengths = [*decode, *(start + length for start, length in chunks)]
        counts = [-(-n // PAGE) for n in self.lengths]
        spare = torch.zeros(1, dtype=torch.int32)  # nobody has page 0, of which masks make use
        order = torch.cat([1 + torch.randperm(sum(counts) + 2, dtype=torch.int32), spare])
        parts = torch.split(order[: sum(counts)], counts)
        self.kv = KVCache(spec, len(order), PAGE, DEVICE, dtype)
        self.kv.storage.fill_(float("nan"))  # what no sequence owns must not enter
        for pages, length in zip(parts, self.lengths, strict=True):
            at = (pages.long()[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length].to(DEVICE)
            self.kv.rows[0][at] = torch.randn(length, 2, spec.kv_heads, spec.head_dim, device=DEVICE).to(dtype)
        self.parts = [p.to(DEVICE) for p in parts]
        rows = torch.randperm(len(decode) + 2)[: len(decode)]  # rows of a larger table, in any order
        tables = torch.full((len(decode) + 2, max([*counts[: len(decode)], 1])), len(order) - 1, dtype=torch.int32)
        for row, pages in zip(rows.tolist(), parts, strict=False):
            tables[row, : len(pages)] = pages
        tokens = len(decode) + sum(length for _, length in chunks)
        empty = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
        self.batch = Batch(
            ids=empty, positions=empty, kv_slots=empty, decode_tables=tables.to(DEVICE),
            decode_rows=rows.int().to(DEVICE), decode_lengths=torch.tensor(decode, dtype=torch.int32, device=DEVICE),
            max_decode_length=max(decode, default=0), logit_rows=None,
            chunks=[
                Chunk(start, length, pages)
                for (start, length), pages in zip(chunks, self.parts[len(decode) :], strict=True)
            ],
        )  # fmt: skip
        heads = spec.heads + 2 * spec.kv_heads
        self.q = torch.randn(tokens, heads, spec.head_dim, device=DEVICE).to(dtype)[:, : spec.heads]  # a strided view
        self.spans = [(i, n - 1, 1) for i, n in enumerate(decode)]
        self.spans += [(len(decode) + i, start, length) for i, (start, length) in enumerate(chunks)]

    def expected(self) -> torch.Tensor:
        """Softmax attention in float32, sequence by sequence."""
        spec, out, row = self.spec, [], 0
        window = spec.window(0)
        for number, start, length in self.spans:
            at = (self.parts[number].long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()
            k, v = self.kv.rows[0][at[: start + length]].float().repeat_interleave(spec.group, 2).unbind(1)
            q = self.q[row : row + length].float()
            scores = torch.einsum("qhd,khd->hqk", q, k) * spec.attention_scale
            if spec.attn_softcap is not None:
                scores = spec.attn_softcap * torch.tanh(scores / spec.attn_softcap)
            distance = torch.arange(start, start + length)[:, None] - torch.arange(start + length)[None]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            scores.masked_fill_(hidden.to(DEVICE), float("-inf"))
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
            row += length
        return torch.cat(out)

    def check(self, backend: object, limit: float) -> None:
        plan = backend.plan(self.batch, self.kv, self.spec)  # type: ignore[attr-defined]
        expected = self.expected()
        for _ in range(2):  # the second time with what the first left in the workspace
            got = plan.run(0, self.q)
            assert got.dtype == self.q.dtype and got.shape == expected.shape
            assert (got.float() - expected).norm() / expected.norm() < limit
            assert (got.float() - expected).abs().max() < 20 * limit


SHAPES = [(1, 2, 64), (4, 1, 128), (7, 2, 64), (8, 1, 256), (3, 2, 24)]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


DECODED = [(*shape, dtype) for dtype in DTYPES for shape in SHAPES if CUDA or dtype is torch.float32 or shape[0] == 7]
"""The interpreter takes a second for one of them."""


@pytest.mark.parametrize(("group", "kv_heads", "head_dim", "dtype"), DECODED)
def test_decode(group: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [1, 16, 17, 8192, 700, 64] if CUDA else [1, 16, 150]
    Case(spec_of(group, kv_heads, head_dim), dtype, lengths, []).check(TritonAttention(), LIMIT[dtype])


AHEAD = Launch(16, 4, 2, 132, 4, ahead=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
def test_keys_loaded_ahead(dtype: torch.dtype, window: int | None) -> None:
    """The newest key in a block loaded before it is written or in a later one, the only key, the first of a block."""
    lengths = [1, 17, 32, 33, 100, *([129, 130, 8192, 700] if CUDA else [])]
    for launch in (AHEAD, replace(AHEAD, most=1)):
        Case(spec_of(7, 2 if CUDA else 1, 64, window), dtype, lengths, []).check(TritonAttention(launch), LIMIT[dtype])


def check_rotation(spec: Spec, lengths: list[int], dtype: torch.dtype, plan_of: Callable[[Case], TritonPlan]) -> None:
    """Heads as the QKV product leaves them: the results and the cache are those of rotating first.

    A row that is done has a length of one, and what is computed of it goes to another slot than its first.
    """
    case, rows = Case(spec, dtype, lengths, []), len(lengths)
    heads = torch.randn(rows, spec.heads + 2 * spec.kv_heads, spec.head_dim, device=DEVICE).to(dtype)
    at = [int(pages[(n - 1) // PAGE]) * PAGE + (n - 1) % PAGE for pages, n in zip(case.parts, lengths, strict=True)]
    slots, rope = torch.tensor(at, device=DEVICE), spec.rope
    assert rope is not None
    ops, positions = TritonOps(DEVICE), torch.tensor(lengths, device=DEVICE) - 1
    table = ops.rotation(positions, inverse_frequencies(rope).to(DEVICE), rope, dtype)
    case.q = ops.qk_norm_rope_and_write(heads.clone(), None, 0.0, table, spec, slots, case.kv.rows[0])
    expected, written = case.expected(), case.kv.rows[0][slots].clone()
    plan = plan_of(case)
    assert plan.rotates
    first, owned = at[0], set(torch.cat(case.parts).tolist())
    scratch = next(page for page in range(case.kv.num_pages) if page not in owned) * PAGE
    for slot in (first, scratch):
        slots[0] = slot
        case.kv.rows[0][slots] = float("nan")
        before = case.kv.rows[0][first].clone()
        got = plan.run(0, Unrotated(heads, table, slots))
        assert (got.float() - expected).norm() / expected.norm() < LIMIT[dtype]
        torch.testing.assert_close(case.kv.rows[0][slots], written, rtol=1e-2, atol=1e-3)
        assert slot == first or torch.equal(case.kv.rows[0][first], before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("launch", [None, AHEAD, replace(AHEAD, most=1), Launch(32, 4, 2, 132, 2)], ids=str)
@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (24, 20)])
def test_it_rotates_and_writes(head_dim: int, window: int | None, launch: Launch | None, dtype: torch.dtype) -> None:
    spec = replace(spec_of(7, 2 if CUDA else 1, head_dim, window), rope=Rope(1e4, head_dim))
    lengths = [1, 17, 32, 33, 100, *([129, 8192] if CUDA else [])]

    def plan_of(case: Case) -> TritonPlan:
        return replace(TritonAttention(launch).plan(case.batch, case.kv, case.spec), pdl=False)

    check_rotation(spec, lengths, dtype, plan_of)


def test_who_rotates() -> None:
    """Not beside chunks, with PDL, nor into a cache that saturates; nor are heads left that no attention rotates."""
    spec = replace(spec_of(2, 1, 64), rope=Rope(1e4, 64))
    case, backend = Case(spec, torch.float16, [5, 40], [(0, 20)]), TritonAttention()
    rows = Case(spec, torch.float16, [5, 40], [])
    narrow = KVCache(spec, rows.kv.num_pages, PAGE, DEVICE, torch.float8_e4m3fn, torch.float16)
    plain, beside, saturating = (
        replace(backend.plan(one.batch, kv, spec), pdl=False)
        for one, kv in ((rows, rows.kv), (case, case.kv), (rows, narrow))
    )
    assert plain.rotates and not replace(plain, pdl=True).rotates
    assert not beside.rotates and not saturating.rotates
    ops, x, weight = TritonOps(DEVICE), torch.randn(2, 32, device=DEVICE), torch.randn(256, 32, device=DEVICE)
    qkv, table = ops.linear(weight, None), torch.randn(2, 2, 32, device=DEVICE)
    slots, cache = torch.arange(2, device=DEVICE), torch.zeros(2, 2, 1, 64, device=DEVICE)
    gains = torch.ones(3, 64, device=DEVICE)
    for rope, qk_norm, rotates, left in (
        (spec.rope, None, True, True), (spec.rope, None, False, False), (spec.rope, gains, True, False),
        (Rope(1e4, 64, interleaved=True), None, True, False), (Rope(1e4, 32), None, True, False),
        (None, None, True, False),
    ):  # fmt: skip
        turns = None if rope is None else table[..., : rope.dim // 2].contiguous()
        found = ops.heads(qkv, x, qk_norm, 1e-6, turns, replace(spec, rope=rope), slots, cache, rotates)
        assert isinstance(found, Unrotated) == left


@pytest.mark.parametrize(("window", "cap"), [(20, None), (None, 5.0), (33, 5.0), (1, None)])
def test_window_and_softcap(window: int | None, cap: float | None) -> None:
    spec = spec_of(2, 2, 32, window, cap)
    Case(spec, torch.float32, [1, 19, 20, 21, 130], [(0, 45), (70, 30)]).check(TritonAttention(), 1e-5)


CHUNKED = list(itertools.product(DTYPES, SHAPES[:3]))
if not CUDA:  # the interpreter takes 10 s for one of them
    CHUNKED = [(torch.float32, (1, 2, 64)), (torch.float16, (4, 1, 128)), (torch.float32, (7, 1, 64))]


@pytest.mark.parametrize(("dtype", "shape"), CHUNKED)
def test_chunks_and_mixed_batches(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    chunks = [(0, 1000), (37, 1), (4000, 513)] if CUDA else [(0, 70), (37, 1), (40, 30)]
    Case(spec_of(*shape), dtype, [5, 40], chunks, seed=1).check(TritonAttention(), LIMIT[dtype])
    Case(spec_of(*shape), dtype, [], chunks[1:], seed=2).check(TritonAttention(), LIMIT[dtype])


def test_splits_are_powers_of_two_that_there_is_room_for() -> None:
    """The merge of a number that is no power of two does not compile; 12 rows of 4 KV heads once gave 11."""
    launches = {launch for table in DECODE.values() for _, launch in table} | {Launch(64, 4, 2, 132, 16)}
    for launch in launches:
        assert launch.programs <= MOST_PROGRAMS and launch.most <= MOST_SPLITS
        for problems in range(2 * MOST_PROGRAMS):
            splits = splits_for(problems, launch)
            assert splits >= 1 and splits & (splits - 1) == 0 and splits <= launch.most
            assert splits == 1 or problems * splits <= launch.programs
        assert splits_for(1, launch) > 1 and splits_for(launch.programs + 1, launch) == 1


def test_the_table_of_launches_is_sound() -> None:
    for head_dim, table in DECODE.items():
        limits = [most for most, _ in table]
        assert limits == sorted(set(limits))
        for most, launch in table:
            assert launch_for(head_dim, most) == launch
        assert launch_for(head_dim, 1 << 20) == table[-1][1]
    for other, like in ((24, 128), (96, 128), (160, 256), (512, 256)):
        assert launch_for(other, 500) == launch_for(like, 500)
    assert launch_for(128, 500) != launch_for(256, 500)
    assert launch_for(128, 4).ahead and not launch_for(128, 4, itemsize=4).ahead
    assert launch_for(128, 500).warps == 2 and launch_for(128, 500, itemsize=4).warps == 4


@pytest.mark.parametrize("rows", [1, 3, 11] if CUDA else [1, 11])
@pytest.mark.parametrize("launch", [Launch(16, 4, 1, 264, 64), Launch(128, 4, 2, 132, 8), Launch(32, 8, 3)], ids=str)
def test_every_launch_gives_the_same(rows: int, launch: Launch) -> None:
    lengths = [1, 40, 129, 33, 7, 64, 65, 100, 3, 2, 31][-rows:]
    dtype = torch.float16
    Case(spec_of(3, 1, 32), dtype, lengths, []).check(TritonAttention(launch), LIMIT[dtype])


def test_more_rows_than_programs_are_not_split() -> None:
    if CUDA:
        Case(spec_of(4, 8, 64), torch.bfloat16, list(range(1, 200)), []).check(TritonAttention(), 1e-2)


def narrowed(case: Case, dtype: torch.dtype) -> KVCache:
    """The case's cache in `dtype`, to which its own is rounded."""
    wide, narrow = case.kv, KVCache(case.spec, case.kv.num_pages, PAGE, DEVICE, dtype, torch.float32)
    narrow.storage.copy_(wide.storage.nan_to_num(0.0).to(dtype))
    wide.storage.copy_(torch.where(wide.storage.isnan(), wide.storage, narrow.storage.float()))
    return narrow


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_narrower_cache(dtype: torch.dtype) -> None:
    """Queries in float32: what is in the cache is exact, and so is the rest."""
    case = Case(spec_of(4, 2, 64), torch.float32, [1, 30, 90], [(20, 30)])
    narrow = narrowed(case, dtype)
    expected = case.expected()
    interpreted = dtype is torch.float16  # the only one of these that Triton's interpreter knows
    backends = [TorchAttention()] + ([TritonAttention()] if CUDA or interpreted else [])
    for backend in backends:
        got = backend.plan(case.batch, narrow, case.spec).run(0, case.q.contiguous())
        assert got.dtype == torch.float32 and (got - expected).norm() / expected.norm() < 1e-5


def test_the_choice_of_backend() -> None:
    cpu, spec = torch.device("cpu"), spec_of(1, 1, 64)
    assert isinstance(make_backend("auto", cpu, spec, torch.float32, torch.float32), TorchAttention)
    with pytest.raises(StartupError, match="needs a GPU"):
        make_backend("triton", cpu, spec, torch.float32, torch.float32)


@pytest.mark.gpu
@pytest.mark.timeout(600)  # its kernels are compiled on first use
@pytest.mark.skipif(not CUDA or importlib.util.find_spec("flashinfer") is None, reason="needs a GPU and flashinfer")
def test_flashinfer() -> None:
    for window, chunks in itertools.product((None,), ([(0, 300), (40, 77)], [])):
        spec = spec_of(7, 4, 128, window)
        case = Case(spec, torch.bfloat16, [1, 33, 500], chunks)
        case.batch.decode_lengths_host = case.batch.decode_lengths.cpu().numpy().astype("int64")
        for name in ("auto", "flashinfer"):
            case.check(when_compiled(make_backend(name, DEVICE, spec, torch.bfloat16, torch.bfloat16)), 1e-2)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not CUDA or importlib.util.find_spec("flashinfer") is None, reason="needs a GPU and flashinfer")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_flashinfer_for_float32(dtype: torch.dtype, limit: float) -> None:
    """A model in float32 with a cache of 16 bits: its queries are rounded, and its results float32 again."""
    spec = spec_of(7, 4, 128)
    case = Case(spec, torch.float32, [1, 33, 500], [(0, 300), (40, 77)])
    narrow = narrowed(case, dtype)
    expected = case.expected()
    case.batch.decode_lengths_host = case.batch.decode_lengths.cpu().numpy().astype("int64")
    for name in ("auto", "flashinfer"):
        backend = when_compiled(make_backend(name, DEVICE, spec, torch.float32, dtype))
        got = backend.plan(case.batch, narrow, spec).run(0, case.q)
        assert got.dtype == torch.float32
        assert (got - expected).norm() / expected.norm() < limit and (got - expected).abs().max() < 20 * limit
    with pytest.raises(StartupError, match="no kernels for this dtype"):
        make_backend("flashinfer", DEVICE, spec, torch.float32, torch.float32)
