"""What jumping over forced tokens is worth: the paper's character pattern, on a CPU with the real model.

    python -m actorserve.perf.constrained [--model DIR] [--batch 8 1] [--rounds 2] [--quantization none]
        [--json FILE]

So many requests at once, four ways in one run on the same machine: jumps on, jumps off (each token drawn under its
mask), with llguidance's masks from the host (--grammar-backend llguidance), and the same number of tokens without a
grammar. Rounds take turns, and the best of each way counts, so that a busy moment of the machine hits none alone.
Outputs with jumps on and off are compared token by token. Target: jumps on are TARGET times as fast as both others.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from actorserve import Engine, SamplingParams
from actorserve.models.embedded import embedded_model

WORDS = "[a-zA-Z0-9_ ]{1,16}"
CHARACTER = (
    r"\{\n"
    rf'    "name": "{WORDS}",\n'
    r'    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",\n'
    r'    "blood status": "(Pure-blood|Half-blood|Muggle-born)",\n'
    r'    "occupation": "(student|teacher|auror|ministry of magic|death eater|order of the phoenix)",\n'
    r'    "wand": \{\n'
    rf'        "wood": "{WORDS}",\n'
    rf'        "core": "{WORDS}",\n'
    r'        "length": [0-9]{1,2}\.[0-9]{0,2}\n'
    r"    \},\n"
    r'    "alive": "(Alive|Deceased)",\n'
    rf'    "patronus": "{WORDS}",\n'
    rf'    "bogart": "{WORDS}"\n'
    r"\}"
)
"""The regular expression of SGLang's first measurements (arXiv 2312.07104 and its repository), with ASCII words."""
NAMES = ("Harry Potter", "Hermione Granger", "Ron Weasley", "Draco Malfoy", "Luna Lovegood", "Severus Snape")
MAX_NEW_TOKENS = 300
TARGET = 2.5


def prompts(batch: int) -> list[str]:
    """Return one question a request."""
    return [f"{NAMES[i % len(NAMES)]} is a character in Harry Potter. Facts about them:\n" for i in range(batch)]


def measure(engine: Any, batch: int, seed: int, tokens: int | None) -> dict[str, Any]:
    """Run the batch; tokens: without a grammar, so many from each request."""
    before, started = engine.stats(), time.perf_counter()
    if tokens is None:
        params = SamplingParams(temperature=0.7, seed=seed, max_new_tokens=MAX_NEW_TOKENS)
        outputs = engine.generate(prompts(batch), params, regex=CHARACTER)
        assert all(re.fullmatch(CHARACTER, o.text) for o in outputs)
    else:
        params = SamplingParams(temperature=0.7, seed=seed, max_new_tokens=tokens, ignore_eos=True)
        outputs = engine.generate(prompts(batch), params)
    seconds = time.perf_counter() - started
    time.sleep(0.6)  # the scheduler's last report comes a few times a second
    total = sum(len(o.ids) for o in outputs)
    return {
        "tokens_per_s": total / seconds,
        "tokens": total,
        "forced_tokens": sum(o.forced_tokens for o in outputs),
        "jumps": sum(o.jumps for o in outputs),
        "steps": engine.stats().steps - before.steps,
        "ids": [o.ids for o in outputs],
    }


def run(model: str, batches: list[int], rounds: int, quantization: str) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the best round of each way, by batch."""
    options: dict[str, Any] = {
        "placement": "inline", "max_total_tokens": 16384, "grammar_seconds": 20.0, "quantization": quantization,
    }  # fmt: skip
    with (
        Engine.sync(model, **options) as jumping,
        Engine.sync(model, **options, disable_jump_forward=True) as still,
        Engine.sync(model, **options, grammar_backend="llguidance") as guided,
    ):
        return {batch: compare(jumping, still, guided, batch, rounds) for batch in batches}


def compare(jumping: Any, still: Any, guided: Any, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the best round of each way: engines with jumps, without, and with masks from the host."""
    best: dict[str, dict[str, Any]] = {}
    for engine in (jumping, still, guided):  # compiles, and fills the prefix cache
        measure(engine, batch, 0, None)
    for number in range(rounds):
        results = {
            "jump on": measure(jumping, batch, number, None),
            "jump off": measure(still, batch, number, None),
            "llguidance": measure(guided, batch, number, None),
        }
        results["free"] = measure(still, batch, number, results["jump off"]["tokens"] // batch)
        plain = results["jump off"]["ids"]
        for result in results.values():
            result["same_ids"] = result.pop("ids") == plain
        for way, result in results.items():
            if way not in best or result["tokens_per_s"] > best[way]["tokens_per_s"]:
                best[way] = result
    return best


def show(batch: int, best: dict[str, dict[str, Any]]) -> None:
    """Print the figures of a batch."""
    print(f"batch {batch:4} {'tokens/s':>9} {'tokens':>7} {'forced':>7} {'jumps':>6} {'steps':>6} {'ms a step':>10}")
    for way, r in best.items():
        step_ms = 1e3 * r["tokens"] / r["tokens_per_s"] / r["steps"]
        counts = f"{r['tokens']:7} {r['forced_tokens']:7} {r['jumps']:6} {r['steps']:6} {step_ms:10.1f}"
        print(f"{way:10} {r['tokens_per_s']:9.1f} {counts}")
    for way in ("jump off", "llguidance"):
        ratio = best["jump on"]["tokens_per_s"] / best[way]["tokens_per_s"]
        print(f"jump on / {way}: {ratio:.2f}x (target {TARGET:g}); fewer steps: "
              f"{best[way]['steps'] / best['jump on']['steps']:.2f}x")  # fmt: skip
    same = ", ".join(f"{way} {best[way]['same_ids']}" for way in ("jump on", "llguidance"))
    print(f"the ids of jump off: {same}", flush=True)


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quantization", default="auto", help="the engine's; none: weights in bfloat16 or float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = run(args.model or embedded_model(), args.batch, args.rounds, args.quantization)
    for batch, best in found.items():
        show(batch, best)
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
