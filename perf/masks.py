"""What the mask of each token costs: our tables, llguidance and, where it is installed, xgrammar, side by side.

    python -m actorserve.perf.masks [--tokens 200] [--only NAME ...] [--large]

Rule: all of them follow the same tokens, drawn at random from what the first one allows, in the same run; a figure is
the time to get one mask int32 [ceil(V / 32)] on the host, and its step. Tables have no mask to fill in a decode step on
a GPU; here they fill one as the CPU's sampler does.
"""

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from ..fsm.compiler import compile_pattern
from ..fsm.errors import GrammarError
from ..fsm.guidance import ebnf_grammar, grammar_of, json_grammar
from ..fsm.matcher import Matcher
from ..fsm.pattern import parse_pattern
from ..models.embedded import embedded_model
from ..sampler.grammar import Grammars
from .fsm import PATTERNS, Vocabulary, made_up, real

try:
    import xgrammar
except ImportError:  # never a dependency: a comparator of whoever has it
    xgrammar = None

OTHERS: dict[str, Any] = {
    "any JSON object": {"type": "object"},
    "linked list": {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["value", "next"],
    },
    "arithmetic, GBNF": 'root ::= t (("+" | "-") t)*\nt ::= [0-9]+ | "(" root ")"',
}
"""Schemas and GBNF that no table can have."""


class Way(Protocol):
    """A grammar as one library has it."""

    def mask(self) -> np.ndarray:
        """int32 [words]: what may come next."""

    def step(self, token: int) -> None:
        """Go on by a token. Raises ValueError if it can't come."""


class Tables:
    """Ours."""

    def __init__(self, pattern: str, vocabulary: Vocabulary) -> None:
        table = compile_pattern(pattern, vocabulary.tables, vocabulary.encode)
        self._grammars = Grammars(1, vocabulary.tables.size, torch.device("cpu"))
        self._grammars.load(0, table.token_class, table.transitions, table.canonical)
        self._grammars.bind(0, 0, 0)
        self._slots = np.array([0])

    def mask(self) -> np.ndarray:
        mask: np.ndarray = self._grammars.mask(self._slots, None)[0].numpy()
        return mask

    def step(self, token: int) -> None:
        self._grammars.advance(self._slots, torch.tensor([token]))


class Guidance:
    """llguidance's matcher."""

    def __init__(self, grammar: str, vocabulary: Vocabulary) -> None:
        self._matcher: Matcher = vocabulary.matchers.new(grammar)
        self._mask = np.zeros(vocabulary.matchers.words, np.int32)

    def mask(self) -> np.ndarray:
        self._matcher.fill(self._mask)
        return self._mask

    def step(self, token: int) -> None:
        self._matcher.consume([token])


class Xgrammar:
    """xgrammar's matcher."""

    def __init__(self, grammar: Any, vocabulary: Vocabulary) -> None:
        names = [b"<%d>" % i if token is None else token for i, token in enumerate(vocabulary.tokens)]
        info = xgrammar.TokenizerInfo(names, stop_token_ids=list(vocabulary.tables.eos))
        compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        if isinstance(grammar, dict):
            options = {"any_whitespace": False, "separators": (", ", ": "), "strict_mode": True}
            compiled = compiler.compile_json_schema(json.dumps(grammar), **options)
        else:
            compiled = compiler.compile_grammar(grammar) if "::=" in grammar else compiler.compile_regex(grammar)
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary.tables.size)

    def mask(self) -> np.ndarray:
        self._matcher.fill_next_token_bitmask(self._mask)
        mask: np.ndarray = self._mask[0].numpy()
        return mask

    def step(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise ValueError(f"token {token} is refused")


def ways_of(grammar: Any, vocabulary: Vocabulary) -> dict[str, Way]:
    """The libraries that can have the grammar: a pattern, GBNF, or a schema."""
    regular = isinstance(grammar, str) and "::=" not in grammar
    if regular:
        text = grammar_of(parse_pattern(grammar))
    else:
        text = json_grammar(grammar) if isinstance(grammar, dict) else ebnf_grammar(grammar)
    ways: dict[str, Way] = {}
    if regular:
        with contextlib.suppress(GrammarError):  # too large: that is what the others are for
            ways["tables"] = Tables(grammar, vocabulary)
    ways["llguidance"] = Guidance(text, vocabulary)
    if xgrammar is not None:
        ways["xgrammar"] = Xgrammar(grammar, vocabulary)
    return ways


def measure(ways: dict[str, Way], eos: tuple[int, ...], tokens: int) -> dict[str, list[float]]:
    """Microseconds of each mask and step, by library; a library that refuses a token, or has no mask, ends there."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    rng = random.Random(0)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = time.perf_counter()
        try:
            return work()
        except (ValueError, GrammarError):
            del ways[name]
        finally:
            times[name][-1] += 1e6 * (time.perf_counter() - before)

    for _ in range(tokens):
        for name in ways:
            times[name].append(0.0)
        masks = {name: timed(name, way.mask) for name, way in list(ways.items())}
        if not ways:
            break
        allowed = np.flatnonzero(np.unpackbits(masks[next(iter(ways))].view(np.uint8), bitorder="little"))
        allowed = allowed[~np.isin(allowed, eos)]
        if not len(allowed):
            for name in ways:  # of the end: no step
                del times[name][-1]
            break
        token = int(allowed[rng.randrange(len(allowed))])
        for name, way in list(ways.items()):
            timed(name, partial(way.step, token))
    return times


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of each grammar")
    parser.add_argument("--only", nargs="*", help="names of grammars")
    parser.add_argument("--large", action="store_true", help="a vocabulary of 151,936 tokens")
    options = parser.parse_args()
    vocabulary = made_up(151_936) if options.large else real(embedded_model())
    print(f"{vocabulary.name}; microseconds a mask: median / worst, of so many tokens")
    for name, grammar in {**PATTERNS, **OTHERS}.items():
        if options.only and name not in options.only:
            continue
        times = measure(ways_of(grammar, vocabulary), vocabulary.tables.eos, options.tokens)
        shown = (f"{way} {statistics.median(t):8.1f} / {max(t):9.1f} ({len(t)})" for way, t in times.items() if t)
        print(f"{name:27}" + "   ".join(shown), flush=True)


if __name__ == "__main__":
    main()
