"""GEMMs whose weight waits in shared memory: what is left to other kernels, and their results.

On an H100 or H200 for real, elsewhere smaller and in the emulator, which also checks how they synchronise.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gluon_emulator import Emulated

from actorserve.models import gemm, primed_kernels
from actorserve.models.gemm import Heads, Tile, TritonLinear, Unscaled, arrivals, choose, unprimed
from actorserve.models.layers import Linear, TorchOps
from actorserve.models.primed_gemm import MOST_PARTS, MOST_ROWS, Primed, can_prime
from actorserve.models.rope import inverse_frequencies
from actorserve.models.spec import Rope, Spec
from actorserve.models.triton_ops import TritonOps

PLAIN_TILE = Tile(16, 64, 64)
WHOLE = Primed(16, 64, 128, PLAIN_TILE)
GATED = Primed(64, 64, 64, PLAIN_TILE, 3, 2)
SPLIT = Primed(64, 64, 128, PLAIN_TILE, 2, 3, 8)
HERE = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = torch.device("cuda" if HERE else "cpu")
DTYPE = torch.bfloat16
PLAIN = TorchOps()
EPS = 1e-5
ROWS = (1, 5, 16, 17, 33, 64)
FRESH = dict.fromkeys(("x_blocks", "squares", "residual"))
"""Arguments that the predecessor writes."""


def rows_of(all_of_them: bool) -> tuple[int, ...]:
    """The emulator takes some for what differs in a number or a function."""
    return ROWS if HERE or all_of_them else (17,)


def heads_of(**changes: object) -> Heads:
    cache = torch.zeros(2, 2, 1, 64, dtype=DTYPE)
    given = {"heads": 1, "kv_heads": 1, "head_dim": 64, "interleaved": False, "qk_norm": None, "eps": EPS}
    given |= {"table": cache, "kv_slots": cache, "kv_rows": cache}
    return Heads(**(given | changes))  # type: ignore[arg-type]


def test_what_has_no_kernel_is_left_to_a_tile() -> None:
    add, heads = object(), heads_of()
    epilogues = (("", None, None), ("silu", None, None), ("", add, None), ("", None, heads))
    taken = [[primed.takes(64, None, *epilogue) for epilogue in epilogues] for primed in (WHOLE, GATED, SPLIT)]
    assert taken == [[False, False, True, True], [False, True, False, False], [False, False, True, False]]
    half = torch.zeros(2, 2, 1, 64, dtype=torch.float8_e4m3fn)
    for other in ({"interleaved": True}, {"qk_norm": half}, {"table": None}, {"head_dim": 128}, {"kv_rows": half}):
        assert not WHOLE.takes(64, None, "", None, heads_of(**other))
    assert unprimed(((1, None), (64, GATED))) == ((1, None), (64, PLAIN_TILE))


@pytest.mark.parametrize("dtype", [DTYPE, torch.float16])
def test_only_bfloat16_on_one_kind_of_gpu_has_them(dtype: torch.dtype) -> None:
    weight = torch.zeros(64, 128, dtype=dtype, device=DEVICE)
    arrived = arrivals(DEVICE)
    ours = TritonLinear(weight, None, arrived, 0, gemms={(64, 128): ((64, SPLIT),)})
    assert ours.tile(3) == (SPLIT if HERE and dtype == DTYPE else PLAIN_TILE)
    assert can_prime(weight) == (HERE and dtype == DTYPE)
    biased = TritonLinear(weight, weight[:, 0].contiguous(), arrived, 0, gemms={(64, 128): ((64, SPLIT),)})
    assert biased.tile(3) == PLAIN_TILE


def test_the_table_is_sound() -> None:
    for (outputs, inputs), choices in gemm.GEMMS.items():
        primed = choose(choices, MOST_ROWS)
        if isinstance(primed, Primed):
            assert primed.fits(outputs, inputs)
            assert outputs // primed.outputs <= MOST_PARTS or primed.weights  # its sums of squares are read
            whole = (primed.rows + primed.outputs) * inputs
            some = primed.weights * primed.outputs * primed.depth + primed.inputs * MOST_ROWS * primed.depth
            assert 2 * (some or whole) <= 226 << 10


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, DTYPE)


def linear_of(outputs: int, inputs: int, primed: Primed, bias: bool = False) -> tuple[TritonLinear, Linear]:
    """Our map with this configuration, and the same in float32."""
    weight = randn(outputs, inputs, seed=1, scale=inputs**-0.5)
    added = randn(outputs, seed=2) if bias else None
    ours = TritonLinear(weight, added, arrivals(DEVICE), MOST_ROWS, gemms={(outputs, inputs): ((MOST_ROWS, primed),)})
    return ours, Linear(weight.float(), None if added is None else added.float())


def close(got: Tensor, exact: Tensor, ulps: int = 3) -> None:
    torch.testing.assert_close(got.float(), exact.float(), rtol=ulps * 2**-7, atol=ulps * 2**-7)


def half_normed(rows: int, width: int) -> tuple[Unscaled, Tensor]:
    """What a norm leaves to its successor, and the normed rows in float32."""
    r, gain = 3 * randn(rows, width, seed=3).float(), 1 + 0.2 * randn(width, seed=4).float()
    parts = [p.square().sum(1) for p in r.split(64, 1)]
    return Unscaled((r * gain).to(DTYPE), torch.stack(parts, 1), EPS), PLAIN.rms_norm(r, gain, EPS)


@pytest.fixture
def primes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels can be launched here, too."""
    if torch.cuda.is_available() and not HERE:
        pytest.skip("needs a GPU of sm_90, or none")
    if not HERE:
        monkeypatch.setattr(gemm, "can_prime", lambda weight: True)
        for name in ("whole_kernel", "gated_kernel", "split_kernel"):
            monkeypatch.setattr(primed_kernels, name, Emulated(getattr(primed_kernels, name), FRESH))


