"""perf/perplexity.py: windows, and that Q4_1 kept is as good as the dequantised weights (issue 7: within 1 %)."""

import math

import pytest

from actorserve.config import EngineConfig
from actorserve.perf.perplexity import compare, windows_of

TEXT = """A lighthouse keeper lived alone on a small island far from the coast. Every evening he climbed the stairs,
cleaned the glass and lit the lamp, so that the ships could find their way past the rocks. In winter the waves were so
high that no boat could land for many weeks, and he ate bread and salted fish until the weather was better. One night,
during a heavy storm, he saw a small light on the water. It came closer and closer, and then it was gone. He took his
coat and ran down to the shore, where he found a young woman holding on to a piece of wood. She told him that her ship
had lost its mast, and that the captain had not been able to see the lighthouse because of the rain.
"""


def test_windows() -> None:
    assert windows_of(list(range(10)), 4, 100) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert windows_of(list(range(10)), 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of([1], 4, 9) == []


def test_kept_blocks_are_as_good_as_dense(smollm: str) -> None:
    found = compare(smollm, TEXT, 96, 192, EngineConfig(device="cpu"))
    kept, dense = found["kept"], found["dense"]
    assert 3 < dense.perplexity < 60
    assert kept.perplexity == pytest.approx(math.exp(kept.loss))
    assert kept.perplexity / dense.perplexity == pytest.approx(1.0, abs=0.01)
