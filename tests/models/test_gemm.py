"""The small-batch GEMM against torch in float32: tiles of every kind, odd sizes, splits, biases, in graphs."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from actorserve.models import gemm
from actorserve.models.gemm import Choice, Choices, Tile, TritonLinear, arrivals, choose, fits, linear
from actorserve.models.stream_gemm import Stream
from actorserve.perf.gemm import table
from actorserve.perf.gemm_tiles import candidates, cases, streams

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float16
ARRIVED = arrivals(DEVICE)
PDL = CUDA and torch.cuda.get_device_capability() >= (9, 0)
PDL_ROWS = 16 if PDL else 0
SHAPES = [(200, 384), (4608, 3584), (3584, 18944), (896, 4864), (1003, 768)]
TILES = [
    Tile(16, 64, 64),
    Tile(16, 64, 64, split=2),
    Tile(16, 64, 128, split=4),  # one of them has nothing to do where there are 3 stages
    Tile(16, 16, 128, warps=2),
    Tile(32, 32, 64, split=3, warps=2, stages=3),
    Tile(64, 128, 64, swap=False),
    Tile(64, 64, 64, split=2, swap=False, stages=3),
    Tile(16, 64, 64, tma=True),
    Tile(64, 64, 64, split=2, swap=False, tma=True),
    Tile(16, 32, 256, ahead=1),  # the depth does not divide the columns
    Tile(16, 64, 64, split=2, stages=3, ahead=2),
    Tile(16, 64, 64, split=2, ahead=1, fetch=True),
    Tile(64, 64, 64, split=4, swap=False, tma=True, fetch=True),
    Tile(16, 32, 256, fetch=True),
    Tile(16, 64, 128, split=4, ahead=2),  # all stages, and more than there are
    Tile(1, 16, 128, split=2, ahead=1),
    Tile(1, 32, 256, ahead=4),
    Tile(1, 16, 64),
    *([Tile(128, 128, 64, split=3, warps=8, swap=False), Tile(256, 128, 64, 1, 8, 3, False, True)] if CUDA else []),
]


def operands(rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs]; products are about 1."""
    generator = torch.Generator(DEVICE).manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator, device=DEVICE)
    weight = torch.randn(outputs, inputs, generator=generator, device=DEVICE) * inputs**-0.5
    bias = torch.randn(outputs, generator=generator, device=DEVICE)
    return x.to(DTYPE), weight.to(DTYPE), bias.to(DTYPE)


STREAMS = [
    Stream(16, 64, 64, 3, 4),  # of 4 tiles one is left, and shared by all
    Stream(16, 64, 64, 12, 4),  # all are shared
    Stream(16, 64, 64, 7, 4, swap=True),  # too few programs to share
    Stream(32, 128, 64, 7, 4, 3, swap=True),
    Stream(64, 32, 128, 5, 4, 3),
    Stream(16, 64, 256, 132, 4, 3),  # the depth does not divide the columns
    *([Stream(64, 128, 64, 264, 4, 4), Stream(128, 256, 64, 132, 8, 4)] if CUDA else []),
]


@pytest.mark.parametrize("tile", [*TILES, *STREAMS], ids=str)
def test_a_tile(tile: Choice) -> None:
    few = (200 if isinstance(tile, Stream) else tile.outputs + 8, 384)
    shapes = SHAPES if CUDA else [few]  # the interpreter takes its time for each program
    for outputs, inputs in shapes:
        for rows in (1, 3) if tile.rows == 1 else (1, 17, *([16, 64, 128, 250] if CUDA else [])):
            assert fits(tile, outputs, inputs, rows)
            x, weight, bias = operands(rows, outputs, inputs)
            exact = F.linear(x.float(), weight.float())
            got = linear(x, weight, None, tile, ARRIVED, PDL, torch.float32)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, exact, rtol=2e-4, atol=2e-4)
            biased = linear(x, weight, bias, tile, ARRIVED, PDL)
            torch.testing.assert_close(biased, (exact + bias.float()).to(DTYPE), rtol=2**-7, atol=2**-7)
            assert torch.equal(linear(x, weight, bias, tile, ARRIVED, False), biased)
    assert not ARRIVED.any()


