"""One linear map of the quantized parts that a checkpoint has for it, whatever they are, by a device's back end.

Used by the Ops (layers.py, cpu_ops.py, triton_ops.py). A back end multiplies with one Part whose inputs are in the
groups' order. Parts of different kinds become maps side by side, act-order an order of the inputs, and what a back end
does not take a dense map.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .unpack import Part, join, sorted_inputs

Map = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Beside:
    """Maps of the same inputs, their outputs one after another."""

    maps: list[Map]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.cat([each(x) for each in self.maps], dim=1)
        return y if self.bias is None else y + self.bias


@dataclass(slots=True)
class Reordered:
    """A map whose weight has its inputs in another order (act-order)."""

    map: Map
    order: Tensor
    """int64 [inputs]"""

    def __call__(self, x: Tensor) -> Tensor:
        return self.map(x.index_select(1, self.order))


def map_of(
    parts: list[Part],
    bias: Tensor | None,
    pack: Callable[[Part, Tensor | None], Map | None],
    dense: Callable[[Tensor, Tensor | None], Map],
) -> Map:
    """The map of parts under one another. `pack`: a back end's, None for a Part that it does not take; `dense`: of a
    weight float32 [outputs, inputs]."""
    joined = join(parts)
    if joined is None:
        return Beside([map_of([part], None, pack, dense) for part in parts], bias)
    ordered = sorted_inputs(joined)
    if ordered is not None:
        part, order = ordered
        made = pack(part, bias)
        if made is not None:
            return made if order is None else Reordered(made, order)
    return dense(joined.dequantise(), bias)
