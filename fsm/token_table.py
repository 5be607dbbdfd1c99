"""TokenTable: an automaton over tokens, in arrays that a sampler can follow without a host.

Made here once per grammar and tokenizer; used by the device tables, the jump planner (jump.py) and host checks. A step
is: mask the logits with the row of the state, draw, state = transitions[state, token_class[token]]. Invariants: from
every state a final one can be reached by tokens that the masks allow, so no mask is ever empty; the bit of an end
token is set exactly in final states; a token without bytes is never allowed; in a state with a canonical token that
token alone is allowed (canonical.py says why, and why jumps then change nothing).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .alphabet import Int32Array, Int64Array, numbered, random_words, ranges
from .budget import Budget
from .canonical import NONE, Canon, Encode
from .errors import Unspellable
from .token_graph import TokenGraph
from .token_walk import walk_tokens
from .utf8 import ByteDfa, Int16Array
from .vocabulary import BoolArray, TokenizerTables

NEVER: Final = 0
"""The class of tokens that no state allows."""
END: Final = 1
"""The class of the tokens that end an output."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """S states (0 is the start), K token classes, V token ids, R distinct mask rows."""

    fingerprint: str
    """Of the tokenizer's tables."""
    token_class: npt.NDArray[np.uint16]
    """uint16 [V]"""
    transitions: Int16Array
    """int16 [S, K]: the state after a token of a class, -1: the token can't come. END leads a final state to itself."""
    row: Int32Array
    """int32 [S]: the mask row of each state."""
    row_classes: npt.NDArray[np.uint8]
    """uint8 [R - C, ceil(K / 8)]: the classes that each of the first rows allows, bits from the low end."""
    row_token: Int32Array
    """int32 [C]: the token that each of the other rows allows."""
    canonical: Int32Array
    """int32 [S]: the only token of the state, or -1."""
    final: BoolArray
    """bool [S]: what came so far is a match."""
    complete: BoolArray
    """bool [S]: a match, and nothing but the end can follow: the output may end without asking the model."""
    byte_state: Int32Array
    """int32 [S]: the state of the automaton over bytes."""

    @property
    def rows(self) -> int:
        """R"""
        return len(self.row_classes) + len(self.row_token)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; masks are not among them."""
        arrays = (self.token_class, self.transitions, self.row, self.row_classes, self.row_token, self.canonical)
        return sum(array.nbytes for array in (*arrays, self.final, self.complete, self.byte_state))

    def allows(self, state: int, token: int) -> bool:
        """Whether the mask of the state has the token."""
        if self.canonical[state] != NONE:
            return bool(self.canonical[state] == token)
        return bool(self.transitions[state, self.token_class[token]] >= 0)

    def step(self, state: int, token: int) -> int:
        """The state after a token, -1 if it isn't allowed."""
        return int(self.transitions[state, self.token_class[token]]) if self.allows(state, token) else -1

    def masks(self, rows: Iterable[int]) -> npt.NDArray[np.uint32]:
        """Mask rows, uint32 [rows, ceil(V / 32)]: token t is bit t % 32 of word t // 32; bits from V on are 0."""
        numbers = np.fromiter(rows, np.int64)
        size = len(self.token_class)
        masks = np.zeros((len(numbers), -(-size // 32)), np.uint32)
        classes = np.flatnonzero(numbers < len(self.row_classes))
        bits = np.unpackbits(self.row_classes[numbers[classes]], axis=1, bitorder="little")
        for first in range(0, len(classes), 64):  # some at a time, that the bytes per token stay in the cache
            some = classes[first : first + 64]
            packed = np.packbits(bits[first : first + 64].take(self.token_class, axis=1), axis=1, bitorder="little")
            masks.view(np.uint8)[some, : packed.shape[1]] = packed
        alone = np.flatnonzero(numbers >= len(self.row_classes))
        tokens = self.row_token[numbers[alone] - len(self.row_classes)]
        masks[alone, tokens // 32] = np.uint32(1) << (tokens % 32).astype(np.uint32)
        return masks


def mask_key(mask: npt.NDArray[np.uint32]) -> bytes:
    """16 bytes that are equal for equal masks, in all processes: where to look for a mask that is there already."""
    return hashlib.blake2b(mask.tobytes(), digest_size=16).digest()


def build_table(dfa: ByteDfa, tables: TokenizerTables, encode: Encode | None, budget: Budget) -> TokenTable:
    """Return the token table of an automaton.

    encode: the tokenizer's own spelling of a text (see canonical.Encode); None: no state has a canonical token.

    Raises Unspellable: no sequence of tokens matches. BudgetError: too large or too slow.
    """
    graph = walk_tokens(dfa, tables, budget)
    spellable = _spells_all(dfa, tables)
    if not spellable:
        live = graph.live(dfa.final, budget)
        if not live[0]:
            raise Unspellable(_missing(dfa, tables))
        graph = graph.only(live[graph.target])
    reached, canonical = _reach(graph, Canon(dfa, tables, graph, encode, budget) if encode else None, budget)
    restricted = _restricted(graph, reached, canonical)
    if not spellable and not restricted.live(dfa.final, budget)[reached].all():
        # Where bytes are missing, canonical tokens may lead to a state that lacks the token it would need.
        reached, canonical = _reach(graph, None, budget)
        restricted = _restricted(graph, reached, canonical)
    return _finished(dfa, tables, restricted, reached, canonical, budget)


# ------------------------------------------------------------------ which states tokens can complete


def _spells_all(dfa: ByteDfa, tables: TokenizerTables) -> bool:
    """Whether each byte class of the grammar has a byte with a token of its own: tokens can then spell all of it."""
    spelled = np.zeros(dfa.delta.shape[1], np.bool_)
    spelled[dfa.byte_class[tables.alone]] = True
    return bool((spelled | (dfa.delta < 0).all(0)).all())


def _missing(dfa: ByteDfa, tables: TokenizerTables) -> list[int]:
    """The byte values that the grammar uses and no token of one byte spells."""
    used: BoolArray = np.any(dfa.delta >= 0, axis=0)[dfa.byte_class]
    return np.flatnonzero(used & ~tables.alone).tolist()


# ------------------------------------------------------------------ which states tokens reach


def _reach(graph: TokenGraph, canon: Canon | None, budget: Budget) -> tuple[Int64Array, Int32Array]:
    """(the states that allowed tokens reach, ascending; the canonical token of every state, NONE if it has none)."""
    seen = np.zeros(graph.states, np.bool_)
    seen[0] = True
    canonical = np.full(graph.states, NONE, np.int32) if canon is None else canon.token
    waiting = np.zeros(1, np.int64)
    while len(waiting):
        budget.check()
        new: list[int] = []
        if canon is not None:
            for state in waiting[canonical[waiting] != NONE].tolist():
                canon.decide(state)
                while canonical[state] >= 0 and not seen[state := int(canon.after[state])]:
                    seen[state] = True
                    new.append(state)
        hit = np.zeros(graph.states, np.bool_)
        hit[graph.after(waiting[canonical[waiting] == NONE])] = True
        fresh = np.flatnonzero(hit & ~seen)
        seen[fresh] = True
        waiting = np.append(fresh, np.array(new, np.int64))
    return np.flatnonzero(seen), canonical


def _restricted(graph: TokenGraph, reached: Int64Array, canonical: Int32Array) -> TokenGraph:
    """The edges that masks allow: those of reached states, and where there is a canonical token, only its own."""
    only = np.full(graph.states, -1, np.int32)
    only[reached] = np.where(canonical[reached] == NONE, graph.classes, graph.token_class[canonical[reached]])
    only = only[graph.source]
    return graph.only((only == graph.classes) | (only == graph.column))


# ------------------------------------------------------------------ the result


def _finished(
    dfa: ByteDfa, tables: TokenizerTables, graph: TokenGraph, reached: Int64Array, canonical: Int32Array, budget: Budget
) -> TokenTable:
    """The table of the reached states, with the classes and rows that are still different."""
    budget.check()
    canonical, final = canonical[reached], dfa.final[reached]
    place = np.full(graph.states, -1, np.int16)
    place[reached] = np.arange(len(reached), dtype=np.int16)
    words = random_words(graph.states), random_words(graph.states)
    counts = np.bincount(graph.column, minlength=graph.classes)
    sums = np.append(np.zeros(1, np.uint64), np.cumsum(words[0][graph.source] * words[1][graph.target]))
    ends = np.cumsum(counts)
    number, first = numbered(np.append(sums[ends] - sums[ends - counts], np.uint64(0)))  # 0: no edges
    own = np.flatnonzero(np.append(counts, 0)[first])
    budget.need_classes(2 + len(own))
    renumber = np.full(len(first), NEVER, np.uint16)
    renumber[own] = 2 + np.arange(len(own), dtype=np.uint16)
    token_class = renumber[number[graph.token_class]]
    token_class[list(tables.eos)] = END
    budget.need_table_bytes(2 * len(reached) * (2 + len(own)))
    transitions = np.full((len(reached), 2 + len(own)), -1, np.int16)
    transitions[final, END] = np.flatnonzero(final)
    edges = ranges((ends - counts)[first[own]], ends[first[own]])
    columns = np.repeat(2 + np.arange(len(own)), counts[first[own]])
    transitions[place[graph.source[edges]], columns] = place[graph.target[edges]]
    row, row_classes, row_token = _rows(transitions, canonical)
    complete = final & (transitions[:, 2:] < 0).all(1)
    return TokenTable(
        tables.fingerprint, token_class, transitions, row, row_classes, row_token, canonical, final, complete,
        reached.astype(np.int32),
    )  # fmt: skip


def _rows(transitions: Int16Array, canonical: Int32Array) -> tuple[Int32Array, npt.NDArray[np.uint8], Int32Array]:
    """(row of each state, classes of the rows of open states, tokens of the rows of the others)."""
    bits = np.packbits(transitions >= 0, axis=1, bitorder="little")
    free = np.flatnonzero(canonical == NONE)
    padded = np.zeros((len(free), -(-bits.shape[1] // 8) * 8), np.uint8)
    padded[:, : bits.shape[1]] = bits[free]
    words = padded.view(np.uint64)
    number, first = numbered((words * random_words(words.shape[1])).sum(1))
    if (bits[free] != bits[free[first]][number]).any():
        raise RuntimeError("two rows share a hash")
    row = np.zeros(len(canonical), np.int32)
    row[free] = number
    tokens, of_token = np.unique(canonical[canonical != NONE], return_inverse=True)
    row[canonical != NONE] = len(first) + of_token
    return row, bits[free[first]], tokens
