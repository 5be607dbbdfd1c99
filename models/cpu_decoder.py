"""A decoder's layers in one call of our C kernels (cpu_decoder.c), for quantized weights on a CPU.

Used by the decoder in the place of its loop over layers, for all layers but the last: that one, where some tokens'
rows end, runs on CpuOps, part by part. Invariant: the result is what CpuOps and CpuAttention compute, bit for bit.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .attention import AttentionPlan
from .cpu_attention import CpuPlan
from .cpu_kernels import Layer, kernels, threads
from .cpu_ops import rotates, rotation_of
from .kv_cache import KVCache
from .layers import DenseMlp
from .norms import is_head_rms
from .quantized import QuantizedLinear
from .spec import Spec

if TYPE_CHECKING:
    from .decoder import LayerWeights, Weights


class CpuLayers:
    """All layers but the last of weights that `fits`."""

    def __init__(self, spec: Spec, weights: "Weights") -> None:
        self.spec = spec
        self.count = spec.layers - 1
        self.run_layers = kernels().run_layers
        self.kept = (list(weights.layers), [maps_of(layer) for layer in weights.layers])
        """What the table points to."""
        self.table = (Layer * self.count)()
        for i, entry in enumerate(self.table):
            layer, following = weights.layers[i], weights.layers[i + 1]
            entry.qkv, entry.o, entry.gate_up, entry.down = (linear.map for linear in maps_of(layer))
            entry.qk_norm = None if layer.qk_norm is None else layer.qk_norm.data_ptr()
            assert layer.mlp_norm is not None and following.attention_norm is not None
            entry.mlp_norm = layer.mlp_norm.weight.data_ptr()
            entry.next_norm = following.attention_norm.weight.data_ptr()
            entry.rotates = spec.rotates(i)

    def run(
        self, hidden: Tensor, residual: Tensor, table: Any, kv_slots: Tensor, kv: KVCache, plan: AttentionPlan
    ) -> int:
        """Take normed hidden states and the residual stream [T, hidden], in place, through the first layers.

        table: as Ops.rotation makes it; kv_slots int64 [T]. Returns how many layers these were; 0: the plan is another
        backend's.
        """
        if not isinstance(plan, CpuPlan):
            return 0
        spec, tokens = self.spec, len(hidden)
        for i, entry in enumerate(self.table):
            visible = plan.visible[spec.window(i)]
            entry.first, entry.keys, entry.cache = visible.first.data_ptr(), visible.keys, kv.rows[i].data_ptr()
        heads = spec.heads + 2 * spec.kv_heads
        qkv = hidden.new_empty(tokens, heads, spec.head_dim)
        attended = hidden.new_empty(tokens, spec.heads * spec.head_dim)
        wide = hidden.new_empty(tokens, 3 * spec.inter)
        packed = hidden.new_empty(tokens, max(spec.hidden, spec.heads * spec.head_dim, spec.inter))
        rotation = rotation_of(qkv, None, table, spec, kv_slots)
        attention = plan.arguments(qkv[:, : spec.heads], attended)
        self.run_layers(
            self.table, self.count, hidden.data_ptr(), residual.data_ptr(), rotation, attention, wide.data_ptr(),
            packed.data_ptr(), spec.residual_scale, spec.norm.eps, threads(),
        )  # fmt: skip
        return self.count


def maps_of(layer: "LayerWeights") -> tuple[Any, ...]:
    """The four linear maps of a layer with a dense MLP."""
    assert isinstance(layer.mlp, DenseMlp)
    return layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down


def fits(spec: Spec, weights: "Weights") -> bool:
    """Whether `CpuLayers` takes this model. The cache's dtype is the plan's concern."""
    plain = spec.layout == "pre" and spec.norm.kind == "rms" and spec.gated and spec.act == "silu"
    heads = spec.clip_qkv is None and spec.local_rope is None and (spec.qk_norm is None or is_head_rms(spec))
    layers = weights.layers[:-1]
    if not (plain and heads and rotates(spec) and all(isinstance(layer.mlp, DenseMlp) for layer in layers)):
        return False
    return all(isinstance(linear, QuantizedLinear) for layer in layers for linear in maps_of(layer))
