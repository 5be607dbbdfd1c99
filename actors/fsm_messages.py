"""What the scheduler and the fsm actor tell each other: grammars, and masks of what may come next."""

from .front_messages import GrammarSpec
from .message import Message

# ------------------------------------------------------------------ sched -> fsm


class Compile(Message, frozen=True, tag=70):
    """Scheduler to fsm: compile a grammar. Owed: one Compiled or CompileFailed with the handle, unless discarded."""

    handle: int
    spec: GrammarSpec


class Discard(Message, frozen=True, tag=71):
    """Scheduler to fsm: nobody waits for this grammar any more. Nothing is owed."""

    handle: int


class Match(Message, frozen=True, tag=74):
    """Scheduler to fsm: a request that follows a Translated grammar has these tokens after its first `start` generated
    ones, which the fsm actor knows. Owed: a row of Masks, or MatchFailed, unless it is forgotten by Unmatch."""

    rid: int
    start: int
    ids: memoryview
    """int32"""
    grammar: str = ""
    """With start 0: Translated.grammar."""


class Unmatch(Message, frozen=True, tag=75):
    """Scheduler to fsm: forget a request's place in its grammar. Nothing is owed."""

    rid: int


# ------------------------------------------------------------------ fsm -> sched


class Compiled(Message, frozen=True, tag=72):
    """fsm to scheduler: the token table of a grammar; arrays as in LoadGrammar. Its state 0 is the start."""

    handle: int
    token_class: memoryview
    transitions: memoryview
    canonical: memoryview
    seconds: float = 0.0
    """What compiling took; 0 if the fsm actor knew the answer."""


class CompileFailed(Message, frozen=True, tag=73):
    """fsm to scheduler: the grammar cannot be used. `status` is HTTP's (400, 503), `message` says where in it."""

    handle: int
    status: int
    code: str
    message: str
    seconds: float = 0.0
    """As in Compiled."""


class Translated(Message, frozen=True, tag=76):
    """fsm to scheduler: a grammar that no table can have; `grammar` is what to send in Match."""

    handle: int
    grammar: str
    seconds: float = 0.0
    """As in Compiled."""


class Masks(Message, frozen=True, tag=77):
    """fsm to scheduler: what requests may draw next.

    rids int64 [rows]; lengths int32 [rows], the generated tokens before; bitmask int32 [rows, words], as in SlotMasks.
    """

    rids: memoryview
    lengths: memoryview
    bitmask: memoryview


class MatchFailed(Message, frozen=True, tag=78):
    """fsm to scheduler: a request cannot go on in its grammar; fields as in Ended."""

    rid: int
    status: int
    code: str
    message: str
