"""`actorserve plan`: where a GPU's memory goes, how many requests fit, and how fast it can be at best. Used by cli.py.

It takes the flags of `actorserve run`, so that a command line can be planned by changing one word, and needs no GPU
and no torch: the arithmetic is models/ledger.py's and models/floors.py's. Exit code 1: the model does not fit.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import msgspec

from .config import EngineConfig
from .errors import StartupError
from .flags import add_config_flags
from .models.families import pooled_spec, spec_of
from .models.floors import GIB, GPUS, Gpu, decode_seconds, prefill_seconds
from .models.ledger import FRACTION, ITEMSIZE, Ledger, balance, demand_of, quantized_bytes
from .models.quantization import Quantization, quantization_of
from .models.shapes import KNOWN, write_shape
from .models.spec import Spec

DEFAULT_MODEL: Final = "smollm2-135m"
"""The shape of the model that is served without --model."""
DEFAULT_GPU: Final = "h200"
LENGTHS: Final = (512, 1024, 4096, 16384)
REMEDIES: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("mem_fraction_static", (0.9, 0.92, 0.94, 0.96)),
    ("kv_cache_dtype", ("fp8_e4m3",)),
    ("chunked_prefill_size", (2048, 512)),
    ("max_running_requests", (64, 16)),
    ("tp_size", (2, 4, 8)),
)
"""Settings that make room, and the values to try, the mildest first."""


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add the plan's own flags and those of `actorserve run`."""
    shapes = fill(", ".join(KNOWN), 100, break_on_hyphens=False)
    group = parser.add_argument_group("plan", f"--model may also be a known shape:\n{shapes}")
    group.add_argument("--gpu", choices=GPUS, default=None, help=f"the GPU (default: {DEFAULT_GPU})")
    group.add_argument("--gpu-memory", type=float, metavar="GIB", help="its memory, if it is another")
    group.add_argument("--length", type=int, nargs="+", metavar="N", help="tokens of a request, prompt and output")
    group.add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(parser)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned: a model and how it is to run on each of the GPUs of a replica."""

    name: str
    spec: Spec
    dtype: str
    context_length: int
    config: EngineConfig
    gpu: Gpu
    quantization: Quantization | None = None
    """The checkpoint's own."""
    own: str | None = None
    """The checkpoint's dtype."""

    @property
    def fraction(self) -> float:
        return self.config.mem_fraction_static or FRACTION["cuda"]

    def ledger(self) -> Ledger:
        """The memory of one GPU. Raises StartupError for a --tp-size that does not divide the model."""
        demand = demand_of(self.spec, self.config, self.dtype, self.context_length, self.quantization, self.own)
        return balance(self.gpu.memory, self.fraction, demand, self.config.max_total_tokens)

    def changed(self, **settings: Any) -> "Subject":
        return replace(self, config=msgspec.structs.replace(self.config, **settings))


def plan(parsed: argparse.Namespace, config: EngineConfig, parser: argparse.ArgumentParser) -> int:
    """Print the plan; returns the exit code. Raises StartupError for a model that is not served."""
    from .actors.machines import check_shares  # with all messages, which `-h` need not wait for

    gpu = chosen_gpu(parsed, parser)
    if parsed.length and min(parsed.length) < 1:
        parser.error("argument --length: must be at least 1")
    check_shares(config)
    subject = read_model(config, gpu)
    ledger = subject.ledger()
    context = subject.context_length
    if parsed.length and max(parsed.length) > context:
        parser.error(f"argument --length: {max(parsed.length)} is more than the context of {context} tokens")
    lengths = parsed.length or [*(n for n in LENGTHS if n < context), context]
    table = list(length_rows(subject, ledger, lengths))
    if parsed.json:
        print(json.dumps(as_json(subject, ledger, table)))
    else:
        name = parsed.gpu or (DEFAULT_GPU if parsed.gpu_memory is None else "a GPU")
        print(as_text(subject, name, ledger, table))
    if ledger.fits:
        return 0
    print(f"actorserve: {complaint(subject, ledger)}", file=sys.stderr)
    return 1


