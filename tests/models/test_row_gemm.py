"""One row times quantized weights that come ahead of it: every epilogue, whole tiles and parts, float8 and 4 bits.

On an H100 or H200 for real, elsewhere smaller and in the emulator, which also checks how programs synchronise.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gluon_emulator import Emulated
from test_packed_gemm import part_of
from test_primed_gemm import DEVICE, DTYPE, EPS, HERE, PLAIN, heads_of, randn

from actorserve.models import packed_tiles, row_kernels
from actorserve.models.gemm import MAX_TILES, Heads, Tile, TritonLinear, Unscaled, arrivals, choose
from actorserve.models.layers import Linear
from actorserve.models.packed_gemm import Packed, Scratch, pack_part
from actorserve.models.packed_tiles import PACKED, choices_for
from actorserve.models.rope import inverse_frequencies
from actorserve.models.row_gemm import OneRow
from actorserve.models.spec import Rope, Spec
from actorserve.models.triton_ops import TritonOps

PLAIN_TILE = Tile(8, 64, 32)
FRESH = dict.fromkeys(("x", "squares", "residual"))
"""Arguments that the predecessor writes."""
KINDS = ["fp8-row", "int4-128"]


def test_what_is_left_to_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other heads; other weights, dtypes and GPUs have no such choice."""
    choice, half = OneRow(128, 128, 2, PLAIN_TILE), torch.zeros(2, 2, 1, 128, dtype=torch.float8_e4m3fn)
    for weight in [pack_part(part_of(kind, 256, 512), DTYPE, Scratch(DEVICE), False) for kind in KINDS]:
        assert weight is not None
        assert choice.takes(1, None, "", None, None) and choice.takes(1, None, "", None, heads_of(head_dim=128))
        assert choice.takes(1, None, "silu", None, None)
        for other in ({"interleaved": True}, {"qk_norm": half}, {"table": None}, {"head_dim": 64}, {"kv_rows": half}):
            assert not choice.takes(1, None, "", None, heads_of(**{"head_dim": 128} | other))
        assert not OneRow(64, 128, 2, PLAIN_TILE).takes(1, None, "", None, heads_of(head_dim=128))
        assert OneRow(128, 128, 2, PLAIN_TILE, programs=2).fits(weight)
    monkeypatch.setattr(
        packed_tiles, "PACKED", {(kind, 256, 512): ((1, choice), (8, PLAIN_TILE)) for kind in ("fp8", "int4")}
    )
    for there in (False, True):
        monkeypatch.setattr(packed_tiles, "on_sm90", lambda device, there=there: there)
        for kind, dtype, fits in (
            ("fp8-row", DTYPE, True), ("int4-128", DTYPE, True), ("fp8-row", torch.float16, False),
            ("int4-64", DTYPE, False), ("fp8-128", DTYPE, False),
        ):  # fmt: skip
            weight = pack_part(part_of(kind, 256, 512), dtype, Scratch(DEVICE), False)
            assert weight is not None and choice.fits(weight) == fits
            assert choose(choices_for(weight), 1) == (choice if there and fits else PLAIN_TILE)


