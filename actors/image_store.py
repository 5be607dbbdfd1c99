"""The scheduler's images: their pixels for as long as a request may need them, and which of them the executors have.

Used by the scheduler actor. Executors keep the features of what they were sent until they are told to drop it: this is
the encoder cache's one table, least recently used first, within FEATURE_BYTES. Invariants: an image that a request has
is here, so that an executor that died can be sent it again; an image of a running request is never dropped.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from ..errors import Overloaded
from .messages import DropImage, ImagePixels, ImageSpan
from .request import Request

HELD_BYTES: Final = 1 << 30
"""Of pixels that requests have; more wait in vain."""
IDLE_BYTES: Final = 128 << 20
"""Of all pixels, where requests do not have more."""
FEATURE_BYTES: Final = 256 << 20
"""Of features on a device that running requests do not need at once."""


@dataclass(slots=True)
class ImageStore:
    """Images by digest, those used last at the end."""

    pixels: OrderedDict[bytes, ImagePixels] = field(default_factory=OrderedDict)
    fresh: set[bytes] = field(default_factory=set)
    """Came, and the request that has them is the next message."""
    loaded: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    """Images that the executors have, with the bytes of their features."""
    token_bytes: int = 0
    """Of features, for each token of an image."""
    nbytes: int = 0
    """Of pixels."""

    def came(self, m: ImagePixels) -> None:
        """Keep an image, a copy, for the Submit that follows."""
        if m.image not in self.pixels:
            raw = memoryview(bytes(m.pixels))
            self.pixels[m.image] = msgspec.structs.replace(m, pixels=raw)
            self.nbytes += len(raw)
        self.fresh.add(m.image)

    def hold(self, images: Iterable[ImageSpan], living: Iterable[Request]) -> None:
        """A request has these images; `living`: all the others. Raises Overloaded where theirs take too much memory."""
        names = {span.image for span in images}
        self.fresh -= names
        for name in names:
            self.pixels.move_to_end(name)
        if self.nbytes <= IDLE_BYTES:
            return
        held = names | self.fresh | {span.image for request in living for span in request.images}
        for name in list(self.pixels):
            if self.nbytes > IDLE_BYTES and name not in held:
                self.nbytes -= len(self.pixels.pop(name).pixels)
        if self.nbytes > HELD_BYTES:
            raise Overloaded("the images of the requests in the engine take too much memory; try again")

    def executor_lost(self) -> None:
        """What the executors had died with them."""
        self.loaded.clear()

    def load(
        self, admitted: Iterable[tuple[Request, int]], running: Iterable[Request]
    ) -> list[ImagePixels | DropImage]:
        """What executors must be sent before these (request, tokens with KV) are computed, of all that are running."""
        sent: list[ImagePixels | DropImage] = []
        for request, cached in admitted:
            for span in request.images:
                if span.image in self.loaded:
                    self.loaded.move_to_end(span.image)
                elif span.start + span.length > cached:
                    self.loaded[span.image] = span.length * self.token_bytes
                    sent.append(self.pixels[span.image])
        if not sent:
            return sent
        needed = {span.image for request in running for span in request.images}
        total = sum(self.loaded.values())
        for name in list(self.loaded):
            if total <= FEATURE_BYTES:
                break
            if name not in needed:
                total -= self.loaded.pop(name)
                sent.append(DropImage(name))
        return sent
