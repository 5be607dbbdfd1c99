"""From a Hugging Face folder to a Decoder: config.json, safetensors (one file or shards), device and dtype.

Used by the executor at start-up. Fused tensors are allocated first (places.py), on the device, and every checkpoint
tensor is copied from the mapped file into its place, so memory peaks at the model plus one tensor. Where a GGUF's
quantized blocks are kept (quantized.py), they take the place of the tensors of the same names. A quantized checkpoint's
modules (quantization.py) stay so where the device multiplies with them (assembly.py), else they are dequantised here.
Invariant: each place is filled exactly once, by a tensor of exactly its shape; anything else is a StartupError.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig, Pooling
from ..errors import StartupError
from .assembly import Assembly, Collector, Keeper, part_pieces
from .attention import make_backend
from .cpu_attention import CpuAttention
from .cpu_decoder import CpuLayers, fits
from .cpu_kernels import kernels
from .cpu_ops import CpuOps
from .decoder import Decoder, Weights, check_supported
from .dtypes import check_dtype, computes_on_cpu_kernels, own_dtype, pick_dtype
from .families import names_of, pooled_spec, spec_of
from .gguf import KEPT_FILE, KEPT_TYPES
from .head import Head
from .kv_cache import kv_dtype
from .layers import DenseMlp, Linear, LinearMap, Ops, TorchOps
from .ledger import CHUNK, keeps_bfloat16
from .moe import Experts
from .names import HEAD, SCORE, Names, layer_of, pieces
from .parallel import Group, add_up
from .places import Blocks, Place, allocate, check_blocks
from .quantization import ONLINE, Quantization, Scheme, quantization_of
from .quantized import KernelLinear, dequantise, lay_together
from .shard import Share
from .spec import Spec
from .tensor_files import headers_of, tensor_files, tensors_of
from .transfer import BulkCopy, can_copy
from .unpack import Part

Progress = Callable[[float], None]

log = logging.getLogger("actorserve.weights")

IGNORED = re.compile(
    r"rotary_(pos_)?emb\.(inv_freq|(cos|sin)_cached)$|\.(attention|attn)\.(masked_)?bias$|"
    r"\.(k|v|q|kv|prob)_(scale|zero_point)$"
)
"""Buffers that old exporters wrote beside the weights; scales of an 8-bit KV cache, which ours does without."""
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""By safetensors' names."""
DUMMY_STD = 0.02


def load_decoder(
    path: str,
    config: EngineConfig,
    progress: Progress,
    pooling: Pooling | None = None,
    group: Group | None = None,
    device: torch.device | None = None,
) -> Decoder:
    """Load the model folder at `path` and return its Decoder; `progress` gets fractions from 0 to 1.

    With `pooling` it ends in hidden states or in a classification head: it has no logits. With a `group` it is this
    rank's part, on `device` (default: the configuration's).
    Raises StartupError for a model that is not served, broken files, or tensors missing, left over or misshapen.
    """
    folder = Path(path)
    facts = read_config(folder)
    context = config.context_length
    whole = spec_of(facts, context) if pooling is None else pooled_spec(facts, pooling, context)
    check_supported(whole)
    share = Share(whole) if group is None else Share(whole, group.size, group.rank)
    spec = share.spec
    device = device or pick_device(config.device)
    blocks = kept_blocks(config, folder, device)
    quantization = quantization_of(facts)
    stays = stays_quantized(config, device, quantization)
    kept = bool(blocks) or (stays and device.type == "cpu")
    dtype = torch.float32 if kept else pick_dtype(config.dtype, facts, device, spec.moe is not None)
    on_cpu_kernels = computes_on_cpu_kernels(device, dtype)
    rounds = on_cpu_kernels and config.dtype == "bfloat16"
    check_dtype(spec, device, dtype)
    progress(0.0)
    scheme = scheme_of(config, quantization) if stays else None
    ops = make_ops(config, device, spec, scheme, dtype, rounds)
    names = names_of(facts, pooled=pooling is not None)
    source = Source(folder, whole, names, quantization, device, config.load_format == "dummy")
    keeper = source.keeper(config, lambda parts, bias: ops.quantized(parts, bias, dtype)) if stays else None
    matrices = dtype_of_matrices(source, facts, config, dtype, blocks, quantization)
    weights, places = allocate(spec, device, dtype, blocks, share, keeper, matrices)
    assemblies = {} if keeper is None else keeper.assemblies
    if source.dummy:
        fill_dummy(places.values(), config.random_seed, device, assemblies.values(), quantization)
    else:
        fill(places, assemblies, source, progress, blocks)
    pack(weights, ops)
    if on_cpu_kernels:
        lay_together(linear_maps(weights))
    if group is not None and spec.layout != "parallel":  # there both are summed at once
        for layer in weights.layers:
            layer.o = add_up(layer.o, layer.mlp, group)
    progress(1.0)
    attention = make_backend(config.attention_backend, device, spec, dtype, kv_dtype(config, dtype), scheme is None)
    if on_cpu_kernels and config.attention_backend == "auto":
        attention = CpuAttention(attention)
    layers = CpuLayers(spec, weights) if on_cpu_kernels and fits(spec, weights) else None
    return Decoder(spec, weights, attention, device, dtype, ops, layers, group, whole)


