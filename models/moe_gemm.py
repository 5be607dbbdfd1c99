"""A mixture of experts for few tokens on a GPU: kernels that read each chosen expert's weights once.

Used by triton_ops.py; moe.py is the reference, and what many tokens are computed with: there the experts have rows
enough for torch's grouped GEMM.
Invariant: a call does no host synchronisation and launches what depends on shapes only, so it can be captured.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from .moe_kernels import experts_kernel, mix_kernel, queue_kernel, route_kernel
from .spec import Moe

MOST_ROWS: Final = 64
"""Rows that an expert has on average up to which these kernels are used."""


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """A configuration of `experts_kernel`; the numbers are elements."""

    outputs: int
    depth: int
    warps: int
    stages: int


GATE_UP: Final = ExpertTile(64, 128, 4, 3)
DOWN: Final = ExpertTile(64, 128, 4, 4)


def takes(tokens: int, moe: Moe, dtype: torch.dtype) -> bool:
    """Whether so many tokens are for these kernels."""
    return dtype.itemsize == 2 and 0 < tokens * moe.top_k <= MOST_ROWS * moe.experts


def choose_experts(x: Tensor, router: Tensor, bias: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor]:
    """moe.route of x [T, hidden] for a Moe of one group: weights float32 and ids int32 [T, k]."""
    tokens, (experts, width) = len(x), router.shape
    weights = torch.empty(tokens, moe.top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, moe.top_k, dtype=torch.int32, device=x.device)
    padded = triton.next_power_of_2(experts)
    bias = bias if moe.score_bias else None
    route_kernel[(tokens,)](
        x, router, bias, weights, ids, width, experts, moe.top_k, moe.routed_scale, moe.router_softcap or 0.0,
        E=padded, K=triton.next_power_of_2(moe.top_k), BK=max(16, min(128, 16384 // padded)),
        SOFTMAX=moe.scoring == "softmax", BIAS=bias is not None, RENORM=moe.renorm,
        CAP=moe.router_softcap is not None, num_warps=8,
    )  # fmt: skip
    return weights, ids


def tile_rows(tokens: int, moe: Moe) -> int:
    """Rows of a tile: twice an expert's on average, so that few need a second one."""
    return int(max(16, min(128, triton.next_power_of_2(2 * tokens * moe.top_k // moe.experts))))


def run_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, act: str, moe: Moe,
    shared: Tensor | None = None, gate: Tensor | None = None, tiles: tuple[ExpertTile, ExpertTile] = (GATE_UP, DOWN),
) -> Tensor:  # fmt: skip
    """moe.run_experts, plus what the shared expert says [T, hidden], times sigmoid(gate [T, 1])."""
    tokens, top_k = ids.shape
    experts, hidden, inter = down.shape
    queues = torch.empty(experts, tokens, dtype=torch.int32, device=x.device)
    counts = torch.empty(experts, dtype=torch.int32, device=x.device)
    block = min(1024, triton.next_power_of_2(tokens * top_k))
    ids = ids.to(torch.int32)
    queue_kernel[(experts,)](ids, queues, counts, tokens * top_k, tokens, BLOCK=block, num_warps=4)
    rows = tile_rows(tokens, moe)
    inner = torch.empty(tokens * top_k, inter, dtype=x.dtype, device=x.device)
    y = torch.empty(tokens * top_k, hidden, dtype=x.dtype, device=x.device)
    products = ((x, gate_up, inner, tiles[0], True), (inner, down, y, tiles[1], False))
    for source, weight, out, tile, of_tokens in products:
        outputs, inputs = out.shape[1], source.shape[1]
        experts_kernel[(triton.cdiv(tokens, rows), triton.cdiv(outputs, tile.outputs), experts)](
            source, weight, out, queues, counts, tokens, outputs, inputs, top_k, BM=rows, BN=tile.outputs,
            BK=tile.depth, EVEN=inputs % tile.depth == 0, ACT=act if of_tokens else "", OF_TOKENS=of_tokens,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    mixed = torch.empty_like(x)
    block = 1024
    mix_kernel[(tokens, triton.cdiv(hidden, block))](
        y, weights, shared, gate, mixed, hidden, top_k, BLOCK=block, SHARED=shared is not None,
        GATE=gate is not None, num_warps=4,
    )  # fmt: skip
    return mixed
