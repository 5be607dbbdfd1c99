"""The weights of a Spec, not yet filled, and in them the place of every tensor of a checkpoint, by our names.

Used by weights.py and the tests. What one GEMM multiplies is one tensor, of which the checkpoint's tensors are views;
what our names are, and how a family's become them, is in names.py.
Invariant: every element of the weights belongs to exactly one place.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StartupError
from .assembly import Keeper
from .decoder import LayerWeights, ScoreWeights, Weights
from .head import Head
from .layers import DenseMlp, Linear, LinearMap
from .mla import Latent
from .moe import Experts
from .names import (
    ATTENTION_NORM,
    ATTENTION_OUT_NORM,
    EMBED,
    EMBED_NORM,
    FINAL_NORM,
    HEAD,
    LAYER,
    MLP_NORM,
    MLP_OUT_NORM,
    POSITIONS,
    SCORE,
    TOKEN_TYPES,
)
from .norms import NormWeights
from .quantized import GROUP, QuantizedLinear, kind_of, of_one_kind, takes
from .shard import Cut, Share
from .spec import Score, Spec

Blocks = dict[str, Tensor]
"""Our name -> quantized rows, uint8 [outputs, bytes]; views of the mapped file."""


@dataclass(slots=True)
class Place:
    """Where a checkpoint tensor goes: `view` of a fused tensor, into which this rank's part of a tensor of `shape` is
    broadcast."""

    view: Tensor
    shape: tuple[int, ...]
    is_norm: bool = False
    offset: float = 0.0
    """Added to what the checkpoint has, once it is in place."""
    cut: Cut | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of the checkpoint's tensor: a view, so that nothing else is read of a mapped file."""
        cut = self.cut
        return tensor if cut is None else tensor.narrow(cut.axis, cut.start, cut.stop - cut.start)


def allocate(
    spec: Spec,
    device: torch.device,
    dtype: torch.dtype,
    blocks: Blocks | None = None,
    share: Share | None = None,
    keeper: Keeper | None = None,
    matrices: torch.dtype | None = None,
) -> tuple[Weights, dict[str, Place]]:
    """Return weights, all that is not `blocks` uninitialised, and the places in them by our names.

    `share`: which part of the model `spec` is. What `keeper` keeps quantized has no places: its assemblies take it.
    `matrices`: of tables and of linear maps' weights, if that is not `dtype`; experts are not among them.
    """
    made = Allocation(spec, device, dtype, blocks or {}, share or Share(spec), keeper, matrices or dtype)
    return made.weights(), made.places


