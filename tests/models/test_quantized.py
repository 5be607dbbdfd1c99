"""Quantized weights on a CPU: against gguf's own dequantisation, dense products, and the same model made dense."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf_writer import random_rows
from safetensors.torch import load_file, save_file
from thread_group import ThreadGroup, on_ranks
from tiny import Driver
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.errors import StartupError
from actorserve.models import c_library, quantized
from actorserve.models.attention import TorchAttention
from actorserve.models.cpu_decoder import maps_of
from actorserve.models.cpu_kernels import kernels
from actorserve.models.gguf import KEPT_FILE
from actorserve.models.gguf_blocks import K_TYPES, blocks_of_32, widened
from actorserve.models.layers import DenseMlp, Linear, TorchOps
from actorserve.models.parallel import Summed
from actorserve.models.quantized import DENSE, DenseLinear, QuantizedLinear, dequantise, pack, takes, takes_dense
from actorserve.models.weights import load_decoder

TYPES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
KINDS = [*TYPES, *K_TYPES, "Q4_K as K8"]
SHAPES = [(16, 32), (80, 96), (208, 64)]  # odd numbers of units: every path of the kernel


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled() -> None:
    """Skip where the kernel cannot be had, as the engine goes on without it."""
    try:
        kernels()
    except StartupError as error:
        pytest.skip(str(error))


def random_blocks(kind: str, outputs: int, inputs: int) -> Tensor:
    """Blocks of random bytes, but with scales around 0.01."""
    rng = np.random.default_rng(outputs)
    blocks = rng.integers(0, 256, (outputs, inputs // 32, TYPES[kind]), np.uint8)
    for place in (0, 2) if kind == "Q4_1" else (0,):
        scales = rng.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(outputs, -1))


def blocks_for(kind: str, outputs: int, inputs: int) -> tuple[Tensor, int]:
    """Random blocks of one of KINDS and how many inputs they have: K-quants come in 256."""
    if kind in TYPES:
        return random_blocks(kind, outputs, inputs), inputs
    inputs = -(-inputs // 256) * 256
    blocks = blocks_of_32(kind[:4], random_rows(kind[:4], outputs, inputs))
    return torch.from_numpy(widened(blocks, inputs) if "as" in kind else blocks), inputs


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_gguf_s(kind: str) -> None:
    for outputs, inputs in SHAPES:
        blocks = random_blocks(kind, outputs, inputs)
        expected = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
        assert torch.equal(dequantise(blocks, inputs), torch.from_numpy(expected))


def as_integers(x: Tensor) -> Tensor:
    """What the kernel makes of x float32 [rows, inputs]: of 32 numbers the largest is 32512 steps."""
    groups = x.view(len(x), -1, 32)
    top = groups.abs().amax(-1, keepdim=True)
    steps = torch.where(top > 0, (groups * (torch.tensor(32512.0) / top)).round(), torch.zeros(()))
    return (steps.double() * (top / 32512).double()).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("compiled")
def test_the_kernel_s_weights_are_exact(kind: str) -> None:
    """A row with a single one takes a column out of the weight, up to float32's rounding."""
    for outputs, inputs in SHAPES:
        blocks, inputs = blocks_for(kind, outputs, inputs)
        linear, dense = QuantizedLinear(blocks, inputs, None), dequantise(blocks, inputs)
        assert (linear(torch.eye(inputs)) - dense.t()).abs().max() < 4e-7 * dense.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("compiled")
def test_product(kind: str) -> None:
    """Right to float32's rounding for numbers as integers, which are next to the numbers; and each row the same bits
    alone and in any batch, by any number of threads, also of more inputs and rows than are multiplied at a time."""
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in [*SHAPES, (48, 1280)]:
        blocks, inputs = blocks_for(kind, outputs, inputs)
        bias = torch.randn(outputs, generator=generator)
        linear = QuantizedLinear(blocks, inputs, bias)
        x = torch.randn(130, inputs, generator=generator) * torch.logspace(-6, 3, 130)[:, None]
        x[3] = 0
        alone = torch.cat([linear(row[None]) for row in x])
        dense = dequantise(blocks, inputs).double().t()
        for exact, bound in ((as_integers(x) @ dense, 2e-6), (x.double() @ dense, 3e-4)):
            largest = exact.abs().amax(-1, keepdim=True)
            assert ((alone - bias - exact).abs() <= bound * largest + 3e-7 * bias.abs()).all()
        assert torch.equal(alone[3], bias)
        for rows in (0, 2, 3, 7, 8, 13, 31, 112, 113, 130):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(linear(x[:rows]), alone[:rows]), (rows, count)
        assert torch.equal(linear(x.t().contiguous().t()), alone), "strided rows"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("compiled")
