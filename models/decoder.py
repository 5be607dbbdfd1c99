"""Decoder: one forward for every family, on CPU and GPU. What runs is decided by a Spec and a Batch, nothing else.

Used by the executor's runner, perf and tests. Arithmetic is in layers.py, norms.py, rope.py, moe.py, mla.py and the
attention backend. There are two ways through the layers: `_merged`, for RMS norms before each part, where every GEMM
but QKV ends in a sum and a norm and every GEMM may do that work itself (Ops); and `_plain`, for all other layouts.
Invariant: forward reads only its arguments and the weights, writes only the KV slots of the batch, and never waits
for the device, so that a batch without chunks can be captured in a CUDA graph.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StartupError
from .attention import AttentionBackend, AttentionPlan
from .batch import Batch
from .head import Head
from .kv_cache import KVCache
from .layers import DenseMlp, Hidden, Linear, LinearMap, Ops, TorchOps
from .mla import Latent, attend
from .moe import Experts
from .norms import NormWeights, is_head_rms, layer_norm, plain_qk_norm_
from .parallel import Group, embed, qk_norm_, whole_logits
from .rope import inverse_frequencies, rotation_table
from .spec import Rope, Spec


@dataclass(slots=True)
class LayerWeights:
    """One layer. Norms are None where the layout has none."""

    attention_norm: NormWeights | None
    qkv: LinearMap
    """hidden -> (heads + 2 * kv_heads) * head_dim: queries, keys, values. With MLA see mla.Latent."""
    qk_norm: Tensor | None
    """[heads + kv_heads, head_dim]"""
    latent: Latent | None
    o: LinearMap
    attention_out_norm: NormWeights | None
    mlp_norm: NormWeights | None
    mlp: DenseMlp | Experts
    mlp_out_norm: NormWeights | None


@dataclass(slots=True)
class ScoreWeights:
    """See spec.Score; float32 whatever the model's dtype."""

    dense: Linear | None
    labels: Linear


@dataclass(slots=True)
class Weights:
    """A whole model."""

    embed: Tensor
    """[vocab, hidden]; with ranks this one's rows. Tables may have 16 bits where hidden states are float32."""
    positions: Tensor | None
    """[learned_positions, hidden]"""
    token_types: Tensor | None
    """[token_types, hidden]"""
    embed_norm: NormWeights | None
    layers: list[LayerWeights]
    norm: NormWeights | None
    head: Head | None
    score: ScoreWeights | None


class Layers(Protocol):
    """All layers in one call, where a device has that."""

    def run(
        self,
        hidden: Tensor,
        residual: Tensor,
        table: Any,
        kv_slots: Tensor,
        kv: KVCache,
        plan: AttentionPlan,
        rows: Tensor | None,
    ) -> Tensor | None:
        """Take normed hidden states and the residual stream [T, hidden], both overwritten, through the layers.

        kv_slots int64 [T]. Returns normed hidden states [R, hidden] of `rows` int64 [R], of all tokens if that is None;
        None, with nothing done, where it does not take the batch.
        """


@dataclass(slots=True)
class Step:
    """What the layers of one forward share."""

    batch: Batch
    kv: KVCache
    plan: AttentionPlan
    table: Any
    """Ops.rotation of the tokens; None without rope."""
    local_table: Any
    """The same of the layers with a window."""

    @property
    def rows(self) -> Tensor | None:
        return self.batch.logit_rows


def check_supported(spec: Spec) -> None:
    """Raise StartupError naming the fields of the spec that this decoder does not implement."""
    unsupported = {
        "causal": not spec.causal and (spec.lm_head or spec.mla is not None or spec.windows != ()),
        "mla": spec.mla is not None and (spec.qk_norm is not None or spec.clip_qkv is not None),
        "local_rope": _differ_in_shape(spec.rope, spec.local_rope),
    }
    missing = [name for name, wanted in unsupported.items() if wanted]
    if missing:
        raise StartupError(f"this model needs parts that are not implemented yet: {', '.join(missing)}")


def _differ_in_shape(rope: Rope | None, local: Rope | None) -> bool:
    """Whether the two ropes rotate different parts of a head, for which kernels would have to be told the layer."""
    return local is not None and (rope is None or (rope.dim, rope.interleaved) != (local.dim, local.interleaved))


