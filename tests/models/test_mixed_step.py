"""Mixed steps at a fixed shape against those of any shape: same logits, same KV, whatever pads them; in graphs, too."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from actorserve.config import EngineConfig
from actorserve.models.kv_cache import KVCache
from actorserve.models.runner import ChunkWork, Runner, StepLogits
from actorserve.models.weights import load_decoder

pytest.importorskip("triton")
from actorserve.models import mixed_step
from actorserve.models.mixed_step import LONGEST, MOST_CHUNKS, Bucket, MixedStep, fits
from actorserve.models.triton_attention import TritonAttention

SLOTS, PAGES, PAGE = 6, 10, 16
NOBODY = np.empty(0, dtype=np.int64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("llama"))


def make_runner(folder: str, sections: tuple[int, int, int] | None = None) -> Runner:
    """Six slots of which 0 to 3 hold 5, 20, 33 and 64 tokens. With `sections` tokens have three positions."""
    decoder = load_decoder(folder, EngineConfig(model=folder, dtype="float32", device=DEVICE), lambda _: None)
    assert decoder.spec.rope is not None
    decoder.spec = replace(decoder.spec, rope=replace(decoder.spec.rope, sections=sections))
    kv = KVCache(decoder.spec, SLOTS * PAGES + 1, PAGE, decoder.device, torch.float32)
    runner = Runner(decoder, kv, SLOTS, PAGES)
    order = np.random.default_rng(0).permutation(SLOTS * PAGES).astype(np.int32).reshape(SLOTS, PAGES)
    for slot in range(SLOTS):
        runner.admit(slot, order[slot], 0, PAGES * PAGE, shift=0 if sections is None else -slot)
    runner.slots.flush()
    for slot, length in enumerate((5, 20, 33, 64)):
        prompt = ChunkWork(slot, 0, ids(length, slot), draws=True)
        advance(runner, runner.mixed(NOBODY, [prompt], exact=False))
    decoder.attention = TritonAttention()
    return runner


@pytest.fixture
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes its time for the empty ones, too."""
    monkeypatch.setattr(mixed_step, "MOST_CHUNKS", 2)


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Memory that nobody has written holds the worst. On a GPU torch would ask for other kernels, too."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, tiny.VOCAB, count)


def pages_of(runner: Runner, storage: torch.Tensor) -> torch.Tensor:
    """The cache [layers, pages, numbers] without the scratch page."""
    return storage.view(runner.decoder.spec.layers, SLOTS * PAGES + 1, -1)[:, :-1]


def advance(runner: Runner, step: StepLogits) -> None:
    """Greedy."""
    drawn = step.logits.argmax(-1)
    out = torch.empty(2, len(drawn), dtype=torch.int32, device=drawn.device)
    runner.slots.advance(step.slots, step.positions, drawn, torch.zeros_like(drawn, dtype=torch.uint8), out)


WORK = {
    "a prompt's end": ([0, 2, 3], [ChunkWork(4, 0, ids(30, 9), True)]),
    "a prompt's middle": ([1, 0], [ChunkWork(5, 0, ids(17, 8), False)]),
    "later in a prompt": ([3], [ChunkWork(1, 20, ids(40, 8), True)]),
    "jumps": ([0, 3], [ChunkWork(1, 20, ids(3, 7), True), ChunkWork(2, 33, ids(6, 6), True)]),
    "no decode rows": ([], [ChunkWork(4, 0, ids(64, 5), True)]),
    "all slots": ([3, 1, 2, 0], [ChunkWork(5, 0, ids(2, 4), True), ChunkWork(4, 0, ids(5, 3), True)]),
}


