"""How a checkpoint is quantized: `quantization_config` of config.json, read into rules.

Used by weights.py (which tensors belong together), assembly.py and the ledger. Pure data, no torch. The methods are
those of AutoAWQ, AutoGPTQ and GPTQModel, Marlin, Hugging Face's and vLLM's `fp8`, and compressed-tensors.
Invariant: what nothing here implements is refused by name; a module that no rule takes is not quantized.
"""

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..errors import StartupError

Packing = Literal["awq", "gptq", "gptq_v2", "marlin", "packed", "int8", "fp8"]
"""Which tensors a quantized module has, and how they hold its values (unpack.py)."""
Inputs = Literal["none", "dynamic", "static"]
"""Whether a module's inputs are quantized too, with scales of the moment or of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one module's weight is stored."""

    packing: Packing
    bits: int
    group: int = 0
    """Inputs that share a scale; 0: all."""
    block: int = 0
    """Outputs that share a scale with a group of inputs; 0: each has its own, or all have one."""
    symmetric: bool = True
    """No zero points but the middle of the range."""
    inputs: Inputs = "none"

    @property
    def is_float(self) -> bool:
        return self.packing == "fp8"

    def bytes_of(self, weights: int, outputs: int) -> float:
        """GPU memory of maps of so many weights: codes, and 4 bytes for each group's scale and zero point."""
        groups = weights // self.group if self.group else outputs
        return weights * self.bits / 8 + 4 * groups


@dataclass(frozen=True, slots=True)
class Matcher:
    """What names modules in a config: `re:` and a regular expression, a class of modules, or a part of a path."""

    text: str

    def takes(self, module: str) -> bool:
        """Whether it means the module of this path."""
        if self.text == "Linear":
            return True
        if self.text.startswith("re:"):
            return re.match(self.text[3:], module) is not None
        return f".{self.text}." in f".{module}."


@dataclass(frozen=True, slots=True)
class Quantization:
    """The rules of a checkpoint, asked in order."""

    method: str
    rules: tuple[tuple[Matcher, Scheme | None], ...]
    """The first that takes a module says how it is stored; None: as it is."""

    def scheme(self, module: str) -> Scheme | None:
        """How the module of this path, in the checkpoint's own names, is stored; None: not quantized."""
        for matcher, scheme in self.rules:
            if matcher.takes(module):
                return scheme
        return None

    @property
    def usual(self) -> Scheme | None:
        """The scheme of most modules."""
        return next((scheme for matcher, scheme in reversed(self.rules) if scheme is not None), None)


ONLINE: Final[dict[str, Scheme]] = {
    "fp8": Scheme("fp8", 8, inputs="dynamic"),
    "int8": Scheme("int8", 8),
}
"""What --quantization makes of a dense checkpoint, by its value."""
KEPT: Final = ("lm_head", "embed_tokens", "embed_out", "output_layer")
"""Modules that a method leaves as they are unless its config says otherwise."""


def quantization_of(facts: dict[str, Any]) -> Quantization | None:
    """The rules of a config.json, None for a checkpoint that is not quantized. Raises StartupError."""
    config = facts.get("quantization_config") or facts.get("compression_config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise StartupError("quantization_config is not a JSON object")
    method = config.get("quant_method")
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise StartupError(f"quantization method {method!r} is not served; served: {', '.join(sorted(READERS))}")
    try:
        rules = tuple(reader(config))
        for matcher, _ in rules:
            matcher.takes("")  # a broken regular expression shows here
    except StartupError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, re.error, RecursionError) as error:
        raise StartupError(f"quantization_config of method {method!r} makes no sense: {error!r}") from None
    return Quantization(str(method), rules)


Rules = list[tuple[Matcher, Scheme | None]]


def _skipped(*names: Any) -> Rules:
    """Rules that leave modules as they are, of lists of names."""
    found = [name for listed in names for name in (listed or ())]
    if not all(isinstance(name, str) and name for name in found):
        raise ValueError("a module to leave as it is has no name")
    return [(Matcher(name), None) for name in found]


def _must(condition: bool, said: str) -> None:
    if not condition:
        raise StartupError(f"quantized checkpoint: {said}")


def _group(size: Any) -> int:
    """Inputs of a group; 0 for -1 or nothing, which mean all."""
    size = -1 if size is None else size
    _must(isinstance(size, int) and (size == -1 or size >= 1), f"group size {size!r} is not served")
    return 0 if size == -1 else int(size)


# ------------------------------------------------------------------ methods


def _awq(config: dict[str, Any]) -> Rules:
    bits = config.get("bits", config.get("w_bit"))
    version = str(config.get("version", "gemm")).lower()
    _must(bits == 4, f"AWQ of {bits!r} bits is not served, 4 are")
    _must(version == "gemm", f"AWQ's layout {version!r} is not served, gemm is")
    group = _group(config.get("group_size", config.get("q_group_size", 128)))
    scheme = Scheme("awq", 4, group, symmetric=not config.get("zero_point", True))
    return [*_skipped(config.get("modules_to_not_convert"), KEPT), (Matcher("Linear"), scheme)]


