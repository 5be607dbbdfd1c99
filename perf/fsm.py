"""What compiling a grammar to token tables costs, stage by stage, beside llguidance's compilation and first mask.

Run as `python -m actorserve.perf.fsm [--tokenizer FOLDER ...] [--only NAME ...] [--json FILE]`. Rule: both see the same
pattern and tokenizer in the same run; each figure is the median of several compilations, after one that warms caches.
Without --tokenizer: SmolLM2's 49,152 tokens, and 151,936 that are these and made-up words in their spelling.
llguidance compiles lazily: its figure is for the first mask only, ours for all masks of the grammar.
What each mask costs then: perf.masks.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..fsm.budget import Budget
from ..fsm.canonical import Encode
from ..fsm.dfa import determinise
from ..fsm.errors import GrammarError
from ..fsm.guidance import grammar_of
from ..fsm.jump import plan_jump
from ..fsm.matcher import Matchers
from ..fsm.minimise import minimise
from ..fsm.nfa import build_nfa
from ..fsm.pattern import parse_pattern
from ..fsm.token_table import TokenTable, build_table
from ..fsm.token_walk import walk_tokens
from ..fsm.utf8 import lower
from ..fsm.vocabulary import TokenizerTables, build_tables
from ..models.embedded import embedded_model
from ..models.tokenizer import load_tokenizer

REPEATS = 5
TARGET_MS = 300.0
"""For a grammar of 500 states at 152k tokens."""
STAGES = ("parse", "dfa", "minimise", "bytes", "walk", "table", "masks")


def character(words: str) -> str:
    """SGLang's regular expression of a character of Harry Potter (its repository, examples of its paper)."""
    lines = [
        r"\{",
        f'    "name": "{words}",',
        '    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",',
        '    "blood status": "(Pure-blood|Half-blood|Muggle-born)",',
        '    "occupation": "(student|teacher|auror|ministry of magic|death eater|order of the phoenix)",',
        r'    "wand": \{',
        f'        "wood": "{words}",',
        f'        "core": "{words}",',
        r'        "length": [0-9]{1,2}\.[0-9]{0,2}',
        r"    \},",
        '    "alive": "(Alive|Deceased)",',
        f'    "patronus": "{words}",',
        f'    "bogart": "{words}"',
        r"\}",
    ]
    return r"\n".join(lines)


STRING = r'([^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})'
ARGUMENT = "[a-z_]{1,20}(: (int|str|float|bool|list|dict))?"
PATTERNS = {
    "ipv4": r"((25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)\.){3}(25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)",
    "email": r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "JSON string": f'"{STRING}*"',
    "JSON string {0,200}": f'"{STRING}{{0,200}}"',
    "50 choices": "|".join(f"option {i} of {i * i + 7}" for i in range(50)),
    "1000 choices": "|".join(f'"value_{i * 7919 % 100003}"' for i in range(1000)),
    "character": character(r"[a-zA-Z0-9_ \t\n]{1,16}"),
    "character, Unicode": character(r"[\w\d\s]{1,16}"),
    "CJK {1,20}": "[\u4e00-\u9fff]{1,20}",
    ".{1,200}": ".{1,200}",
    "signature": rf"def [a-z_][a-z0-9_]{{0,30}}\(({ARGUMENT}(, {ARGUMENT}){{0,5}})?\)( -> (int|str|None))?:",
    "ReAct": r"(Thought: .{1,300}\nAction: (search|lookup)\[.{1,100}\]\nObservation: .{1,300}\n){1,5}Answer: .{1,200}",
    "(a|b)*a(a|b){30}": "(a|b)*a(a|b){30}",
    "((a{1,100}){1,100}){1,100}": "((a{1,100}){1,100}){1,100}",
    "([a-z]{1,10} ?){0,40}x": "([a-z]{1,10} ?){0,40}x",
    ".{1,100000}": ".{1,100000}",
}


@dataclass(slots=True)
class Vocabulary:
    """A tokenizer as fsm/ sees it, and as llguidance does."""

    name: str
    tables: TokenizerTables
    encode: Encode
    build_ms: float
    tokens: list[bytes | None]
    matchers: Matchers


@dataclass(slots=True)
class Result:
    """Of one pattern and vocabulary: milliseconds by stage, and the sizes."""

    stages: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    refused: str = ""
    other: str = ""

    @property
    def total(self) -> float:
        return sum(self.stages.values())


class Clock:
    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.times.setdefault(name, []).append(1e3 * (time.perf_counter() - before))


def compile_once(pattern: str, vocabulary: Vocabulary, clock: Clock) -> tuple[TokenTable, int]:
    """compiler.compile_pattern in stages; the walk is also part of the table, so its time is taken off there."""
    budget = Budget()
    with clock.stage("parse"):
        node = parse_pattern(pattern)
    with clock.stage("dfa"):
        large = determinise(build_nfa(node, budget), budget)
    with clock.stage("minimise"):
        small = minimise(large, budget)
    with clock.stage("bytes"):
        dfa = lower(small, budget)
    with clock.stage("walk"):
        walk_tokens(dfa, vocabulary.tables, budget)
    with clock.stage("table"):
        table = build_table(dfa, vocabulary.tables, vocabulary.encode, budget)
    clock.times["table"][-1] = max(clock.times["table"][-1] - clock.times["walk"][-1], 0.0)
    with clock.stage("masks"):
        table.masks(range(table.rows))
    return table, len(dfa.final)