SAMPLE = ["jumps"]
"""What the interpreter has time for."""


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("name", SAMPLE if DEVICE == "cpu" else list(WORK))
def test_a_padded_step_is_a_mixed_step(
    folder: str, few_tiles: None, unwritten_is_nan: None, name: str, axes: int
) -> None:
    runner = make_runner(folder, None if axes == 1 else (1, 2, 1))
    decoding, chunks = np.array(WORK[name][0], dtype=np.int64), [replace(chunk) for chunk in WORK[name][1]]
    if axes == 3:  # the first chunk is of an image, the others of text
        chunks[0].positions = chunks[0].start + np.random.default_rng(1).integers(0, 5, (3, len(chunks[0].ids)))
    before = runner.kv.storage.clone()
    with torch.inference_mode():
        plain = runner.mixed(decoding, chunks, exact=False)
        written = runner.kv.storage.clone()
        runner.kv.storage.copy_(before)
        step = MixedStep(runner, Bucket(7, 64))
        step.fill(decoding, chunks)
        padded = step.forward()
    count = len(plain.slots)
    assert padded.slots.tolist() == plain.slots.tolist() + [runner.slots.padding] * (7 - count)
    assert padded.positions[:count].tolist() == plain.positions.tolist()
    torch.testing.assert_close(padded.logits[:count], plain.logits, rtol=1e-4, atol=1e-4)
    assert padded.logits.isfinite().all() and runner.kv.storage.isfinite().all()
    torch.testing.assert_close(pages_of(runner, runner.kv.storage), pages_of(runner, written), rtol=1e-4, atol=1e-4)
    assert not torch.equal(written, before)


def test_a_cleared_step_touches_the_scratch_page_only(folder: str, few_tiles: None) -> None:
    runner = make_runner(folder)
    before, cells = runner.kv.storage.clone(), runner.slots.cells.clone()
    with torch.inference_mode():
        advance(runner, MixedStep(runner, Bucket(4, 32)).forward())
    assert torch.equal(pages_of(runner, runner.kv.storage), pages_of(runner, before))
    assert torch.equal(runner.slots.cells, cells)


def test_what_fits() -> None:
    largest = Bucket(4, 32)
    chunk = ChunkWork(1, 0, ids(32, 0), True)
    rows = np.arange(3)
    assert fits(rows, [chunk], largest)
    assert not fits(np.arange(4), [chunk], largest)
    assert fits(np.arange(4), [ChunkWork(1, 0, ids(32, 0), False)], largest)
    assert not fits(NOBODY, [ChunkWork(1, 0, ids(32, 0), False)], largest)
    assert not fits(rows, [ChunkWork(1, 0, ids(33, 0), True)], largest)
    assert not fits(rows, [ChunkWork(1, LONGEST, ids(1, 0), True)], largest)
    assert not fits(rows, [ChunkWork(1, 0, ids(4, 0), True, targets=ids(3, 0))], largest)
    short = [ChunkWork(1, 0, ids(1, 0), False)]
    assert fits(rows, short * MOST_CHUNKS, Bucket(4, 64)) and not fits(rows, short * (MOST_CHUNKS + 1), Bucket(4, 64))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_change_nothing(folder: str, temperature: float) -> None:
    """Every kind of step, one after another: tokens of a stepper with graphs are those of one without."""
    from actorserve.models.graphs import StepGraphs
    from actorserve.models.stepper import Stepper
    from actorserve.sampler.drawer import Drawer
    from actorserve.sampler.params import SamplingParams
    from actorserve.sampler.state import SamplerState

    drawn = []
    for graphs in (False, True):
        runner = make_runner(folder)
        state = SamplerState(SLOTS, tiny.VOCAB, (), runner.device)
        none = np.empty(0, dtype=np.int32)
        for slot in range(SLOTS):
            state.admit(slot, SamplingParams(temperature=temperature, seed=slot), none, none, 0, 0)
        drawer = Drawer(state, SLOTS)
        stepper = Stepper(runner, drawer, StepGraphs(runner, drawer, SLOTS) if graphs else None)
        while stepper.prepare_ahead():
            pass
        tokens = []
        for decoding, chunks in [*WORK.values(), (np.arange(4), []), (np.arange(6), [])]:
            step = stepper.launch(np.array(decoding, dtype=np.int64), chunks)
            step.wait()
            rows = step.rows()
            assert rows is not None
            tokens.append((rows.slots.tolist(), rows.ids.tolist()))
        drawn.append(tokens)
    assert drawn[0] == drawn[1]
