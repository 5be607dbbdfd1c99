"""A window as the scheduler's decisions make it, before it becomes a message: data only.

Made by schedule.py; the scheduler actor turns it into a Plan and what the sampler must know; tests run it on a
simulated executor. Invariant: what is in it is not looked at again once the window is reported.
"""

from dataclasses import dataclass, field

from .request import Request


@dataclass(slots=True)
class PrefillChunk:
    """Tokens [start, end) of a request, in its `admission`-th life."""

    request: Request
    admission: int
    start: int
    end: int
    draws: bool
    """The prompt ends here and a token is wanted: the slot decodes from now on."""
    score_from: int = 0
    scored: int = 0
    """Of so many tokens behind the one at the place `score_from` of the request the logprobs are wanted."""


@dataclass(slots=True)
class JumpChunk:
    """A decoding request's last token, which has no KV yet, and the forced ones behind it; then it draws as before.

    The forced tokens become the request's when the window is reported: until then nothing of it has changed.
    """

    request: Request
    start: int
    """Tokens before."""
    tokens: tuple[int, ...]
    state: int
    """Of its grammar, after them."""

    @property
    def scored(self) -> int:
        """Of how many of the tokens the logprobs are wanted: of the forced ones, or none."""
        return 0 if self.request.params.logprobs is None else len(self.tokens) - 1


@dataclass(slots=True)
class Landed:
    """Forced tokens that became known to the outside: a jump's, or those at the end of a prefill."""

    request: Request
    tokens: list[int]
    complete: bool
    """Whether the output matches its grammar with the last of them; never before, for there its end is no way."""
    scored: int | None = None
    """The row of its first token in the step's Scores."""


@dataclass(slots=True)
class Closed:
    """A request that ended without a draw, since its grammar left nothing but the end (jumps.py)."""

    request: Request
    forced: list[int]
    """The tokens before the end, whose KV nobody needs."""
    end: int


@dataclass(slots=True)
class Scored:
    """Tokens of a prompt whose logprobs came with the last report."""

    request: Request
    start: int
    """The place of the first of them in the prompt."""
    count: int
    row: int
    """The row of the first in the step's Scores."""


@dataclass(slots=True)
class Seat:
    """A request's admission: `cached` tokens have KV in the first of `pages`, which cover its prompt."""

    request: Request
    cached: int
    pages: list[int]


@dataclass(slots=True)
class Window:
    """A plan before it becomes a message: what the executor is to do in k steps."""

    number: int
    k: int = 1
    release: list[int] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(source page, destination page, tokens)"""
    admits: list[Seat] = field(default_factory=list)
    grow_slots: list[int] = field(default_factory=list)
    grow_pages: list[int] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)
    jumps: list[JumpChunk] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Slots that decode in it."""
    once: list[int] = field(default_factory=list)
    """Slots that draw in step 0 only, each under a mask of its own: rows, and such as a chunk lets draw."""
    budget: int = 0
    """Prompt tokens that still fit."""


@dataclass(slots=True)
class Counters:
    """Totals since the start, in tokens unless said."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    retractions: int = 0
    windows: int = 0
    steps: int = 0
    forced_tokens: int = 0
    jumps: int = 0
    expelled_pages: int = 0
    """That a request with impossible numbers had used, or given to the cache."""
