"""Decoder: one forward for every family, on CPU and GPU. What runs is decided by a Spec and a Batch, nothing else.

Used by the executor's runner, perf and tests. Arithmetic is in layers.py, rope.py and the attention backend.
Invariant: forward reads only its arguments and the weights, writes only the KV slots of the batch, and never waits
for the device, so that a batch without chunks can be captured in a CUDA graph.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StartupError
from .attention import AttentionBackend, AttentionPlan
from .batch import Batch
from .head import Head
from .kv_cache import KVCache
from .layers import Hidden, LinearMap, Ops, TorchOps
from .rope import inverse_frequencies
from .spec import Norm, Spec


@dataclass(slots=True)
class LayerWeights:
    """One layer."""

    attention_norm: Tensor
    """[hidden]"""
    qkv: LinearMap
    """hidden -> (heads + 2 * kv_heads) * head_dim: queries, keys, values."""
    qk_norm: Tensor | None
    """[heads + kv_heads, head_dim]"""
    o: LinearMap
    mlp_norm: Tensor
    gate_up: LinearMap
    """hidden -> 2 * inter: gate, up."""
    down: LinearMap


@dataclass(slots=True)
class Weights:
    """A whole model."""

    embed: Tensor
    """[vocab, hidden]"""
    layers: list[LayerWeights]
    norm: Tensor
    head: Head


def check_supported(spec: Spec) -> None:
    """Raise StartupError naming the fields of the spec that this decoder does not implement."""
    unsupported = {
        "moe": spec.moe is not None,
        "mla": spec.mla is not None,
        "norm.kind": spec.norm.kind != "rms",
        "norm.offset": spec.norm.offset != 0,
        "norm.bias": spec.norm.bias,
        "qk_norm": spec.qk_norm not in (None, Norm("rms", spec.qk_norm.eps if spec.qk_norm else 0.0)),
        "qk_norm_shape": spec.qk_norm is not None and spec.qk_norm_shape != "dim",
        "local_rope": spec.local_rope is not None,
        "learned_positions": spec.learned_positions > 0,
        "clip_qkv": spec.clip_qkv is not None,
        "causal": not spec.causal,
        "gated": not spec.gated,
        "layout": spec.layout != "pre",
    }
    missing = [name for name, wanted in unsupported.items() if wanted]
    if missing:
        raise StartupError(f"this model needs parts that are not implemented yet: {', '.join(missing)}")


class Decoder:
    """Runs batches. Weights are on `device` in `dtype`."""

    def __init__(
        self,
        spec: Spec,
        weights: Weights,
        attention: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops | None = None,
    ) -> None:
        check_supported(spec)
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.weights = weights
        self.attention = attention
        self.ops: Ops = ops or TorchOps()
        self.frequencies = None if spec.rope is None else inverse_frequencies(spec.rope).to(device)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Write the batch's keys and values to the cache and return logits float32 [R, vocab].

        R rows in the order of batch.logit_rows, all T tokens where that is None. Tokens whose logits are not wanted
        go through the attention of the last layer (for their keys and values) and no further.
        """
        hidden = self._run(batch, kv, self.weights.head.product)
        if hidden is None:
            return torch.empty(0, self.spec.vocab, dtype=torch.float32, device=self.device)
        return self.logits(hidden)

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        """As `forward`, but return what comes before the head, normed hidden states [R, hidden]; R is not 0.

        For rows whose logits would take too much memory at once: `logits` may be asked for some of them.
        """
        hidden = self._run(batch, kv, None)
        assert isinstance(hidden, Tensor)
        return hidden

    def _run(self, batch: Batch, kv: KVCache, head: LinearMap | None) -> Hidden:
        """The layers: normed hidden states [R, hidden] for `head`, plain ones without; None for no rows."""
        spec, weights, eps, ops = self.spec, self.weights, self.spec.norm.eps, self.ops
        plan = self.attention.plan(batch, kv, spec)
        table = None
        if spec.rope is not None and self.frequencies is not None:
            table = ops.rotation(batch.positions, self.frequencies, spec.rope, self.dtype)
        residual = F.embedding(batch.ids, weights.embed)
        if spec.embed_scale != 1.0:
            residual = residual * spec.embed_scale
        hidden: Hidden = ops.rms_norm(residual, weights.layers[0].attention_norm, eps)
        for i, layer in enumerate(weights.layers):
            last = i + 1 == spec.layers
            x = self._attend(i, layer, hidden, batch, kv, plan, table if spec.rotates(i) else None)
            if last and batch.logit_rows is not None:
                if not len(batch.logit_rows):  # only keys and values were wanted
                    return None
                x, residual = x.index_select(0, batch.logit_rows), residual.index_select(0, batch.logit_rows)
            scale = spec.residual_scale
            hidden, residual = ops.add_norm(layer.o, x, residual, scale, layer.mlp_norm, eps, layer.gate_up)
            x = ops.gated(layer.gate_up, hidden, spec.act)
            norm, into = weights.norm, head
            if not last:
                norm, into = weights.layers[i + 1].attention_norm, weights.layers[i + 1].qkv
            hidden, residual = ops.add_norm(layer.down, x, residual, scale, norm, eps, into)
        return hidden

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        hidden: Hidden,
        batch: Batch,
        kv: KVCache,
        plan: AttentionPlan,
        table: Any,
    ) -> Tensor:
        """Normed hidden states [T, hidden] -> heads' outputs [T, heads * head_dim], before the output projection."""
        spec = self.spec
        weight, eps = (None, 0.0) if spec.qk_norm is None else (layer.qk_norm, spec.qk_norm.eps)
        queries = self.ops.heads(layer.qkv, hidden, weight, eps, table, spec, batch.kv_slots, kv.rows[index])
        return plan.run(index, queries)

    def logits(self, hidden: Hidden) -> Tensor:
        """Normed hidden states [R, hidden] -> logits float32 [R, vocab]."""
        logits = self.weights.head(hidden)
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits = torch.tanh(logits / self.spec.logit_softcap) * self.spec.logit_softcap
        return logits
