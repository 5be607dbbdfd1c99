"""ResponseStore: finished responses of /v1/responses, for those who ask for them again or go on from them.

One per front, in memory. Invariant: it holds MOST responses and MOST_BYTES at most, the newest ones; who made one
(`owner`, an API key's name) is the only one to find it.
"""

from collections import OrderedDict
from typing import Final, NamedTuple

from ..actors.conversation import ChatMessage
from ..errors import RequestError

MOST: Final = 1024
MOST_BYTES: Final = 64 << 20


class Stored(NamedTuple):
    """A response as JSON, and the conversation with its answer; instructions are not part of it, as with OpenAI."""

    body: bytes
    messages: list[ChatMessage]
    size: int
    """Bytes, roughly."""


class ResponseStore:
    """See the module's text."""

    def __init__(self) -> None:
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._size = 0

    def put(self, name: str, stored: Stored, owner: str = "") -> None:
        """Keep a response, and forget the oldest ones for it."""
        self._stored[owner, name] = stored
        self._size += stored.size
        while len(self._stored) > MOST or self._size > MOST_BYTES:
            self._size -= self._stored.popitem(last=False)[1].size

    def get(self, name: str, param: str = "response_id", owner: str = "") -> Stored:
        """Return a response; raises RequestError (404) if there is none of this id (any more)."""
        stored = self._stored.get((owner, name))
        if stored is None:
            raise RequestError(f"response {name[:80]!r} is not stored here", param=param, code="not_found", status=404)
        return stored

    def delete(self, name: str, owner: str = "") -> None:
        """Forget a response; raises as get does."""
        self._size -= self.get(name, owner=owner).size
        del self._stored[owner, name]
