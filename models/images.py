"""ImageReader: the bytes of an image file to what the vision tower takes, by transformers' image processor.

Used by the text actor, in its threads. What is decoded comes from strangers: the format and the number of pixels are
read from the file's head and checked before anything is decoded. Invariant: equal files of one prompt's kind give the
same digest and pixels, and the digest tells all that the features of an image depend on.
"""

import hashlib
import io
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError, StartupError
from .resolve import read_facts
from .vision_config import ONEVISION, vision_facts

FORMATS: Final = ("PNG", "JPEG", "WEBP")
MOST_ASPECT: Final = 100
"""Of the longer side to the shorter: beyond it a resized image has no pixels left. (Some processors pad an image to a
square, so the longer side has a limit of its own.)"""
MOST_BYTES: Final = 60 << 20
"""Of a processed image: it travels in one message."""
KEPT_BYTES: Final = 128 << 20
"""Of processed images that are kept for when they come again, as in the next turn of a conversation."""


@dataclass(frozen=True, slots=True)
class Image:
    """A processed image; see messages.ImagePixels."""

    digest: bytes
    tokens: int
    size: tuple[int, int]
    alone: bool
    pixels: NDArray[np.float32]
    """[tiles, channels, height, width]"""


class ImageReader:
    """Processes images. Safe to use from several threads."""

    def __init__(self, folder: Path, most_pixels: int) -> None:
        """`most_pixels`: of an image as it is sent. Raises StartupError for a model folder without a processor."""
        self.facts = vision_facts(read_facts(folder))
        self._most_pixels = most_pixels
        self._processor = _processor(folder)
        self._kept: OrderedDict[tuple[bytes, bool], Image] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def read(self, file: bytes, alone: bool) -> Image:
        """Process a file; `alone`: it is its prompt's only image. Raises RequestError without a field."""
        key = hashlib.blake2b(file, digest_size=16).digest(), alone
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return kept
        image = self._process(decoded(file, self._most_pixels), alone)
        with self._lock:
            self._keep(key, image)
        return image

    def _keep(self, key: tuple[bytes, bool], image: Image) -> None:
        if key in self._kept:
            return
        self._kept[key] = image
        self._kept_bytes += image.pixels.nbytes
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].pixels.nbytes

    def _process(self, picture: Any, alone: bool) -> Image:
        facts, size = self.facts, (picture.height, picture.width)
        # What OneVision's processor makes of an image depends on how many its prompt has.
        images: Any = [[picture, picture]] if facts.kind == ONEVISION and not alone else [picture]
        try:
            found = self._processor(images=images, return_tensors="np")
            pixels = np.asarray(found["pixel_values"][0], dtype=np.float32)
        except Exception as error:  # whatever the processor raises for a shape that it cannot take
            raise RequestError("the image cannot be resized to what the model takes") from error
        pixels = np.ascontiguousarray(pixels if pixels.ndim == 4 else pixels[None])
        if facts.kind == ONEVISION and not alone:
            pixels = pixels[:1]  # the rest is padding
        if pixels.nbytes > MOST_BYTES:
            raise RequestError(f"the model makes {pixels.nbytes >> 20} MiB of it, the most is {MOST_BYTES >> 20}")
        tokens = facts.tokens((pixels.shape[2], pixels.shape[3]), size, alone)
        alone = alone or facts.kind != ONEVISION  # to others it is all the same
        digest = hashlib.blake2b(f"{pixels.shape} {size} {alone}".encode(), digest_size=16)
        digest.update(pixels.data.cast("B"))
        return Image(digest.digest(), tokens, size, alone, pixels)


def decoded(file: bytes, most_pixels: int) -> Any:
    """A file as a PIL image in RGB, turned as its EXIF says, the first frame. Raises RequestError without a field."""
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with Pillow.open(io.BytesIO(file), formats=FORMATS) as opened:
            _check_size(*opened.size, most_pixels)
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):  # Pillow's own limit, as it opens
        raise RequestError(f"the image has too many pixels, the most is {most_pixels}") from None
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(f"not an image of a type that is served ({', '.join(FORMATS)})") from None
    except Exception as error:  # a decoder's fault is its file's: OSError, ValueError, SyntaxError, MemoryError ...
        raise RequestError(f"the image cannot be decoded: {error}") from None


def _check_size(width: int, height: int, most_pixels: int) -> None:
    text = f"the image has {width} x {height} pixels"
    if width * height > most_pixels:
        raise RequestError(f"{text}, the most is {most_pixels} (--max-image-pixels)")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise RequestError(f"{text}: one side is more than {MOST_ASPECT} times the other")
    if max(width, height) ** 2 > 2 * most_pixels:
        raise RequestError(f"{text}, the longest side is {math.isqrt(2 * most_pixels)}")


def placeholders(secret: bytes, image: Image, vocab_size: int) -> NDArray[np.int32]:
    """The token ids of an image: numbers beyond the vocabulary, of which every place has its own.

    They are the prefix cache's key alone. Two images share a prefix of n tokens by a chance of about 2^-31n, and
    nobody who does not know the secret can look for two that share the first ones.
    """
    raw = hashlib.shake_128(secret + image.digest).digest(4 * image.tokens)
    numbers = np.frombuffer(raw, dtype="<u4").astype(np.int64) % ((1 << 31) - vocab_size) + vocab_size
    return numbers.astype(np.int32)


def _processor(folder: Path) -> Any:
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers raises
        raise StartupError(f"the model's image processor cannot be loaded: {error}") from error
