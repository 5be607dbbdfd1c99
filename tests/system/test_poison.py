"""NaN in the model, and memory that forgets: one request fails, or is computed again; others do not notice."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch

from actorserve import Engine, SamplingParams
from actorserve.actors import executor
from actorserve.actors.executor import Executor
from actorserve.errors import ActorserveError
from actorserve.models.kv_cache import KVCache
from actorserve.models.kv_checksums import CorruptPage, KVChecksums

BAD = 77
"""A token whose embedding is not a number."""
SAMPLING = {"temperature": 0.8, "max_new_tokens": 24, "ignore_eos": True, "logit_bias": {BAD: -100.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    return tiny.save(model, tmp_path_factory.mktemp("poisoned"))


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> list[Executor]:
    """Those that are made, the newest last."""
    made: list[Executor] = []

    class Seen(Executor):
        def __init__(self, context: Any) -> None:
            super().__init__(context)
            made.append(self)

    monkeypatch.setattr(executor, "Executor", Seen)
    return made


def open_engine(folder: str, **options: object) -> Any:
    settings = {
        "skip_tokenizer_init": True, "dtype": "float32", "placement": "inline", "max_total_tokens": 1024,
        "max_running_requests": 6, "cpu_threads": 1, "chunked_prefill_size": 32,
    }  # fmt: skip
    return Engine.sync(folder, **settings | options)


def good_prompts(count: int = 6) -> list[list[int]]:
    stem = [t for t in tiny.prompt(40, seed=9) if t != BAD]
    return [stem[: 8 * i] + [t for t in tiny.prompt(20 + i, seed=i) if t != BAD] for i in range(count)]


def answers(engine: Any, prompts: list[list[int]]) -> list[Any]:
    """Tokens and logprobs, or the error."""

    def one(i: int) -> Any:
        try:
            output = engine.generate(prompts[i], SamplingParams(seed=i, logprobs=0, **SAMPLING))
        except ActorserveError as error:
            return (error.status, error.code)
        return output.ids, [item.logprob for item in output.logprobs]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, range(len(prompts))))


def alike(said: list[Any], expected: list[Any]) -> bool:
    """The same tokens, and logprobs but for the last bits of sums in float32: those differ with the batch's size."""
    return all(a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-5) for a, b in zip(said, expected, strict=True))


def test_nan_fails_one_request(folder: str, executors: list[Executor]) -> None:
    """Its pages, full of NaN, are used again at once, for there are few: the others' tokens stay the same.

    They share a prefix with it, and its first chunks were in the cache before the NaN was seen.
    """
    good = good_prompts()
    with open_engine(folder, max_total_tokens=512, schedule_conservativeness=0.2) as engine:
        expected = answers(engine, good)
        assert not any(isinstance(answer[0], int) for answer in expected)
        bad = [[*good[4][:36], BAD, *good[0], *good[1]], [*good[5][:3], BAD], [BAD] * 70]
        for _ in range(3):
            said = answers(engine, [*good[:3], *bad, *good[3:]])
            assert said[3:6] == [(500, "internal_error")] * 3
            assert alike(said[:3], expected[:3])
            assert alike(answers(engine, good), expected)
        storage = executors[-1].runner.kv.storage  # type: ignore[union-attr]
        assert torch.isnan(storage).any(), "there was something to stumble over"


def test_a_flipped_bit_is_found_and_named(
    folder: str, executors: list[Executor], caplog: pytest.LogCaptureFixture
) -> None:
    """In a page of the prefix cache. The executor is replaced, its KV forgotten, and the answer is right."""
    prompt = [t for t in tiny.prompt(60, seed=3) if t != BAD]
    with open_engine(folder, kv_checksums=True) as engine, caplog.at_level(logging.ERROR):
        (first,) = answers(engine, [prompt])
        assert alike(answers(engine, [prompt]), [first]), "reuse of what is sound"
        assert answers(engine, [prompt[:45], prompt[:37], good_prompts()[1]])  # copies of parts of pages
        assert len(executors) == 1
        rows = executors[0].runner.kv.storage.view(torch.int32)  # type: ignore[union-attr]
        used = rows.abs().sum((0, 2, 3, 4)).nonzero().flatten()
        rows[1, used[5], 0, 0, 3] ^= 1 << 7
        assert alike(answers(engine, [prompt]), [first])
        assert len(executors) == 2
    page, offset = divmod(int(used[5]), 16)
    assert f"KV page {page}, token {offset} of it, is not what was written there" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_bit_counts(folder: str, dtype: torch.dtype) -> None:
    spec = tiny.load(folder).spec
    kv = KVCache(spec, 4, 16, torch.device("cpu"), dtype)
    bits = kv.storage.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
    bits.random_(0, 100)
    sums = KVChecksums(kv)
    pages = torch.arange(4, dtype=torch.int32).numpy()
    sums.written(torch.arange(64).numpy())
    sums.verify(pages, 64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        where = tuple(int(torch.randint(n, (), generator=generator)) for n in bits.shape)
        before = bits[where].clone()
        bits[where] ^= 1 << int(torch.randint(8 * dtype.itemsize - 1, (), generator=generator))
        with pytest.raises(CorruptPage, match=f"page {where[1] // 16}, token {where[1] % 16} "):
            sums.verify(pages, 64)
        bits[where] = before
    kv.copy_pages(copies := torch.tensor([[1, 3, 5], [3, 0, 2]], dtype=torch.int32).numpy())
    sums.copied(copies)
    sums.verify(pages, 64)
