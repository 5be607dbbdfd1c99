"""Up to 64 rows times 4-bit weights by programs with several blocks each: which products, and their results.

On an H100 or H200 for real, elsewhere smaller and in the emulator, which also checks how warps synchronise.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gluon_emulator import Emulated
from test_packed_gemm import part_of
from test_primed_gemm import DEVICE, DTYPE, HERE, PLAIN, half_normed, randn

from actorserve.models import packed_tiles, wide_kernels
from actorserve.models.gemm import Tile, TritonLinear, arrivals, choose
from actorserve.models.layers import Linear
from actorserve.models.packed_gemm import Packed, Scratch, pack_part
from actorserve.models.packed_tiles import PACKED, choices_for, wide_rows
from actorserve.models.quantization import Scheme
from actorserve.models.wide_gemm import Wide

TILE = Tile(64, 128, 32)
FRESH = dict.fromkeys(("x_blocks", "squares"))
"""Arguments that the predecessor writes."""


def packed(kind: str, outputs: int, inputs: int, dtype: torch.dtype = DTYPE) -> Packed:
    weight = pack_part(part_of(kind, outputs, inputs), dtype, Scratch(DEVICE), False)
    assert weight is not None
    return weight


def test_what_is_left_to_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, dtypes and GPUs have no such choice, other epilogues and more rows its tile."""
    choice = Wide(64, 2, 2, TILE)
    assert choice.takes(64, None, "silu", None, None) and choice.outputs == 64
    assert not choice.takes(65, None, "silu", None, None) and not choice.takes(64, None, "", None, None)
    assert not choice.takes(64, torch.zeros(8), "silu", None, None)
    choices = {(kind, 256, 512): ((64, choice),) for kind in ("fp8", "int4", "int8")}
    monkeypatch.setattr(packed_tiles, "PACKED", choices)
    for there in (False, True):
        monkeypatch.setattr(packed_tiles, "on_sm90", lambda device, there=there: there)
        for kind, dtype, fits in (
            ("int4-128", DTYPE, True), ("int4-128", torch.float16, False), ("int4-64", DTYPE, False),
            ("fp8-128", DTYPE, False), ("int8-row", DTYPE, False),
        ):  # fmt: skip
            weight = packed(kind, 256, 512, dtype)
            assert choice.fits(weight) == fits
            assert choose(choices_for(weight), 64) == (choice if there and fits else TILE)
    weight = packed("int4-128", 256, 512)
    assert not Wide(64, 5, 2, TILE).fits(weight), "a program without a block"
    assert not Wide(64, 2, 5, TILE).fits(weight), "more buffers than steps"
    assert not Wide(64, 1, 2, TILE).fits(packed("int4-128", 384, 512)), "more blocks than warps"


def test_up_to_how_many_rows_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By how the weights are quantized, and the GPU: kernels are launched ahead then."""
    four = Scheme("gptq", 4, 128)
    monkeypatch.setattr(packed_tiles, "on_sm90", lambda device: True)
    assert wide_rows(37888, 3584, four, DEVICE) == 64
    for other in (Scheme("gptq", 4, 64), Scheme("gptq", 8, 128), Scheme("fp8", 8)):
        assert wide_rows(37888, 3584, other, DEVICE) == 0
    assert wide_rows(37888, 4096, four, DEVICE) == 0
    monkeypatch.setattr(packed_tiles, "on_sm90", lambda device: False)
    assert wide_rows(37888, 3584, four, DEVICE) == 0


def test_the_table_is_sound() -> None:
    """Buffers have room in shared memory."""
    for (kind, outputs, inputs), choices in PACKED.items():
        for choice in (choice for _, choice in choices if isinstance(choice, Wide)):
            blocks = -(-outputs // 64 // choice.programs)
            assert kind == "int4" and outputs % 64 == inputs % 128 == 0 and blocks <= 5
            assert choice.stages * (choice.rows * 256 + blocks * 64 * (64 + 4)) < 226 << 10


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel can be launched here, too."""
    if torch.cuda.is_available() and not HERE:
        pytest.skip("needs a GPU of sm_90, or none")
    if not HERE:
        monkeypatch.setattr(wide_kernels, "wide_kernel", Emulated(wide_kernels.wide_kernel, FRESH))


def linear_of(outputs: int, inputs: int, choice: Wide) -> tuple[TritonLinear, Linear]:
    """Our map with this configuration, and the same in float32."""
    part = part_of("int4-128", outputs, inputs)
    weight = packed("int4-128", outputs, inputs)
    assert choice.fits(weight)
    ours = TritonLinear(weight, None, arrivals(DEVICE), 0, choices=((64, choice),))
    return ours, Linear(part.dequantise(), None)


def close(got: Tensor, exact: Tensor) -> None:
    """Results are rounded, by up to 2 ** -9 of each; so are gates and ups before."""
    torch.testing.assert_close(got.float(), exact.float(), rtol=2**-6, atol=2**-8 * exact.abs().max().item())


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("outputs", "choice"),
    [
        (448, Wide(64, 2, 4, TILE)),  # three and four blocks
        (640, Wide(64, 2, 3, TILE)),  # as many as there are warps for
        (128, Wide(32, 2, 2, TILE)),  # one each
    ],
)
def test_gated(outputs: int, choice: Wide) -> None:
    ours, exact = linear_of(outputs, 896, choice)
    for time, rows in enumerate((choice.rows, 17, 1)):
        ours.pdl_rows = 64 * (time % 2)
        x, normed = half_normed(rows, 896)
        close(ours.gated(x, "silu"), PLAIN.act_mul(exact(normed), "silu"))
        close(ours.gated(x.x, "gelu"), PLAIN.act_mul(exact(x.x.float()), "gelu"))


@pytest.mark.usefixtures("wide")
def test_what_is_no_number_stays_none() -> None:
    ours, _ = linear_of(128, 256, Wide(64, 1, 2, TILE))
    x = randn(40, 256)
    x[3, 5], x[39] = float("nan"), float("inf")
    y = ours.gated(x, "silu")
    assert y[3].isnan().all() and not y[39].isfinite().any()
    assert y[[*range(3), *range(4, 39)]].isfinite().all()


@pytest.mark.usefixtures("wide")
def test_a_row_does_not_depend_on_others() -> None:
    ours, _ = linear_of(256, 512, Wide(64, 2, 3, TILE))
    x = randn(50, 512)
    y = ours.gated(x, "silu")
    assert torch.equal(ours.gated(x[7:19], "silu"), y[7:19])
