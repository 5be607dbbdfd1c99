"""The memory that kernels in gluon_emulator.py see: tensors behind pointers and descriptors, shared buffers, barriers.

What is read before it is written is NaN, and what is outside of a tensor cannot be reached. A tensor that the kernel's
predecessor writes has two contents: the final one, and a stale one for those who do not wait, NaN where it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class Fault(AssertionError):
    """A kernel does what on a GPU goes wrong, or may."""


def check(right: Any, message: str) -> None:
    """Raise Fault unless `right`."""
    if not right:
        raise Fault(message)


class Memory:
    """A kernel's tensor, as it lies there; `fresh`: bool, where its predecessor writes it."""

    def __init__(self, name: str, tensor: Tensor, fresh: Tensor | None) -> None:
        self.name, self.like = name, tensor
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.final = tensor.as_strided((extent,), (1,))
        self.inside = torch.zeros(extent, dtype=torch.bool)
        self.shaped(self.inside).fill_(True)
        self.written = torch.zeros(extent, dtype=torch.bool)
        self.stale = self.final
        if fresh is not None:
            self.stale = self.final.clone()
            self.shaped(self.stale).masked_fill_(fresh.expand(tensor.shape), float("nan"))

    def shaped(self, flat: Tensor) -> Tensor:
        """What has an element for each place, as the tensor has them."""
        return flat.as_strided(self.like.shape, self.like.stride())

    def seen(self, waited: bool) -> Tensor:
        """Its content for who has waited for the predecessor, or has not: flat."""
        return self.final if waited else self.stale


