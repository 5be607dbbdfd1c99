"""Bulk copies: every byte arrives, errors come out, and the loader's GPU path loads what its CPU path loads."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.models import transfer, weights
from actorserve.models.transfer import BulkCopy, can_copy

add = BulkCopy.add
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("readers", [1, 3])
def test_every_byte_arrives(readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE", 1000)
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(n, 7, generator=generator).to(torch.bfloat16) for n in (1, 71, 500, 1111)]
    fused = torch.zeros(2000, 7, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.split(fused, [1, 71, 500, 1111, 317])[:4]
    arrived: list[int] = []
    with BulkCopy(DEVICE, arrived.append, readers) as bulk:
        for target, source in zip(targets, sources, strict=True):
            assert can_copy(target, source)
            bulk.add(target, source)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source)
    assert sum(arrived) == sum(source.nbytes for source in sources)
    assert not fused[1683:].any()


def test_what_is_not_copied_as_it_is() -> None:
    plain = torch.zeros(4, 4)
    assert not can_copy(plain, torch.zeros(4)), "broadcast"
    assert not can_copy(plain, torch.zeros(4, 4, dtype=torch.bfloat16)), "converted"
    assert not can_copy(plain.t()[:2], torch.zeros(2, 4)), "strided"
    assert not can_copy(torch.zeros(()), torch.zeros(()))


def test_errors_come_out() -> None:
    with pytest.raises(RuntimeError), BulkCopy(DEVICE, lambda count: None) as bulk:
        bulk.add(torch.zeros(10, device=DEVICE), torch.zeros(11))
    with pytest.raises(KeyError), BulkCopy(DEVICE, lambda count: None) as bulk:
        bulk.add(torch.zeros(10, device=DEVICE), torch.zeros(10))
        raise KeyError


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama-tied"])
def test_the_loader_with_bulk_copies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the loader is told that it has a GPU; a bfloat16 checkpoint in bfloat16 goes through BulkCopy."""
    folder = tiny.save(tiny.build(name).to(torch.bfloat16), tmp_path)
    config = EngineConfig(device="cpu", dtype="bfloat16")
    plain = weights.load_decoder(folder, config, lambda fraction: None)
    seen: list[float] = []
    moved: list[Tensor] = []
    monkeypatch.setattr(weights, "uses_bulk_copy", lambda device: True)
    monkeypatch.setattr(BulkCopy, "add", lambda self, target, source: (moved.append(target), add(self, target, source)))
    bulk = weights.load_decoder(folder, config, seen.append)
    assert len(moved) > 10
    ids = tiny.prompt(20)
    assert torch.equal(tiny.Driver.of(plain).logits(ids, [20]), tiny.Driver.of(bulk).logits(ids, [20]))
    assert seen == sorted(seen) and seen[-1] > 0.9
