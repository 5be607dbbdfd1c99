"""Canonical forcing: in which states a grammar leaves one token, and which.

Used by token_table.py. Where the grammar forces the next bytes, many tokens could spell them, but a model has learnt
only the tokenizer's own spelling, the canonical one; offered all of them, small models stray and get worse. So a state
whose next bytes are forced gets one canonical token, and its mask has that bit alone, wherever it is safe to say.

Why jumping ahead changes nothing: the canonical token is a function of the state, never of the text before. A jump
takes the token of the state, goes to the state after it, and so on until a state has none (jump.py). Without jumps the
sampler meets the same states, whose masks allow the same tokens. There is no second source that could disagree.

What is safe to say: the tail of an encoding may change with what follows it. Tokens at the end are held back, up to
LOOK_BACK of them, if a longer token that the grammar allows begins like them (llguidance's rule), or if the encoding
changes with a character that may come next (pre-tokenizers look ahead: most split the last of several spaces off). A
state at which tokens are held back is open: all its tokens are allowed, as at any choice. Tokens already drawn never
change; a run that begins behind one is encoded as it stands, since byte-pair merges never cross a token boundary that
is there. A run is first met where it begins, and the tokens of that encoding claim their states, so that later
entrances into its middle fall in step.
"""

import codecs
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import numpy as np

