"""The CPU's C kernels: against plain torch and float64, the same bits in every batch, on any number of threads."""

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import test_attention
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_attention import PAGE, case, make_spec
from tiny import Driver
from torch import Tensor

from actorserve.errors import StartupError
from actorserve.models import c_library, cpu_kernels, kv_cache
from actorserve.models.batch import Batch, Chunk
from actorserve.models.cpu_attention import CpuAttention, CpuPlan
from actorserve.models.cpu_decoder import CpuLayers, maps_of
from actorserve.models.cpu_ops import CpuOps
from actorserve.models.gguf import KEPT_FILE
from actorserve.models.kv_cache import KVCache
from actorserve.models.layers import TorchOps
from actorserve.models.quantized import ROUNDED, DenseLinear, QuantizedLinear, dequantise
from actorserve.models.rope import inverse_frequencies
from actorserve.models.spec import Norm, Rope, Spec
from actorserve.models.weights import linear_maps


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """Skip where there are no kernels. One thread: small work for torch's own on busy cores takes seconds."""
    try:
        cpu_kernels.kernels()
    except StartupError as error:
        pytest.skip(str(error))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------ attention


def attend(spec: Spec, batch: Batch, kv: Any, q: Tensor, layer: int = 0) -> Tensor:
    plan = CpuAttention().plan(batch, kv, spec)
    assert isinstance(plan, CpuPlan)
    return plan.run(layer, q)


def check(spec: Spec, decode: list[int], chunks: list[tuple[int, int]]) -> None:
    batch, kv, q = case(spec, decode, chunks)
    for layer in range(spec.layers):
        exact = test_attention.reference(batch, kv, spec, layer, q)
        assert (attend(spec, batch, kv, q, layer).double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 128), (4, 2, 32), (3, 1, 64), (8, 2, 32), (7, 1, 64), (18, 1, 32)]
)
def test_decode_rows_and_chunks(heads: int, kv_heads: int, head_dim: int) -> None:
    check(make_spec(heads, kv_heads, head_dim), [1, 16, 17, 63, 64, 65, 130], [(0, 5), (30, 7)])


@pytest.mark.parametrize("window", [1, 16, 70])
def test_windows(window: int) -> None:
    check(make_spec(window=window, scale=0.2), [3, 150, 17], [(0, 12), (81, 7), (3, 1)])


def test_scores_of_any_size() -> None:
    """Neither far apart nor below what an exponential knows do they make NaN."""
    spec = make_spec()
    batch, kv, q = case(spec, [200, 70], [])
    for scale in (1e3, 1e-30, 0.0):
        exact = test_attention.reference(batch, kv, spec, 0, q * scale)
        got = attend(spec, batch, kv, q * scale)
        assert (got.double() - exact).abs().max() < (2e-4 if scale > 1 else 2e-6)


def test_nan_is_not_hidden() -> None:
    """A sequence with one NaN among its keys is poison; its neighbours are not."""
    spec = make_spec()
    batch, kv, q = case(spec, [100, 70], [])
    expected = attend(spec, batch, kv, q)
    slot = int(batch.decode_tables[0, 2]) * PAGE + 3
    kv.k[0][slot, :, 5] = float("nan")
    got = attend(spec, batch, kv, q)
    assert got[0].isnan().all() and torch.equal(got[1], expected[1])


def test_a_token_s_bits_are_its_own() -> None:
    """Alone as in a batch, decoded as in a chunk, on any number of threads, in strided rows."""
    spec = make_spec(window=50)
    batch, kv, q = case(spec, [130, 64, 90], [(0, 70)])
    whole = [attend(spec, batch, kv, q, layer) for layer in (0, 1)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(attend(spec, batch, kv, q), whole[0])
    wide = torch.full((len(q), spec.heads + 4, spec.head_dim), float("nan"))
    wide[:, : spec.heads] = q
    assert torch.equal(attend(spec, batch, kv, wide[:, : spec.heads]), whole[0])
    pages = batch.chunks[0].pages
    for layer in (0, 1):
        for row in range(3):
            alone = decode_batch(batch.decode_tables[row : row + 1], [int(batch.decode_lengths[row])])
            assert torch.equal(attend(spec, alone, kv, q[row : row + 1], layer)[0], whole[layer][row])
        rest = decode_batch(torch.empty(0, 1, dtype=torch.int32), [])
        rest.chunks = [Chunk(40, 30, pages)]
        assert torch.equal(attend(spec, rest, kv, q[43:], layer), whole[layer][43:])
        last = decode_batch(pages[None], [70])
        assert torch.equal(attend(spec, last, kv, q[-1:], layer)[0], whole[layer][-1])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 128), (7, 1, 32), (20, 1, 32)])