def test_the_table_decides() -> None:
    small, large = Tile(16, 32, 64), Tile(32, 32, 64)
    choices = ((16, small), (32, None), (64, large))
    assert [choose(choices, rows) for rows in (1, 16, 17, 33, 64, 65)] == [small, small, None, large, large, None]
    x, weight, bias = operands(18, 96, 64)
    for rows in (1, 18):
        exact = F.linear(x[:rows].float(), weight.float(), bias.float())
        for dtype in (None, torch.float32):
            if dtype is not None and rows == 18 and not CUDA:
                continue  # the CPU has no such cuBLAS
            ours = TritonLinear(weight, bias, ARRIVED, PDL_ROWS, dtype, {(96, 64): choices})
            got = ours(x[:rows])
            assert got.dtype == (dtype or DTYPE)
            torch.testing.assert_close(got.float(), exact, rtol=2**-7, atol=2**-7)


def test_what_it_is_not_for_goes_to_cublas() -> None:
    gemms: dict[tuple[int, int], Choices] = {(96, 64): ((64, Tile(16, 32, 64)),)}
    weight = torch.randn(96, 64, device=DEVICE)
    assert TritonLinear(weight, None, ARRIVED, PDL_ROWS, gemms=gemms).choices == ()  # float32
    turned = weight.to(DTYPE).t().contiguous().t()
    assert TritonLinear(turned, None, ARRIVED, PDL_ROWS, gemms=gemms).choices == ()
    assert TritonLinear(weight.to(DTYPE), None, ARRIVED, PDL_ROWS, gemms=gemms).choices
    assert not fits(Tile(16, 32, 64, tma=True, ahead=1), 96, 64, 1)


def test_the_table_is_sound() -> None:
    for (outputs, inputs), choices in gemm.GEMMS.items():
        limits = [most for most, _ in choices]
        assert limits == sorted(set(limits))
        for most, tile in choices:
            assert tile is None or fits(tile, outputs, inputs, most)


def test_table_of_a_benchmark() -> None:
    """perf.gemm writes a tile into the table where it wins, and only there."""
    fast, slow = Tile(16, 64, 128), Tile(32, 64, 128)

    def result(rows: int, cublas: float, ours: float | None) -> dict[str, Any]:
        tile = fast if rows <= 16 else slow
        tiles = [] if ours is None else [{"us": ours, "tile": asdict(tile)}]
        return {"outputs": 96, "inputs": 256, "rows": rows, "cublas_us": cublas, "tiles": tiles}

    results = [result(1, 10, 8), result(8, 10, 9), result(32, 10, 9.9), result(64, 10, 7), result(128, 10, None)]
    assert table(results) == {(96, 256): ((8, fast), (32, None), (64, slow))}


@pytest.mark.parametrize("model", ["qwen2-7b", "qwen2-0.5b", "smollm2-135m"])
def test_candidates_fit(model: str) -> None:
    for case in cases(model):
        for rows in (1, 32, 64, 128):
            tiles = candidates(case, rows, 132)
            assert tiles and all(fits(tile, case.outputs, case.inputs, rows) for tile in tiles)
            own = streams(case, rows, 132)
            assert own and all(fits(stream, case.outputs, case.inputs, rows) for stream in own)


@pytest.mark.skipif(not CUDA, reason="a race shows on a GPU only")
@pytest.mark.parametrize("tile", [TILES[1], TILES[2], TILES[8], STREAMS[0], STREAMS[1], STREAMS[3]], ids=str)
def test_splits_that_follow_each_other(tile: Choice) -> None:
    """Overlapping launches share the counters: a chain in a graph gives the same bits at every replay."""
    x, weight, _ = operands(16, 1024, 1024)

    def chain(pdl: bool) -> Tensor:
        y = x
        for _ in range(30):
            y = linear(y, weight, None, tile, ARRIVED, pdl)
        return y

    expected = chain(False)
    chain(PDL)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(PDL)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