from .alphabet import Int32Array
from .budget import Budget
from .compressed import CompressedEdges, compress
from .token_graph import TokenGraph
from .utf8 import ByteDfa
from .vocabulary import TokenizerTables

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text that stands in the middle of another one: no BOS, no space before it."""

LOOK_BACK: Final = 4
WINDOW: Final = 256
"""Bytes of a run that are encoded at a time."""
PROBED: Final = 16
"""Forced bytes behind a character that may come next."""
STRADDLED: Final = 4
"""Bytes at the end of a run in which a token may begin that the encoding did not begin there."""
NONE: Final = -1
UNDECIDED: Final = -2
_GROUPS: Final = (
    b"etaoinshrdlcumwfgypbvkjxqz",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    b"0123456789",
    b" ",
    b"\n\r\t",
    b"\"'`",
    b",.:;-_!?()[]{}<>/\\|@#$%^&*+=~",
)
"""ASCII in groups that pre-tokenizers treat alike; of each the likelier ones first."""


@dataclass(slots=True)
class Canon:
    """Decides about states as they are asked for."""

    dfa: ByteDfa
    tables: TokenizerTables
    graph: TokenGraph
    encode: Encode
    budget: Budget
    edges: CompressedEdges = field(init=False)
    token: Int32Array = field(init=False)
    """int32 [states]: the canonical token, NONE, or UNDECIDED."""
    after: Int32Array = field(init=False)
    """int32 [states]: the state after the canonical token, if there is one."""
    _rows: dict[int, Int32Array] = field(default_factory=dict)
    _longer: dict[bytes, Int32Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.encode = cache(self.encode)  # counted repeats hold the same run many times
        self.edges = compress(self.dfa)
        self.token = np.where(self.edges.run_len > 0, UNDECIDED, NONE).astype(np.int32)
        self.after = np.full(len(self.token), -1, np.int32)

    def decide(self, state: int) -> None:
        """Decides about a state, and those that its tokens lead through."""
        if self.token[state] != UNDECIDED:
            return
        self.budget.check()
        run, end = self.edges.forced_run(state, WINDOW)
        cut = len(run) >= WINDOW
        text = _whole_characters(run)
        tokens, states = self._spelled(state, text)
        if cut:
            safe = len(tokens) - LOOK_BACK
        else:
            safe = self._held_back(tokens, states)
            if len(text) == len(run):
                safe = self._probed(state, text, tokens[:safe], end)
        for token, where, after in zip(tokens[: max(safe, 0)], states, states[1:], strict=False):
            if self.token[where] != UNDECIDED:
                return
            self.token[where] = token
            self.after[where] = after
        last = states[max(safe, 0)]
        if self.token[last] == UNDECIDED and (not cut or safe <= 0):
            self.token[last] = NONE

    def _spelled(self, state: int, text: bytes) -> tuple[list[int], list[int]]:
        """(the tokens of the text as far as they can be used, the states before, between and after them)."""
        states = [state]
        tokens: list[int] = []
        place = 0
        for token in self.encode(text.decode()) if text else ():
            spelling = self.tables.token_bytes(token)
            if spelling is None or not text.startswith(spelling, place):
                break  # the tokenizer normalises, or knows a control token here
            state = int(self._row(state)[self.graph.token_class[token]])
            if state < 0:
                break  # no token goes on from there
            place += len(spelling)
            tokens.append(token)
            states.append(state)
        return tokens, states

    def _held_back(self, tokens: list[int], states: list[int]) -> int:
        """How many tokens remain when those are dropped that a longer one could replace."""
        safe = len(tokens)
        tail = b""
        for place in range(len(tokens) - 1, max(len(tokens) - LOOK_BACK, 0) - 1, -1):
            tail = (self.tables.token_bytes(tokens[place]) or b"") + tail
            if (self._row(states[place])[self._longer_classes(tail)] >= 0).any():
                safe = place
        return safe

    def _row(self, state: int) -> Int32Array:
        row = self._rows.get(state)
        if row is None:
            row = self._rows[state] = self.graph.row(state)
        return row

    def _longer_classes(self, prefix: bytes) -> Int32Array:
        """The classes of all tokens that begin with these bytes and are longer."""
        classes = self._longer.get(prefix)
        if classes is None:
            classes = self._longer[prefix] = np.unique(self.graph.token_class[self.tables.longer(prefix)])
        return classes

    def _probed(self, state: int, text: bytes, tokens: list[int], end: int) -> int:
        """How many of the tokens stay the same whatever comes next, as far as a few texts tell."""
        safe = len(tokens)
        for probe in itertools.chain(self._probes(end), self._straddling(state, text)) if tokens else ():
            longer = self.encode((text + probe).decode())
            same = (a == b for a, b in zip(tokens[:safe], longer, strict=False))
            safe = next((i for i, equal in enumerate(same) if not equal), min(safe, len(longer)))
            if not safe:
                break
        return safe

    def _probes(self, end: int) -> Iterator[bytes]:
        """Texts that may follow: one per group of characters, with what is then forced."""
        for group in _GROUPS:
            found = next((byte for byte in group if self.dfa.step(end, byte) >= 0), None)
            if found is not None:
                yield self._with_run(end, bytes([found]))
        lead = next((byte for byte in range(0xC2, 0xF5) if self.dfa.step(end, byte) >= 0), None)
        if lead is not None:
            begun, state = bytes([lead]), self.dfa.step(end, lead)
            while not (text := _whole_characters(begun)):
                begun += bytes([next(byte for byte in range(0x80, 0xC0) if self.dfa.step(state, byte) >= 0)])
                state = self.dfa.step(state, begun[-1])
            yield self._with_run(end, text)

    def _straddling(self, state: int, text: bytes) -> Iterator[bytes]:
        """What may follow such that a token begins in the last bytes of the text and ends behind it.

        Merges that were learnt early win over others, and have low ids: the lowest one per place is tried.
        """
        for place in range(max(len(text) - STRADDLED, 1), len(text)):
            if text[place] & 0xC0 != 0x80:
                longer = self.tables.longer(text[place:])
                row = self._row(self.dfa.walk(state, text[:place]))
                allowed = longer[row[self.graph.token_class[longer]] >= 0]
                if len(allowed):
                    spelling = self.tables.token_bytes(int(allowed.min())) or b""
                    yield _whole_characters(spelling[len(text) - place :])

    def _with_run(self, end: int, text: bytes) -> bytes:
        return text + _whole_characters(self.edges.forced_run(self.dfa.walk(end, text), PROBED)[0])


def _whole_characters(run: bytes) -> bytes:
    """The run without a part of a character at its end; nothing if it begins amid one."""
    if not run or run[0] & 0xC0 == 0x80:
        return b""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return decoder.decode(run).encode()
