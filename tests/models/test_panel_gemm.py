"""Gate and up by panels of the weight: which products have them, what is launched beside them, and their results.

On an H100 or H200 for real, elsewhere smaller and in the emulator, which also checks how they synchronise.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gluon_emulator import Emulated
from test_primed_gemm import DEVICE, DTYPE, HERE, PLAIN, randn

from actorserve.models import gemm, panel_kernels, triton_ops
from actorserve.models.gemm import PANELS, TritonLinear, arrivals
from actorserve.models.layers import Linear
from actorserve.models.panel_gemm import DEPTH, ROWS, Panel
from actorserve.models.triton_ops import TritonOps

MOST = 256
SIZES = (65, 100, 128, 129, MOST) if HERE else (65, 130)
"""Rows: with one tile of them, and with two."""


def linear_of(outputs: int, inputs: int, panel: Panel) -> tuple[TritonLinear, Linear]:
    """Our map with this configuration, and the same in float32."""
    weight = randn(outputs, inputs, seed=1, scale=inputs**-0.5)
    ours = TritonLinear(weight, None, arrivals(DEVICE), 0, gemms={}, panels={(outputs, inputs): ((MOST, panel),)})
    return ours, Linear(weight.float(), None)


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel can be launched here, too."""
    if torch.cuda.is_available() and not HERE:
        pytest.skip("needs a GPU of sm_90, or none")
    if not HERE:
        monkeypatch.setattr(gemm, "can_prime", lambda weight: True)
        emulated = Emulated(panel_kernels.panel_kernel, {"x_blocks": None})  # x is what the predecessor writes
        monkeypatch.setattr(panel_kernels, "panel_kernel", emulated)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize(
    ("panel", "inner", "act"),
    [(Panel(144, 4), 200, "silu"), (Panel(72, 3), 136, "gelu"), (Panel(48, 2), 96, "gelu_tanh")],
)
def test_gated(panel: Panel, inner: int, act: str) -> None:
    ours, exact = linear_of(2 * inner, 640, panel)
    ops = TritonOps(DEVICE)
    for rows in SIZES:
        x = 3 * randn(rows, 640, seed=rows)
        expected = PLAIN.act_mul(exact(x.float()), act)
        torch.testing.assert_close(ops.gated(ours, x, act).float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("panels")
def test_what_is_no_number_stays_none() -> None:
    ours, _ = linear_of(32, 128, Panel(24, 2))
    x = randn(70, 128)
    x[3, 5], x[64] = float("nan"), float("inf")
    y = ours.gated(x, "silu")
    assert y[3].isnan().all() and not y[64].isfinite().any()
    assert y[[*range(3), *range(4, 64), *range(65, 70)]].isfinite().all()


def test_a_norm_before_a_panel_lets_it_start(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[bool] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, PDL, **options: launches.append(PDL and options["launch_pdl"])

    monkeypatch.setattr(triton_ops, "norm_kernel", Recorder())
    monkeypatch.setattr(gemm, "can_prime", lambda weight: True)
    ops = TritonOps(DEVICE)
    ops.pdl_rows = 16
    plain = Linear(randn(64, 64), None)
    panel, _ = linear_of(64, 64, Panel(24, 2))
    for rows, into in ((128, panel), (128, plain), (16, plain), (MOST + 1, panel)):
        x = randn(rows, 64)
        ops.add_norm(plain, x, x, 1.0, x[0], 1e-6, into)
    assert launches == [True, False, True, False]


def test_which_products_have_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(64, 64)
    table = {(64, 64): ((64, None), (128, Panel(24, 2)))}
    monkeypatch.setattr(gemm, "can_prime", lambda weight: weight.dtype == DTYPE)

    def found(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> list[bool]:
        linear = TritonLinear(weight, bias, arrivals(DEVICE), 0, dtype, {}, panels=table)
        return [linear.panel(rows) is not None for rows in (0, 64, 65, 128, 129)]

    assert found(weight) == [False, False, True, True, False]
    assert not any(found(weight.half()) + found(weight, weight[0]) + found(weight, dtype=torch.float32))


def test_the_table_is_sound() -> None:
    for (outputs, inputs), choices in PANELS.items():
        for _, panel in choices:
            if panel is not None:
                assert outputs % 16 == 0 and inputs % DEPTH == 0 and inputs // DEPTH >= panel.stages >= 2
                assert all(width >= 8 and width & (width - 1) == 0 for width in panel.widths)
                assert 2 * DEPTH * panel.stages * (ROWS + 2 * panel.outputs) <= 226 << 10
