"""A grammar after thoughts: reasoning models think first, freely, and what the grammar describes comes after that.

Used by the grammar compiler for answers of chats whose thoughts are told apart. To a token table a state is added in
which all text may come and one of the closing tokens leads to the grammar's start; and, unless the prompt ends amid
thoughts, a start from which an opening token leads there. To a matcher of llguidance's, the same in front of it.
Invariant: outputs without thoughts are those of the grammar alone, token by token; no output ends amid thoughts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import Thoughts
from .canonical import NONE
from .token_table import END, NEVER

if TYPE_CHECKING:
    from .matcher import Matcher

Int32Array = npt.NDArray[np.int32]


class Tables(NamedTuple):
    """The arrays of a token table that drawing needs: V tokens, S states (0 is the start), K classes."""

    token_class: npt.NDArray[np.uint16]
    """uint16 [V]"""
    transitions: npt.NDArray[np.int16]
    """int16 [S, K]"""
    canonical: Int32Array
    """int32 [S]"""


def after_thoughts(tables: Tables, thoughts: Thoughts, text: npt.NDArray[np.bool_]) -> Tables:
    """Put thoughts before a grammar; text bool [V]: the tokens that thoughts are made of, ends and tags are not.

    Raises ValueError if the states or classes do not fit into int16.
    """
    classes = _Classes(tables, thoughts, text)
    added = 1 if thoughts.opened else 2
    old_states = len(tables.transitions)
    if old_states + added > np.iinfo(np.int16).max or classes.count > np.iinfo(np.int16).max:
        raise ValueError("too many states or classes")
    moved = np.where(tables.transitions >= 0, tables.transitions + added, NONE).astype(np.int16)
    transitions = np.full((old_states + added, classes.count), NONE, np.int16)
    transitions[added:] = moved[:, classes.origin]
    thinking, start = added - 1, added
    transitions[thinking, classes.text] = thinking
    transitions[thinking, [classes.of(token) for token in thoughts.closes]] = start
    if not thoughts.opened:
        forced = int(tables.canonical[0])
        if forced == NONE:
            transitions[0] = transitions[start]
        else:  # where one token must come, its class may have others
            transitions[0, classes.of(forced)] = transitions[start, classes.of(forced)]
        if transitions[start, END] >= 0:
            transitions[0, END] = 0
        transitions[0, [classes.of(token) for token in thoughts.opens]] = thinking
    canonical = np.concatenate([np.full(added, NONE, np.int32), tables.canonical])
    return Tables(classes.token_class, transitions, canonical)


class _Classes:
    """Classes in which the tokens that lead into, through and out of thoughts are told apart."""

    def __init__(self, tables: Tables, thoughts: Thoughts, text: npt.NDArray[np.bool_]) -> None:
        self.token_class = tables.token_class.copy()
        origin = list(range(tables.transitions.shape[1]))
        alone = dict.fromkeys([*thoughts.opens, *thoughts.closes])
        if not thoughts.opened and tables.canonical[0] != NONE:
            alone[int(tables.canonical[0])] = None
        tags = {*thoughts.opens, *thoughts.closes}
        # Text that the grammar has no use for is in a class with what is no text.
        foreign = text & (tables.token_class == NEVER)
        foreign[list(tags)] = False
        if foreign.any():
            self.token_class[foreign] = len(origin)
            origin.append(NEVER)
        for token in alone:
            origin.append(origin[self.token_class[token]])
            self.token_class[token] = len(origin) - 1
        own = {self.of(token) for token in tags}
        self.origin = np.array(origin)
        self.count = len(origin)
        self.text = [c for c in range(self.count) if c not in own and c != END and (c != NEVER)]

    def of(self, token: int) -> int:
        """The class of a token."""
        return int(self.token_class[token])


class ThinkingMatcher:
    """A Matcher behind thoughts."""

    def __init__(self, matcher: "Matcher", thoughts: Thoughts, text: Int32Array) -> None:
        """text int32 [words]: the mask of the tokens that thoughts are made of."""
        self._matcher = matcher
        self._thoughts = thoughts
        self._text = text
        self._place = "thoughts" if thoughts.opened else "start"
        """start, thoughts or answer"""

    def copy(self) -> "ThinkingMatcher":
        """Return another one at the same place."""
        other = ThinkingMatcher(self._matcher.copy(), self._thoughts, self._text)
        other._place = self._place
        return other

    def consume(self, ids: Sequence[int]) -> None:
        """See Matcher."""
        for number, token in enumerate(ids):
            if self._place == "start":
                self._place = "thoughts" if token in self._thoughts.opens else "answer"
                if self._place == "thoughts":
                    continue
            if self._place == "answer":
                self._matcher.consume(ids[number:])
                return
            if token in self._thoughts.closes:
                self._place = "answer"

    def fill(self, mask: Int32Array) -> None:
        """See Matcher."""
        if self._place == "thoughts":
            mask[:] = self._text
            _allow(mask, self._thoughts.closes)
            return
        self._matcher.fill(mask)
        if self._place == "start":
            _allow(mask, self._thoughts.opens)


def _allow(mask: Int32Array, tokens: Sequence[int]) -> None:
    for token in tokens:
        mask.view(np.uint32)[token // 32] |= np.uint32(1) << np.uint32(token % 32)
