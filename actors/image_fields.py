"""Images and videos as clients write them, as the files that prompts carry. Used by the HTTP routes and the engine.

Invariant: what leaves here is bytes, within MOST_BYTES for a prompt, or an http(s) address; whether they are an image,
and whether it is fetched (fetch.py), is the text actor's affair.
"""

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Final, TypeAlias

from msgspec.structs import replace

from ..errors import RequestError
from .messages import ImageFile, Prompt, VideoFile

ImageData: TypeAlias = str | bytes | Sequence["str | bytes | Sequence[str | bytes] | None"] | None
"""An image or a list of images; of a batch of prompts one image for all, or a list with one of these, or None, for
each; [] is none."""

Frames: TypeAlias = Sequence[str | bytes]
VideoData: TypeAlias = str | Sequence[str | bytes | Frames | Sequence[str | Frames] | None] | None
"""A video, as its frames, or a list of videos; of a batch of prompts a list with one of these, or None, for each."""

MOST_BYTES: Final = 32 << 20
"""Of all files of a prompt: they travel in one message."""
LEAST_FPS: Final = 1e-4
"""Of a video: a frame in three hours. Seconds become positions, which are int32 behind all videos of a prompt."""


def image_file(value: str | bytes, field: str) -> ImageFile:
    """An image from an address, plain base64, or a file's bytes. Raises RequestError naming the field."""
    if isinstance(value, bytes):
        return ImageFile(value, field)
    if value[:8].lower().startswith(("http://", "https://")):
        return ImageFile(b"", field, value)
    if value[:5].lower() == "file:":
        text = "files of the server are not read; send the image itself, as data:image/png;base64,..."
        raise RequestError(text, param=field, code="unsupported_value")
    encoded = value
    if value.startswith("data:"):
        kind, _, encoded = value.partition(",")
        if not kind.startswith("data:image/") or not kind.endswith(";base64"):
            raise RequestError("a data: address must be data:image/TYPE;base64,...", param=field)
    return ImageFile(_from_base64(encoded, field), field)


def _from_base64(encoded: str, field: str) -> bytes:
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the image is not base64", param=field) from None
    if not data:
        raise RequestError("the image is empty", param=field)
    return data


def video_file(value: str | Sequence[str | bytes], field: str, fps: float | None = None) -> VideoFile:
    """A video from its frames: a list of images, or data:video/jpeg;base64,FRAME,FRAME,... as vLLM has it.

    `fps`: frames of a second. Raises RequestError naming the field.
    """
    if isinstance(value, str):
        kind, _, encoded = value.partition(",")
        if kind.lower() != "data:video/jpeg;base64":
            text = "a video is sent as its frames: a list of images, or data:video/jpeg;base64,FRAME,FRAME,..."
            raise RequestError(text, param=field, code="unsupported_value")
        frames = [ImageFile(_from_base64(frame, field), field) for frame in encoded.split(",")]
    else:
        frames = [image_file(frame, field) for frame in value]
    if not frames:
        raise RequestError("the video has no frames", param=field)
    if fps is not None and not LEAST_FPS <= fps < math.inf:
        raise RequestError(f"fps must be at least {LEAST_FPS}", param=field)
    return VideoFile(tuple(frames), field, None if fps is None else 1 / fps)


def checked(files: Sequence[ImageFile]) -> tuple[ImageFile, ...]:
    """The files of one prompt. Raises RequestError where they are too large together."""
    total = sum(len(file.data) for file in files)
    if total > MOST_BYTES:
        text = f"the images have {total} bytes together, the most is {MOST_BYTES}"
        raise RequestError(text, param=files[-1].field, code="too_large")
    return tuple(files)


def checked_videos(images: Sequence[ImageFile], videos: Sequence[VideoFile]) -> tuple[VideoFile, ...]:
    """The videos of one prompt, which has these images. Raises as `checked`."""
    checked([*images, *(frame for video in videos for frame in video.frames)])
    return tuple(videos)


def with_images(prompts: Sequence[Prompt], data: ImageData, is_batch: bool, videos: VideoData = None) -> list[Prompt]:
    """The prompts with the images of /generate's `image_data` and `video_data`.

    Raises RequestError for a list that does not fit.
    """
    images = _for_each(data, len(prompts), is_batch, "image_data")
    frames = _for_each(videos, len(prompts), is_batch, "video_data")
    made = list[Prompt]()
    for prompt, own, shown in zip(prompts, images, frames, strict=True):
        files, found = _images(own), _videos(shown)
        made.append(replace(prompt, images=files, videos=checked_videos(files, found)))
    return made


def _for_each(data: object, count: int, is_batch: bool, field: str) -> list[object]:
    """What each of the prompts has."""
    if data is None or (is_batch and isinstance(data, list | tuple) and not data):
        return [None] * count
    if not is_batch:
        return [data]
    if isinstance(data, str | bytes):  # one is of all, as in SGLang
        return [data] * count
    if not isinstance(data, list | tuple):
        raise RequestError(f"{field} must be a list as long as the batch ({count})", param=field)
    if len(data) != count:
        raise RequestError(f"{field} has {len(data)} entries for {count} prompts", param=field)
    return list(data)


def _images(own: object) -> tuple[ImageFile, ...]:
    """The images of one prompt."""
    items = [] if own is None else [own] if isinstance(own, str | bytes) else own
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | bytes) for item in items):
        raise RequestError("image_data of a prompt is an image or a list of images", param="image_data")
    return checked([image_file(item, "image_data") for item in items])


def _videos(own: object) -> list[VideoFile]:
    """The videos of one prompt: one, or a list of lists of frames."""
    if own is None:
        return []
    if isinstance(own, str) or (isinstance(own, list | tuple) and own and all(map(_is_frame, own))):
        own = [own]
    if not isinstance(own, list | tuple) or not all(map(_is_video, own)):
        text = "video_data of a prompt is a video, which is a list of images, or a list of videos"
        raise RequestError(text, param="video_data")
    return [video_file(video, "video_data") for video in own]


def _is_frame(value: object) -> bool:
    return isinstance(value, bytes) or (isinstance(value, str) and not value[:11].lower().startswith("data:video/"))


def _is_video(value: object) -> bool:
    if isinstance(value, str):
        return not _is_frame(value)
    return isinstance(value, list | tuple) and all(isinstance(frame, str | bytes) for frame in value)
