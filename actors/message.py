"""What all messages are made of (messages.py has the rules), and the supervisor's to every actor."""

from enum import IntEnum
from typing import Final, NewType

import msgspec

RequestId = NewType("RequestId", int)  # front index << 40 | counter; n choices of a request take n ids in a row


class Finish(IntEnum):
    """Why a request's last token is its last. In StepOut and Tokens one byte per row."""

    NONE = 0
    STOP = 1  # EOS or a stop_token_id, which is the row's token
    LENGTH = 2  # max_new_tokens, or the end of the context
    POISON = 3  # NaN or no token allowed: the request fails, its pages are not kept
    GRAMMAR = 4  # the grammar left no token: the request fails


class ChunkEnd(IntEnum):
    """What comes behind a prompt chunk."""

    MORE = 0
    """Another chunk; or nothing, if the request only fills the cache."""
    DRAW = 1
    """The prompt ends: a token is drawn, and the slot decodes from now on."""
    POOL = 2
    """The prompt ends, and its vector is in the step's Pooled."""


NOTHING: Final = memoryview(b"")


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base of everything that crosses a lane."""


# ------------------------------------------------------------------ from the supervisor, to every actor


class PeerUp(Message, frozen=True, tag=1):
    """An actor that the receiver has a lane with is (again) running; its lanes are fresh."""

    name: str
    epoch: int


class PeerDown(Message, frozen=True, tag=2):
    """An actor that the receiver has a lane with died; what was in its lanes is lost."""

    name: str
    epoch: int
    reason: str
    fault: bool = True
    """It died of itself: of an exception, a signal, a hang, no memory. False: somebody from outside killed it."""
    at_work: tuple[int, ...] = ()
    """The requests that its node was working on; see desk.py."""


class Drain(Message, frozen=True, tag=3):
    """Take no new work; finish what runs until `deadline_ns` (CLOCK_MONOTONIC)."""

    deadline_ns: int


class Fence(Message, frozen=True, tag=95):
    """From whoever stands in for an actor of another machine (link.py), to a scheduler. Owed: the same, back."""

    number: int
