"""Syntax tree to a nondeterministic automaton over characters, without empty moves.

Used by dfa.py. A state is a position of the unrolled expression: a character, or a class of characters, that is to come
next (the follow automaton of Glushkov, "The abstract theory of automata", 1961, seen from the other side of the
character). Positions are made from the end of the expression to its start, each with the set of what may come after it,
so there is nothing to eliminate; x{0,n} becomes (x(x(...)?)?)?, whose sets stay small; and what ends alike, as the
options of many schemas do, is made once. Where one position of a set accepts all that another one does, the other one
is left out: what counted repeats leave then is the one that may still repeat most often, and a repeat of repeats has
as many sets as it has lengths, not as it has ways to get there (subsumption as in De Wulf et al., "Antichains: a new
algorithm for checking universality of finite automata", 2006). Invariant: from every position a match can be completed.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Final

from .budget import Budget
from .errors import BudgetError, EmptyLanguage
from .syntax import SURROGATES, Chars, Choice, Concat, Node, Ranges, Repeat, Text

FINAL: Final = 0
"""The position behind the end: a set that holds it accepts."""

MAX_DEPTH: Final = 200
MAX_FOLLOW: Final = 1_000_000
"""Members of all sets together."""
TOPS: Final = 4
"""Chains per charset that a new position is compared with."""
MAX_COMPARED: Final = 200_000
"""Members of all sets that are compared; positions that come later are not."""
NEVER: Final = -1 << 40
"""Below all positions and loops."""

Positions = frozenset[int]
END: Final[Positions] = frozenset({FINAL})
NONE: Final[Positions] = frozenset()


@dataclass(slots=True)
class Nfa:
    """Position p > 0 reads a character of charsets[charset[p]] and goes on at follow[p]."""

    start: Positions
    charset: list[int]
    follow: list[Positions]
    charsets: list[Ranges]
    chain: dict[int, int]
    """Of two positions with the same one the later accepts all that the earlier one does. It is the first of them."""
    above: set[int]
    """The positions that are not the first of their chains."""

    def reduced(self, positions: Positions) -> Positions:
        """The same without those that others make superfluous."""
        return positions if self.above.isdisjoint(positions) else _highest(positions, self.chain)


def _highest(positions: Positions, chain: dict[int, int]) -> Positions:
    """The last one of each chain."""
    ascending = sorted(positions)
    last = dict(zip(map(chain.__getitem__, ascending), ascending, strict=True))
    return positions if len(last) == len(positions) else frozenset(last.values())


@dataclass(slots=True)
class _Builder:
    budget: Budget
    charset: list[int] = field(default_factory=lambda: [-1])
    follow: list[Positions] = field(default_factory=lambda: [NONE])
    numbers: dict[Ranges, int] = field(default_factory=dict)
    by_id: dict[int, int] = field(default_factory=dict)
    """The same by the ids of the tree's ranges: those of all letters take longer to hash than a position to make."""
    letters: dict[str, int] = field(default_factory=dict)
    made: dict[tuple[int, Positions], Positions] = field(default_factory=dict)
    """By charset and what follows: the set of that position alone."""
    stars: dict[tuple[Node, Positions], tuple[Positions, Positions]] = field(default_factory=dict)
    """By body and what follows the loop: where x* and x+ begin."""
    loops: list[Positions] = field(default_factory=lambda: [NONE])
    """Member -i of a set stands for all of loops[i]: where the body of a starred expression is entered again."""
    chain: dict[int, int] = field(default_factory=lambda: {FINAL: FINAL})
    """As Nfa.chain; what stands for a loop is a chain of its own."""
    above: set[int] = field(default_factory=set)
    """Positions that are not the first of their chains."""
    tops: defaultdict[int, deque[int]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TOPS)))
    """By charset: the last positions of some chains, lately met ones first."""
    steps: int = 0
    members: int = 0
    compared: int = 0

    def build(self, node: Node, then: Positions, depth: int = 0) -> Positions:
        """Returns where `node` followed by `then` begins; empty if nothing matches that."""
        self.steps += 1
        if self.steps & 0x3FF == 0:
            self.budget.check()
        if depth > MAX_DEPTH:
            raise BudgetError("levels of nesting", MAX_DEPTH)
        if not then:
            return NONE
        match node:
            case Text(text):
                return self._text(text, then)
            case Chars(ranges):
                return self._position(self._number(ranges), then) if ranges else NONE
            case Concat(parts):
                for part in reversed(parts):
                    then = self.build(part, then, depth + 1)
                return then
            case Choice(options):
                return self._union(*(self.build(option, then, depth + 1) for option in options))
            case Repeat():
                return self._repeat(node, then, depth + 1)

    def _repeat(self, repeat: Repeat, then: Positions, depth: int) -> Positions:
        node, low, high = repeat.node, repeat.low, repeat.high
        if high is None:
            then = self._star(node, then, depth)[min(low, 1)]
            low = max(low - 1, 0)
        else:
            end = then
            for _ in range(high - low):
                before, then = then, self._union(self.build(node, then, depth), end)
                if then == before:
                    break
        for _ in range(low):
            before, then = then, self.build(node, then, depth)
            if then == before:
                break
        return then

    def _star(self, node: Node, then: Positions, depth: int) -> tuple[Positions, Positions]:
        """Where node* and node+ begin."""
        found = self.stars.get((node, then))
        if found is None:
            loop = len(self.loops)
            self.loops.append(NONE)
            self.chain[-loop] = -loop
            again = self.build(node, frozenset({-loop}), depth)
            self.loops[loop] = self._union(again, then)
            found = self.stars[node, then] = frozenset({-loop}), again
        return found

    def _text(self, text: str, then: Positions) -> Positions:
        for character in reversed(text):
            number = self.letters.get(character)
            if number is None:
                code = ord(character)
                if SURROGATES[0] <= code <= SURROGATES[1]:
                    return NONE
                number = self.letters[character] = self.numbers.setdefault(((code, code),), len(self.numbers))
            then = self._position(number, then)
        return then

    def _position(self, number: int, then: Positions) -> Positions:
        found = self.made.get((number, then))
        if found is None:
            position = len(self.charset)
            self.budget.need_nfa_states(position)
            self.charset.append(number)
            self.follow.append(then)
            self.chain[position] = self._chain(position, number, then)
            found = self.made[number, then] = frozenset({position})
        return found

    def _chain(self, position: int, number: int, then: Positions) -> int:
        """The chain of a new position, which is the last one of it."""
        tops, chain = self.tops[number], self.chain
        alone = len(then) == 1 and self.above.isdisjoint(then)  # it is above nothing, or would have been made before
        if not alone and self.compared < MAX_COMPARED:
            last = {chain[one]: one for one in then}
            for place, top in enumerate(tops):
                other = self.follow[top]
                if len(other) > len(then):
                    continue
                self.compared += len(then)
                for one in other:
                    if last.get(chain[one], NEVER) < one:
                        break
                else:
                    del tops[place]
                    tops.appendleft(position)
                    self.above.add(position)
                    return chain[top]
        tops.appendleft(position)
        return position

    def _number(self, ranges: Ranges) -> int:
        number = self.by_id.get(id(ranges))
        if number is None:
            number = self.by_id[id(ranges)] = self.numbers.setdefault(ranges, len(self.numbers))
        return number

    def _union(self, *sets: Positions) -> Positions:
        union = NONE.union(*sets)
        if not self.above.isdisjoint(union):
            union = _highest(union, self.chain)
        self._count(union)
        return union

    def _count(self, union: Positions) -> None:
        self.members += len(union)
        if self.members > MAX_FOLLOW:
            raise BudgetError("nfa transitions", MAX_FOLLOW)

    def resolved(self, start: Positions) -> Nfa:
        """The automaton, with loops replaced by what they stand for."""
        known: dict[Positions, Positions] = {}

        def resolve(positions: Positions) -> Positions:
            if not positions or min(positions) >= 0:
                return positions
            found = known.get(positions)
            if found is None:
                seen = set(positions)
                waiting = [p for p in positions if p < 0]
                while waiting:
                    new = self.loops[-waiting.pop()] - seen
                    seen |= new
                    waiting += [p for p in new if p < 0]
                found = known[positions] = _highest(frozenset(p for p in seen if p >= 0), self.chain)
                self._count(found)
                self.budget.check()
            return found

        follow = [resolve(positions) for positions in self.follow]
        return Nfa(resolve(start), self.charset, follow, list(self.numbers), self.chain, self.above)


def build_nfa(node: Node, budget: Budget) -> Nfa:
    """Return the automaton of a syntax tree.

    Raises EmptyLanguage: it matches nothing. BudgetError: too many positions, too deep, or too slow.
    """
    builder = _Builder(budget)
    start = builder.build(node, END)
    if not start:
        raise EmptyLanguage
    return builder.resolved(start)
