"""The front door of fsm/: a syntax tree or a pattern to a token table.

Used by whoever compiles grammars, in a process that may be killed. The stages: tree -> positions (nfa.py) -> automaton
over characters (dfa.py, minimise.py) -> over bytes (utf8.py) -> over tokens (token_table.py). Invariant: one budget
covers all of them.
"""

from .budget import Budget
from .canonical import Encode
from .dfa import determinise
from .lengths import least_states
from .minimise import minimise
from .nfa import build_nfa
from .pattern import parse_pattern
from .syntax import Node
from .token_table import TokenTable, build_table
from .utf8 import ByteDfa, lower
from .vocabulary import TokenizerTables


def compile_bytes(node: Node, budget: Budget) -> ByteDfa:
    """Return the minimal automaton over bytes.

    Raises EmptyLanguage: nothing matches. BudgetError: too large or too slow.
    """
    budget.need_dfa_states(least_states(node))  # what is hopeless by arithmetic alone takes no time
    nfa = build_nfa(node, budget)
    return lower(minimise(determinise(nfa, budget), budget), budget)


def compile_tokens(
    node: Node, tables: TokenizerTables, encode: Encode | None, budget: Budget | None = None
) -> TokenTable:
    """Return the token table of a language; encode as for build_table.

    Raises EmptyLanguage, BudgetError, Unspellable.
    """
    budget = budget or Budget()
    return build_table(compile_bytes(node, budget), tables, encode, budget)


def compile_pattern(
    pattern: str, tables: TokenizerTables, encode: Encode | None, budget: Budget | None = None
) -> TokenTable:
    """Return the token table of a regular expression (the dialect is pattern.py's).

    Raises PatternError, and what compile_tokens raises.
    """
    budget = budget or Budget()
    budget.need_pattern(len(pattern))
    return compile_tokens(parse_pattern(pattern), tables, encode, budget)
