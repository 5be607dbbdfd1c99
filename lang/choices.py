"""How `select` decides between choices by their tokens' log-probabilities: SGLang's three methods.

Backends score the choices; this decides. Invariant: of equal scores the first choice wins. `scores[i]` are the tokens
of choice i after the prompt, `unconditional[i]` the same tokens without it, where the first has none (0 stands in).
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import msgspec

TokenScore: TypeAlias = tuple[float, int, str | None]
"""(natural logarithm of the probability, token id, the token's text if known)."""
ChoiceScores: TypeAlias = Sequence[Sequence[TokenScore]]


class ChoicesDecision(msgspec.Struct, frozen=True):
    """What was chosen, and the scores it was chosen by, in the names of SGLang's `meta_info`."""

    decision: str
    meta_info: dict[str, Any]


class ChoicesMethod(msgspec.Struct, frozen=True):
    """A named way to choose; `rank(scores, unconditional)` gives the chosen index, and facts for meta_info."""

    name: str
    rank: Callable[[ChoiceScores, ChoiceScores], tuple[int, dict[str, Any]]]
    requires_unconditional_logprobs: bool = False

    def decide(
        self, choices: Sequence[str], scores: ChoiceScores, unconditional: ChoiceScores | None = None
    ) -> ChoicesDecision:
        """Choose; raises ValueError where the method needs `unconditional` and has none."""
        if self.requires_unconditional_logprobs and unconditional is None:
            raise ValueError(f"{self.name} needs the logprobs of the choices without the prompt")
        chosen, facts = self.rank(scores, unconditional or ())
        meta = {
            "normalized_prompt_logprobs": [_mean(_logprobs(tokens)) for tokens in scores],
            "input_token_logprobs": [list(tokens) for tokens in scores],
        }
        if unconditional is not None:
            meta["unconditional_token_logprobs"] = [list(tokens) for tokens in unconditional]
        return ChoicesDecision(choices[chosen], meta | facts)


def _logprobs(tokens: Sequence[TokenScore]) -> list[float]:
    return [token[0] for token in tokens]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _by_mean(scores: ChoiceScores, _: ChoiceScores) -> tuple[int, dict[str, Any]]:
    return _best([_mean(_logprobs(tokens)) for tokens in scores]), {}


def _token_by_token(scores: ChoiceScores, _: ChoiceScores) -> tuple[int, dict[str, Any]]:
    """Keep the choices with the best first token, of those the best second one, ...; short ones go on at their mean."""
    longest = max(map(len, scores))
    rows = [_logprobs(tokens) for tokens in scores]
    matrix = [row + [_mean(row)] * (longest - len(row)) for row in rows]
    left = list(range(len(matrix)))
    for column in range(longest):
        best = max(matrix[i][column] for i in left)
        left = [i for i in left if matrix[i][column] == best]
    return left[0], {"greedy_logprob_matrix": matrix}


def _by_gain(scores: ChoiceScores, unconditional: ChoiceScores) -> tuple[int, dict[str, Any]]:
    gains = []
    for tokens, alone in zip(scores, unconditional, strict=True):
        pairs = zip(_logprobs(tokens), [0.0, *_logprobs(alone)[1:]], strict=True)
        gains.append(_mean([given - without for given, without in pairs]))
    return _best(gains), {"normalized_unconditional_prompt_logprobs": gains}


token_length_normalized: Final = ChoicesMethod("token_length_normalized", _by_mean)
greedy_token_selection: Final = ChoicesMethod("greedy_token_selection", _token_by_token)
unconditional_likelihood_normalized: Final = ChoicesMethod("unconditional_likelihood_normalized", _by_gain, True)
METHODS: Final = {
    method.name: method
    for method in (token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized)
}
