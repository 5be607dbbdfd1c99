"""perf.cpu_parts: of what a core can do, a map's share is at most all."""

import pytest
import torch

from actorserve.errors import StartupError
from actorserve.models.cpu_kernels import kernels
from actorserve.models.quantized import DenseLinear, QuantizedLinear
from actorserve.perf.cpu_parts import limit_of


def test_integers_are_twice_as_fast() -> None:
    try:
        lanes = kernels().lanes
    except StartupError as error:
        pytest.skip(str(error))
    dense = DenseLinear(torch.zeros(lanes, 32), None)
    blocks = QuantizedLinear(torch.zeros(lanes, 34, dtype=torch.uint8), 32, None)
    assert (limit_of(dense, 100.0), limit_of(blocks, 100.0)) == (100.0, 200.0)
    pairs = DenseLinear(torch.zeros(lanes, 32), None, rounds=True)
    assert limit_of(pairs, 100.0) == (1600.0 if kernels().matrices else 200.0 if kernels().pairs else 100.0)