def make_ops(
    config: EngineConfig, device: torch.device, spec: Spec, scheme: Scheme | None, dtype: torch.dtype, rounds: bool
) -> Ops:
    """Return what forwards run on: our Triton kernels on a GPU, unless torch.compile is to make them.

    On a CPU our C kernels, in float32; with `rounds` their products have inputs in bfloat16. scheme: of weights that
    stay quantized; dtype: of hidden states.
    """
    if computes_on_cpu_kernels(device, dtype):
        return CpuOps(rounds)
    if device.type != "cuda" or config.enable_torch_compile:
        return TorchOps(compiled=device.type == "cuda")
    from .packed_tiles import wide_rows
    from .triton_ops import TritonOps, pdl_rows
    from .tuned_gemm import TunedGemms

    chunk = max(config.chunked_prefill_size or 0, 0) or CHUNK["cuda"]
    tuned = None
    with contextlib.suppress(OSError, RuntimeError):  # without the library's own interface torch's choices stay
        tuned = TunedGemms(device, tuple(max(1, chunk >> i) for i in range(4)))
    wide = wide_rows(2 * spec.inter, spec.hidden, scheme, device) if scheme else 0
    return TritonOps(device, pdl_rows(spec, scheme is None, wide), tuned=tuned, hidden=dtype)


