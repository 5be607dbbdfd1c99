"""A request as the scheduler knows it: the one place where its truth lives (tokens, parameters, progress).

Everything else (KV pages, sampler state, text) can be rebuilt from `tokens` and `params`, which is why a request
survives retraction and the death of its executor: it goes back to the queue and is prefilled again.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from ..config import Pooling
from ..kvstore.radix import Node
from ..sampler.params import SamplingParams
from .constraint import Constraint, Guided
from .messages import ImageSpan, Submit
from .prompt_scores import PromptScores, prompt_scores


class Stage(Enum):
    """Where a request is. Only PREFILL and DECODE hold a slot and pages."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2
    ENDED = 3


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. The KV of the newest token is always missing until the next step computes it."""

    rid: int
    tokens: "array[int]"
    """int32: the prompt and what was generated."""
    prompt_length: int
    params: SamplingParams
    namespace: str
    priority: int
    arrival_ns: int
    limit: int
    """Tokens at which it ends by length."""
    stage: Stage = Stage.WAITING
    slot: int = -1
    node: Node | None = None
    """Deepest radix node that it holds a lock on."""
    pages: list[int] = field(default_factory=list)
    owned: list[bool] = field(default_factory=list)
    """Per page: the request's own (to be freed or given to the tree), else the tree's."""
    target: int = 0
    """Tokens to prefill: what was known at admission."""
    planned: int = 0
    """Tokens whose prefill is planned."""
    confirmed: int = 0
    """Tokens whose prefill the executor has reported."""
    admissions: int = 0
    """Lives so far: chunks of an earlier life report nothing any more."""
    window: int = -1
    """Window of its last admission."""
    blocked_until: int = -1
    """After a retraction: the last window that may still bring tokens; no admission before it is reported."""
    tenant: str = ""
    """Whose it is, for fair shares; "" without API keys."""
    weight: float = 1.0
    """The tenant's share in relation to others'."""
    charged: int = 0
    """Of its tokens, those that the tenant was charged for, or that it found in the cache."""
    crashes: int = 0
    """Deaths of an executor of which it alone can be the cause, since its last token."""
    matched: tuple[int, int] = (-1, 0)
    """(state of the tree, cached prefix tokens in that state): the queue orders by it again and again."""
    constraint: Constraint | None = None
    """What the output must match; its state is that after all of `tokens`."""
    unsent: int = 0
    """Its newest tokens, forced ones, that nobody was told of yet: they wait until a chunk has computed their KV."""
    guided: Guided | None = None
    """The same where the fsm actor follows the grammar: then it draws only when a mask has come."""
    scores: PromptScores | None = None
    """What it wants to know of its prompt's logprobs."""
    pin: int = 0
    """What it leaves in the prefix cache is held under this number (kvstore/pins.py); 0: it is not."""
    pooled: bool = False
    """It wants its prompt's vector and no tokens."""
    reuses: bool = True
    """It may begin with KV from the cache."""
    opening: bool | None = None
    """Whether the output that it was submitted with matches its grammar; None: it has none that tells."""
    images: tuple[ImageSpan, ...] = ()
    """Where the prompt has images; see Submit.ids."""
    second: int = 0
    """See Submit."""
    _ids: np.ndarray | None = None

    def ids(self) -> np.ndarray:
        """Return the tokens as int32 [n]: a copy, remade when tokens were added."""
        if self._ids is None or len(self._ids) != len(self.tokens):
            self._ids = np.array(self.tokens, dtype=np.int32)
        return self._ids

    def append(self, token: int) -> None:
        """Take in a generated token."""
        self.tokens.append(token)
        self.follow(token)

    def follow(self, token: int) -> None:
        """Let the grammar know of the newest token."""
        if self.constraint is not None:
            self.constraint.state = self.constraint.grammar.step(self.constraint.state, token)
        if self.guided is not None:
            self.guided.mask = None

    def matches_with(self, token: int, stopped: bool) -> bool:
        """Whether the text that the client sees is known to match the grammar, now that this token has come.

        stopped: the token ended the output. One that does so by itself (stop_token_ids) is not seen; the grammar's own
        end says that all before matches.
        """
        seen = not stopped or self.params.no_stop_trim
        if self.constraint is not None:
            return self.constraint.complete and (seen or self.constraint.grammar.ends(token))
        return self.guided is not None and stopped and token not in self.params.stop_token_ids

    @property
    def matches(self) -> bool:
        """Whether its tokens are known to match its grammar."""
        return self.constraint is not None and self.constraint.complete

    @property
    def jumps(self) -> bool:
        """Whether forced tokens may come as chunks; see jumps.py."""
        return self.constraint is not None

    @property
    def waits_for_mask(self) -> bool:
        """Whether it cannot draw before the fsm actor has said what may come."""
        return self.guided is not None and self.guided.mask is None

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def computed(self) -> int:
        """Leading tokens whose KV the executor has reported."""
        return self.confirmed if self.confirmed < self.target else max(self.target, len(self.tokens) - 1)

    @property
    def reusable(self) -> int:
        """Leading tokens whose KV may come from the cache: never all, since one must be computed to draw the next."""
        most = len(self.tokens) - 1 if self.reuses else 0
        return most if self.scores is None else self.scores.reusable(most)

    @property
    def wants_tokens(self) -> bool:
        """False for a request that only fills the cache (max_new_tokens 0)."""
        return self.limit > len(self.tokens)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many leading tokens two int32 arrays share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def request_of(m: Submit, pooling: Pooling | None) -> Request:
    """Return what a Submit asks for; `pooling`: ModelInfo's."""
    ids = array("i")
    ids.frombytes(m.ids)
    prompt_length = len(ids)
    ids.frombytes(m.generated)
    assert m.params.max_new_tokens is not None, "the text actor resolves it"
    return Request(
        rid=m.rid,
        tokens=ids,
        prompt_length=prompt_length,
        params=m.params,
        namespace=m.cache_salt,
        priority=m.priority,
        arrival_ns=m.arrival_ns,
        limit=prompt_length + m.params.max_new_tokens,
        scores=prompt_scores(m.params, prompt_length),
        tenant=m.tenant,
        weight=m.weight,
        pin=m.pin,
        pooled=m.pooled,
        reuses=pooling is None or pooling.reuses,
        images=m.images,
        second=m.second,
    )