def test_numbers_that_are_none(kind: str) -> None:
    """They make their row NaN, and no other; the largest and the smallest numbers are still some."""
    blocks, inputs = blocks_for(kind, 48, 96)
    linear, x = QuantizedLinear(blocks, inputs, None), torch.randn(6, inputs)
    x[0, 40], x[1, 95], x[2, 0] = float("nan"), float("inf"), float("-inf")
    x[3], x[4, 50] = 1e-42, 1e33
    got = linear(x)
    assert got[:3].isnan().all() and got[3:].isfinite().all()
    assert torch.equal(got[5], linear(x[5:])[0]) and not got[3].any()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("outputs", "inputs"), [*SHAPES, (48, 640)])
def test_dense_product(outputs: int, inputs: int) -> None:
    """The same of weights that are not quantized; also of more inputs, and more rows, than are multiplied at a time."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    assert torch.equal(DenseLinear(weight, None)(torch.eye(inputs)), weight.t())
    linear, x = DenseLinear(weight, bias), torch.randn(130, inputs, generator=generator)
    alone = torch.cat([linear(row[None]) for row in x])
    exact = x.double() @ weight.double().t() + bias
    assert (alone - exact).abs().max() < 2e-6 * exact.abs().max()
    for rows in (0, 2, 3, 7, 8, 13, 31, 130):
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear(x[:rows]), alone[:rows]), (rows, count)
    assert torch.equal(linear(x.t().contiguous().t()), alone), "strided rows"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("outputs", "inputs"), [*SHAPES, (48, 640)])
def test_rounded_product(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Weights and inputs in bfloat16, sums in float32; a row's result is the same bit for bit in every batch, and what
    is no number makes its own row NaN."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias, x = torch.randn(outputs, generator=generator), torch.randn(130, inputs, generator=generator)
    linear = DenseLinear(weight, bias, rounds=True)
    assert linear.weight.nbytes == 2 * weight.numel()
    exact = x.bfloat16().double() @ weight.bfloat16().double().t() + bias
    expected = linear(x)
    assert (expected - exact).abs().max() < 2e-6 * exact.abs().max()
    for rows in range(131):
        torch.set_num_threads(1 + rows % 3)
        assert torch.equal(linear(x[:rows]), expected[:rows]), rows
    assert torch.equal(torch.cat([linear(row[None]) for row in x]), expected)
    x[0, 0], x[11, 1], x[12, inputs - 1] = float("nan"), float("inf"), 1e-42
    got, others = linear(x), [row for row in range(130) if row not in (0, 11, 12)]
    assert not got[[0, 11]].isfinite().any() and torch.equal(got[others], expected[others])
    assert got[12].isfinite().all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [*SHAPES, (48, 640)])
def test_product_of_16_bits(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Weights of 16 bits, subnormal ones too, are what they are in float32, bit for bit; where matrix instructions take
    them, added up in another order. The same in any batch."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(-30, 5, (outputs, inputs), generator=generator)
    weight = (torch.randn(outputs, inputs, generator=generator) * torch.exp2(sizes)).to(dtype)
    bias, x = torch.randn(outputs, generator=generator), torch.randn(130, inputs, generator=generator)
    linear = DenseLinear(weight, bias)
    assert linear.weight.nbytes == weight.nbytes
    exact, expected = DenseLinear(weight.float(), bias)(x), linear(x)
    if kernels().matrices and dtype == torch.bfloat16:
        assert ((expected - exact).abs() <= 2**-20 * (x.abs() @ weight.float().abs().t())).all()
    else:
        assert torch.equal(expected, exact)
    for rows in range(1, 131):
        torch.set_num_threads(1 + rows % 3)
        assert torch.equal(linear(x[:rows]), expected[:rows]), rows
    assert torch.equal(torch.cat([linear(row[None]) for row in x]), expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dense", [False, True])
def test_what_is_no_product(dense: bool) -> None:
    blocks = random_blocks("Q4_1", 16, 32)
    linear = DenseLinear(dequantise(blocks, 32), None) if dense else QuantizedLinear(blocks, 32, None)
    for x in (torch.zeros(2, 64), torch.zeros(2, 32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="32 float32 inputs"):
            linear(x)
    assert not takes(random_blocks("Q4_1", 17, 32), 32)
    for shape, dtype in (((17, 32), torch.float32), ((16, 40), torch.bfloat16), ((16, 32), torch.float64)):
        assert not takes_dense(torch.zeros(shape, dtype=dtype))
    assert quantized.kind_of(torch.zeros(16, 40, dtype=torch.uint8), 36) is None


def test_packing_for_either_width() -> None:
    """Lanes of 8 and of 16 hold the same scales and values, in units of their own size."""
    blocks = random_blocks("Q4_1", 32, 64)
    wide, narrow = pack(blocks, 64, 16), pack(blocks, 64, 8)
    assert wide.shape == (2, 2, 320) and narrow.shape == (4, 2, 160)
    scales = wide[0, 0, :32].view(torch.float16)
    assert torch.equal(scales, blocks.view(32, 2, 20)[:16, 0, :2].contiguous().view(torch.float16)[:, 0])
    assert torch.equal(scales[8:], narrow[1, 0, :16].view(torch.float16))
    bytes_of = blocks.view(32, 2, 20)[:16, 0, 4:12]  # inputs 0 to 7 are their low halves
    fours = (bytes_of[:, :4] & 15) | ((bytes_of[:, 4:] & 15) << 4)
    assert torch.equal(wide[0, 0, 64:128].view(16, 4), fours)


# ------------------------------------------------------------------ a whole model

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny model with blocks, but for one map that the kernel does not take and one whose parts differ in type."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(tiny.COMMON | SIZES | {"vocab_size": 208, "tie_word_embeddings": True}))
    path = Path(tiny.save(transformers.LlamaForCausalLM(config), tmp_path))
    weights = load_file(path / "model.safetensors")
    kept = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers.2.mlp.down" not in name:
            kind = gguf.GGMLQuantizationType["Q8_0" if "embed" in name or "layers.1.mlp.up" in name else "Q4_1"]
            kept[name] = torch.from_numpy(gguf.quantize(weight.numpy(), kind))
    save_file(kept, path / KEPT_FILE)
    return str(path)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gpt2", "qwen2-moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoint_of_16_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """It stays so, and logits are those of the same numbers in float32, bit for bit (of bfloat16 with matrix
    instructions, nearly); maps of sizes that the kernel does not take, and experts, become float32."""
    sizes = {} if family in ("gpt2", "qwen2-moe") else SIZES
    model = tiny.build(family, **sizes).to(dtype)
    narrow = tiny.load(tiny.save(model, tmp_path / "narrow"))
    wide = tiny.load(tiny.save(model.float(), tmp_path / "wide"))
    ids, steps = tiny.prompt(40), [30] + [1] * 10
    got, expected = Driver.of(narrow).logits(ids, steps), Driver.of(wide).logits(ids, steps)
    if kernels().matrices and dtype == torch.bfloat16 and sizes:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.std()))
    else:
        assert torch.equal(got, expected)
    assert narrow.dtype == wide.dtype == wide.weights.embed.dtype == torch.float32
    assert narrow.weights.embed.dtype == (torch.float32 if family == "qwen2-moe" else dtype)
    if sizes:
        for layer, other in zip(narrow.weights.layers, wide.weights.layers, strict=True):
            for linear, double in zip(maps_of(layer), maps_of(other), strict=True):
                assert linear.map.kind == DENSE[dtype] and 2 * linear.weight.nbytes == double.weight.nbytes


@pytest.mark.usefixtures("compiled")
def test_checkpoint_of_several_dtypes(tmp_path: Path) -> None:
    path = Path(tiny.save(tiny.build("llama", **SIZES).bfloat16(), tmp_path))
    held = load_file(path / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        held[name] = held[name].float()
        save_file(held, path / "model.safetensors", {"format": "pt"})
        embed = tiny.load(str(path)).weights.embed
        assert embed.dtype == (torch.bfloat16 if "norm" in name else torch.float32)


def make_dense(folder: str) -> None:
    """Let model.safetensors hold the blocks' values."""
    path = Path(folder)
    kept, weights = load_file(path / KEPT_FILE), load_file(path / "model.safetensors")
    for name, blocks in kept.items():
        weights[name] = dequantise(blocks, weights[name].shape[1])
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.mark.usefixtures("compiled")
def test_model_equals_its_dense_form(folder: str) -> None:
    """Whatever is in model.safetensors of the tensors that are blocks; in chunks and step by step, too (one map is
    torch's, whose rounding depends on the batch)."""
    ids = tiny.prompt(40)
    decoder = tiny.load(folder, dtype="auto")
    kinds = [isinstance(linear, QuantizedLinear) for layer in decoder.weights.layers for linear in maps_of(layer)]
    assert kinds == [True] * 6 + [False] + [True] * 4 + [False]
    assert isinstance(decoder.weights.head.product, QuantizedLinear)
    got = Driver.of(decoder).logits(ids, [40])
    make_dense(folder)
    dense = tiny.load(folder, quantization="none")
    assert not isinstance(dense.weights.head.product, QuantizedLinear)
    expected = Driver.of(dense).logits(ids, [40])
    assert (got - expected).abs().max() < 3e-4 * expected.abs().max()
    for sizes in ([7, 13, 20], [30] + [1] * 10):
        assert (Driver.of(decoder).logits(ids, sizes) - got).abs().max() < 3e-4 * expected.abs().max()