def test_tokens_that_share_keys(heads: int, kv_heads: int, head_dim: int) -> None:
    """Each token of a chunk, of tiles and blocks that are full or not, has the bits of the same token decoded."""
    spec = make_spec(heads, kv_heads, head_dim)
    batch, kv, q = case(spec, [], [(40, 101)])
    for count in (1, 3):
        torch.set_num_threads(count)
        whole = attend(spec, batch, kv, q)
        for row in range(101):
            alone = decode_batch(batch.chunks[0].pages[None], [41 + row])
            assert torch.equal(attend(spec, alone, kv, q[row : row + 1])[0], whole[row]), row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 128), (7, 1, 32), (20, 1, 32)])
def test_pages_of_16_bits(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """As the same numbers in float32, bit for bit."""
    spec = make_spec(heads, kv_heads, head_dim)
    batch, wide, q = case(spec, [1, 16, 65, 130], [(0, 5), (40, 101)])
    narrow = KVCache(spec, wide.num_pages, PAGE, torch.device("cpu"), dtype, torch.float32)
    narrow.storage.copy_(wide.storage)
    wide.storage.copy_(narrow.storage)
    for layer in range(spec.layers):
        assert torch.equal(attend(spec, batch, narrow, q, layer), attend(spec, batch, wide, q, layer))
    narrow.k[0][int(batch.chunks[1].pages[5]) * PAGE, :, 3] = float("nan")  # of token 80
    assert attend(spec, batch, narrow, q)[9:49].isfinite().all() and attend(spec, batch, narrow, q)[49:].isnan().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_no_number_reaches_tokens_before_it(wrong: float) -> None:
    """Though they share its tile: what they leave in the cache goes to other requests."""
    spec = make_spec()
    batch, kv, q = case(spec, [], [(40, 70)])
    expected = attend(spec, batch, kv, q)
    row = 45
    slot = int(batch.chunks[0].pages[(40 + row) // PAGE]) * PAGE + (40 + row) % PAGE
    kv.k[0][slot, :, 5] = kv.v[0][slot, :, 7] = wrong
    got = attend(spec, batch, kv, q)
    assert torch.equal(got[:row], expected[:row]) and not got[row:].isfinite().all(1).any()


def decode_batch(tables: Tensor, lengths: list[int]) -> Batch:
    nothing = torch.empty(0, dtype=torch.int64)
    longest = max(lengths, default=0)
    return Batch(nothing, nothing, nothing, tables, torch.tensor(lengths, dtype=torch.int32), longest, None)


def test_rows_of_a_table() -> None:
    """As the runner passes them: the slots' tables, narrowed, and which rows of them decode."""
    spec = make_spec()
    batch, kv, q = case(spec, [20, 3, 33], [])
    expected = attend(spec, batch, kv, q)
    tables = torch.zeros(9, 8, dtype=torch.int32)
    rows = torch.tensor([7, 0, 4])
    tables[rows, : batch.decode_tables.shape[1]] = batch.decode_tables
    batch.decode_tables, batch.decode_rows = tables[:, :3], rows
    assert torch.equal(attend(spec, batch, kv, q), expected)


def test_what_the_kernel_does_not_take() -> None:
    backend = CpuAttention()
    for spec, dtype in (
        (make_spec(attn_softcap=1.5), torch.float32), (make_spec(head_dim=24), torch.float32),
        (make_spec(), torch.bfloat16),
    ):  # fmt: skip
        batch, kv, q = case(spec, [9, 20], [(3, 4)], dtype)
        plan = backend.plan(batch, kv, spec)
        assert not isinstance(plan, CpuPlan)
        exact = test_attention.reference(batch, kv, spec, 0, q)
        assert (plan.run(0, q).double() - exact).abs().max() < (2e-2 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("rank", [56, 24])
def test_latents_are_not_the_kernel_s(rank: int, tmp_path: Path) -> None:
    """A cached latent is one row, key and value: as wide as whole vectors, too (DeepSeek-V2's have 512 + 64)."""
    model = tiny.build("deepseek-v2-lite", kv_lora_rank=rank)
    ids = tiny.prompt(20)
    logits = Driver.of(tiny.load(tiny.save(model, tmp_path))).logits(ids, [17, 1, 2])
    assert (logits - tiny.reference_logits(model, ids)).abs().max() < 1e-3


# ------------------------------------------------------------------ between the linear maps


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("hidden", [32, 48, 576, 100])
def test_norms(hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(hidden, generator=generator)
    for rows in (1, 3, 40):
        x, residual = torch.randn(2, rows, hidden, generator=generator) * 3
        assert close(CpuOps().rms_norm(x, weight, 1e-5), TorchOps().rms_norm(x, weight, 1e-5))
        expected = TorchOps().add_rms_norm(x, residual, 0.6, weight, 1e-5)
        got = CpuOps().add_rms_norm(x.clone(), residual.clone(), 0.6, weight, 1e-5)
        assert close(got[0], expected[0]) and close(got[1], expected[1])


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_activation(act: str) -> None:
    gate_up = torch.randn(5, 2 * 64) * 20
    gate_up[0, :6] = torch.tensor([float("nan"), float("inf"), 200.0, -200.0, -88.0, 0.0])
    gate_up[1, 0] = -87.5
    got, expected = CpuOps().act_mul(gate_up, act), TorchOps().act_mul(gate_up, act)
    assert torch.allclose(got, expected, rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("rope", [None, Rope(1e4, 64), Rope(1e4, 32), Rope(1e4, 64, True)])
@pytest.mark.parametrize("normed", [False, True])
def test_heads(rope: Rope | None, normed: bool) -> None:
    """Queries, and what is in the cache; rotated whole, in part, or not at all."""
    spec = Spec(10, 8, 1, 4, 2, 64, 8, rope=rope, qk_norm=Norm("rms", 1e-5) if normed else None)
    tokens, ops = 7, (CpuOps(), TorchOps())
    qkv = torch.randn(tokens, 8, 64)
    weight = torch.randn(6, 64) if normed else None
    slots = torch.randperm(20)[:tokens]
    table = None
    if rope is not None:
        table = ops[0].rotation(torch.randint(0, 5000, (tokens,)), inverse_frequencies(rope), rope, torch.float32)
    results = []
    for o in ops:
        cache = torch.zeros(20, 2, 2, 64)
        q = o.qk_norm_rope_and_write(qkv.clone(), weight, 1e-5, table, spec, slots, cache)
        results.append((q, cache))
    assert close(results[0][0], results[1][0]) and close(results[0][1], results[1][1])
    for dtype in (torch.float16, torch.bfloat16):
        narrow = torch.zeros(20, 2, 2, 64, dtype=dtype)
        ops[0].qk_norm_rope_and_write(qkv.clone(), weight, 1e-5, table, spec, slots, narrow)
        assert torch.equal(narrow, results[0][1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_are_rounded_into_the_cache(dtype: torch.dtype) -> None:
    """As torch rounds them: ties, numbers that are too large or too small, and what is no number."""
    spec = Spec(10, 8, 1, 2, 2, 64, 8)
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 65519.0, 65520.0, 1e30, 1e-7, -3e-8, 1e-40, 3.3e38]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8 + 2**-20, 256.5, 257.5]
    qkv = torch.randn(3, 6, 64) * torch.logspace(-9, 9, 64)
    qkv[1, 3, : len(special)], qkv[2, 5, : len(ties)] = torch.tensor(special), torch.tensor(ties)
    cache = torch.zeros(9, 2, 2, 64, dtype=dtype)
    CpuOps().qk_norm_rope_and_write(qkv.clone(), None, 0.0, None, spec, torch.tensor([8, 0, 3]), cache)
    expected = qkv[:, 2:].view(3, 2, 2, 64).to(dtype)
    assert torch.allclose(cache[[8, 0, 3]], expected, rtol=0, atol=0, equal_nan=True)
    assert not cache[[1, 2, 4, 5, 6, 7]].any()


# ------------------------------------------------------------------ layers in one call

SIZES = {
    "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64,
    "vocab_size": 208,
}  # fmt: skip


def quantized_model(family: str, folder: Path, **sizes: int) -> str:
    """A tiny model with Q4_1 blocks, whose sizes the kernels take."""
    path = Path(tiny.save(tiny.build(family, **SIZES | sizes), folder))
    kept = {
        name: torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1))
        for name, weight in load_file(path / "model.safetensors").items()
        if weight.ndim == 2
    }
    save_file(kept, path / KEPT_FILE)
    return str(path)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", ["llama-biases", "qwen2-windows", "qwen3", "granite", "smollm3"])
def test_layers(family: str, dense: bool, tmp_path: Path) -> None:
    """One call is what the parts are, bit for bit, and plain torch up to rounding; chunks are single steps' bits."""
    folder = quantized_model(family, tmp_path)
    decoder = tiny.load(folder, dtype="float32" if dense else "auto")
    assert isinstance(maps_of(decoder.weights.layers[0])[0], DenseLinear if dense else QuantizedLinear)
    assert isinstance(decoder.layers, CpuLayers)
    ids = tiny.prompt(120)
    got = Driver.of(decoder).logits(ids, [120])
    assert torch.equal(Driver.of(decoder).logits(ids, [100] + [1] * 20), got)
    assert torch.equal(Driver.of(decoder).logits(ids, [33, 87]), got)
    layers, decoder.layers = decoder.layers, None
    assert torch.equal(Driver.of(decoder).logits(ids, [120]), got)
    narrow = Driver.of(decoder, kv=torch.float16).logits(ids, [120])
    decoder.layers = layers
    assert torch.equal(Driver.of(decoder, kv=torch.float16).logits(ids, [33, 67] + [1] * 20), narrow)
    assert 0 < (narrow - got).abs().max() < 3e-3 * got.abs().max()
    decoder.layers, decoder.ops, decoder.attention = None, TorchOps(), test_attention.TorchAttention()
    expected = Driver.of(decoder).logits(ids, [120])
    assert (got - expected).abs().max() < (2e-5 if dense else 3e-4) * expected.abs().max()


def test_a_cache_where_one_of_another_dtype_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is given out again: an address does not tell caches apart."""
    memory = torch.zeros(4 << 20, dtype=torch.uint8)

    def same_place(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    monkeypatch.setattr(kv_cache, "_zeros", same_place)
    decoder, ids = tiny.load(quantized_model("llama-biases", tmp_path)), tiny.prompt(40)
    for dtype in (torch.float32, torch.float16, torch.float32, torch.bfloat16):
        driver = Driver.of(decoder, kv=dtype)
        driver.logits(ids, [40])
        for rows in driver.kv.rows:
            assert rows.flatten(1).isfinite().all(1).sum() == 40


@pytest.mark.parametrize(("heads", "head_dim", "inter"), [(6, 16, 96), (2, 48, 160), (6, 32, 32), (2, 64, 160)])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_inputs_packed_where_they_are_made(heads: int, head_dim: int, inter: int, dtype: str, tmp_path: Path) -> None:
    """Whatever a KV head's queries and a block of the MLP come to: groups of 32 inputs, or parts of them."""
    if head_dim % (2 * cpu_kernels.kernels().lanes):
        pytest.skip("not whole vectors of this CPU")
    sizes = {"num_attention_heads": heads, "head_dim": head_dim, "intermediate_size": inter}
    decoder = tiny.load(quantized_model("llama", tmp_path, **sizes), dtype=dtype)
    assert isinstance(decoder.layers, CpuLayers)
    ids, layers = tiny.prompt(60), decoder.layers
    for chunks in ([60], [40] + [1] * 20, [1, 2, 3, 5, 7, 9, 16, 17]):
        decoder.layers = layers
        got = Driver.of(decoder).logits(ids, chunks)
        decoder.layers = None
        assert torch.equal(Driver.of(decoder).logits(ids, chunks), got)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_rounds_products_alone(family: str, tmp_path: Path) -> None:
    """--dtype bfloat16: inputs and weights of linear maps, and tables; the same bits in chunks of any size."""
    folder = tiny.save(tiny.build(family, **SIZES), tmp_path)
    decoder, exact = tiny.load(folder, dtype="bfloat16"), tiny.load(folder, dtype="float32")
    assert decoder.dtype == torch.float32 and decoder.weights.embed.dtype == torch.bfloat16
    assert isinstance(decoder.layers, CpuLayers) == isinstance(exact.layers, CpuLayers) == (family == "llama")
    assert {linear.map.kind for linear in linear_maps(decoder.weights)} == {ROUNDED}
    ids = tiny.prompt(40)
    logits = Driver.of(decoder).logits(ids, [40])
    for sizes in ([3, 4, 5, 28], [30] + [1] * 10):
        assert torch.equal(Driver.of(decoder).logits(ids, sizes), logits)
    error = (logits - Driver.of(exact).logits(ids, [40])).norm() / logits.norm()
    assert 1e-4 < error < 5e-2


def test_wanted_rows(tmp_path: Path) -> None:
    """Some tokens' logits are wanted, in any order: of decode rows, of a chunk's middle, of none, of more than all."""
    decoder = tiny.load(quantized_model("llama", tmp_path), dtype="auto")
    layers, ids = decoder.layers, tiny.prompt(30)
    for wanted in ([0], [4, 0, 9], [9, 9, 3, 1], [], list(range(10)), [*range(10), 5, 5]):
        results = []
        for one_call in (True, False):
            decoder.layers = layers if one_call else None
            driver = Driver.of(decoder)
            first, second = driver.request(ids), driver.request(ids[::-1])
            driver.forward([(first, 20)])
            rows = torch.tensor(wanted, dtype=torch.int64)
            results += [driver.forward([(first, 1), (second, 9)], rows), driver.forward([(first, 1), (second, 3)])]
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3]), wanted


def test_other_backend(tmp_path: Path) -> None:
    """--attention-backend torch is asked for: the layers run part by part."""
    folder = quantized_model("llama", tmp_path)
    ids = tiny.prompt(20)
    asked = tiny.load(folder, dtype="auto", attention_backend="torch")
    assert not isinstance(asked.attention, CpuAttention)
    got = Driver.of(asked).logits(ids, [20])
    expected = Driver.of(tiny.load(folder, dtype="auto")).logits(ids, [20])
    assert (got - expected).abs().max() < 3e-4 * expected.abs().max()


# ------------------------------------------------------------------ threads


def a_map() -> tuple[QuantizedLinear, Tensor, Tensor]:
    blocks = torch.from_numpy(gguf.quantize(torch.randn(640, 64).numpy(), gguf.GGMLQuantizationType.Q8_0))
    x = torch.randn(20, 64)
    return QuantizedLinear(blocks, 64, None), x, x.double() @ dequantise(blocks, 64).double().t()


def test_callers_at_once() -> None:
    """Engines that share a process: whoever finds the pool taken works alone, and all results are right."""
    linear, x, exact = a_map()
    torch.set_num_threads(3)
    wrong: list[int] = []

    def call(rows: int) -> None:
        for _ in range(400):
            if (linear(x[:rows]).double() - exact[:rows]).abs().max() > 3e-3:
                wrong.append(rows)

    callers = [threading.Thread(target=call, args=(rows,)) for rows in (1, 4, 20, 20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_forked_child() -> None:
    """It has none of the threads, and starts its own."""
    linear, x, exact = a_map()
    torch.set_num_threads(2)
    linear(x)
    child = os.fork()
    if child == 0:
        x.add_(0)  # nothing of torch's own threads is needed
        good = all((linear(x).double() - exact).abs().max() < 3e-3 for _ in range(20))
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_narrow_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thorough: bool) -> None:
    """What is compiled where there is no AVX-512."""
    if not thorough:
        pytest.skip("compiles for seconds: --thorough")
    wide = tiny.load(quantized_model("qwen3", tmp_path), dtype="auto")
    ids = tiny.prompt(40)
    expected = Driver.of(wide).logits(ids, [40])
    flags = [flag.replace("native", "haswell") for flag in c_library.FLAGS]
    monkeypatch.setattr(c_library, "FLAGS", tuple(flags))
    monkeypatch.setenv("ACTORSERVE_CACHE", str(tmp_path / "cache"))
    cpu_kernels.kernels.cache_clear()
    try:
        assert cpu_kernels.kernels().lanes == 8
        narrow = tiny.load(str(tmp_path), dtype="auto")
        assert isinstance(narrow.layers, CpuLayers)
        got = Driver.of(narrow).logits(ids, [40])
        for sizes in ([3, 4, 5, 28], [30] + [1] * 10):
            assert torch.equal(Driver.of(narrow).logits(ids, sizes), got)
        for dtype in (torch.bfloat16, torch.float16):
            weight, x = torch.randn(80, 96).to(dtype), torch.randn(40, 96)
            exact = DenseLinear(weight.float(), None)(x)
            for rows in (1, 2, 6, 7, 13, 40):
                assert torch.equal(DenseLinear(weight, None)(x[:rows]), exact[:rows])
        rounded = DenseLinear(weight.bfloat16(), None, rounds=True)
        exact = DenseLinear(weight.bfloat16(), None)(x.bfloat16().float())
        for rows in (1, 2, 4, 5, 13, 40):
            assert torch.equal(rounded(x[:rows]), exact[:rows])
        x[3, 5], x[4, 7], x[5, 9] = float("nan"), float("inf"), torch.finfo(torch.float32).max
        assert rounded(x)[:6].isfinite().all(1).tolist() == [True] * 3 + [False] * 3
    finally:
        cpu_kernels.kernels.cache_clear()
    assert (got - expected).abs().max() < 3e-4 * expected.abs().max()