class Allocation:
    """Makes the parts of a model, and enters each of their places."""

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        dtype: torch.dtype,
        blocks: Blocks,
        share: Share,
        keeper: Keeper | None,
        matrices: torch.dtype,
    ) -> None:
        self.spec, self.device, self.dtype, self.blocks = spec, device, dtype, blocks
        self.share, self.keeper, self.matrices = share, keeper, matrices
        self.places: dict[str, Place] = {}

    def weights(self) -> Weights:
        """A whole model."""
        spec = self.spec
        embed = self._table(EMBED, spec.vocab)
        positions = self._table(POSITIONS, spec.learned_positions) if spec.learned_positions else None
        layers = [self._layer(i) for i in range(spec.layers)]
        return Weights(
            embed=embed,
            positions=positions,
            token_types=self._table(TOKEN_TYPES, spec.token_types) if spec.token_types else None,
            embed_norm=self._norm(EMBED_NORM) if spec.embed_norm else None,
            layers=layers,
            norm=None if spec.layout == "post_sum" else self._norm(FINAL_NORM),
            head=self._head(embed) if spec.lm_head else None,
            score=self._score(spec.score) if spec.score is not None else None,
        )

    def _head(self, embed: Tensor) -> Head:
        spec = self.spec
        head = quantized_map({EMBED if spec.tied else HEAD: (spec.vocab, spec.hidden)}, self.blocks, None, self.share)
        return Head(head or Linear(embed if spec.tied else self._table(HEAD, spec.vocab), None))

    def _score(self, score: Score) -> ScoreWeights:
        hidden = self.spec.hidden
        dense = self._wide_linear(SCORE + "dense", hidden, True) if score.dense is not None else None
        return ScoreWeights(dense, self._wide_linear(SCORE + "labels", score.labels, score.bias))

    def _wide_linear(self, name: str, outputs: int, biased: bool) -> Linear:
        """A linear map of hidden states, in float32."""
        weight = self._place(name + ".weight", self._new(outputs, self.spec.hidden, wide=True))
        return Linear(weight, self._place(name + ".bias", self._new(outputs, wide=True)) if biased else None)

    def _layer(self, index: int) -> LayerWeights:
        spec, prefix = self.spec, LAYER.format(index)
        after = spec.layout in ("post", "post_sum", "sandwich")
        before = not after or spec.layout == "sandwich"
        mlp_norm = before and spec.layout != "parallel"
        attention = prefix + "self_attn."
        values = spec.value_dim if spec.mla is None else spec.mla.v
        return LayerWeights(
            attention_norm=self._norm(prefix + ATTENTION_NORM) if before else None,
            qkv=self._qkv(attention),
            qk_norm=self._qk_norm(attention) if spec.qk_norm is not None else None,
            latent=self._latent(attention) if spec.mla is not None else None,
            o=self._linear(attention, {"o_proj": spec.hidden}, spec.heads * values, spec.o_bias),
            attention_out_norm=self._norm(prefix + ATTENTION_OUT_NORM) if after else None,
            mlp_norm=self._norm(prefix + MLP_NORM) if mlp_norm else None,
            mlp=self._experts(prefix + "mlp.") if spec.sparse(index) else self._dense(prefix + "mlp.", spec.inter),
            mlp_out_norm=self._norm(prefix + MLP_OUT_NORM) if after else None,
        )

    # ------------------------------------------------------------------ attention

    def _qkv(self, prefix: str) -> LinearMap:
        spec, mla = self.spec, self.spec.mla
        if mla is None:
            q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
            return self._linear(prefix, {"q_proj": q, "k_proj": kv, "v_proj": kv}, spec.hidden, spec.qkv_bias)
        queries = {"q_proj": spec.heads * (mla.nope + mla.rope)} if mla.q_rank is None else {"q_a_proj": mla.q_rank}
        return self._linear(prefix, queries | {"kv_a_proj_with_mqa": mla.kv_rank + mla.rope}, spec.hidden, False)

    def _latent(self, prefix: str) -> Latent:
        spec, mla = self.spec, self.spec.mla
        assert mla is not None
        q_norm = q_up = None
        if mla.q_rank is not None:
            q_norm = self._place(prefix + "q_a_layernorm.weight", self._new(mla.q_rank), is_norm=True)
            q_up = self._linear(prefix, {"q_b_proj": spec.heads * (mla.nope + mla.rope)}, mla.q_rank, False)
        kv_norm = self._place(prefix + "kv_a_layernorm.weight", self._new(mla.kv_rank), is_norm=True)
        kv_up = self._new(spec.heads, mla.nope + mla.v, mla.kv_rank)
        self._place(prefix + "kv_b_proj.weight", kv_up.flatten(0, 1))
        return Latent(q_norm, q_up, kv_norm, kv_up)

    def _qk_norm(self, prefix: str) -> Tensor:
        """[heads + kv_heads, head_dim], whatever shape the checkpoint's have."""
        spec = self.spec
        assert spec.qk_norm is not None
        weight = self._new(spec.heads + spec.kv_heads, spec.head_dim, wide=spec.qk_norm.offset != 0)
        for name, part in (("q_norm", weight[: spec.heads]), ("k_norm", weight[spec.heads :])):
            heads = self.share.cut(f"{name[0]}_proj.weight", (len(part),)) or Cut(0, 0, len(part), len(part))
            norm, dim, offset = f"{prefix}{name}", spec.head_dim, spec.qk_norm.offset
            if spec.qk_norm_shape == "dim":
                self.places[f"{norm}.weight"] = Place(part, (dim,), True, offset)
            elif spec.qk_norm_shape == "all":
                cut = Cut(0, heads.start * dim, heads.stop * dim, heads.whole * dim)
                self.places[f"{norm}.weight"] = Place(part.view(-1), (cut.whole,), True, offset, cut)
            else:
                for head in range(heads.whole):  # those of other ranks have empty places
                    row = max(0, min(head - heads.start, len(part)))
                    ours = part[row : row + (heads.start <= head)]
                    self.places[f"{norm}.{head}.weight"] = Place(ours, (dim,), True, offset)
        return weight

    # ------------------------------------------------------------------ MLPs

    def _dense(self, prefix: str, inter: int) -> DenseMlp:
        spec = self.spec
        names = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
        return DenseMlp(
            self._linear(prefix, dict.fromkeys(names, inter), spec.hidden, spec.mlp_bias),
            self._linear(prefix, {"down_proj": spec.hidden}, inter, spec.mlp_bias),
        )

    def _experts(self, prefix: str) -> Experts:
        spec, moe = self.spec, self.spec.moe
        assert moe is not None
        gate_up = self._new(moe.experts, 2 * moe.inter, spec.hidden)
        down = self._new(moe.experts, spec.hidden, moe.inter)
        for expert in range(moe.experts):
            at = f"{prefix}experts.{expert}."
            self._place(at + "gate_proj.weight", gate_up[expert, : moe.inter])
            self._place(at + "up_proj.weight", gate_up[expert, moe.inter :])
            self._place(at + "down_proj.weight", down[expert])
        bias = None
        if moe.score_bias:
            bias = self._place(prefix + "gate.e_score_correction_bias", self._new(moe.experts, wide=True))
        return Experts(
            router=self._place(prefix + "gate.weight", self._new(moe.experts, spec.hidden, wide=True)),
            score_bias=bias,
            gate_up=gate_up,
            down_proj=down,
            shared=self._dense(prefix + "shared_experts.", moe.shared_inter) if moe.shared_inter else None,
            shared_gate=self._linear(prefix, {"shared_expert_gate": 1}, spec.hidden, False)
            if moe.shared_gate
            else None,
        )

    # ------------------------------------------------------------------ tensors

    def _new(self, *shape: int, wide: bool = False) -> Tensor:
        """An uninitialised tensor; `wide`: in float32, whatever the model's dtype."""
        return torch.empty(shape, dtype=torch.float32 if wide else self.dtype, device=self.device)

    def _matrix(self, rows: int, columns: int) -> Tensor:
        """An uninitialised table or weight of a linear map."""
        return torch.empty(rows, columns, dtype=self.matrices, device=self.device)

    def _place(self, name: str, view: Tensor, is_norm: bool = False, offset: float = 0.0) -> Tensor:
        """Enter the place of the tensor of our name, of which `view` is this rank's part; zeros where that ends."""
        cut = self.share.cut(name, tuple(view.shape))
        shape, filled = list(view.shape), view
        if cut is not None:
            if cut.stop - cut.start < view.shape[cut.axis]:
                view.zero_()
            shape[cut.axis] = cut.whole
            filled = view.narrow(cut.axis, 0, cut.stop - cut.start)
        self.places[name] = Place(filled, tuple(shape), is_norm, offset, cut)
        return view

    def _table(self, name: str, rows: int) -> Tensor:
        return self._place(name, self._matrix(rows, self.spec.hidden))

    def _norm(self, name: str) -> NormWeights:
        norm = self.spec.norm
        weight = self._new(self.spec.hidden, wide=norm.offset != 0)
        self._place(name + ".weight", weight, is_norm=True, offset=norm.offset)
        return NormWeights(weight, self._place(name + ".bias", self._new(self.spec.hidden)) if norm.bias else None)

    def _linear(self, prefix: str, parts: dict[str, int], inputs: int, biased: bool) -> LinearMap:
        """One linear map of the named ones, stacked along the outputs."""
        sizes = list(parts.values())
        bias = self._new(sum(sizes)) if biased else None
        for name, view in zip(parts, [] if bias is None else torch.split(bias, sizes), strict=False):
            self._place(f"{prefix}{name}.bias", view)
        shapes = {f"{prefix}{name}.weight": (size, inputs) for name, size in parts.items()}
        kept = quantized_map(shapes, self.blocks, bias, self.share)
        if kept is None and self.keeper is not None:
            kept = self.keeper.map(shapes, bias, {name: self.share.cut(name, shape) for name, shape in shapes.items()})
        if kept is not None:
            return kept
        weight = self._matrix(sum(sizes), inputs)
        for name, view in zip(shapes, torch.split(weight, sizes), strict=True):
            self._place(name, view)
        return Linear(weight, bias)


