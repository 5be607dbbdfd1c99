"""Rotary position embeddings: frequencies of every scaling variant, and their tables for a batch's positions.

Used by the decoder: frequencies once at load time, one table per forward shared by all layers, in the form in which a
rotation is three element-wise operations. Nothing is tabulated up to a longest context, so any position is valid.
"""

import math

import torch
from torch import Tensor

from .spec import Rope, RopeScaling


def inverse_frequencies(rope: Rope) -> Tensor:
    """Return float32 [rope.dim / 2] on the CPU: radians per position of each rotated pair."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    frequencies: Tensor = 1.0 / rope.theta**exponents
    if rope.scaling is None:
        return frequencies
    if rope.scaling.kind == "linear":
        return frequencies / rope.scaling.factor
    if rope.scaling.kind == "longrope":
        return 1.0 / (torch.tensor(rope.scaling.factors) * rope.theta**exponents)
    if rope.scaling.kind == "llama3":
        return _llama3(frequencies, rope.scaling)
    return _yarn(frequencies, rope, rope.scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_max_position / wavelengths - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): stretch the dimensions that turn less than beta_slow times."""

    def dimension(rotations: float) -> float:
        """The pair that turns this often over the trained context."""
        turns = scaling.original_max_position / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = ((torch.arange(rope.dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def rotation_table(positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [tokens, 1, rope.dim] of `dtype`, for positions int64 [tokens], or [3, tokens] where
    `rope.sections` has pairs turn by different ones.

    `sin` carries the sign of the rotation, so that rotated = x * cos + swapped(x) * sin (see `rotate_`).
    Angles are computed in float32: at position 131,072 a bfloat16 angle would be off by whole turns.
    """
    factor = rope.scaling.attention_factor if rope.scaling else 1.0
    angles = positions_of_pairs(positions, rope).to(torch.float32) * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if rope.interleaved:
        cos = cos.repeat_interleave(2, dim=-1)
        sin = torch.stack((-sin, sin), dim=-1).flatten(-2)
    else:
        cos = torch.cat((cos, cos), dim=-1)
        sin = torch.cat((-sin, sin), dim=-1)
    return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def positions_of_pairs(positions: Tensor, rope: Rope) -> Tensor:
    """Return [tokens, 1], or [tokens, rope.dim / 2] of positions [3, tokens]: what each pair turns by."""
    if positions.dim() == 1:
        return positions[:, None]
    assert rope.sections is not None
    parts = zip(positions.unbind(0), rope.sections, strict=True)
    return torch.cat([own[:, None].expand(-1, pairs) for own, pairs in parts], dim=1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate x [tokens, heads, rope.dim] in place; cos and sin from `rotation_table`."""
    half = x.shape[-1] // 2
    swapped = x.reshape(*x.shape[:-1], half, 2).flip(-1).flatten(-2) if interleaved else x.roll(half, -1)
    x.mul_(cos).addcmul_(swapped, sin)
