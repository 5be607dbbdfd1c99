"""What the text side costs per token and per message, beside the libraries' own ways, measured in the same run.

    python -m actorserve.perf.text                      # the embedded model's tokenizer
    python -m actorserve.perf.text --tokenizer DIR --json

Detokenizing: ours, the `tokenizers` DecodeStream, and transformers' decode of the whole output after each token (what
a naive server does; on a short output). Each figure is the best of several rounds, in microseconds.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import msgspec

from actorserve.actors.messages import NO_STATS, NOTHING, Finish, Submit
from actorserve.actors.output import Output
from actorserve.actors.replicas import Replica
from actorserve.models.detokenize import Detokenizers
from actorserve.models.embedded import embedded_model
from actorserve.models.template import ChatTemplate, decode_chat
from actorserve.models.tokenizer import Tokenizer, load_tokenizer
from actorserve.sampler.params import SamplingParams

TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 12:45, isn't it?\n"
    "def area(r):\n    return 3.14159 * r ** 2 if r > 0 else 0\n"
    "Les élèves étaient déjà arrivés; 日本語のテキストも少し。 🎉\n"
)
ROUNDS = 7
NAIVE_TOKENS = 256


def best(work: Callable[[], object]) -> float:
    """Microseconds of the fastest of ROUNDS runs."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def tokenizing(ours: Tokenizer, theirs: Any) -> dict[str, float]:
    """Per token: a prompt of about 1,000 tokens, and growth: time(8x the text) / 8 time(the text)."""
    text = TEXT * (1000 // len(ours.encode(TEXT)) + 1)
    count = len(ours.encode(text))
    short, long = best(lambda: ours.encode(text)), best(lambda: ours.encode(text * 8))
    return {
        "encode_us_per_token": short / count,
        "encode_transformers_us_per_token": best(lambda: theirs(text)) / count,
        "encode_growth_8x": long / (8 * short),
    }


def detokenizing(ours: Tokenizer, theirs: Any) -> dict[str, float]:
    """Per token of an output of about 1,000 tokens."""
    from tokenizers.decoders import DecodeStream

    ids = ours.encode(TEXT, add_special_tokens=False)
    ids = ids * (1000 // len(ids) + 1)
    detokenizers = Detokenizers(ours)
    alone = Replica(0, "sched", NO_STATS)

    def incremental() -> None:
        push = detokenizers.new(ids[:1]).push
        for token in ids:
            push(token)

    def stream() -> None:
        decoder = DecodeStream(ids[:1], True)
        for token in ids:
            decoder.step(ours.core, token)

    def naive() -> None:
        for end in range(1, NAIVE_TOKENS):
            theirs.decode(ids[:end], skip_special_tokens=True)

    def output(params: SamplingParams) -> Callable[[], None]:
        def run() -> None:
            made = Output(Submit(1, NOTHING, params), "front.0", alone, params, detokenizers.new(ids[:1]))
            for token in ids:
                made.push(token, Finish.NONE)
                made.chunk()

        return run

    return {
        "detokenize_us_per_token": best(incremental) / len(ids),
        "detokenize_decode_stream_us_per_token": best(stream) / len(ids),
        f"detokenize_transformers_whole_{NAIVE_TOKENS}_us_per_token": best(naive) / NAIVE_TOKENS,
        "output_chunk_us_per_token": best(output(SamplingParams())) / len(ids),
        "output_chunk_with_4_stops_us_per_token": best(output(SamplingParams(stop=("\n\n\n", "END", "###", "xyz"))))
        / len(ids),
    }


def templates(ours: Tokenizer, theirs: Any) -> dict[str, float]:
    """Per conversation of 8 turns: rendered and encoded."""
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": TEXT} for i in range(7)]
    hostile = [*turns, {"role": "user", "content": "".join(ours.control.tokens[:4])}]
    template = ChatTemplate(ours.templates, ours.special_tokens, ours.control)

    def render(messages: list[dict[str, str]]) -> Callable[[], list[int]]:
        payload = msgspec.json.encode({"messages": messages})
        return lambda: ours.encode_chat(template.render(decode_chat(payload)))

    ours.prepare()
    return {
        "chat_us": best(render(turns)),
        "chat_with_control_text_us": best(render(hostile)),
        "chat_transformers_us": best(lambda: theirs.apply_chat_template(turns, add_generation_prompt=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m actorserve.perf.text")
    parser.add_argument("--tokenizer", help="model folder; default: the embedded model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from transformers import AutoTokenizer  # slow to import

    path = args.tokenizer or embedded_model()
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    found = {**tokenizing(ours, theirs), **detokenizing(ours, theirs)}
    if ours.templates:
        found |= templates(ours, theirs)
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:60} {value:10.2f}")


if __name__ == "__main__":
    main()
