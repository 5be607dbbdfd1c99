"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1) in its absorbed form, over a cache of latents.

Used by the decoder where a Spec has `mla`. A token is cached as its latent and one rotated key that all heads share;
each head's key projection is applied to its query instead, and its value projection to what attention returns. So
attention has one KV head, whose keys are their own values, and what is cached is a small part of the heads' keys and
values (DeepSeek-V2: 576 numbers instead of 40,960).
Legend: T tokens, H query heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import AttentionPlan
from .layers import LinearMap, write_rows
from .norms import rms_norm
from .rope import rotate_
from .spec import Spec


@dataclass(slots=True)
class Latent:
    """The projections between hidden states and heads, beside `LayerWeights.qkv`: hidden -> (queries or their latent) +
    kv_rank + rope."""

    q_norm: Tensor | None
    """[q_rank]"""
    q_up: LinearMap | None
    """q_rank -> heads * (nope + rope)"""
    kv_norm: Tensor
    """[kv_rank]"""
    kv_up: Tensor
    """[heads, nope + v, kv_rank]: what makes a head's key, then its value, of a latent."""


def attend(
    weights: Latent,
    projected: Tensor,
    spec: Spec,
    table: tuple[Tensor, Tensor] | None,
    kv_slots: Tensor,
    kv_rows: Tensor,
    plan: AttentionPlan,
    layer: int,
) -> Tensor:
    """Write the tokens' rows and return the heads' outputs [T, H * v].

    projected [T, ...]: `qkv` of the hidden states; table: `rotation_table` of the tokens; kv_rows [slots, 1, 1, kv_rank
    + rope], one layer of the cache.
    """
    mla = spec.mla
    assert mla is not None
    width = projected.shape[1] - mla.kv_rank - mla.rope
    q, latent, key = torch.split(projected, [width, mla.kv_rank, mla.rope], dim=1)
    if weights.q_up is not None and weights.q_norm is not None:
        q = weights.q_up(rms_norm(q, weights.q_norm, mla.eps))
    q = q.reshape(len(q), spec.heads, mla.nope + mla.rope)
    rows = torch.cat([rms_norm(latent, weights.kv_norm, mla.eps), key], dim=1)[:, None]
    absorbed = torch.bmm(q[..., : mla.nope].transpose(0, 1), weights.kv_up[:, : mla.nope]).transpose(0, 1)
    queries = torch.cat([absorbed, q[..., mla.nope :]], dim=2)
    if table is not None and spec.rope is not None:
        for heads in (queries, rows):
            rotate_(heads[..., mla.kv_rank :], *table, spec.rope.interleaved)
    write_rows(rows[:, None], kv_slots, kv_rows)
    latents = plan.run(layer, queries).view(len(q), spec.heads, mla.kv_rank)
    values = torch.bmm(latents.transpose(0, 1), weights.kv_up[:, mla.nope :].transpose(1, 2))
    return values.transpose(0, 1).flatten(1)
