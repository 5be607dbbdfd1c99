"""`actorserve doctor`: what this machine has, which paths the engine will take on it, and why. Used by cli.py.

It takes the flags of `actorserve run` and asks the code that decides, not a copy of its rules. Each finding is a line:
ok, warn (it runs, but something is slower or missing), or fail (`actorserve run` with these flags would not start).
Invariant: it starts nothing, downloads nothing, and no finding of it is a traceback. Exit code 1 if something fails.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from . import __version__
from .config import EngineConfig, ModelInfo
from .display import has_colours
from .errors import StartupError
from .flags import add_config_flags
from .models.floors import GIB
from .models.shapes import KNOWN
from .plan import DEFAULT_MODEL

State: TypeAlias = Literal["ok", "warn", "fail"]
COLOURS: Final[dict[State, str]] = {"ok": "32", "warn": "33", "fail": "31"}
SHOWN: Final = ("torch", "triton", "flashinfer-python", "transformers", "tokenizers", "llguidance", "uvloop")
"""Packages whose versions matter when somebody reports something."""
SPARE_BYTES: Final = 2 * GIB
"""Of disk: a converted model must fit into the cache folder."""
DESCRIPTORS: Final = 1024
"""Open files that a few hundred connections need."""
ATTENTION: Final = {
    "TorchAttention": "torch's operations",
    "TritonAttention": "our Triton kernels for prefill and decode",
    "FlashInferPrefill": "FlashInfer's kernels for prefill, our Triton kernels for decode",
    "FlashInferAttention": "FlashInfer's kernels for prefill and decode",
    "TritonMeanwhile": "our Triton kernels for prefill and decode; FlashInfer's for prefill, compiled while serving",
}


class Finding(NamedTuple):
    """One line of the report."""

    state: State
    subject: str
    text: str


def add_doctor_flags(parser: argparse.ArgumentParser) -> None:
    """The doctor's own flag and those of `actorserve run`."""
    parser.add_argument_group("doctor").add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(parser)


def doctor(parsed: argparse.Namespace, config: EngineConfig) -> int:
    """Look, print what was found, and return the exit code."""
    findings: list[Finding] = []
    for finding in examine(config):
        findings.append(finding)
        if not parsed.json:
            print(_line(finding, has_colours(sys.stdout)), flush=True)
    count = {state: sum(f.state == state for f in findings) for state in COLOURS}
    if parsed.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        problems = [f"{count[state]} {state}" for state in ("fail", "warn") if count[state]]
        outlook = "would not start" if count["fail"] else "starts"
        print(f"\n{', '.join(problems) or 'all is well'}: actorserve run {outlook} here")
    return 1 if count["fail"] else 0


def _line(finding: Finding, coloured: bool) -> str:
    state = f"{finding.state:4}"
    if coloured:
        state = f"\x1b[{COLOURS[finding.state]}m{state}\x1b[0m"
    return f"{state}  {finding.subject:10}  {finding.text}"


def examine(config: EngineConfig) -> Iterator[Finding]:
    """All findings, in an order in which later ones follow from earlier ones."""
    yield _system()
    yield from _packages()
    yield from _guarded("lanes", _lanes)
    yield _limits()
    yield from _guarded("cache", _cache)
    if config.nnodes > 1 or config.node_rank:
        found = list(_guarded("machines", lambda: _machines(config)))
        yield from found
        if found[-1].state == "fail":  # the rest is looked at as if this one were alone
            config = msgspec.structs.replace(config, nnodes=1, node_rank=0)
    model: list[ModelInfo] = []
    yield from _guarded("model", lambda: _model(config, model))
    yield from _guarded("device", lambda: _device(config, model[0] if model else None))
    if not config.node_rank:
        yield from _guarded("port", lambda: _port(config))


