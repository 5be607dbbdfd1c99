"""What quantized weights cost in quality: perplexity with them kept, beside the same weights dequantised, in one run.

    python -m actorserve.perf.perplexity --text wiki.test.tokens          # the embedded model, Q4_1 kept on a CPU
    python -m actorserve.perf.perplexity --text FILE --model DIR --quantization int8 --tokens 16384 --json

The text is cut into windows of `--window` tokens, each predicted from its own beginning on (the first token of a window
is not counted). `kept` runs as the engine would (`--quantization`, `--dtype`), `dense` on the dequantised weights in
float32. Any UTF-8 text does; figures of wikitext-2 are of its test.txt as in pytorch/examples, which has <unk> and
spaces around punctuation. It is not part of any package; without --text this text of ours is taken, which is for
seeing that it runs.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from actorserve.config import EngineConfig
from actorserve.models.batch import Batch, Chunk
from actorserve.models.decoder import Decoder
from actorserve.models.embedded import embedded_model
from actorserve.models.kv_cache import KVCache
from actorserve.models.tokenizer import load_tokenizer
from actorserve.models.weights import load_decoder

PAGE = 16


@dataclass(frozen=True)
class Quality:
    """Of one way to hold the weights."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    seconds: float


def windows_of(ids: list[int], window: int, tokens: int) -> list[list[int]]:
    """Windows of the first `tokens` ids; the last one may be shorter, but has two tokens at least."""
    ids = ids[:tokens]
    cut = [ids[first : first + window] for first in range(0, len(ids), window)]
    return [part for part in cut if len(part) > 1]


@torch.inference_mode()
def quality(decoder: Decoder, windows: list[list[int]]) -> Quality:
    """Perplexity of the windows, each in one forward."""
    longest = max(map(len, windows))
    pages = torch.arange(-(-longest // PAGE), dtype=torch.int32, device=decoder.device)
    kv = KVCache(decoder.spec, len(pages), PAGE, decoder.device, decoder.dtype)
    total, count, started = 0.0, 0, time.perf_counter()
    for ids in windows:
        logits = decoder.forward(batch_of(ids, pages, decoder.device), kv)[:-1].float()
        targets = torch.tensor(ids[1:], device=decoder.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double())
        count += len(ids) - 1
    return Quality(total / count, math.exp(total / count), time.perf_counter() - started)


def batch_of(ids: list[int], pages: torch.Tensor, device: torch.device) -> Batch:
    """One prompt as one chunk, with the logits of all its tokens."""
    positions = torch.arange(len(ids), device=device)
    return Batch(
        ids=torch.tensor(ids, device=device),
        positions=positions,
        kv_slots=positions,
        decode_tables=torch.zeros(0, 1, dtype=torch.int32, device=device),
        decode_lengths=torch.zeros(0, dtype=torch.int32, device=device),
        max_decode_length=0,
        logit_rows=None,
        chunks=[Chunk(0, len(ids), pages)],
    )


def compare(model: str, text: str, window: int, tokens: int, kept: EngineConfig) -> dict[str, Quality]:
    """{"kept": ..., "dense": ...} of a model folder on a text."""
    windows = windows_of(load_tokenizer(model).encode(text, add_special_tokens=False), window, tokens)
    if not windows:
        raise SystemExit("the text has no two tokens")
    dense = EngineConfig(device=kept.device, dtype="float32", quantization="none")
    found = {}
    for name, config in (("kept", kept), ("dense", dense)):
        found[name] = quality(load_decoder(model, config, lambda fraction: None), windows)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, help="UTF-8 text")
    p.add_argument("--model", help="a model folder; default: the embedded model")
    p.add_argument("--window", type=int, default=1024)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="auto")
    p.add_argument("--quantization", default="auto")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    text = a.text.read_text(encoding="utf-8") if a.text else __doc__ or ""
    kept = EngineConfig(device=a.device, dtype=a.dtype, quantization=a.quantization)
    found = compare(a.model or embedded_model(), text, a.window, a.tokens, kept)
    if a.json:
        json.dump({name: asdict(quality) for name, quality in found.items()}, sys.stdout)
        return
    for name, one in found.items():
        print(f"{name:<6} perplexity {one.perplexity:9.4f}  loss {one.loss:.6f}  {one.seconds:6.1f} s")
    print(f"kept / dense {found['kept'].perplexity / found['dense'].perplexity:.6f}")


if __name__ == "__main__":
    main()
