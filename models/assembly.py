"""Quantized modules of a checkpoint on their way into a model: their tensors are gathered, unpacked and joined.

Used by weights.py (`Collector`: tensors to Parts) and places.py (`Keeper`: which linear maps stay quantized). Where a
map's checkpoint tensors are several modules (queries, keys, values), an `Assembly` stands in its layer until all of
them are there, and has the back end pack them at once: at most a few modules are unpacked at a time.
Invariant: a module's Part is made when its last tensor has come, and every one is used exactly once.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from ..errors import StartupError
from .layers import LinearMap
from .names import Names, cut_rows, layer_of, rewritten, weights_of
from .quantization import Quantization, Scheme
from .spec import Spec
from .unpack import FORMATS, Cut, Part, quantise, random_part, unpack

Make = Callable[[list[Part], Tensor | None], LinearMap]
"""A back end's: one linear map of Parts under one another, and a bias."""
MARKS: Final = {"weight": ("F8_E4M3", "I8"), "qweight": ("I32",), "weight_packed": ("I32",), "B": ("I32",)}
"""The tensors that show that a module is quantized, and their dtypes in safetensors' words."""
FEWEST_OUTPUTS: Final = 32
"""Maps with fewer stay as they are if nobody has quantized them yet."""


class Collector:
    """Gathers the tensors of quantized modules and yields each module's weight as a Part."""

    def __init__(self, quantization: Quantization, dtypes: Mapping[str, str], device: torch.device) -> None:
        """dtypes: of all the checkpoint's tensors, by name, as safetensors calls them."""
        self.device = device
        self.schemes: dict[str, Scheme] = {}
        for name, dtype in dtypes.items():
            module, _, mark = name.rpartition(".")
            scheme = quantization.scheme(module) if dtype in MARKS.get(mark, ()) else None
            if scheme is not None and mark in FORMATS[scheme.packing].names:
                self.schemes[module] = scheme
        self.awaited: dict[str, set[str]] = {module: set() for module in self.schemes}
        for name in dtypes:
            if self.takes(name):
                module, _, tensor = name.rpartition(".")
                self.awaited[module].add(tensor)
        self.found: dict[str, dict[str, Tensor]] = {}

    def takes(self, name: str) -> bool:
        """Whether a tensor is part of a quantized module's weight."""
        module, _, tensor = name.rpartition(".")
        return module in self.schemes and tensor in FORMATS[self.schemes[module].packing].names

    def add(self, name: str, tensor: Tensor) -> tuple[str, Part] | None:
        """Take one more tensor; returns the name of its module's weight and its Part if it was the last.

        Raises StartupError where tensors do not fit together.
        """
        module, _, kind = name.rpartition(".")
        found = self.found.setdefault(module, {})
        if kind in found:
            raise StartupError(f"tensor {name} is in two files of the checkpoint")
        found[kind] = tensor
        if found.keys() != self.awaited[module]:
            return None
        moved = {kind: tensor.to(self.device) for kind, tensor in found.items()}
        self.found[module] = dict.fromkeys(found, tensor[:0] if tensor.ndim else tensor)  # of the names only
        try:
            return f"{module}.weight", unpack(self.schemes[module], moved)
        except (ValueError, RuntimeError, IndexError) as error:
            raise StartupError(f"quantized module {module} cannot be read: {error}") from None

    def weights(self, names: Names) -> set[str]:
        """Our names of all weights that come as Parts. Raises StartupError for one that cannot be cut."""
        try:
            return {ours for module in self.schemes for ours in weights_of(names, f"{module}.weight")}
        except ValueError as error:
            raise StartupError(f"this family's checkpoints are not served quantized: {error}") from None


def part_pieces(names: Names, spec: Spec, name: str, part: Part) -> Iterator[tuple[str, Part]]:
    """Yield (our name, Part) of each weight in a checkpoint's weight."""
    ours = weights_of(names, name)
    if len(ours) == 1:
        yield rewritten(names, name), part
        return
    for index, own in enumerate(ours):
        yield own, part.rows(lambda tensor, index=index: cut_rows(names, spec, name, tensor)[index])  # type: ignore[misc]


@dataclass(slots=True)
class Assembly:
    """A linear map that waits for its parts; weights.pack puts what was `made` of them in its place."""

    shapes: dict[str, tuple[int, int]]
    """Our name of each weight -> [outputs, inputs], as this rank has it."""
    bias: Tensor | None
    make: Make
    device: torch.device
    online: Scheme | None = None
    """What dense weights become on their way."""
    cuts: Mapping[str, Cut | None] = field(default_factory=dict)
    """What this rank has of the weights; those that it has whole need not be there."""
    parts: dict[str, Part] = field(default_factory=dict)
    made: LinearMap | None = None

    def take(self, name: str, weight: Part | Tensor) -> None:
        """Take a checkpoint's weight; with the last the map is made. Raises StartupError if it has another shape."""
        shape, cut = self.shapes[name], self.cuts.get(name)
        whole = list(shape)
        if cut is not None:
            whole[cut.axis] = cut.whole
        if list(weight.shape) != whole:
            raise StartupError(f"tensor {name} is {list(weight.shape)}, config.json asks for {whole}")
        if not isinstance(weight, Part):
            assert self.online is not None
            weight = quantise(self.online, weight)
        self.parts[name] = weight.of_rank(cut, *shape)
        if len(self.parts) == len(self.shapes):
            self.made = self.make([self.parts.pop(own) for own in self.shapes], self.bias)

    def fill(self, scheme: Scheme, std: float, generator: torch.Generator) -> None:
        """Take random weights."""
        parts = [random_part(scheme, *shape, std, generator) for shape in self.shapes.values()]
        self.made = self.make(parts, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        assert self.made is not None
        return self.made(x)


@dataclass(slots=True)
class Keeper:
    """Which linear maps stay, or become, quantized, and the back end that multiplies with them."""

    make: Make
    device: torch.device
    names: Collection[str] | None
    """Our names of the weights that come quantized; None: all linear maps of the layers become so."""
    online: Scheme | None = None
    assemblies: dict[str, Assembly] = field(default_factory=dict)
    """By the name of each weight."""

    def map(
        self,
        shapes: dict[str, tuple[int, int]],
        bias: Tensor | None,
        cuts: Mapping[str, Cut | None] | None = None,
    ) -> Assembly | None:
        """The map of these weights, of which this rank has `cuts`; None: it is dense, or has parts that are."""
        if self.names is None:
            few = min(outputs for outputs, _ in shapes.values()) < FEWEST_OUTPUTS
            if few or any(layer_of(name) is None for name in shapes):
                return None
        elif not all(name in self.names for name in shapes):
            return None
        assembly = Assembly(shapes, bias, self.make, self.device, self.online, cuts or {})
        self.assemblies.update(dict.fromkeys(shapes, assembly))
        return assembly
