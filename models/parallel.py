"""A forward over several ranks: where they add up, and how rank 0 draws for all.

Used by the decoder, the loader and the executor; what a rank has is shard.py's, how it talks to the others a Group's
(group.py). A rank computes its heads and its columns of each MLP from hidden states that all ranks have, and the
results of the two projections are summed: two sums a layer, one where attention and MLP are side by side, and one for
the embedding, whose rows are cut by token (a whole table on each rank would save that sum, a hundredth of a step, and
cost up to a gigabyte). Logits are gathered; rank 0 draws, and sends what it drew to the others in the same step, so
that a window of k steps needs no host.
Invariant: every rank calls the same operations of its Group in the same order with the same shapes.
"""

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampler.reference import Sampled
from .layers import DenseMlp, LinearMap
from .moe import Experts
from .spec import Spec

if TYPE_CHECKING:
    from .stepper import Drawer


class Group(Protocol):
    """The ranks that compute a model together; operations wait for all of them (on a GPU in stream order)."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' x, of one shape and dtype; it may take the place of x."""

    def gather(self, x: Tensor) -> Tensor:
        """Return [size, *x.shape], the ranks' x in their order."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's x on all ranks, in the place of x."""

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers; for the host, at start."""

    def muted(self) -> AbstractContextManager[None]:
        """A context in which nobody is waited for, and results mean nothing: to compile kernels."""


@dataclass(slots=True)
class Summed:
    """A linear map of which each rank has some inputs."""

    linear: LinearMap
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.sum(self.linear(x))


def add_up(o: LinearMap, mlp: DenseMlp | Experts, group: Group) -> LinearMap:
    """Let a layer's MLP sum its results over the group; returns the output projection that does."""
    if isinstance(mlp, Experts):
        mlp.group = group
    else:
        mlp.down = Summed(mlp.down, group)
    return Summed(o, group)


def embed(ids: Tensor, table: Tensor, group: Group) -> Tensor:
    """Embeddings [T, hidden] of ids [T] from this rank's rows [vocab / size, hidden] of the table."""
    rows = ids - group.rank * len(table)
    ours = (rows >= 0) & (rows < len(table))
    x = F.embedding(torch.where(ours, rows, 0), table)
    return group.sum(torch.where(ours[:, None], x, 0))


def whole_logits(logits: Tensor, vocab: int, group: Group) -> Tensor:
    """Logits [R, vocab] of each rank's [R, vocab / size], on rank 0; on others their own, of which nothing is made."""
    parts = group.gather(logits)
    return parts.transpose(0, 1).flatten(1)[:, :vocab] if group.rank == 0 else logits


def qk_norm_(qkv: Tensor, weight: Tensor, spec: Spec, group: Group) -> None:
    """`plain_qk_norm_` over all heads at once, of which the ranks have some each: qkv [T, H + 2K, D], in place."""
    assert spec.qk_norm is not None and spec.qk_norm.kind == "rms"
    parts = (qkv[:, : spec.heads], qkv[:, spec.heads : len(weight)])
    squares = group.sum(torch.stack([p.float().square().sum((1, 2)) for p in parts]))
    # KV heads that several ranks have count several times, in the sum and in the width.
    for x, gain, total in zip(parts, (weight[: spec.heads], weight[spec.heads :]), squares, strict=True):
        scale = torch.rsqrt(total / (group.size * x[0].numel()) + spec.qk_norm.eps)
        x.copy_((x.float() * scale[:, None, None]).to(x.dtype) * gain)


class RankDrawer:
    """The sampler as a rank's steps use it: rank 0's `drawer` draws, the others are told."""

    def __init__(self, drawer: "Drawer | None", group: Group) -> None:
        """`drawer`: on rank 0."""
        self.drawer = drawer
        self.group = group

    def mode(self, host_slots: np.ndarray) -> Hashable:
        """See stepper.Drawer."""
        return None if self.drawer is None else self.drawer.mode(host_slots)

    def draw(
        self, logits: Tensor, slots: Tensor, positions: Tensor, mode: Hashable, host_slots: np.ndarray | None
    ) -> Sampled:
        """See stepper.Drawer. On other ranks than 0 there are no logprobs."""
        if self.drawer is None:
            told = self.group.broadcast(torch.zeros(2, len(slots), dtype=torch.int32, device=slots.device))
            return Sampled(told[0], told[1].to(torch.uint8))
        drawn = self.drawer.draw(logits, slots, positions, mode, host_slots)
        self.group.broadcast(torch.stack((drawn.ids.to(torch.int32), drawn.finish.to(torch.int32))))
        return drawn

    def score(self, logits: Tensor, host_slots: np.ndarray, ids: np.ndarray) -> Sampled:
        """See stepper.Drawer. Nothing on other ranks than 0."""
        if self.drawer is None:
            nobody = torch.empty(0, dtype=torch.int32, device=logits.device)
            return Sampled(nobody, nobody.to(torch.uint8))
        return self.drawer.score(logits, host_slots, ids)
