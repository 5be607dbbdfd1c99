"""How deep a JSON text is nested, told before it is parsed.

Used by error_replies.py. Parsers recurse, and so does much of what reads what they return. Invariant: the time is that
of a few passes over the text at memory speed, whatever is in it.
"""

from typing import Final

import numpy as np

MAX_JSON_DEPTH: Final = 128
"""Of an HTTP body: objects and lists inside each other. A JSON schema takes two or three a level."""
_STEP: Final = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_OTHERS: Final = bytes(set(range(256)) - set(b'"[]{}'))


def too_deep(text: bytes, most: int = MAX_JSON_DEPTH) -> bool:
    """Whether lists and objects are nested more than `most` deep. Of what is no JSON any answer is right."""
    if text.count(b"[") + text.count(b"{") <= most:
        return False
    # Within strings backslashes come in pairs, or escape what follows; outside of them there are none.
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _OTHERS)
    marks = np.frombuffer(plain, np.uint8)
    within = np.cumsum(marks == ord('"'), dtype=np.int32) & 1
    steps = np.where(within == 1, np.int8(0), _STEP[marks])
    return bool(len(steps)) and int(np.cumsum(steps, dtype=np.int32).max()) > most