def chosen_gpu(parsed: argparse.Namespace, parser: argparse.ArgumentParser) -> Gpu:
    """The GPU of --gpu and --gpu-memory; one that is known by its memory alone has no limits."""
    if parsed.gpu_memory is not None and not 0 < parsed.gpu_memory < 1e6:
        parser.error(f"argument --gpu-memory: a size in GiB is needed, not {parsed.gpu_memory!r}")
    if parsed.gpu is None and parsed.gpu_memory is not None:
        return Gpu(int(parsed.gpu_memory * GIB), None)
    gpu = GPUS[parsed.gpu or DEFAULT_GPU]
    return gpu if parsed.gpu_memory is None else replace(gpu, memory=int(parsed.gpu_memory * GIB))


def read_model(config: EngineConfig, gpu: Gpu) -> Subject:
    """Read --model: a known shape, or what `actorserve run` takes."""
    from .models.resolve import resolve_model  # with what reads GGUF, which `-h` need not wait for

    # Weights need not be there, nor as many GPUs.
    asked = msgspec.structs.replace(config, load_format="dummy", tp_size=1, dp_size=1, nnodes=1)
    with tempfile.TemporaryDirectory() as scratch:
        name = config.model or DEFAULT_MODEL
        if name in KNOWN and not Path(name).exists():
            asked = msgspec.structs.replace(asked, model=str(write_shape(name, Path(scratch) / name)))
        model = resolve_model(asked)
        facts = json.loads((Path(model.path) / "config.json").read_bytes())
    own = str(facts.get("dtype") or facts.get("torch_dtype"))
    dtype = config.dtype if config.dtype != "auto" else own if own in ITEMSIZE else "bfloat16"
    rules = quantization_of(facts)
    spec = spec_of(facts) if model.pooling is None else pooled_spec(facts, model.pooling)
    return Subject(model.name, spec, dtype, model.context_length, config, gpu, rules, own)


