"""Rope of a config.json, in all the ways in which the years have written it. Used by the families.

Two kinds change with the length of a text: `dynamic` its base, `longrope` its factors. Keys of different lengths would
share no prefix, so they are taken once, for the longest context that is served: as transformers computes a text of that
length (longrope: of any length above the trained one).
"""

import math
from typing import Any, Final

from ..errors import StartupError
from .spec import Rope, RopeScaling

Config = dict[str, Any]
SERVED: Final = "served_context_length"
"""Key under which `spec_of` puts the longest context of this engine into a config, where that is not the model's."""


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
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or default_theta)
    dim = int(head_dim_of(config) * partial) if dim is None else dim
    if _kind(parameters) == "dynamic":
        theta *= _dynamic_growth(parameters, config, dim)
    return Rope(theta, dim, interleaved, _scaling(parameters, config), _sections(parameters, dim))


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


def longest_context(config: Config, own: int) -> int:
    """How long a context may be asked for, where config.json says `own`: it may still be the trained one."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = parameters.get("factor")
    if _kind(parameters) not in ("linear", "dynamic", "yarn") or not factor or "rope_local_base_freq" in config:
        return own
    return max(own, int((parameters.get("original_max_position_embeddings") or own) * factor))


def _kind(parameters: Config) -> str:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return "longrope" if kind == "su" else kind


def _dynamic_growth(parameters: Config, config: Config, dim: int) -> float:
    """Dynamic NTK: by what the base grows for the served context, 1 up to max_position_embeddings."""
    if "alpha" in parameters:
        raise StartupError("config.json: rope type 'dynamic' with alpha is not served")
    trained = config.get("max_position_embeddings", 0)
    served = config.get(SERVED) or trained
    if served <= trained:
        return 1.0
    factor = float(parameters["factor"])
    return float((factor * served / trained - (factor - 1)) ** (dim / (dim - 2)))


def _scaling(parameters: Config, config: Config) -> RopeScaling | None:
    kind, max_position = _kind(parameters), config.get("max_position_embeddings", 0)
    if kind in ("default", "dynamic", "mrope"):
        return None
    if kind == "longrope":
        return _longrope(parameters, config)
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
        f"config.json: rope type {kind!r} is not served yet; served: default, dynamic, linear, llama3, longrope, yarn"
    )


def _longrope(parameters: Config, config: Config) -> RopeScaling:
    """LongRoPE (Ding et al. 2024) as Phi 3 has it."""
    key = "original_max_position_embeddings"
    original, max_position = int(parameters.get(key) or config[key]), int(config["max_position_embeddings"])
    factor = float(parameters.get("factor") or max_position / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    given = parameters.get("attention_factor")
    served = config.get(SERVED) or max_position
    return RopeScaling(
        "longrope",
        factor,
        attention_factor=usual if given is None else float(given),
        factors=tuple(float(x) for x in parameters["long_factor" if served > original else "short_factor"]),
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
