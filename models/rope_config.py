"""Rope of a config.json, in all the ways in which the years have written it. Used by the families."""

import math
from typing import Any

from ..errors import StartupError
from .spec import Rope, RopeScaling

Config = dict[str, Any]


def head_dim_of(config: Config) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(
    config: Config,
    default_theta: float = 10000.0,
    default_partial: float = 1.0,
    interleaved: bool = False,
    dim: int | None = None,
) -> Rope:
    """Rope of a config, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `dim`: the rotated part of a head, if it is not the part that `partial_rotary_factor` says.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or default_partial
    dim = int(head_dim_of(config) * partial) if dim is None else dim
    return Rope(
        theta=float(parameters.get("rope_theta") or config.get("rope_theta") or default_theta),
        dim=dim,
        interleaved=interleaved,
        scaling=_scaling(parameters, config.get("max_position_embeddings", 0)),
        sections=_sections(parameters, dim),
    )


def _sections(parameters: Config, dim: int) -> tuple[int, int, int] | None:
    sections = parameters.get("mrope_section")
    if sections is None:
        return None
    if parameters.get("mrope_interleaved"):
        raise StartupError("config.json: mrope_interleaved is not served yet")
    frames, rows, columns = map(int, sections)
    if min(frames, rows, columns) < 0 or frames + rows + columns != dim // 2:
        raise StartupError(f"config.json: mrope_section {sections} does not share out {dim // 2} pairs")
    return frames, rows, columns


def _scaling(parameters: Config, max_position: int) -> RopeScaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    original = parameters.get("original_max_position_embeddings")
    if kind in ("default", "mrope") or (kind == "dynamic" and original in (None, max_position)):
        return None  # dynamic NTK changes nothing up to max_position, and no longer context is served
    if kind == "linear":
        return RopeScaling("linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(parameters["factor"]),
            int(parameters["original_max_position_embeddings"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
        )
    if kind == "yarn":
        return _yarn(parameters, max_position)
    raise StartupError(
        f"config.json: rope type {kind!r} is not served yet; served: default, dynamic, linear, llama3, yarn"
    )


def _yarn(parameters: Config, max_position: int) -> RopeScaling:
    original = int(parameters.get("original_max_position_embeddings") or max_position)
    factor = float(parameters.get("factor") or max_position / original)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    inferred = mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)
    given = parameters.get("attention_factor")
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=inferred if given is None else float(given),
    )


def yarn_scale(rope: Rope, config: Config) -> float:
    """DeepSeek's factor of the attention scores, where a config stretches its context: mscale squared."""
    weight = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("mscale_all_dim")
    if rope.scaling is None or not weight or rope.scaling.factor <= 1:
        return 1.0
    return float((0.1 * weight * math.log(rope.scaling.factor) + 1.0) ** 2)
