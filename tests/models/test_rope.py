"""Rotary embeddings against transformers' formulas and against complex multiplication."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from actorserve.models.rope import inverse_frequencies, rotate_, rotation_table
from actorserve.models.rope_config import rope_of
from actorserve.models.spec import Rope

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 512}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
    "yarn-given": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.3,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("old_style", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_frequencies_equal_transformers(name: str, old_style: bool) -> None:
    theta = 50000.0
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=SCALINGS[name] | {"rope_theta": theta}))
    if old_style:
        scaling = {"type" if key == "rope_type" else key: value for key, value in SCALINGS[name].items()}
        rope = rope_of(SHAPE | {"rope_theta": theta, "rope_scaling": scaling})
    else:
        rope = rope_of(SHAPE | {"rope_parameters": SCALINGS[name] | {"rope_theta": theta}})
    torch.testing.assert_close(inverse_frequencies(rope), theirs.inv_freq, rtol=1e-6, atol=0)
    factor = rope.scaling.attention_factor if rope.scaling else 1.0
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("position", [0, 1, 17, 131_071])
def test_rotation_is_a_complex_product(interleaved: bool, position: int) -> None:
    rope = Rope(theta=10000.0, dim=32, interleaved=interleaved)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    frequencies = inverse_frequencies(rope)
    cos, sin = rotation_table(torch.tensor([position]), frequencies, rope, torch.float32)
    assert cos.shape == sin.shape == (1, 1, 32)
    rotated = x.clone()
    rotate_(rotated, cos, sin, interleaved)
    real, imaginary = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    angle = torch.tensor(float(position)) * frequencies
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    parts = (product.real, product.imag)
    expected = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)


def test_only_the_given_view_is_rotated() -> None:
    """The decoder rotates the leading part of the query and key heads inside the fused rows."""
    rope = Rope(theta=10000.0, dim=8)
    rows = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    table = rotation_table(torch.arange(1, 6), inverse_frequencies(rope), rope, torch.float32)
    rotate_(rows[:, :3, :8], *table, False)
    assert torch.equal(rows[:, 3], before[:, 3])
    assert torch.equal(rows[..., 8:], before[..., 8:])
    assert not torch.isclose(rows[:, :3, :8], before[:, :3, :8]).all(-1).any()


def test_angles_stay_exact_far_out_in_bfloat16() -> None:
    """Position 100,001 in bfloat16 would round to 99,840."""
    rope = Rope(theta=10000.0, dim=16)
    positions = torch.tensor([100_001])
    exact, _ = rotation_table(positions, inverse_frequencies(rope), rope, torch.float32)
    cos, _ = rotation_table(positions, inverse_frequencies(rope), rope, torch.bfloat16)
    assert (cos.float() - exact).abs().max() < 0.005