def length_rows(subject: Subject, ledger: Ledger, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """For requests of each length: how many fit, how many run, and the floors where the GPU's limits are known.

    Floors are tokens/s of one model over its GPUs, without what these tell each other: prefill of such a prompt,
    and decode of one request and of all that run, each with its whole length in the context.
    """
    demand, limits = ledger.demand, subject.gpu.limits
    quantized = quantized_bytes(demand.spec, demand.scheme)
    for length in sorted(set(lengths)):
        room = ledger.requests_at(length)
        running = min(room, demand.slots)
        row: dict[str, Any] = {"length": length, "fit": room, "run": running}
        if limits is not None and demand.itemsize == 2:  # the peak is that of 16 bits
            sizes = (limits, demand.itemsize, demand.kv_itemsize)
            row["prefill_floor"] = length / prefill_seconds(demand.spec, length, limits)
            row["decode_floor_1"] = 1 / decode_seconds(demand.spec, 1, length, *sizes, quantized)
            if running:
                row["decode_floor_run"] = running / decode_seconds(demand.spec, running, length, *sizes, quantized)
        yield row


def complaint(subject: Subject, ledger: Ledger) -> str:
    """One line: how much is lacking, and which settings help."""
    wanted = subject.config.max_total_tokens
    what = f"{wanted:,} tokens of KV" if wanted else "a single KV page"
    helps = list(remedies(subject))
    advice = f"what helps: {', or '.join(helps)}" if helps else "no single setting helps: it needs a larger GPU"
    size = f"{subject.gpu.memory / GIB:.1f} GiB"
    return f"{subject.name} does not fit {size}: {ledger.missing / GIB:.2f} GiB are lacking for {what}; {advice}"


def remedies(subject: Subject) -> Iterator[str]:
    """Settings that alone make it fit, as flags."""
    for field, values in REMEDIES:
        for value in values:
            if value != getattr(subject.config, field) and fits(subject.changed(**{field: value})):
                yield f"--{field.replace('_', '-')} {value}"
                break
    unbounded = subject.changed(max_total_tokens=None)
    if subject.config.max_total_tokens and fits(unbounded):
        yield f"--max-total-tokens {unbounded.ledger().tokens}"


def fits(subject: Subject) -> bool:
    """Whether there is room for what is asked; not if so many GPUs cannot share the model."""
    try:
        return subject.ledger().fits
    except StartupError:
        return False


def as_json(subject: Subject, ledger: Ledger, table: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan as JSON; bytes, tokens, tokens/s."""
    demand = ledger.demand
    return {
        "model": subject.name,
        "dtype": subject.dtype,
        "tp_size": subject.config.tp_size,
        "dp_size": subject.config.dp_size,
        "fits": ledger.fits,
        "missing": ledger.missing,
        "total": ledger.total,
        "memory": [{"name": row.name, "kind": row.kind, "bytes": row.bytes} for row in ledger.rows],
        "pages": ledger.pages,
        "page_size": demand.page_size,
        "page_bytes": demand.page_bytes,
        "tokens": ledger.tokens,
        "max_running_requests": demand.slots,
        "context_length": demand.context_length,
        "lengths": table,
    }


def as_text(subject: Subject, gpu: str, ledger: Ledger, table: list[dict[str, Any]]) -> str:
    """The plan for people; `gpu` is its name."""
    demand, config = ledger.demand, subject.config
    gpus = config.tp_size * config.dp_size
    many = f", each of {gpus}" if gpus > 1 else ""
    if config.nnodes > 1:
        many += f" on {config.nnodes} machines"
    kv = subject.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    lines = [f"{subject.name} in {subject.dtype}, KV in {kv}, on {gpu} with {ledger.total / GIB:.1f} GiB{many}", ""]
    lines += [f"{row.name:<24}{row.bytes / GIB:>9.2f} GiB  {row.kind:<11}{row.note}".rstrip() for row in ledger.rows]
    static = sum(row.bytes for row in ledger.rows if row.kind == "static")
    allowed = f"--mem-fraction-static {subject.fraction} allows {subject.fraction * ledger.total / GIB:.2f}"
    lines.append(f"{'static in all':<24}{static / GIB:>9.2f} GiB  {'':<11}{allowed}")
    if not ledger.fits:
        return "\n".join(lines)
    lines += ["", f"KV: {ledger.tokens:,} tokens at {demand.page_bytes / demand.page_size / 1024:.1f} KiB each"]
    lines += limits_of(ledger)
    if config.dp_size > 1:
        lines.append(
            f"a replica; {config.dp_size} of them have {config.dp_size * ledger.tokens:,} tokens, and run up to "
            f"{config.dp_size * demand.slots:,} requests at once"
        )
    lines += ["", *table_lines(table, subject.gpu.measured)]
    return "\n".join(lines)


def limits_of(ledger: Ledger) -> list[str]:
    """What else bounds the KV pages, in words."""
    demand = ledger.demand
    if ledger.limited_by == "requests":
        return [f"all that {demand.slots:,} requests of {demand.context_length:,} tokens can use"]
    if ledger.limited_by == "setting":
        return ["as --max-total-tokens says"]
    if ledger.pages < demand.pages_per_request:
        return [f"NOTE the longest request that fits has {ledger.tokens:,} tokens of the context's "
                f"{demand.context_length:,}"]  # fmt: skip
    return []


def table_lines(table: list[dict[str, Any]], measured: bool) -> list[str]:
    """The table by length, with floors where there are any."""
    floors = any("prefill_floor" in row for row in table)
    columns = [("tokens each", "length"), ("fit", "fit"), ("run", "run")]
    if floors:
        columns += [("prefill/s", "prefill_floor"), ("decode/s, 1", "decode_floor_1"), ("all", "decode_floor_run")]
    lines = ["".join(f"{title:>13}" for title, _ in columns)]
    lines += ["".join(f"{_number(row.get(key)):>13}" for _, key in columns) for row in table]
    lines.append("fit: by memory; run: of --max-running-requests")
    if floors:
        source = "measured there" if measured else "of the data sheet, which nothing reaches"
        lines.append(f"/s: tokens at best, by bandwidth and peak {source}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
