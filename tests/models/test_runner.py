"""The runner: what jumps leave behind is what a plain prefill of the same tokens leaves."""

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from actorserve.models.kv_cache import KVCache
from actorserve.models.runner import NOTHING, ChunkWork, Runner

PAGES = 6
"""Of each of the three slots."""
NOISE = {"float32": 2e-5, "bfloat16": 0.08}
"""Of keys, values and logits, which are of the order of 1."""


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.build(request.param), tmp_path_factory.mktemp("model"))


class Sequence:
    """A slot and all tokens that it will have, fed to the runner as a scheduler would."""

    def __init__(self, runner: Runner, slot: int, ids: list[int], backwards: bool = False) -> None:
        self.runner, self.slot, self.ids, self.done = runner, slot, np.array(ids, dtype=np.int32), 0
        pages = np.arange(slot * PAGES, (slot + 1) * PAGES, dtype=np.int32)
        self.pages = pages[::-1].copy() if backwards else pages
        runner.admit(slot, self.pages, 0, 1000)
        runner.slots.flush()

    def chunk(self, tokens: int, scored: bool = False) -> ChunkWork:
        self.done += tokens
        start = self.done - tokens
        targets = self.ids[start + 1 : self.done] if scored else NOTHING
        return ChunkWork(self.slot, start, self.ids[start : self.done], True, targets=targets)

    def drawn(self) -> None:
        """The slot's next token is the one that it shall have."""
        self.runner.slots.length[self.slot] = self.done
        self.runner.slots.last[self.slot] = int(self.ids[self.done]) if self.done < len(self.ids) else 0

    def kv(self) -> Tensor:
        """float32 [layers, tokens, 2, kv_heads, head_dim]"""
        kv, places = self.runner.kv, torch.arange(self.done)
        slots = torch.from_numpy(self.pages.astype(np.int64))[places // kv.page_size] * kv.page_size
        return kv.storage[:, slots + places % kv.page_size].float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_kv_and_logits_after_jumps_are_those_of_a_prefill(folder: str, dtype: str) -> None:
    """Jumps inside a page, over one and over several, beside a row that decodes, and decode steps between them."""
    decoder = tiny.load(folder, dtype=dtype)
    kv = KVCache(decoder.spec, 3 * PAGES + 1, 16, decoder.device, decoder.dtype)
    runner = Runner(decoder, kv, 3, PAGES)
    ids = tiny.prompt(80, seed=4)
    jumping, beside = Sequence(runner, 0, ids, backwards=True), Sequence(runner, 1, tiny.prompt(60, seed=5))
    runner.mixed(np.empty(0, np.int64), [jumping.chunk(13), beside.chunk(20)], True)
    scored: dict[int, Tensor] = {}
    for jump in (2, 0, 9, 40, 0, 0, 3):
        for sequence in (jumping, beside):
            sequence.drawn()
        rows = np.array([1] if jump else [0, 1])
        start = jumping.done
        beside.done += 1
        if jump:
            found = runner.mixed(rows, [jumping.chunk(1 + jump, scored=True)], True)
            assert found.scored is not None and found.slots.tolist() == [1, 0] and len(found.logits) == 2
            assert found.positions.tolist()[1] == jumping.done
            scored |= {
                start + i: row for i, row in enumerate(torch.cat([decoder.logits(found.scored), found.logits[1:]]))
            }
        else:
            jumping.done += 1
            runner.decode(runner.upload_rows(rows), rows)
    plain = Sequence(runner, 2, ids)
    found = runner.mixed(np.empty(0, np.int64), [plain.chunk(jumping.done, scored=True)], True)
    assert found.scored is not None
    logits = torch.cat([decoder.logits(found.scored), found.logits])
    assert jumping.done == 13 + 4 + 54 + 3 and plain.kv().abs().max() > 0.5
    torch.testing.assert_close(jumping.kv(), plain.kv(), atol=NOISE[dtype], rtol=0)
    for place, row in scored.items():
        torch.testing.assert_close(row, logits[place], atol=NOISE[dtype], rtol=0)


def test_a_scored_chunk_of_one_token_has_no_rows(folder: str) -> None:
    """The last token's logits are for the draw."""
    decoder = tiny.load(folder, dtype="float32")
    runner = Runner(decoder, KVCache(decoder.spec, PAGES + 1, 16, decoder.device, decoder.dtype), 1, PAGES)
    found = runner.mixed(np.empty(0, np.int64), [Sequence(runner, 0, [5, 6]).chunk(1, scored=True)], True)
    assert found.scored is None and found.logits.shape == (1, tiny.VOCAB)


@torch.inference_mode()
def test_the_tokens_behind_targets_are_scored(folder: str) -> None:
    """From a place inside a chunk on, up to the token that follows it; with nothing drawn at all, too."""
    decoder = tiny.load(folder, dtype="float32")
    runner = Runner(decoder, KVCache(decoder.spec, 2 * PAGES + 1, 16, decoder.device, decoder.dtype), 2, PAGES)
    whole, parts = (Sequence(runner, slot, tiny.prompt(30, seed=6)) for slot in range(2))
    nobody = np.empty(0, np.int64)
    all_rows = runner.mixed(nobody, [whole.chunk(30, scored=True)], True).scored
    assert all_rows is not None
    ids, found = parts.ids, list[Tensor]()
    for start, end, score_from, last in ((0, 11, 4, 12), (11, 20, 0, 21), (20, 30, 0, 30)):
        targets = ids[start + score_from + 1 : last]
        work = ChunkWork(1, start, ids[start:end], False, score_from, targets)
        step = runner.mixed(nobody, [work], True)
        assert step.scored is not None and len(step.scored) == len(targets) and len(step.logits) == 0
        found.append(decoder.logits(step.scored))
    torch.testing.assert_close(torch.cat(found), decoder.logits(all_rows[4:]), atol=1e-4, rtol=0)
