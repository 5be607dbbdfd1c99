"""perf.energy: its arithmetic, and that it goes through all parts, on a CPU, by a clock and a counter of the test."""

from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from actorserve.models import shapes
from actorserve.perf import energy
from actorserve.perf.decode import Bench
from actorserve.perf.shapes import dummy_decoder

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 128, "vocab_size": 300}  # fmt: skip


class Clock:
    """Goes on by 4 ms each time it is looked at; the device takes 2 W."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.004
        return self.now

    def joules(self) -> float:
        return 2 * self.now


def test_a_line_says_what_a_part_costs() -> None:
    part = energy.Part("down", ms=2.0, joules=1.2, flops=1e12, bytes=1e10)
    assert part.line().split() == "down 2.000 ms 1.200 J 600 W 1.20 J/TFLOP 120 pJ/byte".split()
    assert "TFLOP" not in energy.Part("step", 1.0, 1.0).line()


def test_all_parts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.KNOWN, "smollm2-135m", shapes.KNOWN["smollm2-135m"] | SMALL)
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(energy, "time", clock)
    monkeypatch.setattr(energy, "Meter", lambda _: clock)
    monkeypatch.setattr(energy, "captured", lambda run: SimpleNamespace(replay=run))
    monkeypatch.setattr(energy, "Bench", lambda *given, graphs: Bench(*given, graphs=False))
    monkeypatch.setattr(energy, "busy", partial(energy.busy, warm=0.01))
    monkeypatch.setattr(energy, "COPIED", 1 << 20)
    decoder, config = dummy_decoder("smollm2-135m", "cpu")
    args = Namespace(batch=3, context=40, prefill=32, seconds=0.018)
    found = {part.name: part for part in energy.measure(decoder, config, args)}
    assert list(found) == ["copy", "step", "attention", "qkv", "o", "gate, up", "down", "prefill"]
    for part in found.values():
        assert part.joules == pytest.approx(2 * part.ms / 1e3)
        assert part.ms == pytest.approx(24 / 32)  # four times eight runs, then the clock is looked at twice
    assert found["gate, up"].flops == 2 * found["down"].flops == 2 * 3 * 2 * 2 * 64 * 128
    assert found["qkv"].flops == 2 * found["o"].flops
    assert found["attention"].bytes == 3 * 40 * 2 * 2 * 2 * 16 * decoder.dtype.itemsize