def dtype_of_matrices(
    source: "Source", facts: dict[str, Any], config: EngineConfig, dtype: torch.dtype, blocks: Blocks,
    quantization: Quantization | None,
) -> torch.dtype:  # fmt: skip
    """Return what dense weights are kept in beneath hidden states of `dtype`: where our kernels take them, the files'.

    blocks: the weights that a CPU keeps in a GGUF file's; quantization: the checkpoint's.
    """
    spec = source.spec
    if computes_on_cpu_kernels(source.device, dtype):
        if config.dtype == "bfloat16":
            return torch.bfloat16
        dense = not blocks and quantization is None and spec.moe is None
        return source.matrix_dtype(facts) if dense else dtype
    if source.device.type == "cuda" and keeps_bfloat16(spec, config, dtype == torch.float32, quantization):
        own = source.matrix_dtype(facts)
        return own if own == torch.bfloat16 else dtype
    return dtype


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder."""
    try:
        facts = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise StartupError("the model's folder has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"config.json cannot be read: {type(error).__name__}") from None
    if not isinstance(facts, dict):
        raise StartupError("config.json is not a JSON object")
    return facts


def pick_device(name: str, rank: int = 0, ranks: int = 1) -> torch.device:
    """Resolve `EngineConfig.device`; of several executors (`ranks`) each has a GPU of its own, the `rank`-th."""
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no CUDA device here; use --device cpu or install CUDA torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or ranks == 1:
        return torch.device(name)
    if ranks > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise StartupError(f"--tp-size times --dp-size is {ranks}, which needs as many GPUs; torch finds {found}")
    return torch.device(name, rank)


def kept_blocks(config: EngineConfig, folder: Path, device: torch.device) -> Blocks:
    """Resolve `EngineConfig.quantization`: the blocks to multiply with, empty where weights are dense.

    Raises StartupError if it is "gguf" and cannot be done.
    """
    path = folder / KEPT_FILE
    asked = config.quantization == "gguf"
    reason = None
    if config.load_format == "dummy" or not path.exists():
        reason = f"the model has no weights of GGUF's types {', '.join(KEPT_TYPES)}"
    elif device.type != "cpu":
        reason = "it is for CPUs; add --device cpu"
    elif config.dtype not in (("auto", "float32") if asked else ("auto",)):
        reason = f"it computes in float32; drop --dtype {config.dtype}"
    if config.quantization == "none" or (reason and not asked):
        return {}
    try:
        if reason:
            raise StartupError(reason)
        kernels()
    except StartupError as error:
        if asked:
            raise StartupError(f"--quantization gguf: {error}") from None
        log.warning("quantized weights are dequantised, which is slower: %s", error)
        return {}
    return dict(tensors_of([path]))


def scheme_of(config: EngineConfig, quantization: Quantization | None) -> Scheme | None:
    """How most weights are quantized: by the checkpoint, or while loading."""
    return ONLINE.get(config.quantization) or (quantization.usual if quantization is not None else None)


def stays_quantized(config: EngineConfig, device: torch.device, quantization: Quantization | None) -> bool:
    """Resolve `EngineConfig.quantization` for a checkpoint's own quantization, or one that is made while loading.

    On a CPU that is done by kernels for whole numbers, in float32; whatever else is quantized is dequantised there.
    Raises StartupError for what cannot be had.
    """
    online = ONLINE.get(config.quantization)
    if online is not None and quantization is not None:
        raise StartupError(f"--quantization {config.quantization}: the checkpoint is quantized already; drop the flag")
    if online is None and (quantization is None or config.quantization != "auto"):
        return False
    if device.type == "cuda":
        return not config.enable_torch_compile
    scheme = scheme_of(config, quantization)
    if scheme is None or scheme.is_float:
        if online is not None:
            raise StartupError("--quantization fp8: it is for GPUs; int8 is for CPUs too")
        return False
    allowed = ("auto", "float32") if online else ("auto",)
    try:
        if config.dtype not in allowed:
            raise StartupError(f"it computes in float32; drop --dtype {config.dtype}")
        kernels()
    except StartupError as error:
        if online is not None:
            raise StartupError(f"--quantization {config.quantization}: {error}") from None
        log.warning("quantized weights are dequantised: %s", error)
        return False
    return True


class Source:
    """A model's files, and how their tensors become our weights."""

    def __init__(
        self, folder: Path, spec: Spec, names: Names, quantization: Quantization | None, device: torch.device,
        dummy: bool,
    ) -> None:  # fmt: skip
        self.spec, self.names, self.device, self.dummy = spec, names, device, dummy
        self.files = [] if dummy else tensor_files(folder)
        self.collector: Collector | None = None
        self.quantized: set[str] | None = None
        if quantization is not None and not dummy:
            dtypes = {name: header.dtype for name, header in headers_of(self.files).items()}
            self.collector = Collector(quantization, dtypes, device)
            self.quantized = self.collector.weights(names)

    def keeper(self, config: EngineConfig, make: Callable[[list[Part], Tensor | None], LinearMap]) -> Keeper:
        """Which of the model's linear maps stay, or become, quantized."""
        return Keeper(make, self.device, self.quantized, ONLINE.get(config.quantization))

    def weights(self) -> Iterator[tuple[str, Tensor | Part]]:
        """All weights of the files under our names.

        Raises StartupError for one that cannot be cut as its family's are.
        """
        for name, tensor in tensors_of(self.files):
            if self.ignores(name):
                continue
            made = None
            if self.collector is not None and self.collector.takes(name):
                made = self.collector.add(name, tensor)
                if made is None:
                    continue
            try:
                if made is None:
                    yield from pieces(self.names, self.spec, name, tensor)
                else:
                    yield from part_pieces(self.names, self.spec, *made)
            except (ValueError, RuntimeError) as error:
                raise StartupError(f"tensor {name} {list(tensor.shape)} does not fit config.json: {error}") from None

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the files is no weight of ours."""
        return bool(IGNORED.search(name) or (self.names.beside and re.match(self.names.beside, name)))

    def matrix_dtype(self, facts: dict[str, Any]) -> torch.dtype:
        """The dtype of all matrices of the files, float32 if they differ; config.json's of dummy weights."""
        if self.dummy:
            return own_dtype(facts) or torch.float32
        headers = headers_of(self.files).items()
        found = {header.dtype for name, header in headers if len(header.shape) > 1 and not self.ignores(name)}
        return HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32

    def needless(self, name: str, weight: Tensor | Part) -> bool:
        """Whether a model does without a tensor: a head that is tied or not asked, layers for predicting several
        tokens, and the zeros that quantizers keep as biases of maps without."""
        layer, spec, names = layer_of(name), self.spec, self.names
        biases = self.collector is not None and name.endswith(".bias")
        return (
            (name == HEAD and (spec.tied or not spec.lm_head))
            or (name.startswith(SCORE) and spec.score is None)
            or (names.more_layers and layer is not None and layer >= spec.layers)
            or (names.unused is not None and re.search(names.unused, name) is not None)
            or (biases and isinstance(weight, Tensor) and not weight.any())
        )


