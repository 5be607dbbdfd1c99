"""Pictures of a program, in the form in which servers take them. Used by the interpreter.

Invariant: a Picture holds the picture itself, or the address that the program named; nothing is fetched here.
"""

import base64
import mimetypes
from pathlib import Path

import msgspec

from ..errors import RequestError


class Picture(msgspec.Struct, frozen=True):
    """`url` is http(s), or a data: address with the picture in base64."""

    url: str

    @property
    def data(self) -> str:
        """The base64, or the address where there is none."""
        return self.url.partition(";base64,")[2] or self.url

    @property
    def media_type(self) -> str:
        """Like image/png; empty for an address."""
        return self.url[5:].partition(";")[0] if self.url.startswith("data:") else ""


def load(source: str | bytes) -> Picture:
    """A picture from an address, a data: address, a path, or a file's bytes. Raises RequestError."""
    if isinstance(source, bytes):
        return _inline(source, "image/jpeg")
    if source.startswith(("http://", "https://", "data:")):
        return Picture(source)
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise RequestError(f"the picture cannot be read: {error.strerror}", param="image") from None
    return _inline(content, mimetypes.guess_type(source)[0] or "image/jpeg")


def _inline(content: bytes, media_type: str) -> Picture:
    return Picture(f"data:{media_type};base64,{base64.b64encode(content).decode()}")
