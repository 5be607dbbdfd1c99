"""Families on the GPU's kernels against the CPU's path: in Triton's interpreter where there is no GPU.

Only what families do differently there is at stake: norms with offsets, two ropes, heads that the fused kernels cannot
normalise, windows, soft caps, experts, latents. On a GPU all families run in bfloat16, steps also as CUDA graphs.
"""

from pathlib import Path

import pytest
import tiny
import torch
from repacked import ALL, make
from tiny import Driver
from torch import Tensor

from actorserve.errors import StartupError
from actorserve.models.batch import Batch
from actorserve.models.decoder import Decoder
from actorserve.models.dtypes import check_dtype
from actorserve.models.families import names_of, spec_of
from actorserve.models.places import allocate
from actorserve.models.weights import Source, fill, linear_maps, pack, read_config

pytest.importorskip("triton")
from actorserve.models.latent_attention import LatentAttention
from actorserve.models.split_linear import SplitLinear
from actorserve.models.triton_attention import TritonAttention
from actorserve.models.triton_ops import TritonOps

CUDA = torch.cuda.is_available()
INTERPRETED = ["deepseek-v2", "qwen2-windows"]
THOROUGHLY = ["cohere-plus", "gemma2", "gemma3", "granite", "mixtral", "olmo2"]
LENGTH = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


@pytest.mark.skipif(CUDA, reason="the kernels run for real in the test below")
@pytest.mark.parametrize("name", INTERPRETED + THOROUGHLY)
def test_kernels_in_the_interpreter(name: str, tmp_path: Path, thorough: bool) -> None:
    if name in THOROUGHLY and not thorough:
        pytest.skip("seconds each; --thorough")
    _, folder = make(name, tmp_path)
    decoder = tiny.load(folder)
    spec, device = decoder.spec, decoder.device
    attention = TritonAttention() if spec.mla is None else LatentAttention(spec)
    other = Decoder(spec, decoder.weights, attention, device, decoder.dtype, TritonOps(device))
    ids = tiny.prompt(LENGTH)
    expected = Driver.of(decoder).logits(ids, [LENGTH])
    logits = Driver.of(other).logits(ids, [LENGTH - 1, 1])
    assert (logits - expected).abs().max() < 1e-5 * expected.std()


def graphed(decoder: Decoder, batch: Batch, driver: Driver) -> Tensor:
    """The batch's logits, from a CUDA graph."""
    decoder.forward(batch, driver.kv)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        logits = decoder.forward(batch, driver.kv)
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    return logits


@pytest.mark.gpu
@pytest.mark.timeout(600)  # its kernels are compiled on first use
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("name", ALL)
def test_bfloat16_on_a_gpu(name: str, tmp_path: Path) -> None:
    _, folder = make(name, tmp_path)
    ids = tiny.prompt(40)
    expected = Driver.of(tiny.load(folder)).logits(ids, [40])
    # Some random models part from float32 by more wherever they run, as their routers choose other experts.
    on_cpu = Driver.of(tiny.load(folder, dtype="bfloat16")).logits(ids, [40])
    allowed = max(0.1, float((on_cpu - expected).norm() / expected.norm()))
    decoder = tiny.load(folder, device="cuda", dtype="bfloat16")
    for sizes in ([40], [30] + [1] * 10):
        logits = Driver.of(decoder).logits(ids, sizes).cpu()
        assert (logits - expected).norm() < allowed * expected.norm()
    driver = Driver.of(decoder)
    request = driver.request(ids)
    driver.forward([(request, 39)])
    logits = graphed(decoder, driver.batch([(request, 1)]), driver).cpu()
    assert (logits - expected[-1:]).norm() < allowed * expected[-1:].norm()


@pytest.mark.skipif(CUDA, reason="below, for real")
@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_bfloat16_beneath_float32_in_the_interpreter(name: str, tmp_path: Path) -> None:
    """A checkpoint in bfloat16 that is served in float32: its weights stay, and logits are those of float32 weights."""
    folder = tiny.save(tiny.build(name).bfloat16(), tmp_path)
    expected = Driver.of(tiny.load(folder)).logits(tiny.prompt(LENGTH), [LENGTH])
    facts, device = read_config(tmp_path), torch.device("cpu")
    spec = spec_of(facts)
    weights, places = allocate(spec, device, torch.float32, matrices=torch.bfloat16)
    fill(places, {}, Source(tmp_path, spec, names_of(facts), None, device, False), lambda _: None, {})
    ops = TritonOps(device, hidden=torch.float32)
    pack(weights, ops)
    assert all(isinstance(m, SplitLinear) and m.weight.dtype == torch.bfloat16 for m in linear_maps(weights))
    narrow = Decoder(spec, weights, TritonAttention(), device, torch.float32, ops)
    logits = Driver.of(narrow).logits(tiny.prompt(LENGTH), [LENGTH - 1, 1])
    assert (logits - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama-tied", "qwen2", "qwen3"])
def test_bfloat16_beneath_float32_on_a_gpu(name: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.build(name).bfloat16(), tmp_path)
    ids = tiny.prompt(200)
    expected = Driver.of(tiny.load(folder)).logits(ids, [200])
    decoder = tiny.load(folder, device="cuda", dtype="float32")
    assert all(isinstance(linear, SplitLinear) for linear in linear_maps(decoder.weights))
    for sizes in ([200], [150] + [1] * 50):
        logits = Driver.of(decoder).logits(ids, sizes).cpu()
        assert (logits - expected).norm() < 1e-5 * expected.norm()
    driver = Driver.of(decoder)
    request = driver.request(ids)
    driver.forward([(request, 199)])
    logits = graphed(decoder, driver.batch([(request, 1)]), driver).cpu()
    assert (logits - expected[-1:]).norm() < 1e-5 * expected[-1:].norm()
    compiled = tiny.load(folder, device="cuda", dtype="float32", enable_torch_compile=True)
    assert not any(isinstance(linear, SplitLinear) for linear in linear_maps(compiled.weights))


def test_experts_on_a_gpu_need_bfloat16(tmp_path: Path) -> None:
    _, folder = make("mixtral", tmp_path)
    spec = tiny.load(folder).spec
    check_dtype(spec, torch.device("cpu"), torch.float32)
    check_dtype(spec, torch.device("cuda"), torch.bfloat16)
    with pytest.raises(StartupError, match="--dtype bfloat16"):
        check_dtype(spec, torch.device("cuda"), torch.float16)