@pytest.mark.usefixtures("primes")
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_gated(act: str) -> None:
    for primed in (GATED, Primed(64, 128, 128, PLAIN_TILE, 3, 3)):
        ours, exact = linear_of(512 if HERE else 256, 896, primed)
        for rows in rows_of(act == "silu"):
            x, normed = half_normed(rows, 896)
            close(ours.gated(x, act), PLAIN.act_mul(exact(normed), act), 6)
            plain = x.x
            close(ours.gated(plain, act), PLAIN.act_mul(exact(plain.float()), act), 6)


@pytest.mark.usefixtures("primes")
@pytest.mark.parametrize(
    "primed", [WHOLE, Primed(32, 64, 64, PLAIN_TILE), SPLIT, Primed(64, 32, 64, PLAIN_TILE, 4, 4, 4)]
)
@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_add(primed: Primed, scale: float) -> None:
    inputs = 2432 if primed.weights else 896  # 19 and 38 steps: not as many for each part
    outputs = 896 if HERE else 128
    ours, exact = linear_of(outputs, inputs, primed)
    gain = 1 + 0.2 * randn(outputs, seed=5)
    for rows in rows_of(scale == 1):
        x, residual = randn(rows, inputs, seed=6), 2 * randn(rows, outputs, seed=7)
        kept = residual.clone()
        for time in range(3 if HERE else 2):
            ours.pdl_rows = MOST_ROWS if time else 0
            half, new = ours.add(x, residual, scale, gain, EPS)
            assert torch.equal(residual, kept)
            close(new, kept.float() + scale * exact(x.float()))
            assert torch.equal(half.x, (new.float() * gain.float()).to(DTYPE))
            torch.testing.assert_close(half.squares.sum(1), new.float().square().sum(1), rtol=1e-5, atol=1e-5)
    assert not ours.arrived.any()


@pytest.mark.usefixtures("primes")
@pytest.mark.parametrize("primed", [WHOLE, Primed(32, 64, 64, PLAIN_TILE)])
@pytest.mark.parametrize("bias", [False, True])
def test_heads(primed: Primed, bias: bool) -> None:
    heads, kv_heads, rope = (5 if HERE else 3), 2, Rope(1e6, 64)
    spec = Spec(99, 896, 1, heads, kv_heads, 64, 64, rope=rope)
    ours, exact = linear_of((heads + 2 * kv_heads) * 64, 896, primed, bias)
    frequencies = inverse_frequencies(rope).to(DEVICE)
    for rows in rows_of(bias):
        slots = torch.randperm(2 * rows)[:rows].to(DEVICE, torch.int32)
        cache = torch.zeros(2 * rows, 2, kv_heads, 64, dtype=DTYPE, device=DEVICE)
        positions = torch.arange(rows, device=DEVICE) * 37
        table = TritonOps(DEVICE).rotation(positions, frequencies, rope, DTYPE)
        exact_table = PLAIN.rotation(positions, frequencies, rope, torch.float32)
        x, normed = half_normed(rows, 896)
        for given, exact_x in ((x, normed), (x.x, x.x.float())):
            queries = ours.heads(given, Heads(heads, kv_heads, 64, False, None, EPS, table, slots, cache))
            exact_cache = cache.float().zero_()
            expected = PLAIN.heads(exact, exact_x, None, EPS, exact_table, spec, slots, exact_cache)
            close(queries, expected, 6)
            close(cache, exact_cache, 6)
