"""Router: which of several replicas gets a request. The text actor has one, as it is there that prompts become tokens.

Invariant: the choice depends on the arguments and the calls before, and on nothing else; what is kept is bounded.
"""

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..config import EngineConfig
from ..kvstore.sent_prefixes import SentPrefixes

REQUEST_TOKENS: Final = 256
"""A request that a replica has weighs as much as so many tokens of prompt that it has to compute. On an H200 a row more
in the batch costs the others 0.02 ms a step (Qwen2-7B), over 256 steps about what these tokens cost to compute."""


class Router:
    """See the module's text. Replicas are numbers from 0."""

    def __init__(self, config: EngineConfig) -> None:
        self._method = config.load_balance_method
        self._prefixes = SentPrefixes(config.page_size)
        self._turns = [0] * config.dp_size
        """When each was chosen last, in choices."""
        self._choices = 0

    def choose(self, ids: NDArray[np.int32], salt: str, loads: Sequence[int], among: Collection[int]) -> int:
        """One of `among` for this prompt. `loads`: requests that each replica has, `among` or not.

        cache_aware: the one that has least to do before the request's first token, as far as is known: what it lacks of
        the prompt, and its requests. So a prompt follows what it shares with others, unless that replica has more
        requests than another, one for each REQUEST_TOKENS that are shared. Of equals whose turn is longest ago.
        """
        hashes = self._prefixes.hashes(ids, salt) if self._method == "cache_aware" else []
        known = self._prefixes.known(hashes, len(self._turns))
        weight = 0 if self._method == "round_robin" else REQUEST_TOKENS
        chosen = min(among, key=lambda one: (weight * loads[one] - known[one], self._turns[one]))
        self._choices += 1
        self._turns[chosen] = self._choices
        self._prefixes.sent(hashes, chosen)
        return chosen

    def lost(self, replica: int) -> None:
        """Its cache is empty."""
        self._prefixes.forget(replica)