def test_the_table_is_sound() -> None:
    """Buffers and x have room in shared memory, and there are counters enough."""
    for (kind, outputs, inputs), choices in PACKED.items():
        for choice in (choice for _, choice in choices if isinstance(choice, OneRow)):
            found = choice.constants(outputs, inputs, gated=outputs > 8 * inputs)
            steps = found["STEPS"] if found["WHOLE"] else -(-found["STEPS"] // choice.split)
            weight = choice.buffers * choice.outputs * choice.depth // (2 if kind == "int4" else 1)
            assert weight + 8 * (steps * choice.depth + 512) < 226 << 10
            assert found["REST"] <= MAX_TILES and outputs % choice.outputs == inputs % choice.depth == 0


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel can be launched here, too."""
    if torch.cuda.is_available() and not HERE:
        pytest.skip("needs a GPU of sm_90, or none")
    if not HERE:
        monkeypatch.setattr(row_kernels, "row_kernel", Emulated(row_kernels.row_kernel, FRESH))


def linear_of(kind: str, outputs: int, inputs: int, choice: OneRow, bias: bool = False) -> tuple[TritonLinear, Linear]:
    """Our map with this configuration, and the same in float32."""
    part = part_of(kind, outputs, inputs)
    part.scales = part.scales.to(DEVICE)
    weight = pack_part(part, DTYPE, Scratch(DEVICE), True)
    assert isinstance(weight, Packed) and choice.fits(weight)
    added = randn(outputs, seed=2) if bias else None
    ours = TritonLinear(weight, added, arrivals(DEVICE), 8, choices=((1, choice),))
    return ours, Linear(part.dequantise(), None if added is None else added.float())


def close(got: Tensor, exact: Tensor) -> None:
    """Results are rounded, by up to 2 ** -9 of each; a GPU's sums of float8 products to 13 bits of the largest."""
    torch.testing.assert_close(got.float(), exact.float(), rtol=2**-7, atol=2**-7 * exact.abs().max().item())


def row(inputs: int, seed: int = 3) -> Tensor:
    """Numbers of all sizes, a few of them large."""
    x = randn(1, inputs, seed=seed) * (2.0 ** randn(1, inputs, seed=seed + 1).float()).to(DTYPE)
    x[0, :: inputs // 4] *= 64
    return x


def half_normed(width: int) -> tuple[Unscaled, Tensor]:
    """What a norm leaves to its successor, and the normed row in float32."""
    r, gain = row(width).float(), 1 + 0.2 * randn(width, seed=4).float()
    squares = torch.stack([p.square().sum(1) for p in r.split(64, 1)], 1)
    return Unscaled((r * gain).to(DTYPE), squares, EPS), PLAIN.rms_norm(r, gain, EPS)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "choice",
    [
        OneRow(128, 256, 2, PLAIN_TILE, 2, 2),  # a whole tile each, and one in two parts
        OneRow(128, 128, 3, PLAIN_TILE, 1, 2),
        OneRow(128, 256, 4, PLAIN_TILE, 3, launch=1),  # all in parts, which have unequal numbers of steps
    ],
)
def test_gated(kind: str, choice: OneRow) -> None:
    ours, exact = linear_of(kind, 384, 1024, choice)
    for time in range(2):
        ours.pdl_rows = 8 * time
        x, normed = half_normed(1024)
        close(ours.gated(x, "silu"), PLAIN.act_mul(exact(normed), "silu"))
        close(ours.gated(x.x, "gelu"), PLAIN.act_mul(exact(x.x.float()), "gelu"))
    assert not ours.arrived.any()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [OneRow(64, 256, 3, PLAIN_TILE, 4), OneRow(128, 512, 1, PLAIN_TILE)])
def test_add(kind: str, choice: OneRow) -> None:
    ours, exact = linear_of(kind, 128, 2560, choice)
    gain = 1 + 0.2 * randn(128, seed=5)
    for scale in (1.0, 0.22):
        x, residual = row(2560), 2 * randn(1, 128, seed=7)
        kept = residual.clone()
        half, new = ours.add(x, residual, scale, gain, EPS)
        assert torch.equal(residual, kept)
        close(new, kept.float() + scale * exact(x.float()))
        assert torch.equal(half.x, (new.float() * gain.float()).to(DTYPE))
        torch.testing.assert_close(half.squares.sum(1), new.float().square().sum(1), rtol=1e-5, atol=1e-5)
    assert not ours.arrived.any()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_heads(kind: str, bias: bool) -> None:
    heads, kv_heads, rope = 3, 2, Rope(1e6, 128)
    spec = Spec(99, 512, 1, heads, kv_heads, 128, 64, rope=rope)
    ours, exact = linear_of(kind, (heads + 2 * kv_heads) * 128, 512, OneRow(128, 256, 2, PLAIN_TILE, 2), bias)
    slots = torch.tensor([3], device=DEVICE, dtype=torch.int32)
    cache = torch.zeros(5, 2, kv_heads, 128, dtype=DTYPE, device=DEVICE)
    positions, frequencies = torch.tensor([37], device=DEVICE), inverse_frequencies(rope).to(DEVICE)
    table = TritonOps(DEVICE).rotation(positions, frequencies, rope, DTYPE)
    exact_table = PLAIN.rotation(positions, frequencies, rope, torch.float32)
    x, normed = half_normed(512)
    queries = ours.heads(x, Heads(heads, kv_heads, 128, False, None, EPS, table, slots, cache))
    exact_cache = cache.float().zero_()
    close(queries, PLAIN.heads(exact, normed, None, EPS, exact_table, spec, slots, exact_cache))
    close(cache, exact_cache)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("kind", KINDS)
def test_precision(kind: str) -> None:
    """Nothing but the sums rounds: x is one of bfloat16, zero points and scales are exact. And what is not finite
    stays so."""
    ours, exact = linear_of(kind, 64, 512, OneRow(64, 128, 2, PLAIN_TILE))
    ours.dtype = torch.float32
    x = row(512)
    got, expected = ours(x), exact(x.float())
    assert (got - expected).norm() / expected.norm() < (2e-3 if HERE else 1e-5)
    assert not ours(torch.zeros_like(x)).any()
    for bad in (float("inf"), float("nan")):
        x[0, 5] = bad
        assert not ours(x).isfinite().any()
