"""What can be wrong with a grammar: the errors of fsm/, each with what a client can do about it.

Raised by all of fsm/, turned into replies by whoever asked for the grammar. Invariant: all of them are the request's
fault (400), and their text names the offending construct, byte or budget, never an internal object.
"""

from collections.abc import Iterable

from ..errors import RequestError


class GrammarError(RequestError):
    """Base: this grammar can't be used to constrain an output."""

    code = "invalid_grammar"


class PatternError(GrammarError):
    """A regular expression is malformed, or uses what no automaton can do.

    `position`: index into the pattern, None where it was rewritten from another dialect.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message if position is None else f"{message} (position {position})")
        self.position = position


class BudgetError(GrammarError):
    """Compiling took more than it may. `resource` says of what: "nfa states", "dfa states", "seconds", ..."""

    code = "grammar_too_large"

    def __init__(self, resource: str, limit: float) -> None:
        super().__init__(f"the grammar needs more than {limit:g} {resource}")
        self.resource = resource
        self.limit = limit


class EmptyLanguage(GrammarError):
    """Nothing matches."""

    def __init__(self) -> None:
        super().__init__("nothing can match this grammar")


class NotRegular(GrammarError):
    """A valid grammar that no automaton can have: it calls itself, or its form is another backend's."""


class MatcherError(GrammarError):
    """llguidance's parser gave up on an output: it took too long, or no token of the model can follow."""


class Unspellable(GrammarError):
    """No sequence of this tokenizer's tokens matches. `missing`: byte values that no token of one byte spells."""

    def __init__(self, missing: Iterable[int]) -> None:
        self.missing = tuple(missing)
        named = ", ".join(f"0x{value:02X}" for value in self.missing[:16])
        super().__init__(f"the model's tokens cannot spell any match: bytes without a token of their own: {named}")
