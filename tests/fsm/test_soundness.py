"""Soundness at scale, with the real tokenizer: what is walked under the masks matches, and the masks allow no less.

Patterns of tests/data/patterns.txt and of grammars.py, schemas of tests/data: those of the samples by hand, and 310
made at random from the names, types and nestings that tools and configurations have. CI takes a sample;
`pytest tests/fsm/test_soundness.py --thorough` takes all, in some minutes, and `-s` shows the totals.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grammars
import jsonschema
import numpy as np
import pytest

from actorserve.fsm import reference
from actorserve.fsm.budget import Budget
from actorserve.fsm.canonical import NONE
from actorserve.fsm.compiler import compile_tokens
from actorserve.fsm.errors import BudgetError, GrammarError
from actorserve.fsm.json_schema import schema_to_syntax
from actorserve.fsm.pattern import parse_pattern
from actorserve.fsm.spelling import policy
from actorserve.fsm.syntax import Node
from actorserve.fsm.token_table import END, TokenTable
from actorserve.fsm.vocabulary import TokenizerTables, build_tables
from actorserve.models.tokenizer import load_tokenizer

DATA = Path(__file__).parent.parent / "data"
SAMPLES = ("scalars", "enums", "strings", "arrays", "objects", "combinators", "tools")
POLICIES = ("spaced", "compact", "any 2", "indent 2")
SEED = 20261125
LONG = 60
"""Tokens after which a walk heads for the nearest end."""
pytestmark = pytest.mark.timeout(3600)


@dataclass(frozen=True)
class Real:
    tokens: list[bytes | None]
    tables: TokenizerTables
    encode: Callable[[str], list[int]]


@dataclass
class Totals:
    """What was done; shown with `pytest -s`."""

    grammars: int = 0
    too_large: int = 0
    walks: int = 0
    states: int = 0
    names: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def real(smollm: str) -> Real:
    tokenizer = load_tokenizer(smollm)
    tokens = [None if i in tokenizer.added else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    return Real(tokens, build_tables(tokens, tokenizer.eos_ids), encode)


@pytest.fixture
def totals() -> Iterator[Totals]:
    found = Totals()
    yield found
    print(f"\n{found}")


def patterns() -> list[str]:
    return [*(DATA / "patterns.txt").read_text(encoding="utf-8").splitlines(), *grammars.PATTERNS]


def schemas() -> list[dict[str, Any]]:
    """{"schema", "reference": the same in words that Python's `re` understands}"""
    by_hand = [case for name in SAMPLES for case in json.loads((DATA / "json_schemas" / f"{name}.json").read_text())]
    made = (DATA / "tool_and_config_schemas.jsonl").read_text(encoding="utf-8").splitlines()
    return [*by_hand, *({"schema": json.loads(line)} for line in made)]


def compiled(node: Node, real: Real, totals: Totals, name: str) -> TokenTable | None:
    """None: larger than a grammar may be, or without a spelling in this vocabulary."""
    totals.grammars += 1
    try:
        return compile_tokens(node, real.tables, real.encode, Budget(seconds=60.0))
    except BudgetError:
        totals.too_large += 1
        totals.names.append(name[:60])
    except GrammarError as error:
        assert "cannot spell" in error.message, name
    return None


class Walker:
    """Random walks under the masks: a class of tokens first, then one of its tokens, so that rare ones come too."""

    def __init__(self, table: TokenTable, real: Real) -> None:
        self.table, self.real = table, real
        self.members = np.argsort(table.token_class, kind="stable")
        self.first = np.searchsorted(table.token_class[self.members], np.arange(table.transitions.shape[1] + 1))
        self.distance = distances(table)

    def classes(self, state: int) -> np.ndarray:
        """The classes that go on from here; of a forced state that of its token."""
        if self.table.canonical[state] != NONE:
            return self.table.token_class[[self.table.canonical[state]]].astype(np.int64)
        going = np.flatnonzero(self.table.transitions[state] >= 0)
        return going[going != END]

    def walk(self, rng: random.Random) -> tuple[bytes, list[int]]:
        """(the text of a finished output, its states)"""
        state, text, states = 0, b"", [0]
        while True:
            classes = self.classes(state)
            if self.table.final[state] and (not len(classes) or rng.random() < 0.15 or len(states) > LONG):
                return text, states
            after = self.table.transitions[state, classes]
            if len(states) > LONG:
                classes = classes[self.distance[after] == self.distance[after].min()]
            number = int(rng.choice(classes))
            token = int(self.table.canonical[state])
            if token == NONE:
                token = int(self.members[rng.randrange(self.first[number], self.first[number + 1])])
            assert self.table.allows(state, token)
            text += self.real.tokens[token] or b""
            state = self.table.step(state, token)
            states.append(state)


def distances(table: TokenTable) -> np.ndarray:
    """int64 [S]: tokens to the nearest final state, the way that masks leave."""
    moves = table.transitions.astype(np.int64)
    moves[:, END] = -1
    forced = table.canonical != NONE
    only = moves[forced, table.token_class[table.canonical[forced]]]
    moves[forced] = -1
    moves[forced, 0] = only
    found = np.where(table.final, 0, 1 << 30)
    while True:
        beyond = np.where(moves >= 0, found[moves], 1 << 30).min(axis=1) + 1
        better = np.minimum(found, beyond)
        if (better == found).all():
            assert found.max() < 1 << 30, "a state without a way out"
            return found
        found = better


def check_masks(table: TokenTable, node: Node, walker: Walker, real: Real, rng: random.Random, count: int) -> int:
    """Compare whole masks with the reference at states of a walk; returns at how many."""
    state, ways = 0, reference.start(node)
    for done in range(count):
        mask = np.unpackbits(table.masks([int(table.row[state])]).view(np.uint8), bitorder="little")
        mask = mask[: len(real.tokens)].astype(bool)
        wanted = np.array(allowed(ways, real))
        if table.canonical[state] != NONE:
            assert np.flatnonzero(mask).tolist() == [table.canonical[state]] and wanted[mask].all()
        else:
            assert (mask == wanted).all(), [real.tokens[t] for t in np.flatnonzero(mask != wanted)[:5]]
        assert [bool(mask[t]) for t in real.tables.eos] == [bool(table.final[state])] * len(real.tables.eos)
        classes = walker.classes(state)
        if not len(classes):
            return done + 1
        token = int(rng.choice(np.flatnonzero(mask & ~np.isin(np.arange(len(mask)), real.tables.eos)).tolist()))
        ways, state = reference.walk(ways, real.tokens[token] or b""), table.step(state, token)
    return count


def allowed(ways: reference.State, real: Real) -> list[bool]:
    """reference.allowed, with each beginning that tokens share walked once."""
    known: dict[bytes, reference.State] = {b"": ways}

    def after(data: bytes) -> reference.State:
        if data not in known:
            before = after(data[:-1])
            known[data] = reference.step(before, data[-1]) if before else before
        return known[data]

    eos = set(real.tables.eos)
    return [None in ways if t in eos else bool(data) and bool(after(data or b"")) for t, data in enumerate(real.tokens)]


def chosen(items: list[Any], few: int, thorough: bool) -> list[Any]:
    return items if thorough else random.Random(SEED).sample(items, few)


def test_patterns(real: Real, thorough: bool, totals: Totals) -> None:
    for pattern in chosen(patterns(), 12, thorough):
        try:
            node = parse_pattern(pattern)
        except GrammarError:
            pytest.fail(f"refused: {pattern}")
        table = compiled(node, real, totals, pattern)
        if table is None:
            continue
        walker, rng, matches = Walker(table, real), random.Random(pattern), re.compile(pattern).fullmatch
        for _ in range(40 if thorough else 8):
            text, _ = walker.walk(rng)
            assert matches(text.decode()), (pattern, text)
            totals.walks += 1
        totals.states += check_masks(table, node, walker, real, rng, 4 if thorough else 2)


def test_schemas(real: Real, thorough: bool, totals: Totals) -> None:
    for number, case in enumerate(chosen(schemas(), 8, thorough)):
        validator = jsonschema.validators.validator_for(case["schema"], jsonschema.Draft202012Validator)
        check = validator(case.get("reference", case["schema"]), format_checker=validator.FORMAT_CHECKER)
        whitespace = policy(POLICIES[number % len(POLICIES)])
        node = schema_to_syntax(case["schema"], whitespace)
        name = json.dumps(case["schema"])
        table = compiled(node, real, totals, name)
        if table is None:
            continue
        walker, rng = Walker(table, real), random.Random(name)
        for _ in range(20 if thorough else 4):
            text, _ = walker.walk(rng)
            check.validate(json.loads(text.decode()))
            totals.walks += 1
        totals.states += check_masks(table, node, walker, real, rng, 2 if thorough else 1)