def quantized_map(
    shapes: dict[str, tuple[int, int]], blocks: Blocks, bias: Tensor | None, share: Share
) -> LinearMap | None:
    """One linear map of this rank's parts of the named weights, [outputs, inputs] each, stacked; None unless all are
    blocks of one usable type.

    Raises StartupError if blocks do not have the shape that config.json asks for.
    """
    ours = [block_part(name, blocks[name], shape, share) for name, shape in shapes.items() if name in blocks]
    parts = [part for part in ours if part is not None]
    if len(parts) < len(shapes):
        return None
    inputs = next(iter(shapes.values()))[1]
    parts = of_one_kind(parts, inputs)
    if len({part.shape[1] for part in parts}) > 1:
        return None
    stacked = torch.from_numpy(np.concatenate([part.numpy() for part in parts]))  # torch.cat: slow where cores are busy
    return QuantizedLinear(stacked, inputs, bias) if takes(stacked, inputs) else None


def block_part(name: str, rows: Tensor, shape: tuple[int, int], share: Share) -> Tensor | None:
    """This rank's part, of a shape [outputs, inputs], of a weight's blocks, zeros where they end; None where it would
    cut through blocks. Raises as `check_blocks`."""
    cut = share.cut(name, shape)
    whole = list(shape)
    if cut is not None:
        whole[cut.axis] = cut.whole
    check_blocks(name, rows, (whole[0], whole[1]))
    if cut is None:
        return rows
    start, stop, room = cut.start, cut.stop, shape[cut.axis]
    if cut.axis == 1:
        if start % GROUP or stop % GROUP or room % GROUP:
            return None
        size = rows.shape[1] * GROUP // cut.whole
        start, stop, room = (n // GROUP * size for n in (start, stop, room))
    kept = rows.narrow(cut.axis, start, stop - start)
    lacking = room - (stop - start)
    pad = (0, lacking) if cut.axis == 1 else (0, 0, 0, lacking)
    return F.pad(kept, pad) if lacking else kept


def check_blocks(name: str, part: Tensor, shape: tuple[int, ...]) -> None:
    """Raise StartupError unless blocks have the shape [outputs, inputs] of a weight."""
    if len(part) != shape[0] or kind_of(part, shape[1]) is None:
        raise StartupError(f"blocks of {name} are {list(part.shape)} bytes, config.json asks for {list(shape)} values")
