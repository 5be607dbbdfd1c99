"""Matchers: an output's place in a grammar that no automaton can have, kept by llguidance's parser on the host.

Used by the grammar compiler, which tries a grammar once before it is accepted, and by the fsm actor, which has one
matcher a running request. Invariant: a matcher is a function of its grammar and of the tokens it was given; what it
may take in a step is limited, so that a stranger's grammar fails alone and soon.
"""

from collections.abc import Callable, Sequence
from typing import Final

import llguidance
import numpy as np
import numpy.typing as npt

from ..config import Thoughts
from .errors import EmptyLanguage, GrammarError, MatcherError
from .thoughts import ThinkingMatcher

Int32Array = npt.NDArray[np.int32]

LIMITS: Final = llguidance.LLParserLimits(
    # The library's own, but for the items of a step: twice as many, since GBNF is parsed character by character
    # (gbnf.py), where grammars of programming languages take some thousands; they also end looking ahead into what is
    # forced, 10 to 70 ms later. And for memory: lexer states take up to 2 kB each.
    step_max_items=100_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)


class _Tokens:
    """A tokenizer as llguidance wants to see it. `encode` may give tokens of other bytes (a space that SentencePiece
    puts before every text): then the longest tokens are taken from the left."""

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], eos: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = list(special)
        self.eos_token_id, self.bos_token_id = eos, None
        self._encode = encode
        hidden = {*special, eos}
        self._ids = {data: i for i, data in enumerate(self.tokens) if data and i not in hidden}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        whole = text.encode() if isinstance(text, str) else text
        ids = self._encode(whole.decode())
        if b"".join(self.tokens[i] if i < len(self.tokens) else b"?" for i in ids) == whole:
            return ids
        return self._greedy(whole)

    def _greedy(self, data: bytes) -> list[int]:
        found, at = list[int](), 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((n for n in sizes if data[at : at + n] in self._ids), 0)
            if not size:
                break
            found.append(self._ids[data[at : at + size]])
            at += size
        return found


class Matchers:
    """Makes the matchers of one tokenizer."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Sequence[int],
        eos: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        """tokens [V]: their bytes, b"" for ids that never come, a special token's name. eos: ids that end an output."""
        wrapper = llguidance.TokenizerWrapper(_Tokens(tokens, special, eos[0], encode))
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(eos))
        self.words = -(-len(tokens) // 32)
        """32-bit words of a mask."""
        hidden = {*special, *eos}
        bits = np.zeros(32 * self.words, np.bool_)
        bits[[i for i, data in enumerate(tokens) if data and i not in hidden]] = True
        self._text = np.packbits(bits, bitorder="little").view(np.int32)
        """The mask of all tokens that are text."""

    def new(self, grammar: str, thoughts: Thoughts | None = None) -> "AnyMatcher":
        """Return a matcher at the beginning, behind thoughts if there are any.

        Raises GrammarError: malformed, too large, or nothing matches.
        """
        made = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if made.is_error():
            raise _error(made, GrammarError)
        matcher = Matcher(made, self.words)
        return matcher if thoughts is None else ThinkingMatcher(matcher, thoughts, self._text)


class Matcher:
    """One output's. Made by Matchers; may move between threads, but be used by one at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int) -> None:
        self._matcher = matcher
        self._words = words

    def copy(self) -> "Matcher":
        """Return another one at the same place, cheaper than a new one in time and memory."""
        return Matcher(self._matcher.deep_copy(), self._words)

    def consume(self, ids: Sequence[int]) -> None:
        """Go on by these tokens. Raises MatcherError if they can't come here."""
        if not self._matcher.consume_tokens(list(ids)):
            raise _error(self._matcher, MatcherError)

    def fill(self, mask: Int32Array) -> None:
        """Write what may come next into mask int32 [words], bit i of word w for token 32 w + i.

        The end of the output is among it where the grammar is satisfied. Raises MatcherError when nothing may, or a
        limit is reached.
        """
        if mask.shape != (self._words,) or mask.dtype != np.int32 or not mask.flags.c_contiguous:
            raise ValueError(f"a mask is contiguous int32 [{self._words}]")
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise _error(self._matcher, MatcherError)
        if not mask.any():
            raise MatcherError("no token of the model can follow here")


AnyMatcher = Matcher | ThinkingMatcher


def _error(matcher: llguidance.LLMatcher, kind: type[GrammarError]) -> GrammarError:
    """What is wrong, without the state of the parser, in one line."""
    text = matcher.get_error()
    if text.startswith("NoExtension"):
        return EmptyLanguage()
    return kind(" ".join(text.split("\n<")[0].split())[:400])
