"""What two machines of one server tell each other beside the messages of the actors that live on them.

The frames of kind CONTROL (sealed.py); the others carry a message to or from the actor that PEERS names, as the lane
had it. PeerUp and PeerDown travel, too: the head's, of its text and fsm actors; the member's, of its scheduler.
"""

from typing import Final, TypeAlias

import msgspec

from .message import Message, PeerDown, PeerUp

VERSION: Final = 1
"""Of what these machines speak; others are refused."""
CONTROL: Final = 0
PEERS: Final = {"text": 1, "fsm": 2}
"""Kind of a frame to or from an actor of the head."""


class Join(Message, frozen=True, tag=120):
    """Member to head, first of all: who it is. Owed: Welcome or Refusal."""

    version: int
    machine: int
    """--node-rank."""
    replica: int
    facts: dict[str, str]
    """What must be the same on both (machines.py)."""


class Welcome(Message, frozen=True, tag=121):
    """The replica's stand-in on the head has the connection. `now_ns`: CLOCK_MONOTONIC there."""

    now_ns: int


class Refusal(Message, frozen=True, tag=122):
    """The connection is of no use. `final`: asking again would not help."""

    text: str
    final: bool


class Beat(Message, frozen=True, tag=123):
    """I am here; from both sides, a few times in --node-timeout."""


class Serving(Message, frozen=True, tag=124):
    """Member to head: the replica's scheduler is up."""


Control: TypeAlias = Join | Welcome | Refusal | Beat | Serving | PeerUp | PeerDown
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Control).decode
