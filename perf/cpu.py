"""Raw decode speed on the CPU: our decoder loop beside transformers' generate and llama.cpp's server, in one run.

`python -m actorserve.perf.cpu [--model FOLDER] [--batch 1 8 32] [--json]`. No engine, no sampling but argmax: the
ceiling that the executor is measured against. Without --model: the embedded model if it is in the cache, else random
weights of its shape (speed does not depend on the values, but they are never quantized). --dtype and --quantization
are the engine's; transformers computes in --reference-dtype. llama.cpp serves as many clients, with two threads and the
embedded model's Q4_1 weights, if xllamacpp is installed (perf.engines has our whole engine beside it).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actorserve.config import EngineConfig
from actorserve.models.batch import Batch, plain_batch
from actorserve.models.cache import cache_folder
from actorserve.models.decoder import Decoder
from actorserve.models.embedded import NAME
from actorserve.models.gguf import FORMAT
from actorserve.models.kv_cache import KVCache
from actorserve.models.weights import load_decoder
from actorserve.perf.engines import llama_cpp

SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
PAGE = 16
PROMPT = 64


class Loop:
    """`batch` sequences of one length, decoded greedily step by step."""

    def __init__(self, decoder: Decoder, batch: int, tokens: int) -> None:
        self.decoder = decoder
        pages = -(-(PROMPT + tokens) // PAGE)
        self.kv = KVCache(decoder.spec, batch * pages, PAGE, decoder.device, decoder.dtype)
        self.tables = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages)
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(0, decoder.spec.vocab, (batch, PROMPT), generator=generator).tolist()

    def prefill(self) -> None:
        """Compute all prompts; leaves each sequence's next token in `last`."""
        self.length = PROMPT
        logits = [
            self.decoder.forward(plain_batch(prompt, 0, table, PAGE), self.kv)
            for prompt, table in zip(self.prompts, self.tables, strict=True)
        ]
        self.last = torch.cat(logits).argmax(-1)

    def step(self) -> None:
        """One token for every sequence."""
        rows = len(self.tables)
        position = torch.full((rows,), self.length)
        self.length += 1
        batch = Batch(
            ids=self.last,
            positions=position,
            kv_slots=self.tables.gather(1, position[:, None] // PAGE)[:, 0].long() * PAGE + position % PAGE,
            decode_tables=self.tables,
            decode_lengths=torch.full((rows,), self.length, dtype=torch.int32),
            max_decode_length=self.length,
            logit_rows=None,
        )
        self.last = best_tokens(self.decoder.forward(batch, self.kv))


def best_tokens(logits: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: by NumPy, for torch's threads would watch for more work on the cores that our own kernels want."""
    return torch.from_numpy(logits.float().numpy().argmax(-1))


Clock = Callable[[], float]


def seconds(work: Callable[[], object], clock: Clock) -> float:
    """Time of one call."""
    start = clock()
    work()
    return clock() - start


def decode_speed(decoder: Decoder, batch: int, tokens: int, repeats: int, clock: Clock) -> tuple[float, float]:
    """(decode, prefill) tokens per second, best of `repeats`."""
    loop = Loop(decoder, batch, tokens)

    def decode() -> None:
        for _ in range(tokens):
            loop.step()

    prefill_times, decode_times = [], []
    for _ in range(repeats):
        prefill_times.append(seconds(loop.prefill, clock))
        decode_times.append(seconds(decode, clock))
    return batch * tokens / min(decode_times), batch * PROMPT / min(prefill_times)


def reference_model(folder: str, dummy: bool, dtype: torch.dtype) -> Any:
    """The same model in transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if dummy:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(dtype).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def reference_speed(model: Any, batch: int, tokens: int, repeats: int, clock: Clock) -> float:
    """Tokens per second of transformers' generate, its prefill subtracted, best of `repeats`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator)

    def generate(count: int) -> None:
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
            )

    first = min(seconds(lambda: generate(1), clock) for _ in range(repeats))
    whole = min(seconds(lambda: generate(tokens + 1), clock) for _ in range(repeats))
    return batch * tokens / (whole - first)


def model_folder(given: str | None) -> tuple[str, bool]:
    """(folder, whether its weights are random)."""
    if given is not None:
        return given, False
    embedded = cache_folder() / NAME / f"format{FORMAT}"
    if embedded.exists():
        return str(embedded), False
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(SMOLLM2))
    return folder, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder with config.json and safetensors")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="decoded per sequence")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this thread's own time, not that of others: for a busy machine"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--quantization", default="auto", choices=["auto", "none", "gguf", "int8"])
    parser.add_argument("--reference-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--no-reference", action="store_true", help="skip transformers and llama.cpp")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time is one thread's: add --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    folder, dummy = model_folder(args.model)
    load_format = "dummy" if dummy else "auto"
    config = EngineConfig(load_format=load_format, dtype=args.dtype, quantization=args.quantization, device="cpu")
    decoder = load_decoder(folder, config, lambda fraction: None)
    model = None if args.no_reference else reference_model(folder, dummy, getattr(torch, args.reference_dtype))
    rows = []
    theirs: dict[int, float] = {}
    if not (dummy or args.model or args.no_reference or args.cpu_time):
        with tempfile.TemporaryDirectory() as scratch:
            theirs = llama_cpp(args.batch, args.tokens, PROMPT, Path(scratch, "load.json"))
    for batch in args.batch:
        decode, prefill = decode_speed(decoder, batch, args.tokens, args.repeats, clock)
        row = {"batch": batch, "decode_tok_s": round(decode, 1), "prefill_tok_s": round(prefill, 1)}
        if model is not None:
            reference = reference_speed(model, batch, args.tokens, args.repeats, clock)
            row |= {"transformers_tok_s": round(reference, 1), "ratio": round(decode / reference, 2)}
        if batch in theirs:
            row |= {"llama_cpp_tok_s": round(theirs[batch], 1), "to_llama_cpp": round(decode / theirs[batch], 2)}
        rows.append(row)
        if not args.json:
            print("  ".join(f"{name} {value:>8}" for name, value in row.items()), flush=True)
    if args.json:
        facts = {"dtype": args.dtype, "quantization": args.quantization, "reference_dtype": args.reference_dtype}
        facts |= {"threads": args.threads, "cpu_time": args.cpu_time, "random_weights": dummy, "tokens": args.tokens}
        json.dump(facts | {"torch": torch.__version__, "rows": rows}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
