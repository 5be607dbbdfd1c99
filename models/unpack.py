"""Quantized weights of checkpoints in one form, a Part: whole numbers or float8, scales of groups, zero points.

Used by assembly.py. A format is a function from the tensors of a module to its Part; all are exact, and run where the
tensors are. Sources: AutoAWQ's gemm layout, AutoGPTQ and GPTQModel, IST-DASLab/marlin (Frantar et al. 2024),
compressed-tensors, DeepSeek-V3's 128 x 128 blocks.
Invariant: `Part.dequantise` is the definition of what a Part means; every back end equals it up to rounding.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantization import Packing, Scheme

AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which of a word's eight places AWQ keeps each of eight neighbouring outputs."""
FLOAT8: Final = torch.float8_e4m3fn


class Cut(Protocol):
    """What a tensor parallel rank has of a weight: [start, stop) of `whole` values of one of its axes."""

    @property
    def axis(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def whole(self) -> int: ...


@dataclass(slots=True)
class Part:
    """A quantized weight: w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g] with g the group of input i."""

    codes: Tensor
    """uint8 or float8_e4m3fn [outputs, inputs]"""
    scales: Tensor
    """[outputs, groups], floating"""
    zeros: Tensor | None
    """uint8 [outputs, groups]; None with float8."""
    group: int
    """Inputs of a group: input i is in group i // group, the last group may be smaller."""
    bits: int
    groups: Tensor | None = None
    """int64 [inputs]: the group of each input, where that is not i // group (act-order)."""
    input_scale: Tensor | None = None
    """float32 []: what inputs are divided by to become float8; None: it is found for each row."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantise(self) -> Tensor:
        """The weight, float32 [outputs, inputs]."""
        index = self.groups
        if index is None:
            index = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group
        values = self.codes.float()
        if self.zeros is not None:
            values = values - self.zeros.float().index_select(1, index)
        return values * self.scales.float().index_select(1, index)

    def rows(self, cut: Callable[[Tensor], Tensor]) -> "Part":
        """The Part of some outputs; `cut` takes their rows out of a tensor [outputs, ...]."""
        zeros = None if self.zeros is None else cut(self.zeros)
        return replace(self, codes=cut(self.codes), scales=cut(self.scales), zeros=zeros)

    def columns(self, start: int, end: int) -> "Part":
        """The Part of inputs `start` to `end`; where that cuts through a group, of smaller groups."""
        codes = self.codes[:, start:end]
        if self.groups is not None:
            return replace(self, codes=codes, groups=self.groups[start:end])
        if self.scales.shape[1] == 1:
            return replace(self, codes=codes, group=end - start)
        size = math.gcd(self.group, start)
        first, last = start // size, -(-end // size)

        def cut(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(self.group // size, 1)[:, first:last]

        zeros = None if self.zeros is None else cut(self.zeros)
        return replace(self, codes=codes, scales=cut(self.scales), zeros=zeros, group=size)

    def padded(self, outputs: int, inputs: int) -> "Part":
        """As many outputs, the last of them zeros, and inputs, whose last ones must be zeros."""
        rows, columns = outputs - self.codes.shape[0], inputs - self.codes.shape[1]
        if not rows and not columns:
            return self
        group = inputs if self.scales.shape[1] == 1 else self.group
        groups = 0 if self.groups is not None else -(-inputs // group) - self.scales.shape[1]

        def pad(tensor: Tensor, more: int) -> Tensor:
            return F.pad(tensor.view(torch.uint8) if tensor.dtype == FLOAT8 else tensor, (0, more, 0, rows))

        return replace(
            self,
            codes=pad(self.codes, columns).view(self.codes.dtype),
            scales=pad(self.scales, groups),
            zeros=None if self.zeros is None else pad(self.zeros, groups),
            groups=None if self.groups is None else F.pad(self.groups, (0, columns)),
            group=group,
        )

    def of_rank(self, cut: "Cut | None", outputs: int, inputs: int) -> "Part":
        """A tensor parallel rank's part, filled up to the size that it has room for; None: it has the whole."""
        if cut is None:
            return self
        start, stop = cut.start, cut.stop
        ours = self.rows(lambda tensor: tensor[start:stop]) if cut.axis == 0 else self.columns(start, stop)
        return ours.padded(outputs, inputs)

    def to(self, device: torch.device) -> "Part":
        """The same on a device."""
        zeros, groups, limit = (t if t is None else t.to(device) for t in (self.zeros, self.groups, self.input_scale))
        codes, scales = self.codes.to(device), self.scales.to(device)
        return replace(self, codes=codes, scales=scales, zeros=zeros, groups=groups, input_scale=limit)


def join(parts: list[Part]) -> Part | None:
    """One Part of several under one another; None if they are not of one kind.

    Of unequal input scales the largest serves all, as in vLLM.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(part.codes.dtype, part.bits, part.group, part.scales.shape[1]) for part in parts}
    if len(kinds) > 1 or not all(_same(part.groups, first.groups) for part in parts):
        return None
    dtypes = {part.scales.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    limits = [part.input_scale for part in parts if part.input_scale is not None]
    if limits and len(limits) < len(parts):
        return None
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales.to(dtype) for part in parts]),
        zeros=torch.cat([part.zeros for part in parts if part.zeros is not None]) if first.zeros is not None else None,
        input_scale=torch.stack(limits).max() if limits else None,
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def sorted_inputs(part: Part) -> tuple[Part, Tensor | None] | None:
    """(the Part with its inputs in the groups' order, that order int64 [inputs], None if it is so already).

    None where the groups are of unequal sizes, so that no order helps.
    """
    if part.groups is None:
        return part, None
    order = part.groups.argsort(stable=True)
    if not _in_order(part.groups[order], part.group):
        return None
    return replace(part, codes=part.codes[:, order], groups=None), order


# ------------------------------------------------------------------ words


def from_words(words: Tensor, bits: int) -> Tensor:
    """The fields of `bits` bits of int32 words [..., n], lowest first: uint8 [..., n * 32 / bits]."""
    if words.dtype != torch.int32:
        raise ValueError(f"int32 words were expected, not {words.dtype}")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    fields = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(-2)


def _in_order(index: Tensor, group: int) -> bool:
    """Whether input i is in group i // group for all."""
    return torch.equal(index, torch.arange(len(index), device=index.device) // group)


def _with_groups(
    part: Part, index: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.int32, torch.int64)
) -> Part:
    """Enter a checkpoint's g_idx, checked: whole numbers, one of the groups for each input."""
    inputs, count = part.codes.shape[1], part.scales.shape[1]
    if index is None or (index < 0).all():  # compressed-tensors fills it with -1 where nothing is ordered
        return part
    if index.dtype not in dtypes or tuple(index.shape) != (inputs,):
        raise ValueError(f"the inputs' groups are {index.dtype} {list(index.shape)}, not {inputs} numbers")
    index = index.long()
    if int(index.min()) < 0 or int(index.max()) >= count:
        raise ValueError(f"an input is in none of the {count} groups")
    return part if _in_order(index, part.group) else replace(part, groups=index)


# ------------------------------------------------------------------ formats


def _awq(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Part:
    def unpacked(words: Tensor) -> Tensor:
        fields = from_words(words, 4).view(*words.shape, 8)
        return fields[..., list(AWQ_PLACES)].flatten(-2).t()

    codes = unpacked(tensors["qweight"])
    zeros = unpacked(tensors["qzeros"]) if "qzeros" in tensors else None
    return _checked(scheme, codes, tensors["scales"].t(), zeros)


def _gptq(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Part:
    codes = from_words(tensors["qweight"].t(), scheme.bits)
    zeros = from_words(tensors["qzeros"], scheme.bits).t() if "qzeros" in tensors else None
    if zeros is not None and scheme.packing == "gptq":  # version 1 keeps zero - 1
        zeros = (zeros + 1) & ((1 << scheme.bits) - 1)
    return _with_groups(_checked(scheme, codes, tensors["scales"].t(), zeros), tensors.get("g_idx"))


def _marlin(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Part:
    words, scales = tensors["B"], tensors["s"]
    inputs, outputs = 16 * words.shape[0], words.shape[1] // 2
    if inputs % 16 or outputs % 64 or scales.numel() % 64:
        raise ValueError(f"{inputs} inputs and {outputs} outputs are no Marlin tiles")
    device = words.device
    # A tile of 16 x 64 values is kept as a warp's 32 threads want them for tensor cores, eight in a word.
    fields = from_words(words, 4).reshape(-1, 1024)
    tiles = torch.empty_like(fields)
    tiles[:, _marlin_order().to(device)] = fields
    codes = tiles.view(inputs // 16, outputs // 16, 16, 16).permute(1, 3, 0, 2).reshape(outputs, inputs)
    order = (_GROUPED_SCALES if scheme.group and scheme.group != inputs else _SINGLE_SCALES).to(device)
    rows = scales.reshape(-1, len(order))
    plain = torch.empty_like(rows)
    plain[:, order] = rows
    return _checked(scheme, codes, plain.view(-1, outputs).t(), None)


def _marlin_order() -> Tensor:
    """int64 [1024]: for each field of a word in order, its place in four tiles of 16 x 16 values."""
    thread, tile, place = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(8), indexing="ij")
    # A word's places alternate between the pairs that two multiplications need.
    step = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])[place]
    block, pair, odd = step // 4, step // 2 % 2, step % 2
    row = 2 * (thread % 4 + 4 * pair) + odd
    return (256 * tile + 16 * row + thread // 4 + 8 * block).flatten()


_GROUPED_SCALES: Final = torch.arange(64).view(8, 8).t().flatten()
_SINGLE_SCALES: Final = (torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])[None, :] + 2 * torch.arange(4)[:, None]).flatten()


def _packed(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Part:
    codes, middle = from_words(tensors["weight_packed"], scheme.bits), 1 << (scheme.bits - 1)
    if "weight_shape" in tensors:
        outputs, inputs = (int(size) for size in tensors["weight_shape"].tolist())
        if codes.shape[0] != outputs or not 0 < inputs <= codes.shape[1]:
            raise ValueError(f"weight_shape says [{outputs}, {inputs}], there are {list(codes.shape)} values")
        codes = codes[:, :inputs]
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:  # packed along the outputs, or plain
        zeros = from_words(zeros.t(), scheme.bits).t()[: len(codes)] if zeros.dtype == torch.int32 else zeros + middle
        zeros = zeros.to(torch.uint8)
    part = _checked(scheme, codes, tensors["weight_scale"], zeros)
    return _with_groups(part, tensors.get("weight_g_idx"))


def _int8(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Part:
    weight = tensors["weight"]
    if weight.dtype != torch.int8:
        raise ValueError(f"int8 was expected, not {weight.dtype}")
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = (zeros.to(torch.int16) + 128).to(torch.uint8)
        zeros = zeros.reshape(-1, 1).expand(len(codes), 1) if zeros.numel() in (1, len(codes)) else zeros
    return _checked(scheme, codes, tensors["weight_scale"], zeros)


def _fp8(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Part:
    weight = tensors["weight"]
    if weight.dtype != FLOAT8:
        raise ValueError(f"float8_e4m3fn was expected, not {weight.dtype}")
    scales = tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"]
    if scheme.block:
        scales = scales.repeat_interleave(scheme.block, 0)[: len(weight)]
    part = _checked(scheme, weight, scales.float(), None)
    if scheme.inputs == "static":
        if "input_scale" not in tensors:
            raise ValueError("its input_scale is missing")
        part.input_scale = tensors["input_scale"].float().max()
    return part


def _checked(scheme: Scheme, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Part:
    """A Part of whole groups. Raises ValueError if sizes do not belong together."""
    outputs, inputs = codes.shape
    group = min(scheme.group or inputs, inputs)
    count = -(-inputs // group)
    if not scales.is_floating_point():
        raise ValueError(f"its scales are {scales.dtype}")
    if scales.numel() == 1 or (count == 1 and scales.numel() == outputs):  # of the tensor, or of each output
        scales = scales.reshape(-1, 1).expand(outputs, 1)
    if zeros is None and codes.dtype == torch.uint8:
        zeros = torch.full((1, 1), 1 << (scheme.bits - 1), dtype=torch.uint8, device=codes.device)
        zeros = zeros.expand(outputs, count)
    for name, tensor in (("scales", scales), ("zero points", zeros)):
        if tensor is not None and tuple(tensor.shape) != (outputs, count):
            raise ValueError(f"its {name} are {list(tensor.shape)}, [{outputs}, {count}] are needed")
    return Part(codes, scales, zeros, group, scheme.bits)


@dataclass(frozen=True, slots=True)
class Format:
    """The tensors of a module in a packing, and what makes a Part of them."""

    read: Callable[[Scheme, Mapping[str, Tensor]], Part]
    needed: tuple[str, ...]
    """One of each name's alternatives (by `|`) must be there."""
    optional: tuple[str, ...] = ()
    """Those that are read if they are there."""
    ignored: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """All tensors that are the format's."""
        needed = {name for alternatives in self.needed for name in alternatives.split("|")}
        return needed | set(self.optional) | set(self.ignored)


_STATIC: Final = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "weight_g_idx")
FORMATS: Final[dict[Packing, Format]] = {
    "awq": Format(_awq, ("qweight", "scales"), ("qzeros",)),
    "gptq": Format(_gptq, ("qweight", "scales"), ("qzeros", "g_idx")),
    "gptq_v2": Format(_gptq, ("qweight", "scales"), ("qzeros", "g_idx")),
    "marlin": Format(_marlin, ("B", "s"), (), ("workspace",)),
    "packed": Format(_packed, ("weight_packed", "weight_scale"), ("weight_zero_point", "weight_g_idx", "weight_shape")),
    "int8": Format(_int8, ("weight", "weight_scale"), ("weight_zero_point",), _STATIC),
    "fp8": Format(_fp8, ("weight", "weight_scale|weight_scale_inv"), ("input_scale",), _STATIC[1:]),
}


def unpack(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Part:
    """The Part of a module's tensors, by the last part of their names.

    Raises ValueError for a tensor that is missing, or does not fit the others.
    """
    form = FORMATS[scheme.packing]
    for alternatives in form.needed:
        if not any(name in tensors for name in alternatives.split("|")):
            raise ValueError(f"its {alternatives.replace('|', ' or ')} is missing")
    zeros_needed = not scheme.symmetric and not scheme.is_float
    if zeros_needed and not {"qzeros", "weight_zero_point"} & tensors.keys():
        raise ValueError("its zero points are missing")
    return form.read(scheme, tensors)


# ------------------------------------------------------------------ quantizing


def quantise(scheme: Scheme, weight: Tensor) -> Part:
    """A dense weight [outputs, inputs] as a Part of schemes "fp8" and "int8" with a scale for each output."""
    weight = weight.float()
    largest = weight.abs().amax(1, keepdim=True).clamp(min=1e-12)
    if scheme.is_float:
        scales = largest / torch.finfo(FLOAT8).max
        return Part((weight / scales).to(FLOAT8), scales, None, weight.shape[1], 8)
    # Scales of 16 bits, so that no back end must round them; rounded up, so that the largest code is 127 at most.
    scales = (largest / 127 * (1 + 2**-10)).clamp(min=2**-14).half()
    codes = (weight / scales.float()).round().clamp(-127, 127).to(torch.int16) + 128
    zeros = torch.full((1, 1), 128, dtype=torch.uint8, device=weight.device).expand(len(weight), 1)
    return Part(codes.to(torch.uint8), scales, zeros, weight.shape[1], 8)


def random_part(scheme: Scheme, outputs: int, inputs: int, std: float, generator: torch.Generator) -> Part:
    """A Part of random values with about this deviation: speed does not depend on what they are."""
    device = generator.device
    if scheme.is_float or not scheme.group:
        dense = torch.randn(outputs, inputs, generator=generator, device=device) * std
        part = quantise(Scheme("fp8" if scheme.is_float else "int8", 8), dense)
        if scheme.is_float and scheme.group:
            part = replace(part, scales=part.scales.expand(-1, -(-inputs // scheme.group)), group=scheme.group)
        if scheme.is_float or scheme.bits == 8:
            return part
    group = min(scheme.group or inputs, inputs)
    levels = 1 << scheme.bits
    codes = torch.randint(0, levels, (outputs, inputs), generator=generator, device=device, dtype=torch.uint8)
    shape = (outputs, -(-inputs // group))
    scales = torch.full(shape, std * 12**0.5 / levels, dtype=torch.float16, device=device)
    zeros = torch.full(shape, levels // 2, dtype=torch.uint8, device=device)
    if not scheme.symmetric:
        zeros = zeros + torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.uint8)
    return Part(codes, scales, zeros, group, scheme.bits)
