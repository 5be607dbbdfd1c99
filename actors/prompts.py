"""Prompts: what a Generate message asks, made into Submit messages for the scheduler.

The text actor owns one and calls it in its loop or, for long prompts, in a worker thread: nothing here changes after
the start. Invariant: a Submit's prompt is not empty, its ids are the model's, and prompt and output fit the context.
"""

import hashlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeVar, assert_never

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..config import EngineConfig, ModelInfo
from ..errors import RequestError
from ..models.images import Image, ImageReader, placeholders
from ..models.reasoning_parser import opens_reasoning
from ..models.stop_regex import automata_of
from ..models.template import ChatTemplate, decode_chat
from ..models.tokenizer import Tokenizer
from ..models.vision_config import PLACEHOLDER
from ..sampler.params import MAX_SEED, MIN_SEED, SamplingParams
from .messages import (
    ChatPrompt,
    Generate,
    ImageFile,
    ImagePixels,
    ImageSpan,
    Prompt,
    Submit,
    TextPrompt,
    TokenPrompt,
    VideoFile,
)

F = TypeVar("F")

INLINE_CHARS: Final = 4096
"""Longer prompts are tokenized in a thread: this many take about a millisecond."""
MOST_LOGPROBS: Final = 1 << 21
"""Of one prompt, those beside each token counted: they take some hundred megabytes in a front."""


class Encoded(NamedTuple):
    """A prompt's token ids, int32 [n]; and whether it ends in one of its `opens` (ChatPrompt)."""

    ids: NDArray[np.int32]
    thinking: bool = False
    images: tuple[ImagePixels, ...] = ()
    spans: tuple[ImageSpan, ...] = ()
    """Where its images are; see Submit.ids."""
    shown: NDArray[np.int32] | None = None
    """The ids with the model's image token in the place of those that an image's digest tells; None: `ids`."""
    second: int = 0
    """See Submit."""

    @property
    def plain(self) -> NDArray[np.int32]:
        """Ids of the vocabulary only."""
        return self.ids if self.shown is None else self.shown


class Placed(NamedTuple):
    """An image or a video, and the token that it is sent for."""

    image: Image
    token: int


