"""Images as clients write them, as the files that prompts carry. Used by the OpenAI and native routes and the engine.

An address is not fetched: a server that fetches what strangers name can be made to read what is behind its firewall.
Invariant: what leaves here is bytes, within MOST_BYTES for a prompt; whether they are an image is the text actor's to
find out.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Final, TypeAlias

from msgspec.structs import replace

from ..errors import RequestError
from .messages import ImageFile, Prompt

ImageData: TypeAlias = str | bytes | Sequence["str | bytes | Sequence[str | bytes] | None"] | None
"""An image or a list of images; of a batch of prompts a list with one of these, or None, for each."""

MOST_BYTES: Final = 32 << 20
"""Of all files of a prompt: they travel in one message."""


def image_file(value: str | bytes, field: str) -> ImageFile:
    """An image from a data: address, plain base64, or a file's bytes. Raises RequestError naming the field."""
    if isinstance(value, bytes):
        return ImageFile(value, field)
    if value[:8].lower().startswith(("http://", "https://", "file:")):
        text = "addresses are not fetched; send the image itself, as data:image/png;base64,..."
        raise RequestError(text, param=field, code="unsupported_value")
    encoded = value
    if value.startswith("data:"):
        kind, _, encoded = value.partition(",")
        if not kind.startswith("data:image/") or not kind.endswith(";base64"):
            raise RequestError("a data: address must be data:image/TYPE;base64,...", param=field)
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the image is not base64", param=field) from None
    if not data:
        raise RequestError("the image is empty", param=field)
    return ImageFile(data, field)


def checked(files: Sequence[ImageFile]) -> tuple[ImageFile, ...]:
    """The files of one prompt. Raises RequestError where they are too large together."""
    total = sum(len(file.data) for file in files)
    if total > MOST_BYTES:
        text = f"the images have {total} bytes together, the most is {MOST_BYTES}"
        raise RequestError(text, param=files[-1].field, code="too_large")
    return tuple(files)


def with_images(prompts: Sequence[Prompt], data: ImageData, is_batch: bool) -> list[Prompt]:
    """The prompts with the images of /generate's `image_data`. Raises RequestError for a list that does not fit."""
    if data is None:
        return list(prompts)
    if not is_batch:
        data = [data]  # type: ignore[list-item]  # a list in it is checked as any prompt's is
    elif isinstance(data, str | bytes):
        raise RequestError(f"image_data must be a list as long as the batch ({len(prompts)})", param="image_data")
    if len(data) != len(prompts):
        raise RequestError(f"image_data has {len(data)} entries for {len(prompts)} prompts", param="image_data")
    return [replace(prompt, images=_files(own)) for prompt, own in zip(prompts, data, strict=True)]


def _files(own: object) -> tuple[ImageFile, ...]:
    """The images of one prompt."""
    items = [] if own is None else [own] if isinstance(own, str | bytes) else own
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | bytes) for item in items):
        raise RequestError("image_data of a prompt is an image or a list of images", param="image_data")
    return checked([image_file(item, "image_data") for item in items])
