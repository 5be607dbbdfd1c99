"""Attention over latents: the GPU's kernel against TorchAttention; on a CPU in Triton's interpreter."""

import pytest
import torch

from actorserve.errors import StartupError
from actorserve.models.attention import TorchAttention, make_backend
from actorserve.models.batch import Batch, Chunk
from actorserve.models.kv_cache import KVCache
from actorserve.models.spec import Mla, Spec

pytest.importorskip("triton")
from actorserve.models.latent_attention import HEADS, MOST_SPLITS, PROGRAMS, LatentAttention, splits_for

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PAGE = 16
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error."""


def spec_of(heads: int, latent: int, rope: int) -> Spec:
    return Spec(
        vocab=10, hidden=8, layers=1, heads=heads, kv_heads=1, head_dim=latent + rope, inter=4, scale=0.11,
        mla=Mla(None, latent, 16, rope, 16),
    )  # fmt: skip


def check(spec: Spec, dtype: torch.dtype, decode: list[int], chunks: list[tuple[int, int]]) -> None:
    """Decode rows of these lengths, in any order of a larger table, and chunks (start, length), in random pages."""
    torch.manual_seed(0)
    counts = [-(-n // PAGE) for n in (*decode, *(start + length for start, length in chunks))]
    order = torch.randperm(sum(counts) + 2, dtype=torch.int32)
    parts = torch.split(order[: sum(counts)], counts)
    kv = KVCache(spec, len(order), PAGE, DEVICE, dtype)
    kv.storage.normal_()
    kv.storage.view(1, len(order), PAGE, -1)[:, order[sum(counts) :].long()] = float("nan")
    rows = torch.randperm(len(decode) + 2)[: len(decode)]
    tables = torch.full((len(decode) + 2, max([*counts[: len(decode)], 1])), int(order[-1]), dtype=torch.int32)
    for row, pages in zip(rows.tolist(), parts, strict=False):
        tables[row, : len(pages)] = pages
    tokens = len(decode) + sum(length for _, length in chunks)
    batch = Batch(
        ids=torch.zeros(tokens, device=DEVICE), positions=torch.zeros(tokens, device=DEVICE),
        kv_slots=torch.zeros(tokens, device=DEVICE), decode_tables=tables.to(DEVICE),
        decode_rows=rows.int().to(DEVICE), decode_lengths=torch.tensor(decode, dtype=torch.int32, device=DEVICE),
        max_decode_length=max(decode, default=0), logit_rows=None,
        chunks=[
            Chunk(start, length, pages.to(DEVICE))
            for (start, length), pages in zip(chunks, parts[len(decode) :], strict=True)
        ],
    )  # fmt: skip
    q = torch.randn(tokens, spec.heads, spec.head_dim, device=DEVICE).to(dtype)
    wide = KVCache(spec, len(order), PAGE, DEVICE, torch.float32)
    wide.storage.copy_(kv.storage)
    expected = TorchAttention().plan(batch, wide, spec).run(0, q.float())
    got = LatentAttention(spec).plan(batch, kv, spec).run(0, q)
    assert got.dtype == dtype and got.shape == expected.shape == (tokens, spec.heads * spec.value_dim)
    assert ((got.float() - expected).norm(dim=1) / expected.norm(dim=1)).max() < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])])
def test_equals_torch(dtype: torch.dtype) -> None:
    check(spec_of(20, 24, 8), dtype, [37], [(0, 3), (20, 7)])
    check(spec_of(6, 32, 8), dtype, [17] if not CUDA else [1] * 300, [])
    if CUDA:
        check(spec_of(128, 512, 64), dtype, [1, 700, 33], [(0, 300), (513, 77)])
        check(spec_of(16, 512, 64), dtype, list(range(1, 200)), [])


def test_splits_are_powers_of_two() -> None:
    for heads in (1, 16, 40, 128):
        for rows in range(1, 300):
            splits = splits_for(rows, heads)
            assert splits & (splits - 1) == 0 and 1 <= splits <= MOST_SPLITS
            assert splits == 1 or rows * -(-heads // HEADS) * splits <= PROGRAMS
    assert splits_for(1, 16) == MOST_SPLITS and splits_for(300, 16) == 1


def test_who_uses_it() -> None:
    spec = spec_of(6, 32, 8)
    assert isinstance(make_backend("auto", torch.device("cuda"), spec, torch.bfloat16, torch.bfloat16), LatentAttention)
    cpu = make_backend("auto", torch.device("cpu"), spec, torch.float32, torch.float32)
    assert isinstance(cpu, TorchAttention)
    with pytest.raises(StartupError, match="flashinfer: not for latent"):
        make_backend("flashinfer", torch.device("cuda"), spec, torch.bfloat16, torch.bfloat16)
