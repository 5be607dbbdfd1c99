"""PatternMatcher: StopMatcher for requests whose output also ends where a regular expression matches.

The text actor has one per request with `stop_regex`. Patterns are those of fsm/pattern.py, run as automata, so that no
pattern and no text can take long. Invariant: as StopMatcher's: what it shows and what it names depend on the text
alone, not on how it was cut into pieces. Which match counts: the one that is complete first, for there the output ends,
so the shortest; of several that end at the same character, the one that begins first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from ..errors import RequestError
from ..fsm.alphabet import Alphabet
from ..fsm.budget import Budget
from ..fsm.dfa import determinise
from ..fsm.errors import GrammarError
from ..fsm.minimise import minimise
from ..fsm.nfa import build_nfa
from ..fsm.pattern import parse_pattern
from ..fsm.syntax import Node, Text

LIMITS: Final = {"pattern": 256, "nfa_states": 1000, "dfa_states": 1000, "seconds": 0.2}
"""A text actor compiles it while streams wait."""
REMEMBERED: Final = 256
"""Compiled patterns."""


@dataclass(frozen=True, slots=True)
class Automaton:
    """`delta[state][class]` is the next state, -1 where a match cannot go on; state 0 is the start."""

    delta: list[list[int]]
    final: list[bool]
    alphabet: Alphabet


@dataclass(slots=True)
class _Search:
    """A pattern at work. `begun`: of the matches under way, by state the place where the first of them began."""

    name: str
    automaton: Automaton
    begun: dict[int, int]


class PatternMatcher:
    """After a match it shows nothing more."""

    __slots__ = ("_held", "_keep", "_place", "_searches", "matched")

    def __init__(self, stops: Sequence[str], patterns: Sequence[str], trim: bool = True) -> None:
        """`trim` False: the match itself is shown, too. Raises RequestError for patterns that are none."""
        self._searches = [_Search(stop, _text_automaton(stop), {}) for stop in stops]
        self._searches += [_Search(p, a, {}) for p, a in zip(patterns, automata_of(patterns), strict=True)]
        self._keep = not trim
        self._held = ""
        self._place = 0
        """Characters so far."""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take the next piece; return what is safe to show. Look at `matched` afterwards."""
        if self.matched is not None or not text:
            return ""
        shown = self._place - len(self._held)
        seen = self._held + text
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        classes = [search.automaton.alphabet.of(codes).tolist() for search in self._searches]
        for i in range(len(text)):
            begin = self._step([row[i] for row in classes])
            self._place += 1
            if begin is not None:
                self._held = ""
                return seen[: (self._place if self._keep else begin) - shown]
        begun = [place for search in self._searches for place in search.begun.values()]
        hold = min(begun, default=self._place) - shown
        self._held = seen[hold:]
        return seen[:hold]

    def finish(self) -> str:
        """The output ended: what was held back is no match."""
        held, self._held = self._held, ""
        return held

    def _step(self, classes: Sequence[int]) -> int | None:
        """Take a character, given by its class in each alphabet; where the match begins that it completes, if any."""
        found: list[tuple[int, str]] = []
        for search, class_ in zip(self._searches, classes, strict=True):
            delta, final = search.automaton.delta, search.automaton.final
            begun: dict[int, int] = {}
            for state, place in (*search.begun.items(), (0, self._place)):
                after = delta[state][class_]
                if after >= 0:
                    begun[after] = min(place, begun.get(after, place))
            found += [(place, search.name) for state, place in begun.items() if final[state]]
            search.begun = begun
        if not found:
            return None
        begin, self.matched = min(found, key=lambda match: match[0])
        return begin


def automata_of(patterns: Sequence[str]) -> list[Automaton]:
    """The patterns' automata. Raises RequestError as automaton_of does; and for too many states of all of them, as
    each may have a match under way at each character."""
    automata: list[Automaton] = []
    for pattern in patterns:
        automata.append(automaton_of(pattern))
        if sum(len(automaton.final) for automaton in automata) > LIMITS["dfa_states"]:
            text = f"the patterns of stop_regex need more than {LIMITS['dfa_states']} dfa states together"
            raise RequestError(text, param="stop_regex")
    return automata


@lru_cache(REMEMBERED)
def automaton_of(pattern: str) -> Automaton:
    """A pattern's automaton. Raises RequestError for one that is malformed, too large, anchored, or matches nothing."""
    try:
        if _is_anchored(pattern):
            raise RequestError("^, $, \\A and \\Z are not for stop_regex, which is searched everywhere")
        budget = Budget(**LIMITS)  # type: ignore[arg-type]
        budget.need_pattern(len(pattern))
        automaton = _compiled(parse_pattern(pattern), budget)
        if automaton.final[0]:
            raise RequestError("it matches the empty text, where each output begins")
    except (RequestError, GrammarError) as error:
        raise RequestError(f"stop_regex {pattern[:80]!r}: {error.message}", param="stop_regex") from None
    return automaton


@lru_cache(REMEMBERED)
def _text_automaton(text: str) -> Automaton:
    return _compiled(Text(text), Budget())


def _compiled(node: Node, budget: Budget) -> Automaton:
    dfa = minimise(determinise(build_nfa(node, budget), budget), budget)
    return Automaton(dfa.delta.tolist(), dfa.final.tolist(), dfa.alphabet)


def _is_anchored(pattern: str) -> bool:
    """Whether it has an anchor anywhere; a ^ at the beginning of a class is none."""
    in_class = escaped = False
    first = 0  # where a ] would be a member of the class
    for i, character in enumerate(pattern):
        if escaped:
            escaped = False
            if character in "AZ" and not in_class:
                return True
        elif character == "\\":
            escaped = True
        elif in_class:
            in_class = character != "]" or i == first
        elif character in "^$":
            return True
        else:
            in_class = character == "["
            first = i + 1 + pattern.startswith("^", i + 1)
    return False
