"""A slow obvious executor without a model: KV pages hold tokens, the next token is a function of what they hold.

If the scheduler gives a row a wrong page, a page too few, or a page that somebody else writes, the row's tokens
differ from `expected`, which looks only at the prompt.
"""

from collections import deque

import numpy as np

from actorserve.actors.constraint import Grammar
from actorserve.actors.request import Request
from actorserve.actors.window import Window

VOCAB = 200
EOS = 0
PAGE = 16


def next_token(tokens: list[int]) -> int:
    """Return a token that depends on every token before it."""
    h = 17
    for t in tokens:
        h = (h * 31 + t + 1) % 1_000_003
    return h % VOCAB


def logprob_of(before: list[int], token: int) -> float:
    """Return the logprob of a token: it depends on every token before it too."""
    return -float((next_token(before) * 7 + token) % 101)


def most_likely(before: list[int], n: int) -> list[tuple[int, float]]:
    """Return n tokens and their logprobs."""
    return [((next_token(before) + i) % VOCAB, -i - 0.5) for i in range(n)]


def scored(request: Request, before: list[int], token: int, columns: int) -> list[float]:
    """Return a row of scores as PromptScores.values has them, NaN beyond what the request wants."""
    top = most_likely(before, request.params.logprobs or 0)
    row = [logprob_of(before, token), *(x for i, p in top for x in (p, float(i)))]
    return row + [np.nan] * (columns - len(row))


def draw(tokens: list[int], grammar: Grammar | None, state: int) -> tuple[int, int]:
    """Return the next token and the grammar's state after it: of what it allows, one that depends on all tokens."""
    token = next_token(tokens)
    if grammar is None:
        return token, 0
    if grammar.forced(state) >= 0:
        token = grammar.forced(state)
    else:
        allowed = np.flatnonzero(grammar.transitions[state, grammar.token_class] >= 0)
        token = int(allowed[token % len(allowed)])
    return token, grammar.step(state, token)


def draw_masked(tokens: list[int], mask: np.ndarray) -> int:
    """Return the next token: of those whose bits are set, the one that `draw` would take."""
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(allowed[next_token(tokens) % len(allowed)])


def expected(
    prompt: list[int], max_new_tokens: int, grammar: Grammar | None = None, stops: tuple[int, ...] = ()
) -> list[int]:
    """Return prompt and continuation, ended by EOS, a stop token or length."""
    tokens, state = list(prompt), 0
    while len(tokens) < len(prompt) + max_new_tokens:
        token, state = draw(tokens, grammar, state)
        tokens.append(token)
        if token in stops:
            break
        if tokens[-1] == EOS:
            break
    return tokens


class SimulatedExecutor:
    """Runs windows in order; `out` has (window, step, rids, ids, finish, scores) as StepOuts do."""

    def __init__(self, num_pages: int) -> None:
        self.kv = np.full((num_pages, PAGE), -1, dtype=np.int64)
        self.tables: dict[int, list[int]] = {}
        self.length: dict[int, int] = {}
        self.limit: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.rids: dict[int, int] = {}
        self.requests: dict[int, Request] = {}
        self.grammars: dict[int, Grammar | None] = {}
        self.states: dict[int, int] = {}
        self.stops: dict[int, tuple[int, ...]] = {}
        self.forwards = 0
        self.decoding: list[int] = []
        self.out: deque[tuple[int, int, list[int], list[int], np.ndarray, np.ndarray]] = deque()

    def write(self, slot: int, token: int) -> None:
        at = self.length[slot]
        self.kv[self.tables[slot][at // PAGE], at % PAGE] = token
        self.length[slot] = at + 1

    def read(self, slot: int) -> list[int]:
        pages = self.kv[self.tables[slot]].reshape(-1)
        return pages[: self.length[slot]].tolist()

    def draw(self, slot: int) -> tuple[int, int]:
        guided = self.requests[slot].guided
        if guided is None:
            return draw(self.read(slot), self.grammars[slot], self.states[slot])
        assert guided.mask is not None, "no mask has come"
        return draw_masked(self.read(slot), guided.mask), 0

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
            self.requests[slot] = seat.request
            constraint = seat.request.constraint
            self.grammars[slot], self.states[slot] = (constraint.grammar, constraint.state) if constraint else (None, 0)
            self.stops[slot] = seat.request.params.stop_token_ids
        for slot, page in zip(w.grow_slots, w.grow_pages, strict=True):
            self.tables[slot].append(page)
        for step in range(w.k):
            self.forwards += 1
            jumping = {j.request.slot for j in w.jumps} if step == 0 else set()
            assert jumping <= set(self.decoding), "a row that is not decoding jumps"
            chunked = jumping | {c.request.slot for c in w.chunks}
            once = w.once if step == 0 else []
            assert not set(once) & set(self.decoding), "a row that needs a mask draws without one"
            drawing = [s for s in self.decoding if s not in jumping] + [s for s in once if s not in chunked]
            wanted = [c.request.params.logprobs or 0 for c in w.chunks if c.scored] if step == 0 else []
            columns, scores = 1 + 2 * max(wanted, default=0), list[list[float]]()
            for slot in drawing:
                self.write(slot, self.last[slot])
            if step == 0:
                for c in w.chunks:
                    for token in c.request.tokens[c.start : c.end]:
                        self.write(c.request.slot, token)
                    for place in range(c.score_from, c.score_from + c.scored):
                        assert c.start <= place < c.end, "a row that the chunk does not compute"
                        before = self.read(c.request.slot)[: place + 1]
                        scores.append(scored(c.request, before, c.request.tokens[place + 1], columns))
                    if c.draws:
                        drawing.append(c.request.slot)
                for j in w.jumps:
                    slot = j.request.slot
                    assert (j.start, j.tokens[0]) == (self.length[slot], self.last[slot])
                    for token in j.tokens:
                        self.write(slot, token)
                    self.states[slot] = j.state
                    drawing.append(slot)
            drawn = [self.draw(slot) for slot in drawing]
            ids = [token for token, _ in drawn]
            self.states.update(zip(drawing, (state for _, state in drawn), strict=True))
            finish = [
                1 if t == EOS or t in self.stops[s] else 2 * (self.length[s] + 1 >= self.limit[s])
                for s, t in zip(drawing, ids, strict=True)
            ]
            self.last.update(zip(drawing, ids, strict=True))
            self.decoding = [s for s, f in zip(drawing, finish, strict=True) if not f and s not in once]
            rids = [self.rids[s] for s in drawing]
            done = np.array(finish, dtype=np.uint8)
            self.out.append((w.number, step, rids, ids, done, np.array(scores, dtype=np.float32).reshape(-1, columns)))
