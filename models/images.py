"""ImageReader: the bytes of image files to what the vision tower takes, by transformers' image processor.

Used by the text actor, in its threads. What is decoded comes from strangers: the format and the number of pixels are
read from the file's head and checked before anything is decoded. Invariant: equal files of one prompt's kind give the
same digest and pixels, and the digest tells all that the features of an image depend on.
"""

import hashlib
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError, StartupError
from .resolve import read_facts, read_json, tower_folder
from .vision_config import ONEVISION, VisionFacts, is_yi, vision_facts

FORMATS: Final = ("PNG", "JPEG", "WEBP")
MOST_ASPECT: Final = 100
"""Of the longer side to the shorter: beyond it a resized image has no pixels left. (Some processors pad an image to a
square, so the longer side has a limit of its own.)"""
MOST_BYTES: Final = 60 << 20
"""Of a processed image: it travels in one message."""
INTERVAL: Final = 0.5
"""Seconds between a video's frames where nothing is said: transformers' processors take two a second."""
KEPT_BYTES: Final = 128 << 20
"""Of processed images that are kept for when they come again, as in the next turn of a conversation."""


@dataclass(frozen=True, slots=True)
class Image:
    """A processed image; see messages.ImagePixels."""

    digest: bytes
    tokens: int
    size: tuple[int, ...]
    alone: bool
    pixels: NDArray[np.float32] | NDArray[np.uint8]
    """Tiles float32 [tiles, channels, height, width], or patches uint8 [patches, numbers]."""
    video: bool = False
    grid: tuple[int, ...] = ()
    step: float = 1.0
    """As in messages.ImageSpan."""


