"""Rotary embeddings against transformers' formulas and against complex multiplication."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Driver
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from actorserve.models.rope import inverse_frequencies, rotate_, rotation_table
from actorserve.models.rope_config import SERVED, longest_context, rope_of
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


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 64 for i in range(32)],
    "long_factor": [1.0 + i for i in range(32)],
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize("length", [128, 129, 512])
@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_of_the_served_context(length: int, kind: str) -> None:
    """Up to the trained context short factors, beyond it long ones, for texts of all lengths."""
    original = LONGROPE["original_max_position_embeddings"]
    own = {"original_max_position_embeddings": original, "pad_token_id": 0}
    config = Phi3Config(**SHAPE, **own, rope_parameters=LONGROPE | {"rope_theta": 10000.0})
    theirs = Phi3RotaryEmbedding(config)
    theirs(torch.zeros(1, 1, 64), torch.arange(length)[None])
    scaling = LONGROPE | {"type": kind}
    del scaling["rope_type"], scaling["original_max_position_embeddings"]
    old = SHAPE | {"rope_theta": 10000.0, "rope_scaling": scaling, "original_max_position_embeddings": original}
    rope = rope_of(old | {SERVED: length})
    torch.testing.assert_close(inverse_frequencies(rope), theirs.inv_freq, rtol=1e-6, atol=0)
    assert rope.scaling is not None
    assert rope.scaling.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-6)
    assert rope_of(old).scaling == rope_of(old | {SERVED: 512}).scaling, "the model's own context is 512"


@pytest.mark.parametrize("length", [100, 512, 700, 2048])
def test_dynamic_of_the_served_context(length: int) -> None:
    """As transformers has it for a text of the longest length."""
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=parameters))
    theirs(torch.zeros(1, 1, 64), torch.arange(length)[None])
    rope = rope_of(SHAPE | {"rope_parameters": parameters, SERVED: length})
    torch.testing.assert_close(inverse_frequencies(rope), theirs.inv_freq, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("parameters", "longest"),
    [
        ({}, 512),
        ({"rope_type": "llama3", "factor": 8.0}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        ({"type": "linear", "factor": 2}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "longrope", "factor": 4.0}, 512),
    ],
)
def test_longest_context(parameters: dict[str, Any], longest: int) -> None:
    assert longest_context({"rope_scaling": parameters}, 512) == longest


@pytest.mark.parametrize("length", [70, 40])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic"])
def test_logits_beyond_the_trained_context(kind: str, length: int, tmp_path: Path) -> None:
    """All the way through, in chunks: 70 tokens where config.json says 32."""
    more = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | more.get(kind, {})
    model = tiny.build("llama", rope_parameters=parameters, max_position_embeddings=32)
    ids = tiny.prompt(length)
    decoder = tiny.load(tiny.save(model, tmp_path), context_length=length)
    found, expected = Driver.of(decoder).logits(ids, [30, length - 30]), tiny.reference_logits(model, ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


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