def measure(pattern: str, vocabulary: Vocabulary) -> Result:
    result = Result(other=measure_other(pattern, vocabulary))
    before = time.perf_counter()
    try:
        compile_once(pattern, vocabulary, Clock())
    except GrammarError as error:
        result.refused = f"{error.message} ({1e3 * (time.perf_counter() - before):.0f} ms)"
        return result
    repeats = REPEATS if time.perf_counter() - before < 0.3 else 2
    clock = Clock()
    for _ in range(repeats):
        table, states = compile_once(pattern, vocabulary, clock)
    result.stages = {name: statistics.median(values) for name, values in clock.times.items()}
    result.sizes = {
        "byte states": states,
        "states": len(table.row),
        "classes": table.transitions.shape[1],
        "rows": table.rows,
        "canonical": int((table.canonical >= 0).sum()),
        "first jump": len(plan_jump(table, 0, 1000).tokens),
        "KiB": (table.nbytes - table.token_class.nbytes) >> 10,
    }
    return result


def measure_other(pattern: str, vocabulary: Vocabulary) -> str:
    """llguidance's milliseconds to a matcher and its first mask."""
    mask = np.zeros(vocabulary.matchers.words, np.int32)
    times = []
    for _ in range(REPEATS + 1):
        before = time.perf_counter()
        vocabulary.matchers.new(grammar_of(parse_pattern(pattern))).fill(mask)
        times.append(1e3 * (time.perf_counter() - before))
    return f"{statistics.median(times[1:]):.1f}"


def real(folder: str) -> Vocabulary:
    tokenizer = load_tokenizer(folder)
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return _vocabulary(tokens, tokenizer.eos_ids, lambda text: tokenizer.encode(text, add_special_tokens=False))


def made_up(size: int) -> Vocabulary:
    """SmolLM2's tokens, and as many joined pairs of its words as are missing. Its encoding is SmolLM2's."""
    tokenizer = load_tokenizer(embedded_model())
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    words = [token for token in tokens if token and token[:1] == b" " and token[1:].isalpha()]
    tails = [token for token in tokens if token and token.isalpha()]
    known = set(tokens)
    for place in range(size * 4):
        if len(tokens) == size:
            break
        word = words[place * 7919 % len(words)] + tails[place * 104729 % len(tails)]
        if word not in known:
            known.add(word)
            tokens.append(word)
    return _vocabulary(tokens, tokenizer.eos_ids, lambda text: tokenizer.encode(text, add_special_tokens=False))


def _vocabulary(tokens: list[bytes | None], eos: Sequence[int], encode: Encode) -> Vocabulary:
    build: Callable[[], TokenizerTables] = lambda: build_tables(tokens, eos)  # noqa: E731
    build()
    before = time.perf_counter()
    tables = build()
    milliseconds = 1e3 * (time.perf_counter() - before)
    names = [b"<%d>" % i if token is None else token for i, token in enumerate(tokens)]
    special = [i for i, token in enumerate(tokens) if token is None]
    matchers = Matchers(names, special, eos, encode)
    return Vocabulary(f"{len(tokens):,} tokens", tables, encode, milliseconds, tokens, matchers)


def show(vocabulary: Vocabulary, results: dict[str, Result]) -> None:
    print(f"\n{vocabulary.name}; trie {len(vocabulary.tables.parent):,} nodes, built in {vocabulary.build_ms:.0f} ms")
    sizes = ("byte states", "states", "classes", "rows", "canonical", "first jump", "KiB")
    print(f"{'ms':27}" + "".join(f"{s:>9}" for s in STAGES) + f"{'total':>9}{'llguid.':>9}  " + "  ".join(sizes))
    for name, result in results.items():
        if result.refused:
            print(f"{name:27}{result.refused}; llguidance {result.other}")
            continue
        row = "".join(f"{result.stages[s]:9.1f}" for s in STAGES) + f"{result.total:9.1f}{result.other:>9}  "
        print(f"{name:27}{row}" + "  ".join(f"{result.sizes[s]:{len(s)},}" for s in sizes))
    print(f"target: a grammar of 500 states at 152k tokens within {TARGET_MS:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="constrained decoding: what compiling a grammar costs")
    parser.add_argument(
        "--tokenizer", action="append", default=[], help="a folder with tokenizer.json; may be repeated"
    )
    parser.add_argument("--only", nargs="*", help="names of patterns")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    vocabularies = [real(folder) for folder in options.tokenizer] or [real(embedded_model()), made_up(151_936)]
    figures: dict[str, Any] = {}
    for vocabulary in vocabularies:
        chosen = {n: p for n, p in PATTERNS.items() if not options.only or n in options.only}
        results = {name: measure(pattern, vocabulary) for name, pattern in chosen.items()}
        show(vocabulary, results)
        figures[vocabulary.name] = {
            name: {"ms": r.stages, "sizes": r.sizes, "refused": r.refused, "llguidance_ms": r.other}
            for name, r in results.items()
        }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