def _guarded(subject: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a look finds; what it raises is a finding too."""
    try:
        yield from look()
    except StartupError as error:
        yield Finding("fail", subject, error.message)
    except Exception as error:
        # A library that is broken here fails in its own ways, and that is what the doctor was called for.
        yield Finding("fail", subject, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


# ------------------------------------------------------------------ the machine


def _system() -> Finding:
    about = f"actorserve {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    if platform.system() != "Linux":
        return Finding("fail", "system", f"{about}: lanes need Linux")
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(memory[name].split()[0]) * 1024 / GIB for name in ("MemTotal", "MemAvailable"))
    return Finding("ok", "system", f"{about}, {len(os.sched_getaffinity(0))} cores, {free:.1f} of {total:.1f} GiB free")


def _packages() -> Iterator[Finding]:
    try:
        required = metadata.requires("actorserve") or []
    except metadata.PackageNotFoundError:
        yield Finding("warn", "packages", "actorserve runs from its source, not installed: versions are not checked")
        required = []
    bad = list(_unmet(required))
    yield from bad
    found = [f"{name} {version}" for name in SHOWN if (version := _version(name))]
    if not bad:
        yield Finding("ok", "packages", ", ".join(found))


def _unmet(required: list[str]) -> Iterator[Finding]:
    from packaging.requirements import Requirement  # comes with transformers

    for text in required:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        version = _version(need.name)
        if version is None:
            yield Finding("fail", "packages", f"{need.name} is missing: pip install '{need.name}{need.specifier}'")
        elif not need.specifier.contains(version, prereleases=True):
            yield Finding(
                "fail", "packages", f"{need.name} {version}, not {need.specifier}: pip install -U {need.name}"
            )


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _lanes() -> Iterator[Finding]:
    from .actors.lane import create_lane
    from .actors.ring import native

    try:
        create_lane().close()
    except OSError as error:
        yield Finding("fail", "lanes", f"no shared memory between processes: {error.strerror} (memfd_create, eventfd)")
        return
    yield Finding("ok", "lanes", "sealed shared memory and eventfd work: actors run in processes of their own")
    if native() is None:
        yield Finding(
            "warn", "lanes", "written in Python here, which takes more CPU: no C compiler, or no headers of Python"
        )


def _limits() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < DESCRIPTORS:
        more = f"try ulimit -n {hard}" if soft != hard else "root may allow more"
        return Finding("warn", "files", f"{soft} open files at most: too few for many connections; {more}")
    return Finding("ok", "files", f"{soft:,} open files at most")


def _cache() -> Iterator[Finding]:
    from .models.cache import cache_folder

    folder = cache_folder()
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Finding("fail", "cache", f"{folder} is not writable; set ACTORSERVE_CACHE to a folder that is")
    elif free < SPARE_BYTES:
        yield Finding("warn", "cache", f"{folder}: only {free / GIB:.1f} GiB free")
    else:
        yield Finding("ok", "cache", f"{folder}, {free / GIB:.0f} GiB free")


def _port(config: EngineConfig) -> Iterator[Finding]:
    from .serve import listen

    try:
        listen(config.host, config.port).close()
    except StartupError as error:
        yield Finding("fail", "port", error.message)
        return
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        yield Finding("warn", "port", f"{config.host} port {config.port}: others reach it over the network")
    else:
        yield Finding("ok", "port", f"{config.host} port {config.port} is free; only this machine reaches it")


def _machines(config: EngineConfig) -> Iterator[Finding]:
    """What this one is among several, and where they meet."""
    from .actors.machines import check_machines
    from .member import meeting_point

    check_machines(config)
    count = len(config.replicas_here)
    text = f"node {config.node_rank} of {config.nnodes}, {count} of {config.dp_size} replicas"
    if config.node_rank:
        yield Finding("ok", "machines", f"{text}; joins node 0 at {config.dist_init_addr}, which is not asked now")
        return
    with meeting_point(config):
        where = f"{config.dist_init_addr} is free for the others; only for a private network, as nothing is encrypted"
        yield Finding("ok", "machines", f"{text}; {where}")


# ------------------------------------------------------------------ the model and its paths


def _model(config: EngineConfig, found: list[ModelInfo]) -> Iterator[Finding]:
    """The model's facts, put into `found`; the embedded one is not fetched for this."""
    from .models.embedded import is_cached
    from .models.resolve import resolve_model

    if config.model is None and not is_cached():
        yield Finding("ok", "model", "the embedded SmolLM2-135M-Instruct, which the first start fetches (93 MB)")
        return
    model = resolve_model(config)
    found.append(model)
    about = f"{model.name} ({model.model_type}), {model.context_length:,} tokens of context"
    if model.pooling is not None:
        width = model.pooling.width
        what = f"embeddings of {width} numbers" if model.pooling.task == "embed" else f"{width} labels"
        yield Finding("ok", "model", f"{about}; gives {what}, no text")
    elif model.has_chat_template:
        yield Finding("ok", "model", about)
    else:
        yield Finding("warn", "model", f"{about}; no chat template: only completions, or give --chat-template")


def _device(config: EngineConfig, model: ModelInfo | None) -> Iterator[Finding]:
    """The device, then what follows from it."""
    import torch

    from .models.weights import pick_device

    device = pick_device(config.device, 0, config.executors)
    if device.type == "cuda":
        yield _gpu(config, torch)
    else:
        yield _cpu(config, torch)
    if config.tp_size > 1:
        yield _ranks(config, device.type, torch)
    if len(config.replicas_here) > 1:
        yield _replicas(config, device.type)
    yield from _guarded("dtype", lambda: _paths(config, device, model))
    yield from _guarded("kernels", lambda: _kernels(config, device.type))


def _paths(config: EngineConfig, device: Any, model: ModelInfo | None) -> Iterator[Finding]:
    """In what the model is computed; without a model, in what the embedded one's shape would be."""
    from .models.dtypes import pick_dtype
    from .models.families import spec_of
    from .models.quantization import quantization_of
    from .models.weights import kept_blocks, stays_quantized

    facts: dict[str, Any] = KNOWN[DEFAULT_MODEL]
    if model is not None:
        facts = json.loads((Path(model.path) / "config.json").read_bytes())
        stays = stays_quantized(config, device, quantization_of(facts))
        if kept_blocks(config, Path(model.path), device) or (stays and device.type == "cpu"):
            yield Finding("ok", "dtype", "float32 beside quantized weights, which stay as they are")
            text = "our C kernels, as the weights are quantized" if config.attention_backend == "auto" else "torch's"
            yield Finding("ok", "attention", text)
            return
    dtype = pick_dtype(config.dtype, facts, device, spec_of(facts).moe is not None)
    name = str(dtype).removeprefix("torch.")
    rounds = (name, config.dtype) == ("float32", "bfloat16")
    shown = "bfloat16 for weights and inputs of products, float32 for all else" if rounds else name
    yield Finding("ok", "dtype", f"{shown}: {_why_dtype(config, device.type, name)}")
    yield from _guarded("attention", lambda: _attention(config, device, facts, dtype))


def _ranks(config: EngineConfig, device: str, torch: Any) -> Finding:
    """How tensor parallel ranks talk to each other."""
    if device == "cpu":
        return Finding("ok", "ranks", f"{config.tp_size} processes on this CPU's cores, joined by gloo")
    if not torch.distributed.is_nccl_available():
        return Finding("fail", "ranks", "this torch was built without NCCL, which joins GPUs")
    reached = sum(torch.cuda.can_device_access_peer(0, rank) for rank in range(1, config.tp_size))
    version = ".".join(map(str, torch.cuda.nccl.version()))
    text = f"{config.tp_size} GPUs joined by NCCL {version}, {reached} of the first one's peers directly"
    return Finding("ok" if reached == config.tp_size - 1 else "warn", "ranks", text)


def _replicas(config: EngineConfig, device: str) -> Finding:
    """What each of them has, that are here."""
    count = len(config.replicas_here)
    if device == "cpu":
        text = f"{count} that share this CPU's cores, each with weights and a prefix cache of its own"
        return Finding("ok", "replicas", text)
    each = "a GPU" if config.tp_size == 1 else f"{config.tp_size} GPUs"
    return Finding("ok", "replicas", f"{count}, {each} each")


def _gpu(config: EngineConfig, torch: Any) -> Finding:
    about = torch.cuda.get_device_properties(0)
    others = torch.cuda.device_count() - config.executors
    text = f"{about.name}, {about.total_memory / GIB:.0f} GiB, compute capability {about.major}.{about.minor}"
    text += f", CUDA {torch.version.cuda}" + (f"; {others} more stay unused" if others else "")
    return Finding("ok", "device", text)


def _cpu(config: EngineConfig, torch: Any) -> Finding:
    threads = config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // config.executors)
    if config.device == "auto" and shutil.which("nvidia-smi"):
        reason = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return Finding("warn", "device", f"CPU, {threads} threads: there is nvidia-smi, but {reason}")
    return Finding("ok", "device", f"CPU, {threads} threads: {'as asked' if config.device == 'cpu' else 'no GPU here'}")


def _why_dtype(config: EngineConfig, device: str, dtype: str) -> str:
    from .models.cpu_kernels import cpu_kernels_or_none

    if config.dtype != "auto":
        return "as asked"
    if device == "cuda":
        return "the checkpoint's"
    if dtype == "bfloat16":
        return "this CPU has instructions for it; quantized GGUF weights compute in float32"
    if cpu_kernels_or_none() is not None:
        return "our C kernels' way, with weights of 16 bits as they are"
    return "this CPU has no instructions for bfloat16"


def _attention(config: EngineConfig, device: Any, facts: dict[str, Any], dtype: Any) -> Iterator[Finding]:
    from .models.attention import make_backend
    from .models.dtypes import computes_on_cpu_kernels
    from .models.families import spec_of
    from .models.kv_cache import kv_dtype
    from .models.shard import sharded

    spec = sharded(spec_of(facts), config.tp_size)
    backend = make_backend(config.attention_backend, device, spec, dtype, kv_dtype(config, dtype))
    text = ATTENTION.get(type(backend).__name__, type(backend).__name__)
    if config.attention_backend == "auto" and computes_on_cpu_kernels(device, dtype):
        text = "our C kernels"
    if device.type == "cuda" and config.attention_backend == "auto" and _version("flashinfer-python") is None:
        yield Finding("warn", "attention", f"{text}; FlashInfer's faster prefill: pip install 'actorserve[gpu]'")
    else:
        yield Finding("ok", "attention", text)
    if device.type == "cuda":
        graphs = not config.disable_cuda_graph and not getattr(backend, "needs_host_lengths", False)
        yield Finding(
            "ok" if graphs else "warn", "graphs", f"decode steps {'are' if graphs else 'are not'} CUDA graphs"
        )


def _kernels(config: EngineConfig, device: str) -> Iterator[Finding]:
    """The compiler, and whether what it makes runs here."""
    from .models.c_library import find_compiler

    if device == "cuda":
        version = _version("triton")
        if version is None:
            yield Finding("fail", "kernels", "Triton is missing: pip install 'actorserve[gpu]'")
        else:
            yield Finding(
                "ok", "kernels", f"Triton {version} with {find_compiler()}; the sampler is one of its kernels"
            )
        return
    from .models.cpu_kernels import kernels

    try:
        kernels()
    except StartupError as error:
        text = f"{error.message}: quantized weights will be dequantised, which is slower"
        yield Finding("fail" if config.quantization == "gguf" else "warn", "kernels", text)
    else:
        yield Finding("ok", "kernels", f"C kernels for weights of 4 to 32 bits, compiled by {find_compiler()}")
