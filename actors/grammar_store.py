"""The scheduler's grammars: which are known, who waits for one, and which the samplers have.

Used by the scheduler actor, which sends what `unsent` and `load` say. A grammar is compiled once for all requests that
have it, and kept a while beyond the last of them. Invariants: a request waits here until its grammar came or failed,
or it is forgotten; a grammar is never forgotten while a request has it; what the samplers have is `loaded`, in the
order of their messages.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .constraint import Constraint, Grammar, Guided
from .messages import Compiled, CompileFailed, DropGrammar, GrammarSpec, LoadGrammar, Translated
from .request import Request

IDLE_BYTES: Final = 64 << 20
"""Of tables that no request has, here and as much on the device."""
IDLE_MOST: Final = 64


@dataclass(slots=True, eq=False)
class Entry:
    """A grammar, or the wish for one."""

    handle: int
    spec: GrammarSpec
    grammar: Grammar | str | None = None
    """Tables; or the text of one that the fsm actor follows."""
    waiting: dict[int, Request] = field(default_factory=dict)
    """By request id, until the grammar comes."""

    def give(self, request: Request) -> None:
        """Put the request at its place in the grammar: the beginning, or behind what it has generated."""
        if isinstance(self.grammar, str):
            request.guided = Guided(self.grammar)
        elif self.grammar is not None:
            request.constraint = constraint = Constraint(self.grammar)
            for token in request.tokens[request.prompt_length :]:
                constraint.state = self.grammar.step(constraint.state, token)
            request.opening = constraint.complete

    @property
    def nbytes(self) -> int:
        """Bytes of the grammar."""
        if self.grammar is None:
            return 0
        return len(self.grammar) if isinstance(self.grammar, str) else self.grammar.nbytes


@dataclass(slots=True)
class GrammarCounters:
    """Totals since the start; see messages.Stats."""

    hits: int = 0
    compiled: int = 0
    failed: int = 0
    seconds: float = 0.0


class GrammarStore:
    """See the module's text."""

    def __init__(self) -> None:
        self.counters = GrammarCounters()
        self.loaded: OrderedDict[int, Grammar] = OrderedDict()
        """What the samplers have, by handle, least recently admitted first."""
        self._entries: OrderedDict[GrammarSpec, Entry] = OrderedDict()
        """Least recently asked for first."""
        self._by_handle: dict[int, Entry] = {}
        self._next = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for their grammar."""
        return sum(len(entry.waiting) for entry in self.unsent())

    def unsent(self) -> list[Entry]:
        """The grammars that are still to be compiled: what an fsm actor that comes up must be asked for."""
        return [entry for entry in self._by_handle.values() if entry.grammar is None]

    def ask(self, spec: GrammarSpec, request: Request) -> Entry | None:
        """Give the request its constraint, or let it wait. Returns an entry that must be compiled now."""
        entry = self._entries.get(spec)
        if entry is not None and entry.grammar is not None:
            self._entries.move_to_end(spec)
            self.counters.hits += 1
            entry.give(request)
            return None
        new = entry is None
        if entry is None:
            entry = self._entries[spec] = self._by_handle[self._next] = Entry(self._next, spec)
            self._next += 1
        entry.waiting[request.rid] = request
        return entry if new else None

    def compiled(self, m: Compiled | Translated) -> list[Request]:
        """Take a grammar in; returns the requests that waited for it, now with their constraints."""
        self.counters.compiled += 1
        self.counters.seconds += m.seconds
        entry = self._by_handle.get(m.handle)
        if entry is None or entry.grammar is not None:
            return []
        entry.grammar = m.grammar if isinstance(m, Translated) else _tables(m)
        requests = list(entry.waiting.values())
        entry.waiting.clear()
        for request in requests:
            entry.give(request)
        return requests

    def kind(self, handle: int) -> str | None:
        """Which field of a request it came from."""
        entry = self._by_handle.get(handle)
        return None if entry is None else entry.spec.kind

    def failed(self, m: CompileFailed) -> list[Request]:
        """Forget a grammar that cannot be; returns the requests that waited for it."""
        self.counters.failed += 1
        self.counters.seconds += m.seconds
        entry = self._by_handle.get(m.handle)
        if entry is None:
            return []
        self._forget(entry)
        return list(entry.waiting.values())

    def abandon(self, rid: int) -> tuple[bool, int | None]:
        """(whether the request waited here, the handle that nobody waits for any more)"""
        for entry in self.unsent():
            if entry.waiting.pop(rid, None) is not None:
                if entry.waiting:
                    return True, None
                self._forget(entry)
                return True, entry.handle
        return False, None

    def waiting_rids(self) -> list[int]:
        """The requests that wait for a grammar."""
        return [rid for entry in self.unsent() for rid in entry.waiting]

    def waiting_requests(self) -> list[Request]:
        """The same, the requests themselves."""
        return [request for entry in self.unsent() for request in entry.waiting.values()]

    def abandon_all(self) -> list[int]:
        """Forget all that wait; returns the handles that must not be compiled any more."""
        entries = self.unsent()
        for entry in entries:
            self._forget(entry)
        return [entry.handle for entry in entries]

    def trim(self, requests: Iterable[Request]) -> None:
        """Forget the grammars that have not been asked for longest, as far as none of these requests has them."""
        idle = [e for e in self._entries.values() if e.grammar is not None]
        if len(idle) <= IDLE_MOST and sum(entry.nbytes for entry in idle) <= IDLE_BYTES:
            return
        used = {r.constraint.grammar.handle for r in requests if r.constraint is not None}
        idle = [entry for entry in idle if entry.handle not in used]
        size = sum(entry.nbytes for entry in idle)
        for number, entry in enumerate(idle):
            if len(idle) - number <= IDLE_MOST and size <= IDLE_BYTES:
                break
            size -= entry.nbytes
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.spec], self._by_handle[entry.handle]

    # ------------------------------------------------------------------ what the samplers have

    def load(
        self, window: int, admitted: list[Request], running: list[Request], slots: int
    ) -> list[DropGrammar | LoadGrammar]:
        """What the samplers must be sent before the window admits these requests. `running`: they among others.

        The samplers have room for twice as many grammars as `slots`.
        """
        wanted = {r.constraint.grammar.handle: r.constraint.grammar for r in admitted if r.constraint is not None}
        new = [grammar for handle, grammar in wanted.items() if handle not in self.loaded]
        for handle in wanted.keys() & self.loaded.keys():
            self.loaded.move_to_end(handle)
        messages: list[DropGrammar | LoadGrammar] = self._drops(window, running, min(slots, IDLE_MOST)) if new else []
        for g in new:
            self.loaded[g.handle] = g
            arrays = (memoryview(a.tobytes()) for a in (g.token_class, g.transitions, g.canonical))
            messages.append(LoadGrammar(window, g.handle, *arrays))
        return messages

    def _drops(self, window: int, running: list[Request], most: int) -> list[DropGrammar | LoadGrammar]:
        """Make room: those that no slot follows, least recently admitted first."""
        used = {r.constraint.grammar.handle for r in running if r.constraint is not None}
        idle = [grammar for handle, grammar in self.loaded.items() if handle not in used]
        size, drops = sum(g.nbytes for g in idle), list[DropGrammar | LoadGrammar]()
        for number, grammar in enumerate(idle):
            if len(idle) - number <= most and size <= IDLE_BYTES:
                break
            size -= grammar.nbytes
            del self.loaded[grammar.handle]
            drops.append(DropGrammar(window, grammar.handle))
        return drops


def _tables(m: Compiled) -> Grammar:
    """Copies of the message's arrays."""
    classes, canonical = (np.frombuffer(a, t).copy() for a, t in ((m.token_class, np.uint16), (m.canonical, "i4")))
    return Grammar(
        m.handle, classes, np.frombuffer(m.transitions, np.int16).reshape(len(canonical), -1).copy(), canonical
    )
