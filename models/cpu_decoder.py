"""A decoder's layers in one call of our C kernels (cpu_decoder.c), in float32 on a CPU.

Used by the decoder in the place of its loop over layers. Invariant: the result is what CpuOps and CpuAttention compute
part by part, bit for bit.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .attention import AttentionPlan
from .cpu_attention import CpuPlan
from .cpu_kernels import Layer, kernels, scratch, threads
from .cpu_ops import rotates, rotation_of
from .kv_cache import KVCache
from .layers import DenseMlp
from .norms import is_head_rms
from .quantized import KernelLinear
from .spec import Spec

if TYPE_CHECKING:
    from .decoder import LayerWeights, Weights


class CpuLayers:
    """All layers of weights that `fits`."""

    def __init__(self, spec: Spec, weights: "Weights") -> None:
        self.spec = spec
        self.count = spec.layers
        self.run_layers = kernels().run_layers
        self.kept = (list(weights.layers), [maps_of(layer) for layer in weights.layers])
        """What the table points to."""
        self.table = (Layer * self.count)()
        for i, entry in enumerate(self.table):
            layer, last = weights.layers[i], i + 1 == self.count
            following = weights.norm if last else weights.layers[i + 1].attention_norm
            entry.qkv, entry.o, entry.gate_up, entry.down = (linear.map for linear in maps_of(layer))
            entry.qk_norm = None if layer.qk_norm is None else layer.qk_norm.data_ptr()
            assert layer.mlp_norm is not None and following is not None
            entry.mlp_norm, entry.next_norm = layer.mlp_norm.weight.data_ptr(), following.weight.data_ptr()
            entry.rotates = spec.rotates(i)
        self.fields = np.frombuffer(memoryview(self.table), np.dtype(Layer))
        """The table as columns, for what changes from step to step."""
        self.windows = [spec.window(i) for i in range(self.count)]
        self.places: tuple[int, ...] = ()

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
        """See decoder.Layers. table: as Ops.rotation makes it. Declines another backend's plan, and more rows than
        tokens."""
        if not isinstance(plan, CpuPlan) or (rows is not None and len(rows) > len(hidden)):
            return None
        spec, tokens = self.spec, len(hidden)
        self._point(kv, plan)
        heads = spec.heads + 2 * spec.kv_heads
        qkv = hidden.new_empty(tokens, heads, spec.head_dim)
        attended = hidden.new_empty(tokens, spec.heads * spec.head_dim)
        inner, widest = hidden.new_empty(tokens, spec.inter), max(spec.hidden, spec.heads * spec.head_dim, spec.inter)
        packed = scratch(2 * tokens, widest)
        rotation = rotation_of(qkv, None, table, spec, kv_slots)
        rotation.kind = plan.kind
        attention = plan.arguments(qkv[:, : spec.heads], attended)
        self.run_layers(
            self.table, self.count, hidden.data_ptr(), residual.data_ptr(), rotation, attention, inner.data_ptr(),
            packed.data_ptr(), widest, None if rows is None else rows.data_ptr(), 0 if rows is None else len(rows),
            spec.residual_scale, spec.norm.eps, threads(),
        )  # fmt: skip
        return hidden if rows is None else hidden[: len(rows)]

    def _point(self, kv: KVCache, plan: CpuPlan) -> None:
        """Enter the cache and what the tokens see in the table."""
        places = (kv.storage.data_ptr(), kv.storage.itemsize, *kv.storage.stride())
        if places != self.places:
            self.fields["cache"], self.places = [rows.data_ptr() for rows in kv.rows[: self.count]], places
        for window, visible in plan.visible.items():
            layers = slice(None) if len(plan.visible) == 1 else [own == window for own in self.windows]
            self.fields["first"][layers], self.fields["keys"][layers] = visible.first.data_ptr(), visible.keys


def maps_of(layer: "LayerWeights") -> tuple[Any, ...]:
    """The four linear maps of a layer with a dense MLP."""
    assert isinstance(layer.mlp, DenseMlp)
    return layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down


def fits(spec: Spec, weights: "Weights") -> bool:
    """Whether `CpuLayers` takes this model. The cache's dtype is the plan's concern."""
    plain = spec.layout == "pre" and spec.norm.kind == "rms" and spec.gated and spec.act == "silu"
    heads = spec.clip_qkv is None and spec.local_rope is None and (spec.qk_norm is None or is_head_rms(spec))
    layers = weights.layers
    whole = plain and heads and rotates(spec) and weights.norm is not None
    if not (whole and all(isinstance(layer.mlp, DenseMlp) for layer in layers)):
        return False
    return all(isinstance(linear, KernelLinear) for layer in layers for linear in maps_of(layer))
