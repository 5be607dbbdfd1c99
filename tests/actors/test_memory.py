"""Sizes of the batch and the KV pool: on the CPU as they are, on a GPU with its memory played by the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from actorserve.actors import memory
from actorserve.config import EngineConfig, ModelInfo
from actorserve.errors import StartupError
from actorserve.models import ledger
from actorserve.models.decoder import Decoder

MODEL = ModelInfo(name="m", path="", model_type="llama", vocab_size=200, context_length=500, eos_ids=())
LONG = ModelInfo(name="m", path="", model_type="llama", vocab_size=200, context_length=480_000, eos_ids=())
GIB = 1 << 30


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tmp_path_factory.mktemp("llama")
    tiny.build("llama").config.save_pretrained(folder)
    return tiny.load(str(folder), load_format="dummy")


def test_cpu(decoder: Decoder) -> None:
    assert memory.batch_slots(EngineConfig(), "cpu") == 64
    assert memory.batch_slots(EngineConfig(max_running_requests=3), "cpu") == 3
    assert memory.kv_pages(EngineConfig(max_running_requests=3), decoder, MODEL) == 3 * 32, "what the batch can use"
    assert memory.kv_pages(EngineConfig(max_total_tokens=1000), decoder, MODEL) == 63
    with pytest.raises(StartupError, match="raise --mem-fraction-static"):
        memory.kv_pages(EngineConfig(mem_fraction_static=1e-9), decoder, MODEL)


def test_the_largest_forward_runs(decoder: Decoder) -> None:
    config = EngineConfig(chunked_prefill_size=40, max_running_requests=3)
    logits: list[torch.Size] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(decoder, name)

        def forward(self, batch: object, kv: object) -> None:
            logits.append(decoder.forward(batch, kv).shape)  # type: ignore[arg-type]

    memory.largest_forward(config, Watched(), 3)()  # type: ignore[arg-type]
    assert logits == [torch.Size([3, 200])]


class Gpu:
    """A decoder that says it is on a GPU, and that GPU's memory. Bytes."""

    def __init__(self, decoder: Decoder, total: int, used: int, peak: int) -> None:
        self.spec = self.whole = decoder.spec
        self.dtype, self.device = torch.bfloat16, torch.device("cuda")
        self.total, self.used, self.peak = total, used, peak

    def pages(self, **settings: object) -> int:
        config = EngineConfig(**{"max_running_requests": 100} | settings)  # type: ignore[arg-type]
        return memory.kv_pages(config, self, LONG)  # type: ignore[arg-type]


@pytest.fixture
def gpu(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    played = Gpu(decoder, 10 * GIB, 2 * GIB, GIB // 2)
    monkeypatch.setattr(memory, "largest_forward", lambda config, decoder, slots: lambda: None)
    monkeypatch.setattr(memory, "measure_activation_peak", lambda run, device: played.peak)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (played.total - played.used, played.total))
    yield played


def expected(gpu: Gpu, fraction: float) -> int:
    config = EngineConfig(max_running_requests=100)
    demand = ledger.demand_of(gpu.spec, config, "bfloat16", LONG.context_length)
    rows = {row.name: row.bytes for row in ledger.estimate(demand)}
    static = gpu.used + rows["slot arrays"]  # the sampler's tables are in use: they were made before
    transient = gpu.peak + rows["attention workspace"] + rows["CUDA graphs"]
    room = min(int(fraction * gpu.total) - static, gpu.total - static - transient)
    return room // ledger.page_bytes(gpu.spec, 16, 2) - 1


def test_gpu(gpu: Gpu) -> None:
    assert gpu.pages() == expected(gpu, 0.88) > 0
    assert gpu.pages(mem_fraction_static=0.5) == expected(gpu, 0.5)
    gpu.peak = 3 * GIB
    assert gpu.pages() == expected(gpu, 0.88), "the measured peak counts where it is large"
    assert gpu.pages(max_running_requests=4) == 4 * 30_000, "what the batch can use"


def test_gpu_without_room(gpu: Gpu) -> None:
    assert gpu.pages(max_total_tokens=10_000) == 625
    with pytest.raises(StartupError, match="lacking for --max-total-tokens on the GPU"):
        gpu.pages(max_total_tokens=10_000_000_000)
    gpu.used = 9 * GIB
    with pytest.raises(StartupError, match="GiB are lacking for KV pages on the GPU: `actorserve plan`"):
        gpu.pages()


def test_the_peak_is_what_the_allocator_took(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [100]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: max(held))
    device = torch.device("cuda")
    assert memory.measure_activation_peak(lambda: held.append(350), device) == 250

    def too_large() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(StartupError, match="lower --chunked-prefill-size"):
        memory.measure_activation_peak(too_large, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_measured_on_a_gpu() -> None:
    def run() -> None:
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda")

    assert 64 << 20 <= memory.measure_activation_peak(run, torch.device("cuda")) <= 68 << 20
