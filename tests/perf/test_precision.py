"""perf.precision on a small model: rounding is measured as such, an exact engine has none, and float8 pages show."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from actorserve.config import EngineConfig
from actorserve.models import shapes
from actorserve.models.cpu_kernels import cpu_kernels_or_none
from actorserve.perf.precision import Error, error_of, measure, random_model

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 128, "vocab_size": 300}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(shapes.KNOWN, "smollm2-135m", shapes.KNOWN["smollm2-135m"] | SMALL)
    return random_model("smollm2-135m", tmp_path / "model", torch.bfloat16, torch.device("cpu"))


def errors(folder: str, kv: str = "auto", dtype: str = "bfloat16") -> dict[str, Error]:
    config = EngineConfig(model=folder, dtype=dtype, device="cpu", kv_cache_dtype=kv, quantization="none")
    return measure(folder, {"": config}, rows=5, tokens=20, dtype=torch.bfloat16)


def test_ours_rounds_no_more_than_theirs(folder: str) -> None:
    """With our C kernels less: they round inputs of products, and nothing else."""
    found, ours = errors(folder), cpu_kernels_or_none() is not None
    theirs = found["transformers"].relative
    assert 1e-4 < theirs < 5e-2
    for way in ("decoded", "prefilled"):
        least, most = (0.25, 0.6) if ours else (0.5, 1.2)
        assert least * theirs < found[way].relative < most * theirs
    exact = errors(folder, dtype="float32")
    assert all(exact[way].relative < 1e-5 and not exact[way].others for way in ("decoded", "prefilled"))


def test_what_float8_pages_cost_is_seen(folder: str) -> None:
    found = {kv: errors(folder, kv)["decoded"].relative for kv in ("auto", "fp8", "fp8_e5m2")}
    assert 1.2 * found["auto"] < found["fp8"] < 0.8 * found["fp8_e5m2"] < 0.2


def test_what_pages_of_16_bits_cost_a_model_in_float32(folder: str) -> None:
    """float16 has three bits more than bfloat16."""
    found = {kv: errors(folder, kv, "float32")["decoded"].relative for kv in ("auto", "float16", "bfloat16")}
    assert 10 * found["auto"] < found["float16"] < 0.2 * found["bfloat16"] < 2e-3


def test_the_error_of_known_logits() -> None:
    exact = torch.tensor([[[0.0, 2.0, 4.0], [1.0, 1.0, 4.0]]])
    off = exact + torch.tensor([0.0, 4.0, 0.0])
    found = error_of(off, exact)
    assert found.others == 1.0 and found.gap == 3.0
    assert found.relative == pytest.approx(((16 / 3 / 4 + 16 / 3 / 3) / 2) ** 0.5)
    assert error_of(exact, exact) == Error(0.0, 0.0, 0.0, 0.0)
