"""Straightforward packers of every quantized format, value by value from their definitions: the tests' references.

A `Plain` is a weight's whole numbers, scales and zero points as a quantizer finds them; a packer makes of it the
tensors of a checkpoint's module and of its config.json the quantization_config.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Plain:
    """w[o, i] = (q[o, i] - z[o, g]) * s[o, g], g = groups[i]."""

    q: Tensor
    s: Tensor
    z: Tensor
    groups: Tensor
    bits: int

    def dense(self) -> Tensor:
        """float32 [outputs, inputs]"""
        out = torch.empty(self.q.shape)
        for i in range(self.q.shape[1]):
            g = int(self.groups[i])
            out[:, i] = (self.q[:, i].float() - self.z[:, g].float()) * self.s[:, g].float()
        return out


def quantised(weight: Tensor, bits: int, group: int, symmetric: bool, order: Tensor | None = None) -> Plain:
    """Round to nearest, scales in float16; `order`: the inputs in the order in which they are grouped."""
    outputs, inputs = weight.shape
    size = group if group > 0 else inputs
    top = 2**bits - 1
    groups = torch.empty(inputs, dtype=torch.int64)
    groups[order if order is not None else torch.arange(inputs)] = torch.arange(inputs) // size
    count = int(groups.max()) + 1
    s, z = torch.empty(outputs, count), torch.empty(outputs, count, dtype=torch.int64)
    q = torch.empty(outputs, inputs, dtype=torch.int64)
    for g in range(count):
        part = weight[:, groups == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            s[:, g], z[:, g] = (2 * high / top).half().float().clamp(min=1e-6), 2 ** (bits - 1)
        else:
            s[:, g] = ((high - low) / top).half().float().clamp(min=1e-6)
            z[:, g] = (-low / s[:, g]).round().clamp(1, top).long()
        q[:, groups == g] = ((part / s[:, g, None]).round().long() + z[:, g, None]).clamp(0, top)
    return Plain(q, s.half(), z, groups, bits)


def words(values: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """int32 [..., n * bits / 32] of values [..., n]: value i of a word at bits i * bits, or at places[i] * bits."""
    each = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % each)).unflatten(-1, (-1, each))
    out = torch.zeros(values.shape[:-1], dtype=torch.int64)
    for i in range(each):
        out |= values[..., i].long() << (bits * (places[i] if places else i))
    return torch.where(out >= 2**31, out - 2**32, out).int().contiguous()


def awq(plain: Plain) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: place p of a word holds output order[p]
    places = tuple(order.index(i) for i in range(8))
    return {
        "qweight": words(plain.q.t(), 4, places),
        "qzeros": words(plain.z.t(), 4, places),
        "scales": plain.s.t().contiguous(),
    }


def gptq(plain: Plain, version: int = 1) -> dict[str, Tensor]:
    stored = (plain.z - 1 if version == 1 else plain.z) % 2**plain.bits
    return {
        "qweight": words(plain.q, plain.bits).t().contiguous(),
        "qzeros": words(stored.t(), plain.bits),
        "scales": plain.s.t().contiguous(),
        "g_idx": plain.groups.int(),
    }


def marlin(plain: Plain) -> dict[str, Tensor]:
    """As the Marlin kernel's threads read it: 16 x 64 values in a tile, 32 threads with four words each."""
    q, (outputs, inputs) = plain.q.t(), plain.q.shape
    packed = torch.zeros(inputs // 16, outputs // 64, 32, 4, dtype=torch.int64)
    for thread in range(32):
        column = thread // 4
        rows = [2 * (thread % 4) + i for i in (0, 1, 8, 9)]
        for tile in range(4):
            values = [(row, 16 * tile + column + 8 * half) for half in (0, 1) for row in rows]
            for place, (row, col) in enumerate(values[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, :, thread, tile] |= q[row::16, col::64] << (4 * place)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    scales = plain.s.t()
    if len(scales) > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    moved = scales.reshape(-1, len(order))[:, order].reshape(scales.shape)
    return {"B": packed.int().reshape(inputs // 16, outputs * 2), "s": moved.contiguous()}


def packed(plain: Plain, symmetric: bool = True) -> dict[str, Tensor]:
    found = {
        "weight_packed": words(plain.q, plain.bits),
        "weight_scale": plain.s.clone(),
        "weight_shape": torch.tensor(plain.q.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = words(plain.z.t(), plain.bits).t().contiguous()
    if not torch.equal(plain.groups, plain.groups.sort().values):
        found["weight_g_idx"] = plain.groups.int()
    return found


def int8(plain: Plain) -> dict[str, Tensor]:
    return {"weight": (plain.q - 128).to(torch.int8), "weight_scale": plain.s.clone()}


F8 = torch.float8_e4m3fn


def fp8(weight: Tensor, kind: str, static: float | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, dense) with scales of the `tensor`, each `channel`, or `block`s of 128 x 128."""
    outputs, inputs = weight.shape
    if kind == "block":
        grid = torch.zeros(-(-outputs // 128), -(-inputs // 128))
        full = torch.empty_like(weight)
        for r in range(grid.shape[0]):
            for c in range(grid.shape[1]):
                at = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
                grid[r, c] = weight[at].abs().max() / 448
                full[at] = grid[r, c]
        codes = (weight / full).to(F8)
        return {"weight": codes, "weight_scale_inv": grid}, codes.float() * full
    scale = weight.abs().amax(1, keepdim=True) / 448 if kind == "channel" else weight.abs().max() / 448
    codes = (weight / scale).to(F8)
    found = {"weight": codes, "weight_scale": scale}
    if static is not None:
        found["input_scale"] = torch.tensor(static)
    return found, codes.float() * scale


# ------------------------------------------------------------------ whole formats

Packer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A dense weight -> (the tensors of its module, what they mean)."""


@dataclass
class Case:
    """A quantized checkpoint's config, and how its modules are packed."""

    config: dict[str, Any]
    pack: Packer


def _int_case(config: dict[str, Any], pack: Callable[[Plain], dict[str, Tensor]], **options: Any) -> Case:
    ordered = options.pop("ordered", False)

    def packer(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        own = options | ({"order": torch.randperm(weight.shape[1])} if ordered else {})
        plain = quantised(weight, **own)
        return pack(plain), plain.dense()

    return Case(config, packer)


def _groups(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    groups = {"group_0": group}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def _int(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | more


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC = {"num_bits": 8, "dynamic": True, "strategy": "token"}
CASES: dict[str, Case] = {
    "awq": _int_case(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        awq, bits=4, group=32, symmetric=False,
    ),
    "gptq": _int_case(GPTQ, gptq, bits=4, group=32, symmetric=True),
    "gptq-asym": _int_case(GPTQ | {"sym": False}, gptq, bits=4, group=32, symmetric=False),
    "gptq-v2": _int_case(
        GPTQ | {"checkpoint_format": "gptq_v2"}, lambda p: gptq(p, 2), bits=4, group=32, symmetric=False
    ),
    "gptq-row": _int_case(GPTQ | {"group_size": -1}, gptq, bits=4, group=-1, symmetric=True),
    "gptq-act-order": _int_case(
        GPTQ | {"desc_act": True, "sym": False}, gptq, bits=4, group=32, symmetric=False, ordered=True
    ),
    "gptq-8": _int_case(GPTQ | {"bits": 8}, gptq, bits=8, group=32, symmetric=True),
    "gptq-8-asym": _int_case(GPTQ | {"bits": 8, "sym": False}, gptq, bits=8, group=32, symmetric=False),
    "marlin": _int_case(
        GPTQ | {"group_size": 128, "checkpoint_format": "marlin"}, marlin, bits=4, group=128, symmetric=True
    ),
    "packed-4": _int_case(_groups("pack-quantized", _int(4)), packed, bits=4, group=32, symmetric=True),
    "packed-4-asym": _int_case(
        _groups("pack-quantized", _int(4, symmetric=False)), lambda p: packed(p, False),
        bits=4, group=32, symmetric=False,
    ),
    "packed-4-act-order": _int_case(
        _groups("pack-quantized", _int(4, actorder="group")), packed, bits=4, group=32, symmetric=True, ordered=True
    ),
    "packed-8": _int_case(
        _groups("pack-quantized", _int(8, strategy="channel")), packed, bits=8, group=-1, symmetric=True
    ),
    "w8a8": _int_case(
        _groups("int-quantized", _int(8, strategy="channel"), DYNAMIC), int8, bits=8, group=-1, symmetric=True
    ),
    "w8a16": _int_case(_groups("int-quantized", _int(8, strategy="channel")), int8, bits=8, group=-1, symmetric=True),
    "fp8": Case({"quant_method": "fp8", "activation_scheme": "dynamic"}, lambda w: fp8(w, "tensor")),
    "fp8-static": Case({"quant_method": "fp8", "activation_scheme": "static"}, lambda w: fp8(w, "tensor", 0.05)),
    "fp8-block": Case(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"},
        lambda w: fp8(w, "block"),
    ),
    "fp8-channel": Case(
        _groups("float-quantized", FLOAT | {"strategy": "channel"}, DYNAMIC | {"type": "float"}),
        lambda w: fp8(w, "channel"),
    ),
}  # fmt: skip


def shared_order(case: Case) -> Case:
    """The same, with an act-order that all weights of as many inputs share, as those of one layer do."""
    return replace(case, pack=lambda weight: _seeded(case.pack, weight))


def _seeded(pack: Packer, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(weight.shape[1])
    return pack(weight)
