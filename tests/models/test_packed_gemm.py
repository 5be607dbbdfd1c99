"""Quantized weights on a GPU against dense products in float32: every kind, groups, epilogues, few rows and many.

In Triton's interpreter where there is no GPU (float16); on one also in bfloat16, larger, and in CUDA graphs.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from packers import CASES, shared_order
from test_quantized_models import quantised
from tiny import Driver
from torch import Tensor

pytest.importorskip("triton")

from actorserve.config import EngineConfig
from actorserve.models import packed_tiles
from actorserve.models.decoder import Decoder
from actorserve.models.families import names_of, spec_of
from actorserve.models.gemm import MAX_TILES, Tile, TritonLinear, arrivals, fits, linear
from actorserve.models.layers import Linear, TorchOps
from actorserve.models.packed_gemm import CHUNK, Float8Rows, Packed, Scratch, pack_part, quantise_rows
from actorserve.models.packed_tiles import PACKED, by_rule, choices_for
from actorserve.models.places import allocate
from actorserve.models.quantization import Scheme, quantization_of
from actorserve.models.rope import inverse_frequencies
from actorserve.models.spec import Rope, Spec
from actorserve.models.triton_attention import TritonAttention
from actorserve.models.triton_ops import TritonOps
from actorserve.models.unpack import FLOAT8, Part, random_part
from actorserve.models.weights import Source, fill, pack, read_config
from actorserve.perf.gemm import packed_table
from actorserve.perf.gemm_tiles import cases, packed_candidates

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = 2e-3
"""Relative error of a product: inputs have 16 bits, sums 32."""
ARRIVED = arrivals(DEVICE)
KINDS = {
    "int4-32": Scheme("awq", 4, 32, symmetric=False),
    "int4-64": Scheme("awq", 4, 64, symmetric=False),
    "int4-128": Scheme("awq", 4, 128, symmetric=False),
    "int4-row": Scheme("gptq", 4),
    "int8-32": Scheme("packed", 8, 32),
    "int8-128": Scheme("packed", 8, 128),
    "int8-row": Scheme("int8", 8),
    "fp8-row": Scheme("fp8", 8, inputs="dynamic"),
    "fp8-128": Scheme("fp8", 8, 128, 128, inputs="dynamic"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


def part_of(kind: str, outputs: int, inputs: int) -> Part:
    """Random codes, and scales that differ."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    part = random_part(KINDS[kind], outputs, inputs, inputs**-0.5, generator)
    factor = 0.5 + torch.rand(part.scales.shape, generator=generator)
    part.scales = (part.scales * factor).half() if "int" in kind else part.scales * factor
    return part.to(DEVICE)


def packed(part: Part, dtype: torch.dtype, quantises: bool = False) -> Packed:
    weight = pack_part(part, dtype, Scratch(DEVICE), quantises)
    assert weight is not None
    return weight


