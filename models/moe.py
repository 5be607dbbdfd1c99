"""Mixture of experts: the router, and a token's chosen experts computed by sorting tokens and a grouped GEMM.

Used by the decoder in an MLP's place. The same code runs on CPU and GPU: torch's grouped GEMM takes where each expert's
tokens end from the device, so nothing waits for the host and steps can be captured. Routing is float32 throughout. On a
GPU few tokens have kernels of their own (moe_gemm.py).
Sources: Shazeer et al. 2017; group-limited choice: DeepSeek-V2, 2024, section 2.1.2; score bias: DeepSeek-V3, 2024.
Legend: T tokens, E experts, k experts of a token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import ACTIVATIONS, DenseMlp, Hidden, LinearMap, Ops
from .spec import Moe, Spec

if TYPE_CHECKING:
    from .parallel import Group


@dataclass(slots=True)
class Experts:
    """The experts of one layer; see layers.DenseMlp for the methods."""

    router: Tensor
    """float32 [E, hidden]"""
    score_bias: Tensor | None
    """float32 [E]"""
    gate_up: Tensor
    """[E, 2 * inter, hidden]: gate, up."""
    down_proj: Tensor
    """[E, hidden, inter]"""
    shared: DenseMlp | None
    shared_gate: LinearMap | None
    """hidden -> 1"""
    group: "Group | None" = None
    """The ranks, of which each has some columns of every expert."""

    @property
    def takes(self) -> LinearMap:
        """See DenseMlp; nothing that a norm could be merged with."""
        return self.down

    def down(self, x: Tensor) -> Tensor:
        """`inner` is the result already, or this rank's summand of it."""
        return x if self.group is None else self.group.sum(x)

    def inner(self, ops: Ops, x: Hidden, spec: Spec) -> Tensor:
        """Normed hidden states [T, hidden] -> [T, hidden]."""
        assert spec.moe is not None
        shared = None if self.shared is None else self.shared.down(self.shared.inner(ops, x, spec))
        gate = None if shared is None or self.shared_gate is None or not spec.moe.shared_gate else self.shared_gate(x)
        out = ops.experts(x, self.router, self.score_bias, self.gate_up, self.down_proj, spec, shared, gate)
        if out is not None:
            return out
        weights, ids = route(F.linear(x.float(), self.router), self.score_bias, spec.moe)
        out = run_experts(x, weights, ids, self.gate_up, self.down_proj, spec.act)
        if shared is not None:
            out = out + (shared if gate is None else shared * torch.sigmoid(gate))
        return out


def route(logits: Tensor, bias: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor]:
    """Return (weights float32 [T, k], experts int64 [T, k]) of router logits float32 [T, E]."""
    if moe.router_softcap is not None:
        logits = torch.tanh(logits / moe.router_softcap) * moe.router_softcap
    scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None or not moe.score_bias else scores + bias
    if moe.groups > 1:
        choice = choice.masked_fill(~_in_best_groups(choice, moe), float("-inf"))
    ids = choice.topk(moe.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if moe.renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * moe.routed_scale, ids


def _in_best_groups(choice: Tensor, moe: Moe) -> Tensor:
    """bool [T, E]: whether an expert is in one of its token's best groups."""
    groups = choice.view(len(choice), moe.groups, -1)
    quality = groups.topk(moe.group_best, dim=-1).values.sum(-1)
    best = torch.zeros_like(quality, dtype=torch.bool).scatter_(1, quality.topk(moe.top_groups, dim=-1).indices, True)
    return best[..., None].expand_as(groups).reshape(choice.shape)


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
    """Return [T, hidden]: the sum over a token's experts of weight * down(act(gate(x)) * up(x)).

    x [T, hidden]; weights float32 and ids [T, k]; gate_up [E, 2 * inter, hidden]; down [E, hidden, inter].
    """
    tokens, top_k = ids.shape
    experts, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(len(gate_up), device=ids.device), right=True).to(torch.int32)
    gate, up = grouped(x.index_select(0, order // top_k), gate_up, ends).chunk(2, -1)
    y = grouped(ACTIVATIONS[act](gate) * up, down, ends)
    weighted = y.float() * weights.flatten().index_select(0, order)[:, None]
    summed = torch.empty_like(weighted).index_copy_(0, order, weighted).view(tokens, top_k, -1).sum(1)
    return summed.to(x.dtype)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[0] of x [N, in] times weight[0].T, those up to ends[1] times weight[1].T, ...; [N, out].

    weight [E, out, in]; ends int32 [E].
    """
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