class Prompts:
    """Tokenizes and checks. Without a tokenizer (skip_tokenizer_init) it takes token ids only."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelInfo,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        images: ImageReader | None = None,
    ) -> None:
        self._seed = config.random_seed
        self._vocab_size = model.vocab_size
        self._context_length = model.context_length
        self._pooled = model.pooling is not None
        self._tokenizer = tokenizer
        self._template = template
        chars = None if tokenizer is None else tokenizer.chars_per_token
        self._most_chars = None if chars is None else chars * model.context_length
        self._images = images
        self._image_token = model.image_token_id
        self._is_mark = model.image_token_id == model.vocab_size
        """The image token is no token of the model's, and nothing without an image."""
        if tokenizer is not None and self._is_mark:
            self._image_token = tokenizer.core.token_to_id(PLACEHOLDER)
        self._video_token = model.video_token_id
        self._max_images = config.max_images
        self._max_frames = config.max_video_frames
        self._secret = secrets.token_bytes(16)

    def is_long(self, prompt: Prompt) -> bool:
        """Whether `encode` would stall the loop."""
        if prompt.images or prompt.videos:
            return True
        match prompt:
            case TextPrompt():
                return len(prompt.text) + len(prompt.second or "") > INLINE_CHARS
            case ChatPrompt():
                return len(prompt.payload) > INLINE_CHARS
            case TokenPrompt():
                return False
            case _:
                assert_never(prompt)

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt's token ids, a copy, that fit the model. Raises RequestError naming the field.

        A text that cannot fit, whatever its tokens are, is not tokenized.
        """
        self.check_images(prompt)
        encoded, field = self._encoded(prompt, most_chars=self._most_chars)
        self._check_ids(encoded.ids, field)
        encoded = self._with_images(encoded, prompt, field)
        self._check_length(encoded.ids, field)
        return encoded

    def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> NDArray[np.int32]:
        """The prompt's token ids, however many. Raises RequestError naming the field."""
        self.check_images(prompt)
        encoded, field = self._encoded(prompt, add_special_tokens)
        return self._with_images(encoded, prompt, field).plain

    def check_images(self, prompt: Prompt) -> None:
        """Raise RequestError where the model takes no images or videos, or not as many."""
        for what, files, token in (
            ("images", prompt.images, self._image_token),
            ("videos", prompt.videos, self._video_token),
        ):
            if files and (self._images is None or token is None):
                raise RequestError(f"this model takes no {what}", param=files[0].field, code="unsupported_value")
            if len(files) > self._max_images:
                text = f"the prompt has {len(files)} {what}, the most is {self._max_images} (--max-images)"
                raise RequestError(text, param=files[self._max_images].field, code="too_many")
        for video in prompt.videos:
            if len(video.frames) > self._max_frames:
                text = f"the video has {len(video.frames)} frames, the most is {self._max_frames} (--max-video-frames)"
                raise RequestError(text, param=video.field, code="too_many")

    def _with_images(self, encoded: Encoded, prompt: Prompt, field: str) -> Encoded:
        """The prompt with its images and videos in the places of their tokens. Raises RequestError naming a field."""
        images, videos = prompt.images, prompt.videos
        found = {
            place: Placed(self._read(image, alone=len(images) == 1), int(encoded.ids[place]))
            for place, image in _placed(encoded, "image", images, self._image_token, field, self._is_mark)
        }
        for place, video in _placed(encoded, "video", videos, self._video_token, field):
            found[place] = Placed(self._read(video, alone=False), int(encoded.ids[place]))
        return self._expanded(encoded, found) if found else encoded

    def _read(self, file: ImageFile | VideoFile, alone: bool) -> Image:
        assert self._images is not None, "checked before"
        try:
            if isinstance(file, VideoFile):
                return self._images.read_video([frame.data for frame in file.frames], file.interval)
            return self._images.read(file.data, alone)
        except RequestError as error:
            code = "invalid_video" if isinstance(file, VideoFile) else "invalid_image"
            raise RequestError(error.message, param=file.field, code=code) from error

    def _expanded(self, encoded: Encoded, found: dict[int, Placed]) -> Encoded:
        """The prompt with all tokens of its images, one of which it has at each of the places."""
        ids, shown, spans, done, length = list[NDArray[np.int32]](), [], [], 0, 0
        for place, (image, mark) in sorted(found.items()):
            token = mark if mark < self._vocab_size else 0  # what penalties count it as
            text = encoded.ids[done:place]
            start = length + len(text)
            spans.append(ImageSpan(image.digest, start, image.tokens, token, image.grid, image.step))
            ids += [text, placeholders(self._secret, image, self._vocab_size)]
            shown += [text, np.full(image.tokens, token, dtype=np.int32)]
            done, length = place + 1, start + image.tokens
        rest = encoded.ids[done:]
        return Encoded(
            np.concatenate([*ids, rest]),
            encoded.thinking,
            tuple(pixels_of(image) for image in {image.digest: image for image, _ in found.values()}.values()),
            tuple(spans),
            np.concatenate([*shown, rest]),
        )

    def _encoded(
        self, prompt: Prompt, add_special_tokens: bool = True, most_chars: int | None = None
    ) -> tuple[Encoded, str]:
        """(the prompt, the field that it came in)"""
        match prompt:
            case TokenPrompt():
                if prompt.ids.nbytes % 4:
                    raise RequestError("input_ids are not int32", param="input_ids")
                return Encoded(np.frombuffer(prompt.ids, dtype=np.int32).copy()), "input_ids"
            case TextPrompt():
                _check_chars(prompt.text, None if prompt.most else most_chars, "prompt")
                if prompt.second is not None:
                    _check_chars(prompt.second, None if prompt.most else most_chars, "prompt")
                    return self._pair(prompt, prompt.second), "prompt"
                return Encoded(np.array(self._text_ids(prompt, add_special_tokens), dtype=np.int32)), "prompt"
            case ChatPrompt():
                chat, thinking = self._chat(prompt, most_chars)
                return Encoded(np.array(chat, dtype=np.int32), thinking), "messages"
            case _:
                assert_never(prompt)

    def submits(self, request: Generate, prompt: Encoded) -> list[Submit]:
        """One Submit per choice. Raises RequestError for parameters out of range.

        A max_new_tokens that does not fit is cut to the room in the context, as in SGLang; None takes all of it.
        A request without a seed gets one from the server's seed and its id; choice i draws with seed + i.
        """
        params = request.params
        params.check(self._vocab_size)
        if (params.stop or params.stop_regex) and self._tokenizer is None:
            param = "stop" if params.stop else "stop_regex"
            raise RequestError("stop strings need a tokenizer; this server runs without one", param=param)
        automata_of(params.stop_regex)
        ids, grammar = prompt.ids, request.grammar
        if prompt.thinking and grammar is not None and grammar.thoughts is not None:
            opened = msgspec.structs.replace(grammar.thoughts, opened=True)
            grammar = msgspec.structs.replace(grammar, thoughts=opened)
        if prompt.spans and params.wants_prompt:
            text = "logprobs of a prompt with images or videos are not served"
            raise RequestError(text, param="logprob_start_len", code="unsupported_value")
        check_start(params, len(ids))
        room = 0 if request.pooled else self._context_length - len(ids)
        most = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        seed = derived_seed(self._seed, request.rid) if params.seed is None else params.seed
        # The bytes outlive the ring; the scheduler and the codec want them as raw bytes.
        raw = memoryview(ids.tobytes())
        now = time.monotonic_ns()
        return [
            Submit(
                rid=request.rid + i,
                ids=raw,
                params=_resolved(params, most, choice_seed(seed, i)),
                cache_salt=request.cache_salt,
                priority=request.priority,
                arrival_ns=request.arrival_ns,
                grammar=grammar,
                tenant=request.tenant,
                weight=request.weight,
                pin=0 if i else request.pin,
                pooled=request.pooled,
                name=request.name,
                tokenized_ns=now,
                images=prompt.spans,
                second=prompt.second,
            )
            for i in range(request.n)
        ]

    def _text_ids(self, prompt: TextPrompt, add_special_tokens: bool) -> list[int]:
        if self._tokenizer is None:
            raise RequestError("this server runs without a tokenizer: send input_ids", param="prompt")
        try:
            if prompt.most:
                ids = self._tokenizer.encode_first(prompt.text, prompt.most)
            else:
                ids = self._tokenizer.encode(prompt.text, add_special_tokens)
        except RequestError as error:
            raise RequestError(error.message, param="prompt") from error
        end = self._tokenizer.text_end if self._pooled and add_special_tokens else None
        if end is not None and ids[-1:] != [end]:
            room = prompt.most - 1 if prompt.most else len(ids)
            ids = [*ids[:room], end]  # gte-Qwen2's own code does so, which is not run
        return ids

    def _pair(self, prompt: TextPrompt, second: str) -> Encoded:
        if self._tokenizer is None:
            raise RequestError("this server runs without a tokenizer, which pairs of texts need", param="prompt")
        try:
            ids, begin = self._tokenizer.encode_pair(prompt.text, second, prompt.most)
        except RequestError as error:
            raise RequestError(error.message, param="prompt") from error
        return Encoded(np.array(ids, dtype=np.int32), second=begin)

    def _chat(self, prompt: ChatPrompt, most_chars: int | None) -> tuple[list[int], bool]:
        """(token ids, whether it ends in one of `opens`)"""
        if self._tokenizer is None:
            raise RequestError("this server runs without a tokenizer: send input_ids", param="messages")
        if self._template is None:
            raise RequestError(
                "this model has no chat template; start the server with --chat-template FILE, or send a plain prompt",
                param="messages",
            )
        try:
            text = self._template.render(decode_chat(prompt.payload))
            _check_chars(text, most_chars, "messages")
            return self._tokenizer.encode_chat(text), opens_reasoning(
                prompt.opens, self._tokenizer.control.unmask(text)
            )
        except RequestError as error:
            raise RequestError(error.message, param=error.param or "messages", code=error.code) from error

    def _check_ids(self, ids: NDArray[np.int32], field: str) -> None:
        """Raise RequestError unless there are ids, and all are the vocabulary's or the mark of an image."""
        if not len(ids):
            raise RequestError("the prompt has no tokens", param=field)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            mark = self._image_token if self._is_mark else None
            wrong = ids[((ids < 0) | (ids >= self._vocab_size)) & (ids != mark)]
            if len(wrong):
                raise RequestError(f"{field} has token {wrong[0]}; ids are 0 to {self._vocab_size - 1}", param=field)

    def _check_length(self, ids: NDArray[np.int32], field: str) -> None:
        if self._pooled and len(ids) > self._context_length:
            text = f"{field} has {len(ids)} tokens; the model takes {self._context_length}"
            raise RequestError(text, param=field, code="context_length_exceeded")
        if not self._pooled and len(ids) >= self._context_length:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; with at least one new token the model takes {self._context_length}",
                param=field,
                code="context_length_exceeded",
            )