class Decoder:
    """Runs batches. Weights are on `device` in `dtype`. With a group all its ranks run the same batches."""

    def __init__(
        self,
        spec: Spec,
        weights: Weights,
        attention: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops | None = None,
        layers: Layers | None = None,
        group: Group | None = None,
        whole: Spec | None = None,
    ) -> None:
        """`spec`: what this rank of `group` has of the model, `whole`; without a group it has all."""
        check_supported(spec)
        self.spec = spec
        self.whole = whole or spec
        self.group = group
        self.device = device
        self.dtype = dtype
        self.weights = weights
        self.attention = attention
        self.ops: Ops = ops or TorchOps()
        self.layers = layers
        self.embed_scale = torch.tensor(spec.embed_scale, dtype=dtype).item()
        """As Gemma was trained: a number of the model's dtype."""
        self.merges = spec.layout == "pre" and spec.norm.kind == "rms"
        self.fuses_heads = spec.clip_qkv is None and (spec.qk_norm is None or is_head_rms(spec))
        self.frequencies = None if spec.rope is None else inverse_frequencies(spec.rope).to(device)
        self.local_frequencies = None if spec.local_rope is None else inverse_frequencies(spec.local_rope).to(device)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Write the batch's keys and values to the cache and return logits float32 [R, vocab].

        R rows in the order of batch.logit_rows, all T tokens where that is None. Tokens whose logits are not wanted
        go through the attention of the last layer (for their keys and values) and no further. Other ranks than 0
        return R rows that mean nothing.
        """
        assert self.weights.head is not None, "this model has no logits"
        hidden = self._run(batch, kv, self.weights.head.product)
        if hidden is None:
            return torch.empty(0, self.whole.vocab, dtype=torch.float32, device=self.device)
        return self.logits(hidden)

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        """As `forward`, but return what comes before the head, normed hidden states [R, hidden].

        For models without a head, and for rows whose logits would take too much memory at once: `logits` may be asked
        for some of them.
        """
        hidden = self._run(batch, kv, None)
        if hidden is None:
            return torch.empty(0, self.spec.hidden, dtype=self.dtype, device=self.device)
        assert isinstance(hidden, Tensor)
        return hidden

    def _run(self, batch: Batch, kv: KVCache, head: LinearMap | None) -> Hidden | None:
        """The layers: normed hidden states [R, hidden] for `head`, plain ones without; None for no rows."""
        spec = self.spec
        table = self._rotation(batch.positions, spec.rope, self.frequencies)
        local = table
        if spec.local_rope is not None:
            local = self._rotation(batch.positions, spec.local_rope, self.local_frequencies)
        step = Step(batch, kv, self.attention.plan(batch, kv, spec), table, local)
        residual = self._embed(batch)
        return self._merged(residual, step, head) if self.merges else self._plain(residual, step)

    def _rotation(self, positions: Tensor, rope: Rope | None, frequencies: Tensor | None) -> Any:
        if rope is None or frequencies is None:
            return None
        if self.spec.mla is not None:
            return rotation_table(positions, frequencies, rope, self.dtype)
        return self.ops.rotation(positions, frequencies, rope, self.dtype)

    def _embed(self, batch: Batch) -> Tensor:
        table = self.weights.embed
        x = F.embedding(batch.ids, table) if self.group is None else embed(batch.ids, table, self.group)
        x = x.to(self.dtype)
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        if batch.features is not None:
            rows, values = batch.features
            x = x.index_copy(0, rows, values)
        if self.weights.positions is not None:
            x = x + F.embedding(batch.positions, self.weights.positions)
        if self.weights.token_types is not None:
            types = batch.token_types
            x = x + (self.weights.token_types[0] if types is None else F.embedding(types, self.weights.token_types))
        return self._norm(x, self.weights.embed_norm)

    # ------------------------------------------------------------------ the layers, both return None for no rows

    def _merged(self, residual: Tensor, step: Step, head: LinearMap | None) -> Hidden | None:
        """Layers with an RMS norm before each part: normed hidden states [R, hidden] of embeddings [T, hidden]."""
        spec, weights, eps, ops = self.spec, self.weights, self.spec.norm.eps, self.ops
        scale = spec.residual_scale
        norms = [layer.attention_norm for layer in weights.layers] + [weights.norm]
        into = [*(layer.qkv for layer in weights.layers), head]
        assert norms[0] is not None
        hidden: Hidden = ops.rms_norm(residual, norms[0].weight, eps)
        if self.layers is not None:
            assert isinstance(hidden, Tensor)
            slots = step.batch.kv_slots
            done = self.layers.run(hidden, residual, step.table, slots, step.kv, step.plan, step.rows)
            if done is not None:
                return done if len(done) else None
        for i, layer in enumerate(weights.layers):
            x = self._attend(i, layer, hidden, step)
            if i + 1 == spec.layers and step.rows is not None:
                if not len(step.rows):  # only keys and values were wanted
                    return None
                x, residual = x.index_select(0, step.rows), residual.index_select(0, step.rows)
            norm, after = layer.mlp_norm, norms[i + 1]
            assert norm is not None and after is not None
            hidden, residual = ops.add_norm(layer.o, x, residual, scale, norm.weight, eps, layer.mlp.takes)
            x = layer.mlp.inner(ops, hidden, spec)
            hidden, residual = ops.add_norm(layer.mlp.down, x, residual, scale, after.weight, eps, into[i + 1])
        return hidden

    def _plain(self, residual: Tensor, step: Step) -> Tensor | None:
        """Layers of any layout, one operation after another; as `_merged`."""
        spec = self.spec
        for i, layer in enumerate(self.weights.layers):
            x = self._norm(residual, layer.attention_norm)
            attended = self._attend(i, layer, x, step)
            if i + 1 == spec.layers and step.rows is not None:
                if not len(step.rows):
                    return None
                attended, x, residual = (t.index_select(0, step.rows) for t in (attended, x, residual))
            delta = layer.o(attended)
            if spec.layout == "parallel":
                delta = delta + self._mlp(layer, x)
                if self.group is not None:
                    delta = self.group.sum(delta)
            residual = self._add(residual, delta, layer.attention_out_norm)
            if spec.layout != "parallel":
                delta = self._mlp(layer, self._norm(residual, layer.mlp_norm))
                residual = self._add(residual, delta, layer.mlp_out_norm)
        return self._norm(residual, self.weights.norm)

    def _add(self, residual: Tensor, delta: Tensor, norm: NormWeights | None) -> Tensor:
        """The residual stream with what a part adds to it; `norm` is of that, or of their sum."""
        if self.spec.layout == "post_sum":
            return self._norm(torch.add(residual, delta, alpha=self.spec.residual_scale), norm)
        return torch.add(residual, self._norm(delta, norm), alpha=self.spec.residual_scale)

    def _norm(self, x: Tensor, weights: NormWeights | None) -> Tensor:
        if weights is None:
            return x
        if self.spec.norm.kind == "layer":
            return layer_norm(x, weights, self.spec.norm.eps)
        return self.ops.rms_norm(x, weights.weight, self.spec.norm.eps)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        return layer.mlp.down(layer.mlp.inner(self.ops, x, self.spec))

    def _attend(self, index: int, layer: LayerWeights, hidden: Hidden, step: Step) -> Tensor:
        """Normed hidden states [T, hidden] -> heads' outputs [T, heads * value width], before the output projection."""
        spec, slots, kv_rows = self.spec, step.batch.kv_slots, step.kv.rows[index]
        table = None
        if spec.rotates(index):
            table = step.table if spec.window(index) is None else step.local_table
        if layer.latent is not None:
            return attend(layer.latent, layer.qkv(hidden), spec, table, slots, kv_rows, step.plan, index)
        weight, eps = (None, 0.0) if spec.qk_norm is None else (layer.qk_norm, spec.qk_norm.eps)
        if self.fuses_heads:
            rotates = step.plan.rotates
            queries = self.ops.heads(layer.qkv, hidden, weight, eps, table, spec, slots, kv_rows, rotates)
        else:
            heads = layer.qkv(hidden).view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
            if spec.clip_qkv is not None:
                heads = heads.clamp(-spec.clip_qkv, spec.clip_qkv)
            if weight is not None and self.group is not None and spec.qk_norm_shape == "all":
                qk_norm_(heads, weight, spec, self.group)
            elif weight is not None:
                plain_qk_norm_(heads, weight, spec)
            queries = self.ops.qk_norm_rope_and_write(heads, None, 0.0, table, spec, slots, kv_rows)
        return step.plan.run(index, queries)

    def logits(self, hidden: Hidden) -> Tensor:
        """Normed hidden states [R, hidden] -> logits float32 [R, vocab]; see `forward`."""
        assert self.weights.head is not None, "this model has no logits"
        logits = self.weights.head(hidden)
        if self.group is not None:
            logits = whole_logits(logits, self.whole.vocab, self.group)
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits = torch.tanh(logits / self.spec.logit_softcap) * self.spec.logit_softcap
        return logits
