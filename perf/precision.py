"""How far 16-bit logits are from float32's, ours beside transformers' on the same weights and tokens.

`python -m actorserve.perf.precision [--model FOLDER | --shape qwen2-0.5b] [--rows 50] [--tokens 64] [--device cuda]
[--kv-cache-dtype auto fp8_e4m3] [--enable-torch-compile] [--json FILE]`. Default model: the embedded one; a shape gets
random weights. All engines are given the same tokens, transformers' own greedy text after a beginning (random ids with
a shape), so that one rounding does not lead to another text. The reference is transformers in float32 on the same
16-bit weights. With `--dtype float32` ours computes in float32, too, and weights and transformers have bfloat16.
Ours is measured twice: token by token with all rows in a step, as outputs are decoded, and prompts as a
whole; and again for each dtype of the KV cache, and with torch.compile's kernels. Printed: the root mean square over
the vocabulary of a place's error, over the spread of its logits; and at how many places another token than the
reference's is the likeliest, with the largest gap there in its logits.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.models.batch import plain_batch
from actorserve.models.decoder import Decoder
from actorserve.models.kv_cache import KVCache, kv_dtype
from actorserve.models.runner import Runner
from actorserve.models.shapes import KNOWN, write_shape
from actorserve.models.weights import load_decoder, pick_device

PAGE = 16
FAR = 1 << 30
BEGINNING = 8
"""Ids that a text begins with."""


@dataclass
class Error:
    """Of all places of all rows."""

    relative: float
    """Root mean square of the error over the spread of the logits."""
    worst: float
    """The largest of a place's."""
    others: float
    """Share of the places where another token is the likeliest."""
    gap: float
    """The largest gap of the reference's logits there."""


def error_of(logits: Tensor, exact: Tensor) -> Error:
    """logits and exact: [rows, tokens, vocab]; a row at a time, for they are large."""
    squares, others, gaps = [], [], []
    for got, want in zip(logits, exact, strict=True):
        got, want = got.float().to(want.device), want.float()
        squares.append((got - want).square().mean(-1) / want.var(-1))
        chosen = got.argmax(-1, keepdim=True)
        others.append(chosen[:, 0] != want.argmax(-1))
        gaps.append(want.amax(-1) - want.gather(-1, chosen)[:, 0])
    all_squares = torch.stack(squares)
    return Error(
        all_squares.mean().sqrt().item(), all_squares.max().sqrt().item(),
        torch.stack(others).float().mean().item(), torch.stack(gaps).max().item(),
    )  # fmt: skip