def fill_dummy(
    places: Iterable[Place],
    seed: int,
    device: torch.device,
    assemblies: Iterable[Assembly] = (),
    quantization: Quantization | None = None,
) -> None:
    """Fill all places with N(0, 0.02), norms with 1: a model of the right shape and speed that says nothing."""
    generator = torch.Generator(device).manual_seed(seed)
    for place in places:
        if place.is_norm:
            place.view.fill_(1.0)
        elif place.cut is None:
            place.view.normal_(0.0, DUMMY_STD, generator=generator)
        else:  # the part of what one rank would have
            drawn = torch.empty(place.shape, dtype=place.view.dtype, device=device)
            place.view.copy_(place.part(drawn.normal_(0.0, DUMMY_STD, generator=generator)))
    for assembly in assemblies:
        scheme = assembly.online or (quantization.usual if quantization is not None else None)
        if assembly.made is None and scheme is not None:  # it is there once for each of its weights
            assembly.fill(scheme, DUMMY_STD, generator)


def linear_maps(weights: Weights) -> Iterator[LinearMap]:
    """Yield the linear maps of all layers but for experts', then the head's, in the order of a forward."""
    for layer in weights.layers:
        yield from (layer.qkv, layer.o)
        if isinstance(layer.mlp, DenseMlp):
            yield from (layer.mlp.gate_up, layer.mlp.down)
    if weights.head is not None:
        yield weights.head.product


def pack(weights: Weights, ops: Ops) -> None:
    """Bring the linear maps into the form in which this device multiplies fastest, one after another.

    A tied head's table stays for look-ups: one more on a CPU. So does the plain weight that a head in 16 bits refines
    its logits with.
    """
    for layer in weights.layers:
        layer.qkv, layer.o = _packed(layer.qkv, ops), _packed(layer.o, ops)
        if layer.latent is not None and layer.latent.q_up is not None:
            layer.latent.q_up = _packed(layer.latent.q_up, ops)
        mlp = layer.mlp.shared if isinstance(layer.mlp, Experts) else layer.mlp
        if mlp is not None:
            _pack_mlp(mlp, ops)
    head = weights.head
    if head is not None and isinstance(head.product, Linear):
        product = ops.head(head.product.weight)
        weights.head = Head(product if isinstance(product, KernelLinear) else head.product, product)


