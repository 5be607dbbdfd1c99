"""Tensor parallelism as a table: which part of each weight a rank has, for all families (Megatron-LM, 2019, section 3).

Used by places.py, which makes a rank's weights, and by the ledger. Queries, keys, values, gate and up are cut along
their outputs, so that a rank has whole heads and some of the MLP's columns; the projections behind them along their
inputs, so that each rank has a summand of the result (parallel.py adds them up); the vocabulary's tables by rows. All
else, norms and routers, every rank has whole. No torch here.
Where KV heads are fewer than ranks, several ranks have the same one. Columns and vocabulary need not divide: what is
lacking at the end is zeros, of which an activation makes zeros and a product nothing.
Invariant: the ranks' parts of a weight are together all of it, and overlap only in KV heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from ..errors import StartupError
from .spec import Spec

Along = Literal["heads", "kv_heads", "columns", "vocab"]
"""What a dimension is made of."""

TABLE: Final[Mapping[str, tuple[int, Along]]] = {
    "q_proj": (0, "heads"),
    "k_proj": (0, "kv_heads"),
    "v_proj": (0, "kv_heads"),
    "q_b_proj": (0, "heads"),
    "kv_b_proj": (0, "heads"),
    "o_proj": (1, "heads"),
    "gate_proj": (0, "columns"),
    "up_proj": (0, "columns"),
    "down_proj": (1, "columns"),
    "embed_tokens": (0, "vocab"),
    "lm_head": (0, "vocab"),
}
"""Our name of a module -> the axis of its weight [outputs, inputs] that is cut, and along what."""
COLUMNS: Final = 8
"""A rank has a multiple of so many columns of an MLP: grouped GEMMs want rows of 16 bytes."""
ROWS: Final = 64
"""And of so many rows of the vocabulary, for which GEMMs have their fast tiles."""
LARGEST: Final = 16
"""Up to here sizes that would do are named."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's part of one of a tensor's axes: [start, stop) of `whole` values."""

    axis: int
    start: int
    stop: int
    whole: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of a model."""

    whole: Spec
    ranks: int = 1
    rank: int = 0

    @property
    def spec(self) -> Spec:
        """The model as this rank computes it. Raises StartupError where it does not divide."""
        return sharded(self.whole, self.ranks)

    def cut(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        """The cut of the tensor of our name, of which a rank has room for a part of `shape`; None: it is whole."""
        module, _, kind = name.rpartition(".")
        entry = TABLE.get(module.rpartition(".")[2])
        if self.ranks == 1 or entry is None:
            return None
        axis, along = entry
        if kind == "bias" and axis == 1:  # of a sum: one rank adds it
            return None if self.rank == 0 else Cut(0, 0, 0, shape[0])
        size = shape[axis]
        if along in ("columns", "vocab"):
            whole = self.whole.vocab if along == "vocab" else self._columns(name)
            start = min(self.rank * size, whole)
            return Cut(axis, start, min(start + size, whole), whole)
        kv_heads = self.whole.kv_heads
        if along == "heads" or kv_heads % self.ranks == 0:
            return Cut(axis, self.rank * size, (self.rank + 1) * size, self.ranks * size)
        start = self.rank * kv_heads // self.ranks * size
        return Cut(axis, start, start + size, kv_heads * size)

    def _columns(self, name: str) -> int:
        """Width of the whole MLP that a tensor is of."""
        moe = self.whole.moe
        if moe is not None and ".experts." in name:
            return moe.inter
        return moe.shared_inter if moe is not None and ".shared_experts." in name else self.whole.inter


def sharded(spec: Spec, ranks: int) -> Spec:
    """The part of a model that one of `ranks` tensor parallel ranks computes, zeros at the end of columns included.

    Raises StartupError where heads do not divide.
    """
    if ranks == 1:
        return spec
    if not divides(spec, ranks):
        possible = ", ".join(str(n) for n in range(2, LARGEST + 1) if divides(spec, n))
        raise StartupError(
            f"--tp-size {ranks} does not divide {spec.heads} attention heads and {spec.kv_heads} KV heads; "
            + (f"possible: {possible}" if possible else "this model cannot be divided")
        )
    moe = spec.moe and replace(
        spec.moe, inter=part(spec.moe.inter, ranks, COLUMNS), shared_inter=part(spec.moe.shared_inter, ranks, COLUMNS)
    )
    return replace(
        spec,
        heads=spec.heads // ranks,
        kv_heads=max(1, spec.kv_heads // ranks),
        inter=part(spec.inter, ranks, COLUMNS),
        moe=moe,
        vocab=part(spec.vocab, ranks, ROWS),
    )


def divides(spec: Spec, ranks: int) -> bool:
    """Whether each rank can have as many heads, and the KV heads that these attend to."""
    return spec.heads % ranks == 0 and (spec.kv_heads % ranks == 0 or ranks % spec.kv_heads == 0)


def part(whole: int, ranks: int, multiple: int) -> int:
    """How much of `whole` a rank has room for: a multiple, enough for all ranks together."""
    return -(-whole // (ranks * multiple)) * multiple