@torch.inference_mode()
def decoded(decoder: Decoder, config: EngineConfig, ids: Tensor) -> Tensor:
    """Logits float32 [rows, tokens, vocab] of ids [rows, tokens], one token of each row a step."""
    rows, length = ids.shape
    pages = -(-length // PAGE)
    dtype = kv_dtype(config, decoder.dtype)
    kv = KVCache(decoder.spec, rows * pages + 1, PAGE, decoder.device, dtype, decoder.dtype)
    runner = Runner(decoder, kv, rows, pages)
    for row in range(rows):
        runner.admit(row, np.arange(row * pages, (row + 1) * pages, dtype=np.int32), 0, FAR)
    runner.slots.flush()
    every = runner.upload_rows(np.arange(rows))
    host = np.arange(rows) if runner.exact else None
    found = []
    for at in range(length):
        runner.slots.last[:rows] = ids[:, at]
        runner.slots.length[:rows] = at
        runner.lengths[:rows] = at
        found.append(runner.decode(every, host).logits)
    return torch.stack(found, 1)


@torch.inference_mode()
def prefilled(decoder: Decoder, config: EngineConfig, ids: Tensor) -> Tensor:
    """The same, each row as one prompt."""
    pages = -(-ids.shape[1] // PAGE)
    dtype = kv_dtype(config, decoder.dtype)
    kv = KVCache(decoder.spec, pages, PAGE, decoder.device, dtype, decoder.dtype)
    table = torch.arange(pages, dtype=torch.int32, device=decoder.device)
    return torch.stack([decoder.forward(plain_batch(row, 0, table, PAGE, all_logits=True), kv) for row in ids.tolist()])


def reference(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model with weights rounded to `dtype`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


@torch.inference_mode()
def texts(model: Any, rows: int, tokens: int, random: bool) -> Tensor:
    """Ids [rows, tokens] for a model: its greedy text after random ids, or those alone."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (rows, tokens if random else BEGINNING), generator=generator).to(model.device)
    if not random:
        options = {"do_sample": False, "max_new_tokens": tokens - BEGINNING, "min_new_tokens": tokens - BEGINNING}
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return ids


@torch.inference_mode()
def by_rows(model: Any, ids: Tensor) -> Tensor:
    """transformers' logits [rows, tokens, vocab], some rows at a time."""
    return torch.cat([model(part).logits for part in ids.split(8)])


def measure(
    folder: str,
    configs: dict[str, EngineConfig],
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    random: bool = False,
    tell: Callable[[str, Error, Error], None] = lambda name, error, theirs: None,
) -> dict[str, Error]:
    """Errors of transformers and of ours, in `dtype`, by what was run and by the name of each configuration.

    `tell` gets each of them as it is known, and theirs.
    """
    device = pick_device(next(iter(configs.values())).device)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = reference(folder, dtype, device)
    ids = texts(model, rows, tokens, random)
    rounded = by_rows(model, ids)
    exact = by_rows(model.float(), ids)
    theirs = error_of(rounded, exact)
    found = {"transformers": theirs}
    tell("transformers", theirs, theirs)
    del model, rounded
    ways: dict[str, Callable[[Decoder, EngineConfig, Tensor], Tensor]] = {"decoded": decoded, "prefilled": prefilled}
    for of_config, config in configs.items():
        decoder = load_decoder(folder, config, lambda _: None, device=device)
        for name, way in ways.items():
            full = f"{name} {of_config}".strip()
            found[full] = error_of(way(decoder, config, ids), exact)
            tell(full, found[full], theirs)
    return found


def random_model(shape: str, folder: Path, dtype: torch.dtype, device: torch.device) -> str:
    """Write a model of a known shape with random weights, drawn by transformers; returns its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_shape(shape, folder)))
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def show(name: str, e: Error, theirs: Error) -> None:
    """Print a line."""
    share = e.relative / theirs.relative
    line = f"{name:22}{e.relative:>10.2e}{share:>11.3f}{e.worst:>10.2e}{100 * e.others:>11.2f} %{e.gap:>13.3f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: the embedded model")
    parser.add_argument("--shape", choices=KNOWN, help="random weights of this shape instead")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"])
    parser.add_argument("--enable-torch-compile", action="store_true", help="measure that, too")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    dtype = getattr(torch, "bfloat16" if args.dtype == "float32" else args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        if args.shape:
            folder = random_model(args.shape, Path(scratch), dtype, pick_device(args.device))
        elif args.model:
            folder = args.model
        else:
            from actorserve.models.embedded import embedded_model

            folder = embedded_model()
        plain = EngineConfig(
            model=folder, dtype=args.dtype, device=args.device, attention_backend=args.attention_backend,
            quantization="none",
        )  # fmt: skip
        configs = {"" if kv == "auto" else kv: replace(plain, kv_cache_dtype=kv) for kv in args.kv_cache_dtype}
        if args.enable_torch_compile:
            configs["compiled"] = replace(plain, enable_torch_compile=True)
        print(f"{args.dtype}, {args.rows} rows of {args.tokens} tokens")
        print(f"{'':22}{'error':>10}{'of theirs':>11}{'worst':>10}{'other token':>13}{'largest gap':>13}", flush=True)
        found = measure(folder, configs, args.rows, args.tokens, dtype, bool(args.shape), show)
    if args.json:
        Path(args.json).write_text(json.dumps({name: asdict(e) for name, e in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
