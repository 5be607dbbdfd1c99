"""TritonOps against TorchOps in float32: every variant of the kernels between GEMMs, and where they write.

In Triton's interpreter where there is no GPU (float16 and float32); on one also in bfloat16, larger, and in a CUDA
graph.
"""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from actorserve.models import gemm
from actorserve.models.families import spec_of
from actorserve.models.gemm import TritonLinear
from actorserve.models.layers import ACTIVATIONS, TorchOps
from actorserve.models.rope import inverse_frequencies
from actorserve.models.shapes import KNOWN
from actorserve.models.spec import Rope, RopeScaling, Spec
from actorserve.models.split_linear import STACKED_ROWS, SplitLinear, split
from actorserve.models.triton_ops import TritonOps, pdl_rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if CUDA else [])]
ULP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}
OPS = TritonOps(DEVICE)
PLAIN = TorchOps()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: Tensor, exact: Tensor) -> None:
    """`got` is the float32 `exact` rounded to its dtype, but for the last place (of about the largest terms)."""
    ulp = ULP[got.dtype]
    torch.testing.assert_close(got.float(), exact.float(), rtol=ulp, atol=ulp)


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("dim", [12, 64])
def test_rotation(dim: int, factor: float) -> None:
    scaling = RopeScaling("yarn", 4.0, original_max_position=4096, attention_factor=factor)
    rope = Rope(1e6, dim, scaling=scaling)
    frequencies = inverse_frequencies(rope).to(DEVICE)
    frequencies[0] = 1.0
    positions = torch.tensor([0, 1, 5, 1023, 32767, 131071, 131072, 99999], device=DEVICE)
    for p in (positions, positions.int()):
        table = OPS.rotation(p, frequencies, rope, torch.bfloat16)
        assert table.dtype == torch.float32 and table.shape == (8, 2, dim // 2)
        angles = positions.float()[:, None] * frequencies
        torch.testing.assert_close(table[:, 0], angles.cos() * factor, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(table[:, 1], angles.sin() * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 576, 3584, 16384])
def test_norm(width: int, dtype: torch.dtype) -> None:
    rows = 129 if CUDA else 2
    x, weight = randn(rows, width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    close(OPS.rms_norm(x, weight, 1e-6), PLAIN.rms_norm(x.float(), weight.float(), 1e-6))
    delta = randn(rows, width, dtype=dtype, seed=2)
    for scale in (1.0, 0.22):
        kept = x.clone()
        y, residual = OPS.add_rms_norm(delta, x, scale, weight, 1e-5)
        close(residual, x.float() + scale * delta.float())
        close(y, PLAIN.rms_norm(residual.float(), weight.float(), 1e-5))
        assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_a_product_in_parts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The parts' sum is rounded as the product is, so both ways give the same; where they are few rows it is whole."""
    monkeypatch.setitem(gemm.PARTS, (80, 96), ((2, 1), (4, 3)))
    weight, gain, bias = randn(80, 96, dtype=dtype), randn(80, dtype=dtype, seed=1), randn(80, dtype=dtype, seed=2)
    linear = TritonLinear(weight, None, OPS.arrived, 0)
    assert [linear.parts(rows) for rows in (1, 2, 3, 4, 5)] == [1, 1, 3, 3, 1]
    assert TritonLinear(weight, bias, OPS.arrived, 0).parts(3) == 1
    assert TritonLinear(weight[:64].contiguous(), None, OPS.arrived, 0).parts(3) == 1
    for rows in (2, 4, 5):
        x, residual = randn(rows, 96, dtype=dtype, seed=3), randn(rows, 80, dtype=dtype, seed=4)
        exact = x.float() @ weight.float().T
        if linear.parts(rows) > 1:
            parts = linear.in_parts(x, 3)
            assert parts.dtype == torch.float32
            torch.testing.assert_close(parts.sum(0), exact, rtol=1e-4, atol=1e-4)
        y, new = OPS.add_norm(linear, x, residual, 0.5, gain, 1e-6, None)
        torch.testing.assert_close(
            new.float(), residual.float() + 0.5 * exact, rtol=2 * ULP[dtype], atol=8 * ULP[dtype]
        )
        close(y, PLAIN.rms_norm(new.float(), gain.float(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy; 1 / inf is meant
def test_act_mul(act: str, dtype: torch.dtype) -> None:
    for width in (40, 1500):
        gate_up = 3 * randn(3, 2 * width, dtype=dtype)
        exact = PLAIN.act_mul(gate_up.float(), act)
        got = OPS.act_mul(gate_up, act)
        assert got.shape == (3, width)
        torch.testing.assert_close(got.float(), exact, rtol=2 * ULP[dtype], atol=4 * ULP[dtype])  # 1 + erf cancels


ROPES = [
    (16, Rope(1e4, 16)),
    (16, Rope(1e4, 16, interleaved=True)),
    (16, Rope(1e4, 8)),
    (16, Rope(1e4, 8, interleaved=True)),
    (24, Rope(1e4, 12)),  # no powers of two
    (24, None),
    (64, Rope(1e4, 64)),
    (128, Rope(1e6, 128)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("head_dim", "rope"), ROPES)
def test_rope_and_write(head_dim: int, rope: Rope | None, normed: bool, dtype: torch.dtype) -> None:
    for heads, kv_heads, tokens in ((7, 1, 3), (4, 4, 2), *([(28, 4, 300)] if CUDA else [])):
        spec = Spec(99, 64, 1, heads, kv_heads, head_dim, 64, rope=rope)
        qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
        weight = 1 + 0.3 * randn(heads + kv_heads, head_dim, dtype=dtype, seed=1) if normed else None
        slots = torch.randperm(2 * tokens)[:tokens].to(DEVICE)
        cache = torch.zeros(2 * tokens, 2, kv_heads, head_dim, dtype=dtype, device=DEVICE)
        exact, exact_cache = qkv.float(), cache.float()
        table = exact_table = None
        if rope is not None:
            positions = torch.randint(0, 4000, (tokens,)).to(DEVICE)
            frequencies = inverse_frequencies(rope).to(DEVICE)
            table = OPS.rotation(positions, frequencies, rope, dtype)
            exact_table = PLAIN.rotation(positions, frequencies, rope, torch.float32)
        exact_weight = None if weight is None else weight.float()
        exact_q = PLAIN.qk_norm_rope_and_write(exact, exact_weight, 1e-6, exact_table, spec, slots, exact_cache)
        q = OPS.qk_norm_rope_and_write(qkv, weight, 1e-6, table, spec, slots.int(), cache)
        assert q.shape == (tokens, heads, head_dim)
        tolerance = {"rtol": 2 * ULP[dtype], "atol": 4 * ULP[dtype]}
        torch.testing.assert_close(q.float(), exact_q, **tolerance)
        torch.testing.assert_close(cache.float(), exact_cache, **tolerance)
        assert torch.equal(cache[slots, 1], qkv[:, heads + kv_heads :])


@pytest.mark.parametrize("sections", [(16, 24, 24), (3, 0, 5), (1, 2, 1)])
def test_rotation_by_three_positions(sections: tuple[int, int, int]) -> None:
    rope = Rope(1e4, 2 * sum(sections), sections=sections)
    frequencies = inverse_frequencies(rope).to(DEVICE)
    positions = torch.randint(0, 4000, (3, 5)).to(DEVICE)
    table = OPS.rotation(positions, frequencies, rope, torch.bfloat16)
    for token in range(5):
        turns = torch.cat([positions[i, token].expand(pairs) for i, pairs in enumerate(sections)]).float() * frequencies
        torch.testing.assert_close(table[token], torch.stack([turns.cos(), turns.sin()]), rtol=1e-3, atol=1e-4)
    cos, sin = PLAIN.rotation(positions, frequencies, rope, torch.float32)
    torch.testing.assert_close(table[:, 0], cos[:, 0, : sum(sections)], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(table[:, 1], sin[:, 0, sum(sections) :], rtol=1e-3, atol=1e-4)
    alike = OPS.rotation(positions[:1].expand(3, -1).contiguous(), frequencies, rope, torch.bfloat16)
    assert torch.equal(alike, OPS.rotation(positions[0], frequencies, rope, torch.bfloat16))


@pytest.mark.parametrize("interleaved", [False, True])
def test_layers_without_rope_and_tokens_that_share_a_slot(interleaved: bool) -> None:
    """A layer without a table rotates nothing, although the model has rope; padding rows write one scratch slot."""
    spec = Spec(99, 64, 1, 2, 2, 16, 64, rope=Rope(1e4, 16, interleaved))
    qkv = randn(3, 6, 16, dtype=torch.float16)
    cache = torch.zeros(9, 2, 2, 16, dtype=torch.float16, device=DEVICE)
    kept = qkv.clone()
    q = OPS.qk_norm_rope_and_write(qkv, None, 0.0, None, spec, torch.tensor([7, 8, 8], device=DEVICE), cache)
    assert torch.equal(q, kept[:, :2]) and torch.equal(qkv, kept)
    assert torch.equal(cache[7].flatten(0, 1), kept[0, 2:])
    assert not cache[:7].any()


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def fp8_caches(values: Tensor, spec: Spec, rope: Rope | None, dtype: torch.dtype = FLOAT8[0]) -> list[Tensor]:
    """What ours and the reference's caches hold of values [T, H + 2K, D], as float32."""
    slots = torch.arange(len(values), device=DEVICE)
    caches = []
    for ops, qkv in ((OPS, values.clone()), (PLAIN, values.float())):
        shape = (len(values), 2, spec.kv_heads, spec.head_dim)
        cache = torch.zeros(shape, dtype=dtype, device=DEVICE)
        table = ops.rotation(slots, inverse_frequencies(rope).to(DEVICE), rope, qkv.dtype) if rope else None
        ops.qk_norm_rope_and_write(qkv, None, 0.0, table, spec, slots, cache)
        caches.append(cache.float())
    return caches


@pytest.mark.parametrize("dtype", FLOAT8)
def test_fp8_cache_saturates(dtype: torch.dtype) -> None:
    """On numbers that need no rounding: the interpreter's loses the carry into the exponent."""
    spec, limit = Spec(99, 64, 1, 2, 2, 16, 64), torch.finfo(dtype).max
    values = torch.linspace(-1.1 * limit, 1.1 * limit, 6 * 6 * 16, device=DEVICE).view(6, 6, 16)
    representable = values.clamp(-limit, limit).to(dtype).float()
    values = torch.where(values.abs() > limit, values, representable).to(torch.float16)
    ours, exact = fp8_caches(values, spec, None, dtype)
    assert torch.equal(ours, exact) and ours.abs().max() == limit


@pytest.mark.skipif(not CUDA, reason="the interpreter does not round to fp8 as a GPU does")
@pytest.mark.parametrize("interleaved", [False, True])
def test_fp8_cache_rounds_once(interleaved: bool) -> None:
    rope = Rope(1e4, 64, interleaved)
    spec = Spec(99, 64, 1, 8, 2, 64, 64, rope=rope)
    ours, exact = fp8_caches(100 * randn(300, 12, 64, dtype=torch.bfloat16), spec, rope)
    torch.testing.assert_close(ours, exact, rtol=1 / 8, atol=2**-9)
    assert (ours != exact).float().mean() < 1e-3  # a tie now and then


def test_no_tokens() -> None:
    empty = torch.empty(0, 64, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(64, dtype=torch.float16, device=DEVICE)
    assert OPS.add_rms_norm(empty, empty, 1.0, weight, 1e-6)[0].shape == (0, 64)
    assert OPS.act_mul(empty, "silu").shape == (0, 32)


def test_up_to_how_many_rows_kernels_overlap() -> None:
    """More where gate-up is a stream, and its weight not quantized, or a Wide; else by the width."""
    large, small = spec_of(KNOWN["qwen2-7b"]), spec_of(KNOWN["qwen2-0.5b"])
    assert (pdl_rows(large), pdl_rows(large, dense=False), pdl_rows(small)) == (64, 16, 64)
    assert pdl_rows(large, dense=False, wide=32) == 32 and pdl_rows(large, dense=False, wide=8) == 16


@pytest.mark.skipif(not CUDA, reason="PDL is the GPU's")
@pytest.mark.parametrize("pdl_rows", [0, 16, 256])
@pytest.mark.parametrize("rows", [1, 33, 256])
def test_a_chain_in_a_graph(rows: int, pdl_rows: int) -> None:
    """Kernels that overlap give what they give one after another, at every replay."""
    hidden, inter = 896, 1000
    ops, plain = TritonOps(DEVICE, pdl_rows), TritonOps(DEVICE, 0)
    gate_up, down = (math.sqrt(1 / n) * randn(m, n, dtype=torch.bfloat16) for m, n in ((2000, 896), (896, 1000)))
    weight = torch.ones(hidden, dtype=torch.bfloat16, device=DEVICE)

    def chain(o: TritonOps, x: Tensor) -> Tensor:
        residual = x
        for _ in range(8):
            x, residual = o.add_rms_norm(x, residual, 1.0, weight, 1e-6)
            x = o.linear(down, None)(o.act_mul(o.linear(gate_up, None)(x), "silu"))
        return x

    assert inter == down.shape[1]
    x = randn(rows, hidden, dtype=torch.bfloat16)
    expected = chain(plain, x)
    chain(ops, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(ops, x)
    graph.replay()
    torch.cuda.synchronize()
    first = out.clone()
    torch.testing.assert_close(first, expected, rtol=2**-6, atol=2**-6)  # cuBLAS may choose otherwise in a graph
    for _ in range(20):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, first)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_every_activation_of_a_spec_has_a_kernel(act: str) -> None:
    assert OPS.act_mul(randn(1, 8), act).shape == (1, 4)


@pytest.mark.parametrize("rows", [0, 1, 7, STACKED_ROWS + 5])
@pytest.mark.parametrize("biased", [False, True])
def test_a_bfloat16_weight_of_float32_inputs(rows: int, biased: bool) -> None:
    """As exact as float32's own product, whatever the inputs' size; of few rows and of many."""
    x = randn(rows, 300) * torch.logspace(-15, 15, 300, device=DEVICE)
    assert torch.equal(split(x).double().sum(0), x.double())  # no bit is lost
    weight, bias = randn(70, 300, dtype=torch.bfloat16, seed=1), randn(70, seed=2) if biased else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    for linear in (SplitLinear(weight, bias), TritonOps(DEVICE, hidden=torch.float32).linear(weight, bias)):
        y = linear(x)
        assert isinstance(linear, SplitLinear) and y.dtype == torch.float32 and y.shape == (rows, 70)
        assert not rows or (y - exact).norm() < 1e-6 * exact.norm()
    head = TritonOps(DEVICE, hidden=torch.float32).head(weight)
    assert torch.equal(head(x), SplitLinear(weight, None)(x))
    assert not isinstance(OPS.linear(weight, bias), SplitLinear)