def x_of(rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows(kind: str, dtype: torch.dtype) -> None:
    """Whole and odd sizes, one part and several, tiles of which some are split, a bias."""
    shapes = [(48, 256, 2), (112, 416, 1), *([(4608, 3584, 4), (3584, 18944, 8)] if CUDA else [])]
    for outputs, inputs, split in shapes:
        part = part_of(kind, outputs, inputs)
        weight, dense = packed(part, dtype), part.dequantise()
        bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        depths = [depth for depth in (CHUNK, 2 * CHUNK) if weight.fits(depth)]
        for rows, depth in ((3, depths[0]), *([(1, depths[-1]), (61, depths[-1])] if CUDA else [(1, depths[-1])])):
            x = x_of(rows, inputs, dtype)
            tile = Tile(16 if rows <= 16 else 64, 64, depth, split, 4, 3)
            exact = F.linear(x.float(), dense, bias.float())
            for each in (tile, replace(tile, outputs=16, split=2, whole=2)):
                got = linear(x, weight, bias, each, ARRIVED, False, torch.float32)
                assert error(got, exact) < TOLERANCE / 4
    assert not ARRIVED.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_slices(kind: str, dtype: torch.dtype) -> None:
    """A program's warps with steps of their own, some with fewer than others or none; both halves, and parts, one
    of which may have no step."""
    weight, dense = packed(part_of(kind, 64, 640), dtype), part_of(kind, 64, 640).dequantise()
    x = x_of(3, 640, dtype)
    exact = F.linear(x.float(), dense)
    for slices, split, chunks in ((4, 1, 1), (8, 1, 1), (2, 2, 1), (2, 1, 2), (2, 4, 1)):
        if not weight.fits(chunks * CHUNK, slices):
            continue
        tile = Tile(8, 32, chunks * CHUNK, split, slices, 3, slices=slices)
        got = linear(x, weight, None, tile, ARRIVED, False, torch.float32)
        assert error(got, exact) < TOLERANCE / 4
        gated = linear(x, weight, None, tile, ARRIVED, False, torch.float32, "silu")
        assert error(gated, F.silu(exact[:, :32]) * exact[:, 32:]) < TOLERANCE
    assert weight.fits(CHUNK, 2) and not packed(part_of(kind, 64, 416), dtype).fits(2 * CHUNK, 2)
    assert not ARRIVED.any()


@pytest.mark.parametrize("kind", ["int4-128", "fp8-row"])
def test_a_norm_between_slices(kind: str) -> None:
    """One product adds to the residual, the next one divides by its root mean squares."""
    hidden, rows, dtype = 256, 3, DTYPES[-1]
    weight, dense = packed(part_of(kind, hidden, hidden), dtype), part_of(kind, hidden, hidden).dequantise()
    x, residual = x_of(rows, hidden, dtype), x_of(rows + 1, hidden, dtype)[1:]
    gain = 1 + x_of(1, hidden, dtype)[0] / 4
    after = residual.float() + 0.5 * F.linear(x.float(), dense)
    exact = F.linear(F.rms_norm(after, (hidden,), gain.float(), 1e-5), dense)
    tile = Tile(8, 32, CHUNK, 1, 2, 8, slices=2)
    half, new = TritonLinear(weight, None, ARRIVED, 0, choices=((8, tile),)).add(x, residual, 0.5, gain, 1e-5)
    limit = TOLERANCE if dtype == torch.float16 else 8 * TOLERANCE  # inputs of the second product are rounded
    assert error(new, after) < limit and half.squares.shape == (rows, hidden // 32)
    assert error(linear(half, weight, None, tile, ARRIVED, False, torch.float32), exact) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_exact(kind: str, dtype: torch.dtype) -> None:
    """A weight that is unpacked is the part's, rounded once; zero points of all sizes."""
    outputs, inputs = 32, 224
    part = part_of(kind, outputs, inputs)
    if part.zeros is not None and part.bits == 4:
        part.zeros = (torch.arange(part.zeros.numel()) % 17).to(torch.uint8).view(part.zeros.shape).to(DEVICE)
    weight = packed(part, dtype)
    assert torch.equal(weight.unpacked(), part.dequantise().to(dtype))
    x = x_of(2, inputs, dtype)
    got = linear(x, weight, None, Tile(16, 16, CHUNK), ARRIVED, False, torch.float32)
    assert error(got, F.linear(x.float(), part.dequantise())) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4-128", "int8-row"])
def test_many_rows(kind: str, dtype: torch.dtype) -> None:
    """A weight that is unpacked is rounded, by up to 2 ** -9 in bfloat16, and so are results, alone 1.7e-3 in norm."""
    part = part_of(kind, 64, 256)
    weight, bias = packed(part, dtype), torch.ones(64, dtype=dtype, device=DEVICE)
    ours = TritonLinear(weight, bias, ARRIVED, 0, choices=())
    x = x_of(70, 256, dtype)
    exact = F.linear(x.float(), part.dequantise(), bias.float())
    wide = TritonLinear(weight, bias, ARRIVED, 0, torch.float32, choices=())(x) if CUDA else ours(x)
    assert error(wide, exact) < TOLERANCE
    assert error(ours(x), wide) < (1.8e-3 if dtype == torch.bfloat16 else 3e-4), "rounded once"
    assert ours(x[:0]).shape == (0, 64)


def rounded_rows(x: Tensor, group: int, static: float | None = None) -> Tensor:
    """x as its float8 form says, float32."""
    parts = x.float().view(len(x), -1, group or x.shape[1])
    scale = parts.abs().amax(2, keepdim=True) / 448 if static is None else torch.tensor(static, device=x.device)
    return ((parts / scale).clamp(-448, 448).to(FLOAT8).float() * scale).view(x.shape)


def straight(rows: Float8Rows) -> Tensor:
    """What quantise_rows says, in its inputs' order."""
    values, scales = rows.values, rows.scales
    plain = values.float().view(len(values), -1, CHUNK, 2).transpose(2, 3).reshape(len(values), -1)
    wide = scales.view(len(values), -1)
    return plain * wide.repeat_interleave(plain.shape[1] // wide.shape[1], 1)


@pytest.mark.parametrize(("group", "static"), [(0, None), (0, 0.005), (128, None)])
def test_quantised_rows(group: int, static: float | None) -> None:
    """Against torch's rounding. The interpreter's forgets to carry: one value in 16 is wrong there."""
    x = x_of(5, 256, torch.float16)
    x[3] = 0
    limit = None if static is None else torch.tensor(static, device=DEVICE)
    rows = quantise_rows(x, 256, group, limit)
    got, expected = straight(rows), rounded_rows(x, group, static)
    expected[3] = 0
    if CUDA:
        assert ((got - expected).abs() <= 2**-3 * expected.abs()).all()  # divisions may round to a neighbour
    assert (got != expected).float().mean() < (0.01 if CUDA else 0.1)
    assert rows.scales.shape == ((5, 2) if group else (5,))
    gate_up = torch.cat((torch.full_like(x, 20.0), x / 20), 1)  # silu(20) is 20
    fused = quantise_rows(gate_up, 256, group, limit, "silu")
    product = 20 * (x / 20)
    again = quantise_rows(product, 256, group, limit)
    assert torch.equal(fused.values.view(torch.uint8), again.values.view(torch.uint8))
    assert torch.equal(fused.scales, again.scales)


@pytest.mark.parametrize("kind", ["fp8-row", "fp8-128"])
def test_a_norm_that_quantises(kind: str) -> None:
    """One kernel between a GEMM and one with float8 inputs, and the result is as with two."""
    ops, (rows, inputs) = TritonOps(DEVICE, fuse=True), (70, 256)
    into = TritonLinear(packed(part_of(kind, 64, inputs), torch.bfloat16, quantises=True), None, ARRIVED, 0)
    assert isinstance(into.weight, Packed) and into.float8_rows(rows) is into.weight
    before = TritonLinear(x_of(inputs, inputs, torch.float16) / 16, None, ARRIVED, 0)
    x, residual, gain = (
        x_of(rows, inputs, torch.float16),
        x_of(rows + 1, inputs, torch.float16)[1:],
        x_of(1, inputs, torch.float16)[0],
    )
    got, new = ops.add_norm(before, x, residual, 0.5, gain, 1e-5, into)
    normed, expected = ops.add_rms_norm(before(x), residual, 0.5, gain, 1e-5)
    again = into.weight.quantised(normed)
    assert isinstance(got, Float8Rows) and torch.equal(new, expected)
    assert (got.values.view(torch.uint8) != again.values.view(torch.uint8)).float().mean() < 0.01
    torch.testing.assert_close(got.scales, again.scales, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["fp8-row", "fp8-128"])
@pytest.mark.parametrize("static", [None, 0.01])
def test_float8_inputs(kind: str, static: float | None) -> None:
    """Many rows of float8 weights: the product of both, quantized."""
    if static is not None and kind == "fp8-128":
        pytest.skip("blocks have no static scales")
    outputs, inputs = 64, 256
    part = part_of(kind, outputs, inputs)
    part.input_scale = None if static is None else torch.tensor(static, device=DEVICE)
    weight = packed(part, torch.bfloat16, quantises=True)
    x = x_of(70, inputs, torch.float16)
    if CUDA:
        x = x.to(torch.bfloat16)
    bias = torch.ones(outputs, device=DEVICE, dtype=x.dtype)
    got = weight.multiply(x, bias, x.dtype)
    rounded = straight(weight.quantised(x))
    exact = rounded @ part.dequantise().t() + 1
    assert error(got, exact) < TOLERANCE
    assert error(got, x.float() @ part.dequantise().t() + 1) < (0.05 if CUDA else 0.15)


@pytest.mark.parametrize("kind", ["fp8-row", "fp8-128"])
def test_few_float8_rows(kind: str) -> None:
    """A weight that is read once, in one part and two; a bias, and both halves with the activation."""
    outputs, inputs, rows = 64, 512, 20
    weight = packed(part_of(kind, outputs, inputs), torch.bfloat16, quantises=True)
    assert not weight.takes_float8(16) and weight.takes_float8(17)
    x = x_of(rows, inputs, torch.bfloat16 if CUDA else torch.float16)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)).to(x)
    quantised = weight.quantised(x)
    exact = straight(quantised) @ part_of(kind, outputs, inputs).dequantise().t()
    for tile in (Tile(32, 32, 2 * CHUNK, 1), Tile(32, 64, 2 * CHUNK, 2), Tile(32, 32, 2 * CHUNK, 2, whole=1)):
        ours = TritonLinear(weight, bias, ARRIVED, 0, torch.float32, choices=((64, tile),))
        assert error(ours(x), exact + bias.float()) < TOLERANCE / 4
        assert torch.equal(ours(x), ours(quantised))
        gated = linear(quantised, weight, None, tile, ARRIVED, False, torch.float32, "silu")
        assert error(gated, F.silu(exact[:, :32]) * exact[:, 32:]) < TOLERANCE


def test_activation_and_quantisation_at_once() -> None:
    """Between gate-up and down of many rows there is one kernel, and the result is as with two."""
    ops = TritonOps(DEVICE)
    dtype = torch.bfloat16 if CUDA else torch.float16
    gate_up = Linear(x_of(128, 64, dtype) / 8, None)
    parts = [part_of("fp8-row", 64, 64)]
    down = ops.quantized(parts, None, torch.bfloat16)
    assert isinstance(down, TritonLinear)
    x = x_of(70, 64, dtype)
    for rows in (3, 70):
        hidden = ops.gated(gate_up, x[:rows], "silu", down)
        assert isinstance(hidden, Float8Rows) == (rows == 70)
    plain = ops.gated(gate_up, x, "silu")
    assert error(down(hidden), down(plain).float()) < 1e-2


def test_what_the_kernels_do_not_take() -> None:
    def takes(part: Part, dtype: torch.dtype = torch.float16) -> bool:
        return pack_part(part, dtype, Scratch(DEVICE), False) is not None

    assert takes(part_of("int4-128", 64, 256))
    assert not takes(part_of("int4-128", 64, 256), torch.float32)
    assert not takes(part_of("int4-128", 72, 256))
    part = part_of("int8-128", 64, 256)
    part.zeros = torch.full((64, 2), 127, dtype=torch.uint8, device=DEVICE)
    assert not takes(part), "8 bits with zero points"
    part = part_of("int4-128", 64, 256)
    part.scales = part.scales.float() * 1e-9
    assert not takes(part), "scales beyond float16"
    part = part_of("int4-128", 64, 288)
    part.group = 96
    assert not takes(part)


def test_tiles_by_rule() -> None:
    for kind in KINDS:
        for outputs, inputs in ((4608, 3584), (37888, 3584), (3584, 18944), (896, 4864), (64, 128)):
            scheme = KINDS[kind]
            group = 0 if scheme.group >= inputs else scheme.group
            words = torch.empty(outputs, inputs * scheme.bits // 16, dtype=torch.int16, device="meta")
            name: Any = kind.split("-")[0]
            weight = Packed(name, words, words, inputs, group, torch.bfloat16, False, None, Scratch(DEVICE))
            for rows in (1, 16, 32, 64, 128, 256):
                tile = by_rule(weight, rows)
                tiles = -(-outputs // tile.outputs) * -(-rows // tile.rows)
                assert weight.fits(tile.depth) and (tile.split == 1 or tile.split * tiles <= MAX_TILES)
                steps = -(-words.shape[1] // tile.depth)
                assert -(-steps // -(-steps // tile.split)) == tile.split, "no part is without a step"
    for (kind, outputs, inputs), choices in PACKED.items():
        assert kind in ("int4", "int8", "fp8") and outputs % 16 == 0 and inputs % 128 == 0
        assert [most for most, _ in choices] == sorted({most for most, _ in choices})


def test_tiles_that_are_measured() -> None:
    """perf.gemm's candidates fit, and what it found takes the rule's place."""
    for case in cases("qwen2-7b")[:4]:
        for kind, group in (("int4", 128), ("int8", 0), ("fp8", 0), ("fp8", 128)):
            unit = CHUNK * (4 if kind == "int4" else 2)
            words = torch.empty(case.outputs, case.inputs // unit * CHUNK, dtype=torch.int16, device="meta")
            name: Any = kind
            weight = Packed(name, words, words, case.inputs, group, torch.bfloat16, False, None, Scratch(DEVICE))
            for rows in (1, 32, 64, 128):
                tiles = packed_candidates(case, rows, 132, kind, group)
                assert tiles and all(weight.fits(tile.depth) and tile.rows >= min(rows, 128) for tile in tiles)
                assert all(fits(tile, case.outputs, case.inputs, rows) for tile in tiles)
    best = Tile(16, 64, 32, 2)
    result = {"outputs": 64, "inputs": 256, "rows": 8, "cublas_us": 9.0, "tiles": [{"us": 5.0, "tile": asdict(best)}]}
    found = packed_table([result | {"kind": "int4"}, result | {"kind": "", "rows": 1}])
    assert found == {("int4", 64, 256): ((8, best),)}
    weight = packed(part_of("int4-128", 64, 256), torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_tiles, "PACKED", found)
        choices = choices_for(weight)
        assert choices[0] == (8, best) and [most for most, _ in choices] == [8, 16, 32, 64, 128, 256]
        patch.setattr(packed_tiles, "PACKED", {("int4", 64, 256): ((8, Tile(16, 64, 64)),)})
        assert choices_for(weight)[0] == (8, by_rule(weight, 8)), "two chunks are two groups"


# ------------------------------------------------------------------ whole models

HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
         "num_hidden_layers": 1}  # fmt: skip


def on_kernels(folder: Path) -> tuple[Decoder, Decoder]:
    """(the model dequantised on the CPU, float32; the same with its parts packed for our kernels)."""
    plain = tiny.load(str(folder))
    if CUDA:
        return plain, tiny.load(str(folder), device="cuda", dtype="bfloat16")
    config, facts, ops = EngineConfig(), read_config(folder), TritonOps(DEVICE)
    spec, dtype = spec_of(facts), torch.float16
    source = Source(folder, spec, names_of(facts), quantization_of(facts), DEVICE, False)
    keeper = source.keeper(config, lambda parts, bias: ops.quantized(parts, bias, dtype))
    weights, places = allocate(spec, DEVICE, dtype, keeper=keeper)
    fill(places, keeper.assemblies, source, lambda fraction: None, {})
    pack(weights, TorchOps())
    return plain, Decoder(spec, weights, TritonAttention(), DEVICE, dtype, ops)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy; 1 / inf is meant
@pytest.mark.parametrize("name", ["awq", "gptq-act-order", "fp8-block", "w8a8"])
def test_a_model(name: str, tmp_path: Path, thorough: bool) -> None:
    """Through the loader, with every epilogue, steps and chunks."""
    if not (CUDA or thorough or name in ("awq", "fp8-block")):
        pytest.skip("seconds each; --thorough")
    quantised(tmp_path, shared_order(CASES[name]), **HEADS)
    plain, made = on_kernels(tmp_path)
    layer = made.weights.layers[0]
    assert isinstance(getattr(layer.o, "map", layer.o), TritonLinear)
    ids = tiny.prompt(3)
    expected = Driver.of(plain).logits(ids, [3])
    got = Driver.of(made).logits(ids, [2, 1]).float().cpu()
    assert (got - expected).norm() < (0.1 if CUDA else 0.02) * expected.norm()  # bfloat16 throughout, as other families


def test_pairs_of_a_head() -> None:
    """Tiles of less than a head take pairs of one, which the epilogue rotates."""
    rope = Rope(10000.0, 64)
    spec = Spec(99, 256, 1, 1, 1, 64, 64, rope=rope)
    part, x = part_of("int4-128", 192, 256), x_of(5, 256, torch.float16)
    weight, slots = packed(part, torch.float16), torch.arange(5, device=DEVICE)
    for tile in (Tile(16, 32, CHUNK, 1), Tile(8, 32, CHUNK, 1, 2, slices=2)):
        made = []
        for fuse in (True, False):
            cache = torch.zeros(5, 2, 1, 64, dtype=torch.float16, device=DEVICE)
            ops = TritonOps(DEVICE, fuse=fuse)
            table = ops.rotation(slots + 7, inverse_frequencies(rope).to(DEVICE), rope, torch.float16)
            ours = TritonLinear(weight, None, ARRIVED, 0, choices=((16, tile),))
            made.append((ops.heads(ours, x, None, 0.0, table, spec, slots, cache), cache))
        for fused, plain in zip(*made, strict=True):
            assert plain.any() and error(fused.reshape(5, -1), plain.reshape(5, -1).float()) < TOLERANCE
