"""The decoder against transformers (eager, float64) or a plain reference, in every way to cut prompts into batches."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from repacked import ALL, Reference, make
from tiny import Driver

from actorserve.errors import StartupError
from actorserve.models.attention import TorchAttention
from actorserve.models.batch import Batch, plain_batch
from actorserve.models.decoder import Decoder, check_supported
from actorserve.models.kv_cache import KVCache
from actorserve.models.layers import TorchOps
from actorserve.models.places import allocate
from actorserve.models.runner import ChunkWork, Runner
from actorserve.models.spec import Mla, Rope, Spec

TOLERANCE = 1e-5
"""Of the logits' standard deviation. Measured: below 6e-6."""
LENGTH = 70


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(ALL))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Decoder]:
    """(reference, our decoder) of every tiny family."""
    reference, folder = make(request.param, tmp_path_factory.mktemp("model"))
    return reference, tiny.load(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny.load(tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("model")))


def assert_close(logits: torch.Tensor, reference: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert logits.shape == reference.shape
    assert (logits - reference).abs().max() <= tolerance * reference.std()


@pytest.mark.parametrize(
    "sizes", [[LENGTH], [7] * 10, [60] + [1] * 10, [64, 6]], ids=["whole", "sevens", "steps", "64"]
)
def test_logits_equal_transformers(family: tuple[Reference, Decoder], sizes: list[int]) -> None:
    reference, decoder = family
    ids = tiny.prompt(LENGTH)
    assert_close(Driver.of(decoder).logits(ids, sizes), reference(ids))


@torch.inference_mode()
def test_window_of_four_steps(family: tuple[Reference, Decoder]) -> None:
    """The text that the reference continues greedily, by steps that draw and advance on the device, two rows a step."""
    reference, decoder = family
    kv = KVCache(decoder.spec, 11, tiny.PAGE, decoder.device, decoder.dtype)
    runner = Runner(decoder, kv, 2, 5)
    prompts = [tiny.prompt(length, seed=length) for length in (37, 16)]
    for slot in range(2):
        runner.admit(slot, np.arange(5, dtype=np.int32)[::-1] + 5 * slot, 0, 1000)
    runner.slots.flush()
    chunks = [ChunkWork(slot, 0, np.array(ids), draws=True) for slot, ids in enumerate(prompts)]
    nobody, rows = np.empty(0, dtype=np.int64), np.arange(2)
    found, seen = runner.mixed(nobody, chunks, True), []
    for step in range(5):
        drawn = found.logits.argmax(-1)
        seen.append(found.logits)
        for ids, token in zip(prompts, drawn.tolist(), strict=True):
            ids.append(token)
        finish = torch.zeros(2, dtype=torch.uint8)
        runner.slots.advance(found.slots, found.positions, drawn, finish, torch.empty(2, 2, dtype=torch.int32))
        if step < 4:
            found = runner.decode(runner.upload_rows(rows), rows)
    for slot, ids in enumerate(prompts):
        expected = reference(ids)[-6:-1]
        assert_close(torch.stack(seen)[:, slot], expected)
        assert expected.argmax(-1).tolist() == ids[-5:]


def test_shared_prefix_pages(family: tuple[Reference, Decoder]) -> None:
    """A second request starts on the first one's pages, and both go on in one batch."""
    reference, decoder = family
    driver = Driver.of(decoder)
    ids = tiny.prompt(LENGTH)
    other = ids[:48] + tiny.prompt(LENGTH - 48, seed=2)
    first = driver.request(ids)
    driver.forward([(first, LENGTH - 1)])
    second = driver.request(other, shared=first, pages=3)
    logits = driver.forward([(first, 1), (second, LENGTH - 48)])
    assert_close(logits[:1], reference(ids)[-1:])
    assert_close(logits[1:], reference(other)[48:])


def test_mixed_batch(family: tuple[Reference, Decoder]) -> None:
    """Decode rows of unequal lengths, a first chunk and a later chunk, all in one forward."""
    reference, decoder = family
    driver = Driver.of(decoder)
    prompts = [tiny.prompt(length, seed=length) for length in (40, 3, 65, 50, 21)]
    references = [reference(ids) for ids in prompts]
    requests = [driver.request(ids) for ids in prompts]
    for request in requests[:3]:
        driver.forward([(request, len(request.ids) - 1)])
    driver.forward([(requests[3], 30)])
    logits = driver.forward([(requests[0], 1), (requests[1], 1), (requests[2], 1), (requests[3], 20), (requests[4], 9)])
    expected = [references[0][-1:], references[1][-1:], references[2][-1:], references[3][30:50], references[4][:9]]
    assert_close(logits, torch.cat(expected))


def greedy(driver: Driver, requests: list[tiny.Request], chunk: int) -> list[list[int]]:
    """Finish the requests greedily: one prompt chunk at a time beside the decode rows of those already running."""
    lengths = [len(request.ids) for request in requests]
    waiting, running = list(requests), []
    while waiting or running:
        work = [(request, 1) for request in running]
        if waiting:
            work.append((waiting[0], min(chunk, len(waiting[0].ids) - waiting[0].done)))
        logits = driver.forward(work)
        for row, request in enumerate(running):
            request.ids.append(int(logits[row].argmax()))
        if waiting and waiting[0].done == len(waiting[0].ids):
            running.append(waiting.pop(0))
            running[-1].ids.append(int(logits[-1].argmax()))
        running = [request for request in running if len(request.ids) < request.goal]
    return [request.ids[length:] for request, length in zip(requests, lengths, strict=True)]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-windows", "qwen3", "deepseek-v3"])
def test_greedy_ids_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """Chunks of 16, 64 and none, alone or together, on cached prefix pages: the same ids."""
    tokens = 8
    decoder = tiny.load(tiny.save(tiny.build(name), tmp_path))
    prompts = [tiny.prompt(length, seed=length) for length in (33, 70, 5, 64, 17, 2, 48)]
    driver = Driver.of(decoder, 128)
    cold = [driver.request(ids, tokens) for ids in prompts]
    expected = [greedy(driver, [request], 1000)[0] for request in cold]
    assert len({tuple(ids) for ids in expected}) > 4, "the prompts must lead somewhere"
    warm = [
        driver.request(ids, tokens, shared=request, pages=(len(ids) - 1) // tiny.PAGE)
        for ids, request in zip(prompts, cold, strict=True)
    ]
    assert greedy(driver, warm, 16) == expected
    for chunk in (16, 64, 1000):
        driver = Driver.of(decoder, 128, seed=chunk)
        assert greedy(driver, [driver.request(ids, tokens) for ids in prompts], chunk) == expected


def test_only_wanted_rows(llama: Decoder) -> None:
    ids = tiny.prompt(30)
    everything = Driver.of(llama).logits(ids, [30])
    driver = Driver.of(llama)
    rows = torch.tensor([29, 3])
    assert_close(driver.forward([(driver.request(ids), 30)], logit_rows=rows), everything[rows])
    none = driver.forward([(driver.request(ids), 30)], logit_rows=torch.empty(0, dtype=torch.int64))
    assert none.shape == (0, tiny.VOCAB)


def test_unwanted_rows_still_write_their_keys(llama: Decoder) -> None:
    """The last layer drops rows after attention: a later chunk must find the KV of those before it all the same."""
    ids = tiny.prompt(30)
    driver = Driver.of(llama)
    request = driver.request(ids)
    driver.forward([(request, 20)], logit_rows=torch.empty(0, dtype=torch.int64))
    assert_close(driver.forward([(request, 10)]), Driver.of(llama).logits(ids, [30])[20:])


def test_plain_batch(llama: Decoder) -> None:
    ids = tiny.prompt(30)
    kv = KVCache(llama.spec, 8, tiny.PAGE, llama.device, llama.dtype)
    pages = torch.tensor([5, 2], dtype=torch.int32)
    logits = llama.forward(plain_batch(ids, 0, pages, tiny.PAGE), kv)
    assert_close(logits, Driver.of(llama).logits(ids, [30])[-1:])


def test_decode_needs_nothing_from_the_device(llama: Decoder) -> None:
    """On the meta device any read of a value raises: a decode batch can be captured in a CUDA graph."""
    meta = torch.device("meta")
    weights, _ = allocate(llama.spec, meta, torch.bfloat16)
    decoder = Decoder(llama.spec, weights, TorchAttention(), meta, torch.bfloat16)
    kv = KVCache(llama.spec, 8, tiny.PAGE, meta, torch.bfloat16)
    batch = Batch(
        ids=torch.zeros(4, dtype=torch.int64, device=meta),
        positions=torch.zeros(4, dtype=torch.int64, device=meta),
        kv_slots=torch.zeros(4, dtype=torch.int64, device=meta),
        decode_tables=torch.zeros(4, 3, dtype=torch.int32, device=meta),
        decode_lengths=torch.zeros(4, dtype=torch.int32, device=meta),
        max_decode_length=48,
        logit_rows=None,
    )
    assert decoder.forward(batch, kv).shape == (4, tiny.VOCAB)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    model = tiny.build("qwen3")
    decoder = tiny.load(tiny.save(model, tmp_path), dtype="bfloat16")
    ids = tiny.prompt(LENGTH)
    reference = tiny.reference_logits(model, ids)
    for sizes in ([LENGTH], [20] + [1] * 50):
        logits = Driver.of(decoder).logits(ids, sizes)
        assert logits.dtype == torch.float32
        assert (logits.float() - reference).norm() < 0.05 * reference.norm()


@pytest.fixture
def recursion_limit() -> Iterator[None]:
    """torch.compile raises it for the whole process, which other tests' deep nestings must not pass by."""
    before = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("recursion_limit")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile writes C++ for a CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_operations(llama: Decoder) -> None:
    """--enable-torch-compile: the same logits, by at most two programs an operation for all numbers of tokens."""
    ops, made = TorchOps(compiled=True), torch._dynamo.utils.counters["stats"]
    compiled = Decoder(llama.spec, llama.weights, llama.attention, llama.device, llama.dtype, ops)
    before, ids, sizes = made["unique_graphs"], tiny.prompt(LENGTH), [40, 20, 7, 2, 1]
    assert_close(Driver.of(compiled).logits(ids, sizes), Driver.of(llama).logits(ids, sizes))
    assert 5 <= made["unique_graphs"] - before <= 2 * 5


@pytest.mark.parametrize(
    "fields",
    [
        {"causal": False},
        {"local_rope": Rope(10000.0, 2)},
        {"local_rope": Rope(10000.0, 4, interleaved=True)},
        {"mla": Mla(None, 4, 4, 4, 4), "clip_qkv": 8.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_refuses_what_it_would_ignore(fields: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match=next(iter(fields))):
        check_supported(replace(Spec(10, 8, 2, 2, 2, 4, 8, rope=Rope(10000.0, 4)), **fields))
