"""Times of one machine as another's: CLOCK_MONOTONIC begins with each machine's boot.

Used by link.py. Of all messages that cross, Submit has times of the head and Timelines times of the member; the others
have none. What is known of the difference is off by half of the time that the first question took, at most.
"""

from typing import Any, Final

import msgspec

from .messages import Submit, Timelines, TimelineView

_submit: Final = msgspec.msgpack.Decoder(Submit)
_timelines: Final = msgspec.msgpack.Decoder(Timelines)
_encode: Final = msgspec.msgpack.Encoder().encode
_SUBMIT: Final = Submit.__struct_config__.tag
_TIMELINES: Final = Timelines.__struct_config__.tag


class Clocks:
    """The difference, and messages moved by it."""

    def __init__(self) -> None:
        self.ahead_ns = 0
        """What the head's clock shows more than ours."""

    def heard(self, asked_ns: int, head_ns: int, answered_ns: int) -> None:
        """The head's clock showed `head_ns` between these two times of ours."""
        self.ahead_ns = head_ns - (asked_ns + answered_ns) // 2

    def from_head(self, message: bytes) -> bytes:
        """A message to our scheduler."""
        if _tag(message) != _SUBMIT:
            return message
        return _encode(_moved(_submit.decode(message), -self.ahead_ns))

    def to_head(self, message: memoryview) -> bytes | memoryview:
        """A message of our scheduler."""
        if _tag(message) != _TIMELINES:
            return message
        m = _timelines.decode(message)
        return _encode(Timelines(m.rid, [self._moved(one) for one in m.timelines]))

    def _moved(self, one: TimelineView) -> TimelineView:
        windows = [_moved(window, self.ahead_ns) for window in one.windows]
        moved: TimelineView = msgspec.structs.replace(_moved(one, self.ahead_ns), windows=windows)
        return moved


def _tag(message: bytes | memoryview) -> int:
    """Of a message as msgpack: an array that begins with its tag."""
    place = 3 if message[0] == 0xDC else 1
    return message[place] if len(message) > place else -1


def _moved(struct: Any, by_ns: int) -> Any:
    """All its times that are times; 0 is none."""
    names = (name for name in struct.__struct_fields__ if name.endswith("_ns"))
    return msgspec.structs.replace(struct, **{n: at + by_ns for n in names if (at := getattr(struct, n))})
