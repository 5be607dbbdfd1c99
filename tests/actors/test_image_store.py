"""The scheduler's images: what executors are sent and when, and how long pixels stay."""

from array import array

import pytest

from actorserve.actors import image_store
from actorserve.actors.image_store import ImageStore
from actorserve.actors.messages import DropImage, ImagePixels, ImageSpan
from actorserve.actors.request import Request
from actorserve.errors import Overloaded
from actorserve.sampler.params import SamplingParams

TOKENS = 16


def came(store: ImageStore, *names: bytes) -> list[ImagePixels]:
    images = [ImagePixels(name, TOKENS, (1, 1, 5, 5), (5, 5), True, memoryview(bytes(100))) for name in names]
    for image in images:
        store.came(image)
    return images


def request(*names: bytes) -> Request:
    """A prompt of images only."""
    spans = tuple(ImageSpan(name, TOKENS * i, TOKENS, 7) for i, name in enumerate(names))
    tokens = array("i", range(TOKENS * len(names) + 1))
    return Request(1, tokens, len(tokens), SamplingParams(), "", 0, 0, len(tokens) + 1, images=spans)


def names(sent: list[ImagePixels | DropImage]) -> list[tuple[type, bytes]]:
    return [(type(message), message.image) for message in sent]


def test_an_image_is_sent_once_and_again_to_a_new_executor() -> None:
    store = ImageStore(token_bytes=10)
    came(store, b"a", b"b")
    both = request(b"a", b"b")
    store.hold(both.images, [])
    assert names(store.load([(both, 0)], [both])) == [(ImagePixels, b"a"), (ImagePixels, b"b")]
    assert store.load([(both, 0)], [both]) == []
    store.executor_lost()
    # What is in the cache needs no features; the image that the cache ends in does.
    assert names(store.load([(both, TOKENS)], [both])) == [(ImagePixels, b"b")]
    assert names(store.load([(both, TOKENS - 1)], [both])) == [(ImagePixels, b"a")]


def test_features_go_when_there_are_too_many_and_nobody_runs_that_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "FEATURE_BYTES", 2 * TOKENS * 10)
    store = ImageStore(token_bytes=10)
    came(store, b"a", b"b", b"c", b"d")
    one, two, three, four = (request(name) for name in (b"a", b"b", b"c", b"d"))
    store.load([(one, 0)], [one])
    store.load([(two, 0)], [two])
    store.load([(one, 0)], [one])  # used again: b is the oldest now
    assert names(store.load([(three, 0)], [three])) == [(ImagePixels, b"c"), (DropImage, b"b")]
    sent = store.load([(four, 0)], [one, three, four])
    assert names(sent) == [(ImagePixels, b"d")], "all others are in use"
    assert names(store.load([(two, 0)], [two])) == [(ImagePixels, b"b"), (DropImage, b"a"), (DropImage, b"c")]


def test_pixels_stay_while_a_request_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "IDLE_BYTES", 250)
    monkeypatch.setattr(image_store, "HELD_BYTES", 350)
    store = ImageStore()
    living = []
    for name in (b"a", b"b", b"c"):
        came(store, name)
        store.hold(request(name).images, living)
        if name != b"b":
            living.append(request(name))
    assert set(store.pixels) == {b"a", b"c"} and store.nbytes == 200
    came(store, b"d", b"e")  # for one request: neither goes before it has come
    with pytest.raises(Overloaded, match="too much memory"):
        store.hold(request(b"d", b"e").images, living)
    came(store, b"f")
    store.hold(request(b"f").images, living)
    assert set(store.pixels) == {b"a", b"c", b"f"}


def test_the_same_image_again_is_one() -> None:
    store = ImageStore()
    first = came(store, b"a")
    came(store, b"a")
    assert store.nbytes == 100 and store.pixels[b"a"].pixels == first[0].pixels