class ImageReader:
    """Processes images. Safe to use from several threads."""

    def __init__(self, folder: Path, most_pixels: int) -> None:
        """`most_pixels`: of an image as it is sent. Raises StartupError for a model folder without a processor."""
        self.facts = vision_facts(read_facts(folder))
        self._most_pixels = most_pixels
        self._processor = image_processor(folder)
        self._paper = tuple(int(255 * value) for value in self._processor.image_mean) if self.facts.square else None
        """RGB of what is beside an image that is made square."""
        self._video_pixels = _video_pixels(folder, self.facts)
        self._kept: OrderedDict[tuple[bytes, Any], Image] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def read(self, file: bytes, alone: bool) -> Image:
        """Process a file; `alone`: it is its prompt's only image. Raises RequestError without a field."""
        return self._read([file], alone, lambda: self._process(decoded(file, self._most_pixels), alone))

    def read_video(self, frames: Sequence[bytes], interval: float | None) -> Image:
        """Process files that are a video's frames, `interval` seconds apart. Raises RequestError without a field."""
        return self._read(frames, ("video", interval), lambda: self._process_video(frames, interval or INTERVAL))

    def _read(self, files: Sequence[bytes], how: Any, process: Callable[[], Image]) -> Image:
        hashes = [hashlib.blake2b(file, digest_size=16).digest() for file in files]
        key = hashlib.blake2b(b"".join(hashes), digest_size=16).digest(), how
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return kept
        image = process()
        with self._lock:
            self._keep(key, image)
        return image

    def _keep(self, key: tuple[bytes, Any], image: Image) -> None:
        if key in self._kept:
            return
        self._kept[key] = image
        self._kept_bytes += image.pixels.nbytes
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].pixels.nbytes

    def _process(self, picture: Any, alone: bool) -> Image:
        facts, size = self.facts, (picture.height, picture.width)
        if facts.patched:
            patches, grid = self._patches(picture, {})
            return _patched(facts, patches[:, :, 0].reshape(len(patches), -1), (1, *grid), False, 1.0)
        if self._paper is not None:
            picture = squared(picture, self._paper)
        # What OneVision's processor makes of an image depends on how many its prompt has.
        several = facts.kind == ONEVISION and not alone
        pixels = np.asarray(self._processed([[picture, picture]] if several else [picture])[0], dtype=np.float32)
        pixels = np.ascontiguousarray(pixels if pixels.ndim == 4 else pixels[None])
        if several:
            pixels = pixels[:1]  # the rest is padding
        tokens = facts.tokens((pixels.shape[2], pixels.shape[3]), size, alone)
        alone = alone or facts.kind != ONEVISION  # to others it is all the same
        return _image(tokens, size, alone, pixels)

    def _process_video(self, files: Sequence[bytes], interval: float) -> Image:
        facts, frames, size = self.facts, list[Any](), None
        assert facts.video_token is not None, "checked before"
        for i, file in enumerate(files):
            try:
                picture = decoded(file, self._most_pixels)
            except RequestError as error:
                raise RequestError(f"frame {i}: {error.message}") from None
            size = size or picture.size
            if picture.size != size:
                raise RequestError(f"frame {i} has {picture.size} pixels, the first has {size}")
            frames.append(self._frame(picture, len(files)))
            if len(files) * frames[0][0].nbytes > MOST_BYTES:
                raise RequestError(f"the model makes more than {MOST_BYTES >> 20} MiB of so many frames")
        if not facts.patched:
            tiles = np.concatenate([pixels for pixels, _ in frames])
            return _image(facts.video_tokens(len(frames)), (tiles.shape[2], tiles.shape[3]), True, tiles, True)
        return self._joined(frames, interval)

    def _frame(self, picture: Any, count: int) -> tuple[NDArray[Any], tuple[int, int]]:
        """One of `count` frames: a tile, or patches uint8 [patches, channels, side * side]; their rows and columns."""
        if not self.facts.patched:  # as OneVision takes each of several images
            pixels = np.asarray(self._processed([[picture, picture]])[0], dtype=np.float32)
            return pixels[:1], (0, 0)
        least, most, total = self._video_pixels
        most = max(min(most, total * self.facts.frames // count), int(least * 1.05))
        patches, grid = self._patches(picture, {"size": {"shortest_edge": least, "longest_edge": most}})
        return patches[:, :, 0], grid

    def _joined(self, frames: list[tuple[NDArray[Any], tuple[int, int]]], interval: float) -> Image:
        """Patches of frames made patches of several frames each; the last frame is repeated where one lacks."""
        facts, (first, grid) = self.facts, frames[0]
        deep = facts.frames
        stack = [patches for patches, _ in frames]
        stack += stack[-1:] * (-len(stack) % deep)
        shape = (len(stack) // deep, deep, *first.shape)
        patches = np.stack(stack).reshape(shape).transpose(0, 2, 3, 1, 4)  # [times, patches, channels, deep, numbers]
        step = 1.0 if facts.per_second is None else facts.per_second * interval * deep
        flat = patches.reshape(shape[0] * shape[2], -1)
        return _patched(facts, flat, (shape[0], *grid), True, step)

    def _patches(self, picture: Any, options: dict[str, Any]) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Patches of a picture, [patches, channels, frames, side * side], all frames alike; their rows and columns."""
        found = self._processed([picture], "image_grid_thw", do_rescale=False, do_normalize=False, **options)
        pixels, (_, rows, columns) = np.asarray(found[0]), np.asarray(found[1])[0].tolist()
        facts = self.facts
        return pixels.astype(np.uint8).reshape(rows * columns, -1, facts.frames, facts.patch**2), (rows, columns)

    def _processed(self, images: list[Any], beside: str | None = None, **options: Any) -> Any:
        """What the processor makes of images: of the first, or of all with what it says beside."""
        try:
            found = self._processor(images=images, return_tensors="np", **options)
            return found["pixel_values"] if beside is None else (found["pixel_values"], found[beside])
        except Exception as error:  # whatever the processor raises for a shape that it cannot take
            raise RequestError("the image cannot be resized to what the model takes") from error


def _patched(facts: VisionFacts, pixels: NDArray[np.uint8], size: tuple[int, ...], video: bool, step: float) -> Image:
    """Of patches [patches, numbers] in `size` frames, rows and columns."""
    times, rows, columns = size
    grid = times, rows // facts.merge, columns // facts.merge
    return _image(math.prod(grid), size, True, np.ascontiguousarray(pixels), video, grid, step)


def _image(
    tokens: int,
    size: tuple[int, ...],
    alone: bool,
    pixels: NDArray[Any],
    video: bool = False,
    grid: tuple[int, ...] = (),
    step: float = 1.0,
) -> Image:
    """With the digest of all that the features and the positions of an image depend on."""
    if pixels.nbytes > MOST_BYTES:
        raise RequestError(f"the model makes {pixels.nbytes >> 20} MiB of it, the most is {MOST_BYTES >> 20}")
    digest = hashlib.blake2b(f"{pixels.shape} {size} {alone} {video} {step}".encode(), digest_size=16)
    digest.update(pixels.data.cast("B"))
    return Image(digest.digest(), tokens, size, alone, pixels, video, grid, step)


def decoded(file: bytes, most_pixels: int) -> Any:
    """A file as a PIL image in RGB, turned as its EXIF says, the first frame. Raises RequestError without a field."""
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(io.BytesIO(file), formats=FORMATS) as opened:
            _check_size(*opened.size, most_pixels)
            opened.load()
            turn = _turn(opened)
            picture = _on_white(_eight_bits(opened))
            return picture if turn is None else picture.transpose(turn)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):  # Pillow's own limit, as it opens
        raise RequestError(f"the image has too many pixels, the most is {most_pixels}") from None
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(f"not an image of a type that is served ({', '.join(FORMATS)})") from None
    except Exception as error:  # a decoder's fault is its file's: OSError, ValueError, SyntaxError, MemoryError ...
        raise RequestError(f"the image cannot be decoded: {error}") from None


def _turn(picture: Any) -> Any:
    """How a loaded PIL image is to be turned by its EXIF (Pillow's Transpose); None: not at all, or not readably so,
    for EXIF that is broken is no fault of the pixels."""
    from PIL.ExifTags import Base
    from PIL.Image import Transpose

    turns = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM}
    turns |= {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
    try:
        return turns.get(picture.getexif().get(Base.Orientation))
    except Exception:  # what its parser meets: SyntaxError, struct.error, KeyError ...
        return None


def _on_white(picture: Any) -> Any:
    """A PIL image in RGB. What shows through is white, as in a browser, vLLM and Qwen's tools: the colours below
    transparent pixels are nobody's intention, and mostly black."""
    from PIL import Image as Pillow

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = Pillow.new("RGB", picture.size, "white")
    with_alpha = picture.convert("RGBA")
    seen.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return seen


def _eight_bits(picture: Any) -> Any:
    """A PIL image of 8 bits: Pillow's convert makes 16 of them white from 255 on."""
    from PIL import Image as Pillow

    if not picture.mode.startswith("I"):
        return picture
    return Pillow.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def squared(picture: Any, paper: tuple[int, ...]) -> Any:
    """A picture in the middle of the smallest square that holds it, of one colour."""
    from PIL import Image as Pillow

    side = max(picture.size)
    square = Pillow.new("RGB", (side, side), paper)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


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


def _video_pixels(folder: Path, facts: VisionFacts) -> tuple[int, int, int]:
    """(fewest, most) pixels of a frame, and the most of all frames together: of Qwen-VL's own processor."""
    area, stated = facts.side**2, dict[str, Any]()
    path = folder / "video_preprocessor_config.json"
    if path.exists():
        stated = read_json(path)
    size = stated.get("size") or {}
    least = stated.get("min_pixels") or size.get("shortest_edge") or 128 * area
    most = stated.get("max_pixels") or size.get("longest_edge") or 768 * area
    if not isinstance(least, int) or not isinstance(most, int):
        raise StartupError(f"{path}: sizes must be numbers of pixels")
    return least, most, 115_200 * area


def image_processor(folder: Path) -> Any:
    """transformers' image processor of a model. Raises StartupError."""
    facts = read_facts(folder)
    if is_yi(facts):
        folder = tower_folder(folder, facts)
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers raises
        raise StartupError(f"the model's image processor cannot be loaded: {error}") from error