@pytest.mark.usefixtures("compiled")
def test_model_of_k_quants(tmp_path: Path) -> None:
    """Types as in a file of Q4_K_M: values and half of the rest have more bits, so a map's parts differ. One call."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    folder = tiny.save(tiny.build("llama", **sizes, vocab_size=208), tmp_path)
    kept = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if weight.ndim == 2:
            kind = "Q6_K" if "v_proj" in name or "down" in name else "Q5_K" if "embed" in name else "Q4_K"
            kept[name] = torch.from_numpy(blocks_of_32(kind, random_rows(kind, *weight.shape, 0.002)))
    save_file(kept, tmp_path / KEPT_FILE)
    decoder, ids = tiny.load(folder, dtype="auto"), tiny.prompt(40)
    assert decoder.layers is not None
    sizes_of = [
        linear.weight.nbytes * 32 / linear.outputs / linear.inputs for linear in maps_of(decoder.weights.layers[0])
    ]
    assert sizes_of == [40, 22, 22, 40]
    got = Driver.of(decoder).logits(ids, [40])
    assert torch.equal(Driver.of(decoder).logits(ids, [25] + [1] * 15), got)
    make_dense(folder)
    expected = Driver.of(tiny.load(folder, quantization="none")).logits(ids, [40])
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.usefixtures("compiled")
def test_ranks_have_parts_of_the_blocks(folder: str) -> None:
    """But where a cut would go through blocks: 96 columns on two ranks."""
    torch.set_num_threads(1)
    ids = tiny.prompt(40)
    expected = Driver.of(tiny.load(folder, dtype="auto")).logits(ids, [30, 10])

    def run(group: ThreadGroup) -> Tensor:
        decoder = load_decoder(folder, EngineConfig(device="cpu"), lambda fraction: None, group=group)
        kinds = []
        for layer in decoder.weights.layers:
            assert (
                isinstance(layer.o, Summed) and isinstance(layer.mlp, DenseMlp) and isinstance(layer.mlp.down, Summed)
            )
            maps = (layer.qkv, layer.o.linear, layer.mlp.gate_up, layer.mlp.down.linear)
            kinds.append([isinstance(linear, QuantizedLinear) for linear in maps])
        assert kinds == [[True, True, True, False], [True, True, False, False], [True, True, True, False]]
        return Driver.of(decoder).logits(ids, [30, 10])

    got = on_ranks(2, run)[0]
    assert (got - expected).abs().max() < 3e-4 * expected.abs().max()


def test_when_blocks_are_used(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def uses(**fields: str) -> bool:
        return isinstance(tiny.load(folder, **fields).weights.layers[0].qkv, QuantizedLinear)

    assert not uses(dtype="auto", quantization="none")
    assert not uses(dtype="float32"), "a dtype that is asked for is the weights'"
    with pytest.raises(StartupError, match="drop --dtype bfloat16"):
        uses(dtype="bfloat16", quantization="gguf")
    monkeypatch.setattr("actorserve.models.weights.kernels", no_kernel)
    assert not uses(dtype="auto")
    with pytest.raises(StartupError, match="--quantization gguf: there is no C compiler"):
        uses(dtype="auto", quantization="gguf")
    (Path(folder) / KEPT_FILE).unlink()
    with pytest.raises(StartupError, match="no weights of GGUF's types Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K"):
        uses(quantization="gguf")


def no_kernel() -> None:
    raise StartupError("there is no C compiler")


@pytest.mark.usefixtures("compiled")
def test_misshapen_blocks(folder: str) -> None:
    kept = load_file(Path(folder) / KEPT_FILE)
    for name, wrong in (
        ("model.layers.0.self_attn.o_proj.weight", kept["model.layers.0.self_attn.o_proj.weight"][:32]),
        ("model.layers.1.mlp.up_proj.weight", kept["model.layers.1.mlp.up_proj.weight"][:, :-1].contiguous()),
    ):
        save_file(kept | {name: wrong}, Path(folder) / KEPT_FILE)
        with pytest.raises(StartupError, match=rf"blocks of {name} are .*config.json asks for"):
            tiny.load(folder, quantization="gguf")


@pytest.mark.usefixtures("compiled")
def test_real_model_equals_its_dense_form(smollm: str) -> None:
    """Logits of the real weights, whose head is quantized too, and of the same values in float32."""
    decoder = load_decoder(smollm, EngineConfig(device="cpu"), lambda fraction: None)
    ids = tiny.prompt(24)
    got = Driver.of(decoder).logits(ids, [20, 1, 1, 1, 1])
    kept = load_file(Path(smollm) / KEPT_FILE)
    assert len(kept) == 211
    for i, layer in enumerate(decoder.weights.layers):
        prefix = f"model.layers.{i}."
        parts = {
            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"],
        }  # fmt: skip
        for name, names in parts.items():
            owner = layer if hasattr(layer, name) else layer.mlp
            inputs = getattr(owner, name).inputs
            dense = torch.cat([dequantise(kept[f"{prefix}{part}.weight"], inputs) for part in names])
            setattr(owner, name, Linear(dense, None))
    decoder.weights.head.product = Linear(decoder.weights.embed, None)
    decoder.layers, decoder.ops, decoder.attention = None, TorchOps(), TorchAttention()
    expected = Driver.of(decoder).logits(ids, [24])
    assert (got - expected).abs().max() < 2e-3 * expected.std()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


# ------------------------------------------------------------------ compiling


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(StartupError, match="there is no C compiler"):
        c_library.find_compiler()


@pytest.mark.usefixtures("compiled")
def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTORSERVE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return 2; }")
    assert c_library.load_library(source).two() == 2
    (made,) = (tmp_path / "cache" / "kernels").iterdir()
    with monkeypatch.context() as without:
        without.setattr(c_library, "_compile", lambda *_: pytest.fail("compiled again"))
        assert c_library.load_library(source).two() == 2
    source.write_text("int two(void) { return 3; }")
    assert c_library.load_library(source).two() == 3
    assert len(list(made.parent.iterdir())) == 2, "another source is another library, and nothing else is left"


@pytest.mark.usefixtures("compiled")
def test_what_does_not_compile_or_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTORSERVE_CACHE", str(tmp_path))
    source = tmp_path / "bad.c"
    for text, message in (
        ("#error needs another machine", "does not compile bad.c: .*needs another machine"),
        ("int missing_symbol(void); int f(void) { return missing_symbol(); }", "bad.c cannot be compiled and loaded"),
    ):
        source.write_text(text)
        with pytest.raises(StartupError, match=message):
            c_library.load_library(source)