def _gptq(config: dict[str, Any]) -> Rules:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        layout = "marlin"
    _must(layout in ("gptq", "gptq_v2", "marlin"), f"GPTQ's layout {layout!r} is not served")
    if layout == "marlin":
        return _marlin(config)

    def scheme(changed: dict[str, Any]) -> Scheme:
        own = config | changed
        bits = own["bits"]
        _must(bits in (4, 8), f"GPTQ of {bits!r} bits is not served, 4 and 8 are")
        packing: Packing = "gptq" if layout == "gptq" else "gptq_v2"
        return Scheme(packing, bits, _group(own.get("group_size")), symmetric=bool(own.get("sym", True)))

    rules = _skipped(config.get("modules_in_block_to_not_quantize"), config.get("modules_to_not_convert"))
    for pattern, changed in (config.get("dynamic") or {}).items():  # GPTQModel's rules for single modules
        sign, plain = pattern[:2], pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
        rules.append((Matcher(f"re:{plain}"), None if sign == "-:" else scheme(changed or {})))
    kept = [name for name in KEPT if name != "lm_head" or not config.get("lm_head")]
    return [*rules, *_skipped(kept), (Matcher("Linear"), scheme({}))]


def _marlin(config: dict[str, Any]) -> Rules:
    bits = config.get("bits", 4)
    _must(bits == 4, f"Marlin of {bits!r} bits is not served, 4 are")
    _must(not config.get("desc_act"), "Marlin with act-order is not served")
    return [*_skipped(KEPT), (Matcher("Linear"), Scheme("marlin", 4, _group(config.get("group_size"))))]


def _fp8(config: dict[str, Any]) -> Rules:
    form = str(config.get("fmt", "e4m3")).lower()
    _must(form in ("e4m3", "e4m3fn", "float8_e4m3fn"), f"FP8 of format {form!r} is not served, e4m3 is")
    activations = config.get("activation_scheme", "dynamic")
    _must(activations in ("dynamic", "static"), f"FP8 with activation_scheme {activations!r} is not served")
    block = config.get("weight_block_size")
    _must(block in (None, [128, 128]), f"FP8 with weight_block_size {block!r} is not served, [128, 128] is")
    _must(not block or activations == "dynamic", "FP8 of blocks with static activation scales is not served")
    size = 128 if block else 0
    skipped = _skipped(config.get("ignored_layers"), config.get("modules_to_not_convert"), KEPT)
    return [*skipped, (Matcher("Linear"), Scheme("fp8", 8, size, size, inputs=activations))]


def _compressed(config: dict[str, Any]) -> Rules:
    ignored = _skipped(config.get("ignore"))
    rules: Rules = []
    for group in config["config_groups"].values():
        layout = group.get("format") or config.get("format") or "dense"
        scheme = _compressed_scheme(str(layout), group.get("weights"), group.get("input_activations"))
        rules += [(Matcher(target), scheme) for target in group.get("targets") or ["Linear"]]
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _must(sparsity == "dense", f"compressed-tensors' sparse format {sparsity!r} is not served")
    rules.sort(key=lambda rule: rule[0].text == "Linear")  # a module's own name before its class
    return [*ignored, *_skipped(("embed_tokens",)), *rules]


def _compressed_scheme(layout: str, weights: Any, inputs: Any) -> Scheme | None:
    if not weights:
        return None
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    said = f"compressed-tensors' {layout} of {bits}-bit {kind}"
    _must(strategy in ("tensor", "channel", "group", "block"), f"{said} with strategy {strategy!r} is not served")
    group = _group(weights.get("group_size")) if strategy == "group" else 0
    block = 0
    if strategy == "block":
        shape = weights.get("block_structure")
        _must(shape in ([128, 128], "128x128"), f"{said} in blocks of {shape!r} is not served, [128, 128] is")
        group = block = 128
    activations = _inputs(said, inputs)
    symmetric = bool(weights.get("symmetric", True))
    if layout == "pack-quantized":
        _must(kind == "int" and bits in (4, 8), f"{said} is not served, of 4-bit and 8-bit int it is")
        return Scheme("packed", bits, group, symmetric=symmetric)
    if layout in ("float-quantized", "int-quantized", "naive-quantized"):
        _must(bits == 8 and kind in ("int", "float"), f"{said} is not served, of 8 bits it is")
        if kind == "float":
            _must(symmetric, f"{said} with zero points is not served")
            return Scheme("fp8", 8, group, block, inputs=activations)
        _must(not block, f"{said} in blocks is not served")
        return Scheme("int8", 8, group, symmetric=symmetric)
    raise StartupError(f"quantized checkpoint: {said} is not served")


def _inputs(said: str, inputs: Any) -> Inputs:
    """How compressed-tensors' `input_activations` are quantized."""
    if not inputs:
        return "none"
    bits = inputs.get("num_bits", 8)
    _must(bits == 8, f"{said} with inputs of {bits!r} bits is not served")
    return "dynamic" if inputs.get("dynamic") else "static"


READERS: Final = {"awq": _awq, "gptq": _gptq, "marlin": _marlin, "fp8": _fp8, "compressed-tensors": _compressed}
