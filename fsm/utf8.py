"""Automaton over characters to automaton over bytes: UTF-8 without overlong forms and surrogates.

Used by compiler.py. The 64 characters that share all bytes but the last are a block; what a state does with a block is
a state of its own behind the lead bytes, and blocks of blocks likewise. Blocks that are alike are handled once, for all
states at a time. (Automata for UTF-8 ranges one range at a time: R. Cox, "Regular expression matching in the wild",
2010.) Invariant: the result is minimal if the automaton over characters is, as no state in the middle of a character
accepts what another one does; and every state can still complete a match.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .alphabet import Alphabet, Int32Array, UInt64Array, column_keys, numbered, random_words
from .budget import Budget
from .dfa import CharDfa

CELLS: Final = 1 << 16
"""Pairs of rows and patterns that are looked at together."""
Int16Array = npt.NDArray[np.int16]
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ByteDfa:
    """A deterministic automaton over bytes. State 0 is the start; every state can be reached and completed."""

    delta: Int16Array
    """The next state, int16 [states, byte classes], -1 where there is none."""
    byte_class: UInt8Array
    """uint8 [256]"""
    final: npt.NDArray[np.bool_]
    """bool [states]"""

    def step(self, state: int, byte: int) -> int:
        """The state after one byte, -1 if the byte can't come."""
        return int(self.delta[state, self.byte_class[byte]])

    def walk(self, state: int, data: bytes) -> int:
        """The state after these bytes, -1 if they can't come."""
        for byte in data:
            if state < 0:
                return -1
            state = self.step(state, byte)
        return state


def lower(dfa: CharDfa, budget: Budget) -> ByteDfa:
    """Return the automaton over bytes. Raises BudgetError: too many states, or too slow."""
    blocks, patterns = _blocks(dfa.alphabet)
    used = np.unique(patterns)
    patterns = np.searchsorted(used, patterns).astype(np.int32)
    values, row_of = _distinct(dfa.delta[:, used])
    count = len(dfa.delta)
    first = np.full((count, 256), -1, np.int32)
    first[:, :128] = dfa.delta[:, dfa.alphabet.of(np.arange(128))]
    later: list[Int32Array] = []  # what states amid a character do with 80 to BF
    for lead, shorter, leads in ((0xC0, 2, 32), (0xE0, 0, 16), (0xF0, 0, 5)):
        budget.check()
        instance, rows = _instances(values, patterns, count, budget)
        values = np.where(instance >= 0, instance + count, -1)
        count += len(rows)
        later.append(rows)
        first[:, lead + shorter : lead + leads] = values[row_of][:, blocks[shorter:leads]]
        if lead < 0xF0:
            # Overlong forms, long ones of characters that have a short one, are no UTF-8: such blocks are dead.
            blocks[:leads] = values.shape[1]
            values = np.concatenate([values, np.full((len(values), 1), -1, np.int32)], 1)
            patterns, blocks = _distinct(blocks.reshape(-1, 64))
    final = np.zeros(count, np.bool_)
    final[: len(dfa.final)] = dfa.final
    return _by_class(first, np.concatenate(later), final)


def _by_class(first: Int32Array, later: Int32Array, final: npt.NDArray[np.bool_]) -> ByteDfa:
    """The automaton with a column per byte class instead of one per byte."""
    keys = column_keys(first)
    keys[0x80:0xC0] += column_keys(later)
    byte_class, byte = numbered(keys)
    delta = np.full((len(final), len(byte)), -1, np.int16)
    delta[: len(first)] = first[:, byte]
    inner = np.flatnonzero((byte >= 0x80) & (byte < 0xC0))
    delta[len(first) :, inner] = later[:, byte[inner] - 0x80]
    return ByteDfa(delta, byte_class.astype(np.uint8), final)


def _blocks(alphabet: Alphabet) -> tuple[Int32Array, Int32Array]:
    """(pattern of each block of 64 characters, int32 [20480]; classes of each pattern, int32 [patterns, 64]).

    There are as many blocks as leads from F0 to F4 can begin; those behind the last character have class 0. The first
    two, ASCII, are never asked for.
    """
    first = alphabet.of(np.arange((5 << 18) // 64) * 64)
    mixed = np.unique(alphabet.starts[alphabet.starts % 64 != 0] // 64)
    mixed, first[:2] = mixed[mixed >= 2], first[-1]
    patterns, of_mixed = _distinct(alphabet.of(mixed[:, None] * 64 + np.arange(64)))
    plain = np.unique(np.delete(first, mixed))
    blocks = np.searchsorted(plain, first).astype(np.int32)
    blocks[mixed] = of_mixed + len(plain)
    return blocks, np.concatenate([np.repeat(plain[:, None], 64, 1), patterns])


def _distinct(rows: Int32Array) -> tuple[Int32Array, Int32Array]:
    """(the distinct rows, the number of each row)"""
    if not len(rows):
        return rows, np.zeros(0, np.int32)
    keys = (random_words(int(rows.max()) + 2)[rows] * random_words(rows.shape[1])).sum(1)
    number, first = numbered(keys)
    return rows[first], number


def _instances(values: Int32Array, patterns: Int32Array, states: int, budget: Budget) -> tuple[Int32Array, Int32Array]:
    """What each row of values makes of each pattern. There are `states` already.

    values int32 [rows, n], -1: dead; patterns int32 [patterns, 64], places in such a row. Returns the number of what
    comes of each, int32 [rows, patterns], -1 where all is dead, and the distinct ones, int32 [numbers, 64].
    """
    keys = np.empty((len(values), len(patterns)), np.uint64)
    distinct = np.empty(0, np.uint64)
    keys_of = _keys(values, patterns)
    step = max(1, CELLS // len(patterns))
    for start in range(0, len(values), step):
        budget.check()
        keys[start : start + step] = keys_of(values[start : start + step])
        distinct = np.unique(np.append(distinct, keys[start : start + step]))
        budget.need_dfa_states(states + len(distinct) - 1)  # one of them may be dead
    number, first = numbered(keys.ravel())
    row, pattern = np.divmod(first, len(patterns))
    made = values[row[:, None], patterns[pattern]]
    alive = (made >= 0).any(1)
    place = np.where(alive, np.cumsum(alive, dtype=np.int32) - 1, -1)
    return place[number].reshape(keys.shape), made[alive]


def _keys(values: Int32Array, patterns: Int32Array) -> Callable[[Int32Array], UInt64Array]:
    """What gives rows of these values a key for each pattern, equal where they make the same of it."""
    code = np.append(random_words(int(values.max()) + 1), np.uint64(0))  # the last one is what -1 takes
    words = random_words(64)
    if values.shape[1] >= 64:
        return lambda rows: np.stack([(code[row[patterns]] * words).sum(1) for row in rows])
    weights = np.zeros((len(patterns), values.shape[1]), np.uint64)
    np.add.at(weights, (np.arange(len(patterns))[:, None], patterns), words)

    def keys_of(rows: Int32Array) -> UInt64Array:
        keys = np.zeros((len(rows), len(patterns)), np.uint64)
        for column in range(rows.shape[1]):
            keys += code[rows[:, column, None]] * weights[:, column]
        return keys

    return keys_of
