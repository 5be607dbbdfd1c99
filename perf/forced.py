"""How many forwards jump-forward saves: tokens that a grammar forces, in tool calls and JSON of real shapes.

    python -m actorserve.perf.forced [--seed 0] [--json FILE]

No model runs: each instance is followed through its grammar's token table with SmolLM2's tokenizer, as the scheduler
does. A forced token needs no forward of its own, so forwards are tokens divided by those that are drawn. Tool calls are
the instances of tests/data/json_schemas/tools.json in the form of Hermes and Qwen, tool_choice naming the function, and
their arguments alone; JSON is the schemas of tests/data/tool_and_config_schemas.jsonl, filled with made-up values that
validate. Reference: 840 real instances of MaskBench with the same whitespace and tokenizer, counted once with other
libraries: JSON 1.34, the function calls among it (BFCL) 2.47.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import numpy as np

from ..actors.constraint import Grammar
from ..actors.fsm_worker import syntax_of
from ..actors.messages import GrammarSpec
from ..fsm.budget import Budget
from ..fsm.compiler import compile_tokens
from ..fsm.errors import GrammarError
from ..models.call_grammar import Calls, Function
from ..models.embedded import embedded_model
from .fsm import Vocabulary, real

DATA = Path(__file__).parent.parent / "tests" / "data"
WORDS = (
    "the quick report about Berlin was sent to Alice and her team on Monday because prices of coffee rose again in "
    "spring while most shops stayed open until late"
).split()
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
OPTIONAL = 0.5
"""How often a member comes that need not."""
MOST = 4
"""Elements of an array, words of a string."""


def tool_calls() -> Iterator[tuple[GrammarSpec, str]]:
    """(grammar, text) of each call."""
    for case in json.loads((DATA / "json_schemas" / "tools.json").read_text()):
        name = case["name"].replace(" ", "_").replace("-", "_")
        if case["schema"].get("type") != "object":
            continue
        calls = Calls("hermes", [Function(name, case["schema"])], False)
        spec = GrammarSpec("tool_calls", msgspec.json.encode(calls).decode())
        for arguments in case["valid"]:
            call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            yield spec, f"<tool_call>\n{call}\n</tool_call>"


def arguments() -> Iterator[tuple[GrammarSpec, str]]:
    """(grammar, text) of the arguments of each call alone, as a JSON schema."""
    for case in json.loads((DATA / "json_schemas" / "tools.json").read_text()):
        for value in case["valid"]:
            yield GrammarSpec("json_schema", json.dumps(case["schema"])), json.dumps(value, ensure_ascii=False)


def documents(seed: int) -> Iterator[tuple[GrammarSpec, str]]:
    """(grammar, text) of one document for each schema that has one."""
    rng = random.Random(seed)
    for line in (DATA / "tool_and_config_schemas.jsonl").read_text().splitlines():
        schema = json.loads(line)
        value = filled(schema, rng)
        if jsonschema.Draft202012Validator(schema, format_checker=FORMATS).is_valid(value):
            yield GrammarSpec("json_schema", line), json.dumps(value, ensure_ascii=False)


def filled(schema: Any, rng: random.Random) -> Any:
    """A value such as one would expect; it need not validate."""
    if not isinstance(schema, dict):
        return None
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return filled(rng.choice(schema[name]), rng)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema.get("type", "string")
    match rng.choice(kind) if isinstance(kind, list) else kind:
        case "object":
            must = schema.get("required", [])
            members = schema.get("properties", {}).items()
            return {name: filled(sub, rng) for name, sub in members if name in must or rng.random() < OPTIONAL}
        case "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", MOST)
            count = rng.randint(least, max(least, min(most, MOST)))
            return [filled(schema.get("items", {}), rng) for _ in range(count)]
        case "integer":
            step = schema.get("multipleOf", 1)
            return rng.randint(schema.get("minimum", 1), schema.get("maximum", 500)) // step * step
        case "number":
            return round(rng.uniform(schema.get("minimum", 0), schema.get("maximum", 100)), 2)
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
        case _:
            text = " ".join(rng.choices(WORDS, k=rng.randint(1, MOST)))
            return text[: schema.get("maxLength", len(text))].strip()


def follow(grammar: Grammar, vocabulary: Vocabulary, text: str) -> tuple[int, int]:
    """(tokens, forced ones among them) of an output that is `text`. Raises ValueError if the grammar has no such."""
    rest, state, tokens, forced = text.encode(), 0, 0, 0
    while rest:
        token = grammar.forced(state)
        forced += token >= 0
        if token < 0:
            token = drawn(grammar, vocabulary, state, rest)
        spelled = vocabulary.tokens[token] or b""
        if not spelled or not rest.startswith(spelled):
            raise ValueError(f"{text}: the grammar goes elsewhere at {rest[:20]!r}")
        rest, state, tokens = rest[len(spelled) :], grammar.step(state, token), tokens + 1
    if not grammar.final(state):
        raise ValueError(f"{text}: not the end")
    return tokens, forced


def drawn(grammar: Grammar, vocabulary: Vocabulary, state: int, rest: bytes) -> int:
    """The token that a model would draw: the tokenizer's first, or the longest that the grammar allows."""
    first = vocabulary.encode(rest.decode(errors="ignore"))[0]
    if grammar.step(state, first) >= 0:
        return int(first)
    fits = [t for t, spelled in enumerate(vocabulary.tokens) if spelled and rest.startswith(spelled)]
    allowed = [t for t in fits if grammar.step(state, t) >= 0]
    if not allowed:
        raise ValueError(f"no token goes on with {rest[:20]!r}")
    return max(allowed, key=lambda t: len(vocabulary.tokens[t] or b""))


def measure(pairs: Iterator[tuple[GrammarSpec, str]], vocabulary: Vocabulary) -> dict[str, float]:
    """Sums over all pairs whose grammar has tables."""
    tokens = forced = count = other = 0
    ratios = []
    for spec, text in pairs:
        try:
            table = compile_tokens(syntax_of(spec), vocabulary.tables, vocabulary.encode, Budget())
        except GrammarError:
            other += 1
            continue
        grammar = Grammar(0, table.token_class, table.transitions, np.asarray(table.canonical))
        of_text, of_those = follow(grammar, vocabulary, text)
        count, tokens, forced = count + 1, tokens + of_text, forced + of_those
        ratios.append(of_text / max(1, of_text - of_those))
    return {
        "instances": count, "without_tables": other, "tokens": tokens, "forced": forced,
        "forwards_saved": tokens / (tokens - forced), "median": statistics.median(ratios),
    }  # fmt: skip


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    vocabulary = real(embedded_model())
    results = {
        "tool calls": measure(tool_calls(), vocabulary),
        "arguments": measure(arguments(), vocabulary),
        "JSON": measure(documents(options.seed), vocabulary),
    }
    print(f"{'':<12}{'instances':>10}{'no tables':>10}{'tokens':>8}{'forced':>8}{'forwards saved':>16}{'median':>8}")
    for name, r in results.items():
        print(
            f"{name:<12}{r['instances']:>10}{r['without_tables']:>10}{r['tokens']:>8}{r['forced']:>8}"
            f"{r['forwards_saved']:>15.2f}x{r['median']:>7.2f}x"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