def _pack_mlp(mlp: DenseMlp, ops: Ops) -> None:
    mlp.gate_up, mlp.down = _packed(mlp.gate_up, ops), _packed(mlp.down, ops)


def _packed(linear: LinearMap, ops: Ops) -> LinearMap:
    if isinstance(linear, Assembly):
        assert linear.made is not None
        return linear.made
    return ops.linear(linear.weight, linear.bias) if isinstance(linear, Linear) else linear


def fill(
    places: dict[str, Place], assemblies: dict[str, Assembly], source: Source, progress: Progress, blocks: Blocks
) -> None:
    """Copy every tensor of the checkpoint into its place; those that are also blocks from there, which are exact.

    A weight of an assembly goes there.
    """
    total = sum(file.stat().st_size for file in source.files) or 1
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        progress(min(1.0, done / total))

    for name in blocks.keys() & places.keys():
        view = places[name].view
        check_blocks(name, blocks[name], places[name].shape)
        view.copy_(places[name].part(dequantise(blocks[name], places[name].shape[1])))
    missing, extra = (places.keys() | assemblies.keys()) - blocks.keys(), []
    device = next(iter(places.values())).view.device
    with BulkCopy(device, moved) if uses_bulk_copy(device) else contextlib.nullcontext() as bulk:
        for name, weight in source.weights():
            if name in blocks:
                continue
            if name not in places and name not in assemblies:
                if not source.needless(name, weight):
                    extra.append(name)
                continue
            if name not in missing:
                raise StartupError(f"tensor {name} is in two files of the checkpoint")
            missing.discard(name)
            size = _put(name, weight, places.get(name), assemblies.get(name), bulk)
            moved(size)
    if missing:
        raise StartupError(f"the checkpoint lacks {_some(missing)}")
    if extra:
        raise StartupError(f"the checkpoint holds tensors that config.json does not account for: {_some(extra)}")
    for place in places.values():
        if place.offset:
            place.view.add_(place.offset)


def _put(
    name: str, weight: Tensor | Part, place: Place | None, assembly: Assembly | None, bulk: BulkCopy | None
) -> int:
    """Put a weight where it belongs; returns how many bytes are done, 0 where `bulk` counts them."""
    size = weight.codes.nbytes if isinstance(weight, Part) else weight.nbytes
    if assembly is not None:
        if isinstance(weight, Tensor):
            _check_dense(name, weight)
            weight = weight.to(assembly.device)
        assembly.take(name, weight)
        return size
    assert place is not None
    if isinstance(weight, Part):
        _check_shape(name, weight.shape, place)
        place.view.copy_(place.part(weight.dequantise()))
        return size
    _check_dense(name, weight)
    _check_shape(name, tuple(weight.shape), place)
    ours = place.part(weight)
    if bulk is not None and can_copy(place.view, ours):
        bulk.add(place.view, ours)
        return size - ours.nbytes
    place.view.copy_(ours)
    return size


def uses_bulk_copy(device: torch.device) -> bool:
    """Whether copies to the device go through BulkCopy; within the host's memory they gain nothing by it."""
    return device.type == "cuda"


def _check_dense(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise StartupError(f"tensor {name} holds {tensor.dtype}: quantized, but quantization_config does not say how")


def _check_shape(name: str, shape: tuple[int, ...], place: Place) -> None:
    if shape != place.shape:
        raise StartupError(f"tensor {name} is {list(shape)}, config.json asks for {list(place.shape)}")


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(ordered[:4]) + more
