"""Compressed FSM: runs of bytes that nothing but the grammar decides.

Used by canonical.py, which spells them in tokens. After SGLang's compressed finite state machine (arXiv 2312.07104):
a state with exactly one byte out, and not final, has no choice; such states in a row are one edge with many bytes.
Invariant: each forced state has one place in the arena, so memory is linear in the states; a run ends where it would
meet another one, and is continued there.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .alphabet import Int32Array
from .utf8 import ByteDfa

ALL: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class CompressedEdges:
    """The forced run of state s is arena[run_off[s] : run_off[s] + run_len[s]], and what is forced at run_end[s]."""

    run_off: Int32Array
    run_len: Int32Array
    """int32 [states]; 0: not forced"""
    run_end: Int32Array
    arena: bytes

    def forced_run(self, state: int, limit: int = ALL) -> tuple[bytes, int]:
        """The bytes that must follow, at most `limit`, and the state after them (or after more, if they were cut)."""
        parts: list[bytes] = []
        while (length := int(self.run_len[state])) and limit > 0:
            start = int(self.run_off[state])
            parts.append(self.arena[start : start + min(length, limit)])
            limit -= length
            state = int(self.run_end[state])
        return b"".join(parts), state


def compress(dfa: ByteDfa) -> CompressedEdges:
    """Return the runs of all states."""
    byte, after = forced_bytes(dfa)
    states = len(byte)
    forced = byte >= 0
    inward = np.bincount(after[forced], minlength=states)
    heads = np.flatnonzero(forced & (inward == 0)).tolist()
    heads += np.flatnonzero(forced & (inward > 1)).tolist()  # where runs meet, or one begins behind a choice
    next_of, byte_of = after.tolist(), byte.tolist()
    offset, length, end = [0] * states, [0] * states, list(range(states))
    placed = [False] * states
    met = (inward > 1).tolist()
    arena = bytearray()
    for head in heads:
        run = [head]
        while byte_of[state := next_of[run[-1]]] >= 0 and not met[state]:
            run.append(state)
        for place, member in enumerate(run):
            assert not placed[member]
            placed[member] = True
            offset[member], length[member], end[member] = len(arena) + place, len(run) - place, state
        arena += bytes([byte_of[member] for member in run])
    arrays = [np.array(values, np.int32) for values in (offset, length, end)]
    return CompressedEdges(arrays[0], arrays[1], arrays[2], bytes(arena))


def forced_bytes(dfa: ByteDfa) -> tuple[npt.NDArray[np.int16], Int32Array]:
    """(the one byte that can follow each state, -1 if others can too or none need; the state after it), [states]."""
    size = np.bincount(dfa.byte_class, minlength=dfa.delta.shape[1])
    alive = dfa.delta >= 0
    one = ((alive * size).sum(1) == 1) & ~dfa.final
    column = alive.argmax(1)
    byte_of_class = np.zeros(len(size), np.int16)
    byte_of_class[dfa.byte_class[::-1]] = np.arange(255, -1, -1)
    states = np.arange(len(one))
    return np.where(one, byte_of_class[column], -1), np.where(one, dfa.delta[states, column], -1).astype(np.int32)
