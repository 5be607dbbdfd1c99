"""Names of tensors: those that our weights have, which are Llama's in transformers, and how checkpoints' become them.

Used by places.py, which makes the weights, and by weights.py, which fills them. What a family calls differently is a
list of rewrites; what it stores in one tensor, or transposed, is cut by a function.
Invariant: every value of a checkpoint's tensor lands in exactly one piece.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from .spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

EMBED: Final = "model.embed_tokens.weight"
POSITIONS: Final = "model.embed_positions.weight"
TOKEN_TYPES: Final = "model.token_types.weight"
EMBED_NORM: Final = "model.embed_norm"
FINAL_NORM: Final = "model.norm"
HEAD: Final = "lm_head.weight"
SCORE: Final = "score."
"""Prefix of a classification head's maps, `dense` and `labels`."""
LAYER: Final = "model.layers.{}."
"""Prefix of a layer's tensors."""
ATTENTION_NORM: Final = "input_layernorm"
ATTENTION_OUT_NORM: Final = "attention_out_norm"
MLP_NORM: Final = "post_attention_layernorm"
MLP_OUT_NORM: Final = "mlp_out_norm"

Pieces = Iterator[tuple[str, "Tensor"]]
Cut = Callable[["Tensor", Spec], Pieces]
"""A tensor whose module is fused -> the modules in it and their tensors."""


@dataclass(frozen=True, slots=True)
class Names:
    """How a family's checkpoints name and store tensors."""

    rewrites: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement): each is applied once, in this order."""
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """By the rewritten name's module, the part before `.weight` or `.bias`."""
    more_layers: bool = False
    """A checkpoint may have more layers than config.json says, for predicting several tokens: they are left out."""
    unused: str | None = None
    """Regular expression for those of our names that a checkpoint may have and nothing needs."""
    beside: str | None = None
    """Regular expression of a checkpoint's tensors that are not the decoder's."""


PLAIN: Final = Names()


def pieces(names: Names, spec: Spec, name: str, tensor: "Tensor") -> Pieces:
    """Yield (our name, tensor) of everything in a checkpoint's tensor."""
    name = rewritten(names, name)
    path, _, kind = name.rpartition(".")
    parent, _, module = path.rpartition(".")
    if module not in names.cuts:
        yield name, tensor
        return
    for part, piece in names.cuts[module](tensor, spec):
        yield f"{parent}.{part}.{kind}", piece


def rewritten(names: Names, name: str) -> str:
    """Our name of a checkpoint's tensor, which may still have to be cut."""
    for pattern, replacement in names.rewrites:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def weights_of(names: Names, name: str) -> list[str]:
    """Our names of the weights in a checkpoint's, without looking at it.

    Raises ValueError for one that is cut in another way than by rows: a quantized weight cannot be.
    """
    name = rewritten(names, name)
    path, _, kind = name.rpartition(".")
    parent, _, module = path.rpartition(".")
    if module not in names.cuts:
        return [name]
    modules = BY_ROWS.get(names.cuts[module])
    if modules is None:
        raise ValueError(f"{module} is stored in a way of its own")
    return [f"{parent}.{part}.{kind}" for part in modules]


def cut_rows(names: Names, spec: Spec, name: str, tensor: "Tensor") -> list["Tensor"]:
    """The pieces of a tensor [outputs, ...], in the order of `weights_of`."""
    return [piece for _, piece in pieces(names, spec, name, tensor)]


def layer_of(name: str) -> int | None:
    """The layer that one of our names is of."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


# ------------------------------------------------------------------ cuts


def qkv(tensor: "Tensor", spec: Spec) -> Pieces:
    """Queries, keys and values one after another; weight or bias."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if len(tensor) != q + 2 * kv:
        raise ValueError(f"{q} + 2 * {kv} rows were expected")
    yield from (("q_proj", tensor[:q]), ("k_proj", tensor[q : q + kv]), ("v_proj", tensor[q + kv :]))


def grouped_qkv(tensor: "Tensor", spec: Spec) -> Pieces:
    """For each KV head its queries, then its key and value (InternLM 2)."""
    groups = tensor.reshape(spec.kv_heads, spec.group + 2, spec.head_dim, *tensor.shape[1:])
    yield "q_proj", groups[:, : spec.group].flatten(0, 2)
    yield "k_proj", groups[:, spec.group].flatten(0, 1)
    yield "v_proj", groups[:, spec.group + 1].flatten(0, 1)


def gate_up(tensor: "Tensor", spec: Spec) -> Pieces:
    """Gate and up one after another."""
    yield from zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)


def by_head(name: str) -> Cut:
    """One norm weight for all heads, [heads, head_dim]."""
    return lambda tensor, spec: ((f"{name}.{head}", row) for head, row in enumerate(tensor.unbind()))


def transposed(cut_or_name: Cut | str) -> Cut:
    """A weight stored as [inputs, outputs] (GPT-2's Conv1D): then to be cut, or one module."""

    def cut(tensor: "Tensor", spec: Spec) -> Pieces:
        turned = tensor.t() if tensor.ndim == 2 else tensor
        return iter([(cut_or_name, turned)]) if isinstance(cut_or_name, str) else cut_or_name(turned, spec)

    return cut


def stacked(name: str, turned: bool = False) -> Cut:
    """All experts' matrices under one another, [experts * inter, hidden]; `turned`: each is transposed (DBRX)."""

    def cut(tensor: "Tensor", spec: Spec) -> Pieces:
        if spec.moe is None:
            raise ValueError("it has no experts")
        for expert, matrix in enumerate(tensor.reshape(spec.moe.experts, spec.moe.inter, -1)):
            yield f"{expert}.{name}", matrix.t() if turned else matrix

    return cut


BY_ROWS: Final[dict[Cut, tuple[str, ...]]] = {
    qkv: ("q_proj", "k_proj", "v_proj"),
    grouped_qkv: ("q_proj", "k_proj", "v_proj"),
    gate_up: ("gate_proj", "up_proj"),
}
"""The cuts that distribute rows, and the modules they yield, in order."""