def _check_chars(text: str, most: int | None, field: str) -> None:
    """Raise RequestError for a text that is longer than any that fits the context."""
    if most is not None and len(text) > most:
        what = f"the prompt has {len(text)} characters; no text of more than {most} fits the model's context"
        raise RequestError(what, param=field, code="context_length_exceeded")


def _placed(
    encoded: Encoded, what: str, files: Sequence[F], token: int | None, field: str, always: bool = False
) -> Iterator[tuple[int, F]]:
    """Yield (place in the prompt, file). Raises RequestError where a prompt with files, or `always` any prompt, has not
    as many tokens."""
    places = np.flatnonzero(encoded.ids == token).tolist() if files or always else []
    if len(places) != len(files):
        text = f"{len(files)} {what}s were sent, but the prompt has {len(places)} {what} tokens"
        raise RequestError(text, param=field)
    yield from zip(places, files, strict=True)


def pixels_of(image: Image) -> ImagePixels:
    """The message of a processed image."""
    raw = image.pixels.reshape(-1).data.cast("B")
    return ImagePixels(image.digest, image.tokens, image.pixels.shape, image.size, image.alone, raw, image.video)


def check_start(params: SamplingParams, tokens: int) -> None:
    """Raise RequestError where logprobs are wanted of a prompt that has no such tokens, or of too many."""
    if not params.wants_prompt:
        return
    if params.logprob_start_len >= tokens:
        text = f"logprob_start_len is {params.logprob_start_len}, but the prompt has {tokens} tokens"
        raise RequestError(text, param="logprob_start_len")
    width = 1 + (params.logprobs or 0) + len(params.token_ids_logprob)
    if (tokens - params.logprob_start_len) * width > MOST_LOGPROBS:
        text = f"{width} logprobs for each of the prompt's tokens behind it are more than {MOST_LOGPROBS}"
        raise RequestError(text, param="logprob_start_len")


def derived_seed(server_seed: int, rid: int) -> int:
    """The seed of a request that brings none: 63 bits that differ for each request and are the same in every run."""
    digest = hashlib.blake2b(f"{server_seed} {rid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & MAX_SEED


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a request's i-th choice: the i-th after its own, within int64."""
    return (seed + choice - MIN_SEED) % (MAX_SEED - MIN_SEED + 1) + MIN_SEED


def _resolved(params: SamplingParams, max_new_tokens: int, seed: int) -> SamplingParams:
    """For the scheduler: stop strings stay with the text actor."""
    least = min(params.min_new_tokens, max_new_tokens)
    return msgspec.structs.replace(
        params, max_new_tokens=max_new_tokens, min_new_tokens=least, seed=seed, stop=(), stop_regex=()
    )
