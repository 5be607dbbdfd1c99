"""Products by measured algorithms are torch's products; choices are kept and checked before they are used."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actorserve.models import tuned_gemm
from actorserve.models.cublaslt import KERNEL, MEMSET, Plan, Product
from actorserve.models.tuned_gemm import DECODED, TunedGemms, bucket, key_of, read_choices, write_choices

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16


@given(st.integers(1, 1 << 20))
def test_a_bucket_is_near(rows: int) -> None:
    assert 0.70 < bucket(rows) / rows < 1.42
    assert bucket(rows).bit_count() == 1


def test_names_tell_products_apart() -> None:
    base = Product(64, 32, 8, False, BF16, BF16)
    others = [
        Product(32, 64, 8, False, BF16, BF16), Product(64, 32, 16, False, BF16, BF16),
        Product(64, 32, 8, True, BF16, BF16),
        Product(64, 32, 8, False, torch.float16, torch.float16), Product(64, 32, 8, False, BF16, torch.float32),
    ]  # fmt: skip
    assert len({key_of(p) for p in [base, *others]}) == 6


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"a": 1}', b'{"a": "xyz"}', b"\xff", b'{"a": "00", "b": []}'])
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "choices.json"
    if content is not None:
        file.write_bytes(content)
    assert read_choices(file) == {}


def test_choices_are_kept(tmp_path: Path) -> None:
    choices = {"64x32x8 bfloat16 bfloat16": bytes(range(64)), "torch's": b""}
    write_choices(tmp_path / "new" / "choices.json", choices)
    assert read_choices(tmp_path / "new" / "choices.json") == choices


@pytest.mark.parametrize(
    ("nodes", "chosen"),
    [
        ([[KERNEL], [KERNEL]], None), ([[KERNEL, KERNEL], [KERNEL]], None), ([], None), ([None, [KERNEL]], None),
        ([[MEMSET, KERNEL], [MEMSET, KERNEL]], None),
        ([[MEMSET, KERNEL], None, [KERNEL, KERNEL], [KERNEL], [KERNEL]], 3),
    ],
)  # fmt: skip
def test_in_a_decode_step_no_memory_is_cleared(
    monkeypatch: pytest.MonkeyPatch, nodes: list[list[int] | None], chosen: int | None
) -> None:
    """The library's choice is torch's unless it clears memory; then its next that is one kernel. It is asked once."""
    ran, asked = [], []

    class Candidates:
        """A plan; None: a candidate that is not for this product."""

        def __init__(self, library: object, product: Product) -> None:
            asked.append(product)

        def candidates(self) -> list[bytes]:
            return [bytes([i]) for i in range(len(nodes))]

        def algorithm(self, candidate: bytes) -> int | None:
            return None if nodes[candidate[0]] is None else candidate[0]

        def nodes(self, algorithm: int, *operands: object) -> list[int] | None:
            return nodes[algorithm]

        def run(self, algorithm: int, *operands: object) -> None:
            ran.append(algorithm)

        def close(self) -> None:
            asked.append(None)

    monkeypatch.setattr(tuned_gemm, "Plan", Candidates)
    monkeypatch.setattr(tuned_gemm, "CublasLt", lambda *_: SimpleNamespace(version=1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "none")
    gemms = TunedGemms(torch.device("cpu"), folder=Path("/nonexistent"))
    for rows in (DECODED[0], DECODED[0], DECODED[0] + 1, 8):
        out = gemms.multiply(torch.zeros(rows, 32), torch.zeros(64, 32), None, torch.float32)
        assert (out is not None) == (chosen is not None and rows in DECODED)
    assert ran == ([] if chosen is None else [chosen, chosen])
    assert len([a for a in asked if a]) == 1 and (None in asked) == (chosen is None)


def operands(rows: int, outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    made = torch.randn(rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(outputs)
    x, weight, added = (t.to("cuda", dtype) for t in made)
    return (x, weight, added) if bias else (x, weight)


@gpu
@pytest.mark.parametrize("rows", [768, 1001, 2048])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "result"), [(BF16, BF16), (torch.float16, torch.float16), (BF16, torch.float32)])
def test_every_candidate_multiplies(
    tmp_path: Path, rows: int, bias: bool, dtype: torch.dtype, result: torch.dtype
) -> None:
    """Whatever is chosen, by file too, the product is float32's up to the rounding of its result."""
    if bias and result != dtype:
        return  # a model's head has none
    x, weight, *rest = operands(rows, 384, 512, bias, dtype)
    added = rest[0] if rest else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    gemms = TunedGemms(x.device, folder=tmp_path)
    product = Product(384, 512, rows, bias, dtype, result)
    key = key_of(product)
    candidates = gemms._candidates(Plan(gemms.library, product))
    ran = 0
    for candidate in candidates:
        write_choices(gemms._file, {key: candidate})
        again = TunedGemms(x.device, folder=tmp_path)
        out = again.multiply(x, weight, added, result)
        if out is None:
            continue  # of another number of rows, and not for this
        ran += 1
        assert out.dtype == result
        error = ((out.double() - exact).abs() / exact.abs().clamp(min=1)).max().item()
        assert error < (2e-5 if result == torch.float32 else torch.finfo(result).eps)
    assert ran > 0


@gpu
@pytest.mark.parametrize(("outputs", "inputs"), [(37888, 3584), (384, 512)])
def test_decode_steps_multiply(tmp_path: Path, outputs: int, inputs: int) -> None:
    """Whichever algorithm it is, the product is float32's up to rounding; it is one kernel if it is not torch's."""
    x, weight = operands(256, outputs, inputs, False, BF16)
    gemms = TunedGemms(x.device, folder=tmp_path)
    out = gemms.multiply(x, weight, None, BF16)
    if out is not None:
        exact = x.float() @ weight.float().T
        assert ((out.float() - exact).abs() / exact.abs().clamp(min=1)).max().item() < 2 * torch.finfo(BF16).eps
        plan, algorithm = next(chosen for chosen in gemms._plans.values() if chosen is not None)
        assert plan.nodes(algorithm, x, weight, None, out) == [KERNEL]


@gpu
def test_what_is_no_algorithm_is_not_run(tmp_path: Path) -> None:
    x, weight = operands(1024, 384, 512, False, BF16)
    gemms = TunedGemms(x.device, folder=tmp_path)
    for content in (bytes(64), b"\xff" * 64, b"abc"):
        write_choices(gemms._file, {key_of(Product(384, 512, 1024, False, BF16, BF16)): content})
        assert TunedGemms(x.device, folder=tmp_path).multiply(x, weight, None, BF16) is None


@gpu
def test_ahead(tmp_path: Path) -> None:
    """Each product is measured once, also over restarts, and small ones never."""
    x, weight = operands(64, 384, 512, False, BF16)
    gemms = TunedGemms(x.device, (4096, 2048, 2047, 64), tmp_path)
    gemms.register(weight, None, BF16)
    gemms.register(weight, None, torch.float32)
    assert [gemms.tune_ahead() for _ in range(3)] == [True, True, False]
    again = TunedGemms(x.device, (4096, 2048, 1024), tmp_path)
    again.register(weight, None, BF16)
    assert [again.tune_ahead() for _ in range(2)] == [True, False]
    assert again.multiply(x, weight, None, BF16) is None