@dataclass(frozen=True)
class Pointer:
    """Addresses in a tensor: a number of elements from its first, or a tensor of them."""

    memory: Memory
    offsets: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.like.dtype)

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.offsets + more)

    def places(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(int64 offsets, bool: which of them count); of the others the offset is 0."""
        offsets = torch.as_tensor(self.offsets).long()
        live = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.expand(offsets.shape)
        offsets = torch.where(live, offsets, 0)
        inside = self.memory.inside
        check(((offsets >= 0) & (offsets < len(inside))).all(), f"access beyond {self.memory.name}")
        check((inside[offsets] | ~live).all(), f"access between the rows of {self.memory.name}")
        return offsets, live


class Blocks:
    """A tensor that is loaded in blocks: a TensorDescriptor in a kernel."""

    def __init__(self, name: str, descriptor: TensorDescriptor, fresh: Tensor | None) -> None:
        self.memory = Memory(name, descriptor.base, fresh)
        self.block_shape, self.layout = descriptor.block_shape, descriptor.layout
        self.dtype = descriptor.base.dtype

    def block(self, first: Sequence[Any], waited: bool) -> Tensor:
        """The block that begins there, with zeros for what is outside."""
        tensor = self.memory.shaped(self.memory.seen(waited))
        source, target = [], []
        for begin, length, size in zip(map(int, first), self.block_shape, tensor.shape, strict=True):
            low, high = max(begin, 0), max(0, min(begin + length, size))
            source.append(slice(low, high))
            target.append(slice(low - begin, max(high, low) - begin))
        values = torch.zeros(self.block_shape, dtype=self.dtype)
        values[tuple(target)] = tensor[tuple(source)]
        return values


def swizzle_of(layout: Any) -> int:
    """Bytes within which a layout has pieces of a row in another order; 0: rows lie as they are, one after another."""
    plain = isinstance(layout, gl.SwizzledSharedLayout | gl.SharedLinearLayout)
    return 0 if plain else layout.swizzle_byte_width


@lru_cache
def places(shape: tuple[int, ...], layout: Any, itemsize: int) -> Tensor:
    """int64 `shape`: where each element lies, counted in elements.

    With a swizzle lines of as many bytes lie one after another, those of the next columns behind all of these, and a
    line's pieces of 16 bytes are exchanged by the number of its 128 bytes (CUDA's tensor maps).
    """
    count = prod(shape)
    if isinstance(layout, gl.SharedLinearLayout):
        check(2 ** len(layout.offset_bases) == count, f"{shape} is not what the layout is of")
        offsets = torch.arange(count)
        index = torch.zeros(len(shape), count, dtype=torch.int64)
        for bit, basis in enumerate(layout.offset_bases):
            index ^= (offsets >> bit & 1) * torch.tensor(basis)[:, None]
        found = torch.empty(shape, dtype=torch.int64)
        found[tuple(index)] = offsets
        return found
    width = swizzle_of(layout)
    if not width:
        return torch.arange(count).view(shape)
    check(len(shape) == layout.rank, f"{shape} is not one block of the layout's")
    wide, piece, rows = width // itemsize, 16 // itemsize, count // shape[-1]
    check(shape[-1] % wide == 0, "a swizzle begins in between")
    row, column = torch.arange(rows)[:, None], torch.arange(shape[-1])[None, :]
    exchanged = (column % wide // piece) ^ (row * width // 128 % (width // 16))
    return (column // wide * (rows * wide) + row * wide + exchanged * piece + column % piece).view(shape)


@dataclass(frozen=True)
class Shared:
    """A part of a program's buffer in shared memory. `owner` is told who reads and writes it."""

    owner: Any
    memory: Tensor
    """[elements] of the whole buffer."""
    start: int
    shape: tuple[int, ...]
    layout: Any
    order: tuple[int, ...] | None = None
    part: tuple[int, int, int] | None = None
    """Dimension, first and length of what of it is meant."""

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        """Whether it is neither turned nor a slice."""
        return self.order is None and self.part is None

    def index(self, i: Any) -> "Shared":
        """The i-th of its parts along the first dimension."""
        check(0 <= i < self.shape[0] and self.whole, f"no buffer {i} of {self.shape[0]}")
        rest = self.shape[1:]
        return Shared(self.owner, self.memory, self.start + int(i) * prod(rest), rest, self.layout)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return replace(self, order=order)

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> "Shared":
        check(dtype == self.dtype and prod(shape) == prod(self.shape) and self.whole, "another size")
        same = isinstance(layout, gl.SharedLinearLayout) or swizzle_of(layout) == swizzle_of(self.layout)
        check(same, "another swizzle")
        return replace(self, shape=tuple(shape), layout=layout)

    _reinterpret = reinterpret  # its name in Triton 3.6

    def overlaps(self, other: object) -> bool:
        if not isinstance(other, Shared) or other.memory is not self.memory:
            return False
        return self.start < other.start + prod(other.shape) and other.start < self.start + prod(self.shape)

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        check(self.whole and start + length <= self.shape[dim], "no such slice")
        return replace(self, part=(dim, start, length))

    def _places(self) -> Tensor:
        lines = max(1, 8 * swizzle_of(self.layout))
        check(self.start * self.dtype.itemsize % lines == 0, "a swizzle begins in between")
        return places(self.shape, self.layout, self.dtype.itemsize) + self.start

    def values(self) -> Tensor:
        """A copy."""
        values = self.memory[self._places()]
        if self.part is not None:
            values = values.narrow(*self.part)
        return values if self.order is None else values.permute(self.order)

    def fill(self, values: Tensor) -> None:
        check(tuple(values.shape) == self.shape and self.whole, f"{list(values.shape)} into {self.shape}")
        self.memory[self._places()] = values

    def load(self, layout: Any) -> Tensor:
        self.owner.reads(self)
        return self.values()

    def store(self, values: Tensor) -> None:
        check(values.dtype == self.dtype, f"{values.dtype} into {self.dtype}")
        self.owner.stores(self)
        self.fill(values)


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase is complete when so many have arrived, and all bytes that they expect."""

    count: int = 0
    """0: it is not initialised."""
    missing: int = 0
    """Arrivals."""
    nbytes: int = 0
    """Expected, and not there yet."""
    completed: int = 0
    """Phases."""


@dataclass
class Barriers:
    """Barriers [n, 1]."""

    all: list[Barrier] = field(default_factory=list)

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]
