"""A slow obvious executor without a model: KV pages hold tokens, the next token is a function of what they hold.

If the scheduler gives a row a wrong page, a page too few, or a page that somebody else writes, the row's tokens
differ from `expected`, which looks only at the prompt.
"""

from collections import deque

import numpy as np

from actorserve.actors.schedule import Window

VOCAB = 200
EOS = 0
PAGE = 16


def next_token(tokens: list[int]) -> int:
    """Return a token that depends on every token before it."""
    h = 17
    for t in tokens:
        h = (h * 31 + t + 1) % 1_000_003
    return h % VOCAB


def expected(prompt: list[int], max_new_tokens: int) -> list[int]:
    """Return prompt and continuation, ended by EOS or length."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens


class SimulatedExecutor:
    """Runs windows in order; `steps` yields (window, step, rids, ids, finish) as StepOuts do."""

    def __init__(self, num_pages: int) -> None:
        self.kv = np.full((num_pages, PAGE), -1, dtype=np.int64)
        self.tables: dict[int, list[int]] = {}
        self.length: dict[int, int] = {}
        self.limit: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.rids: dict[int, int] = {}
        self.decoding: list[int] = []
        self.out: deque[tuple[int, int, list[int], list[int], np.ndarray]] = deque()

    def write(self, slot: int, token: int) -> None:
        at = self.length[slot]
        self.kv[self.tables[slot][at // PAGE], at % PAGE] = token
        self.length[slot] = at + 1

    def read(self, slot: int) -> list[int]:
        pages = self.kv[self.tables[slot]].reshape(-1)
        return pages[: self.length[slot]].tolist()

    def run(self, w: Window) -> None:
        self.decoding = [s for s in self.decoding if s not in w.release]
        contents = [self.kv[source, :n].copy() for source, _, n in w.copies]
        for (_, destination, n), content in zip(w.copies, contents, strict=True):
            self.kv[destination, :n] = content
        for seat in w.admits:
            slot = seat.request.slot
            assert slot not in self.decoding
            self.tables[slot], self.length[slot] = list(seat.pages), seat.cached
            self.limit[slot], self.rids[slot] = seat.request.limit, seat.request.rid
        for slot, page in zip(w.grow_slots, w.grow_pages, strict=True):
            self.tables[slot].append(page)
        for step in range(w.k):
            drawing = list(self.decoding)
            for slot in drawing:
                self.write(slot, self.last[slot])
            if step == 0:
                for c in w.chunks:
                    for token in c.request.tokens[c.start : c.end]:
                        self.write(c.request.slot, token)
                    if c.draws:
                        drawing.append(c.request.slot)
            ids = [next_token(self.read(slot)) for slot in drawing]
            finish = [
                1 if t == EOS else 2 * (self.length[s] + 1 >= self.limit[s]) for s, t in zip(drawing, ids, strict=True)
            ]
            self.last.update(zip(drawing, ids, strict=True))
            self.decoding = [s for s, f in zip(drawing, finish, strict=True) if not f]
            rids = [self.rids[s] for s in drawing]
            self.out.append((w.number, step, rids, ids, np.array(finish, dtype=np.uint8)))
