"""Vision-language models through the whole engine: what transformers says, prefix cache by image, cut anywhere."""

import base64
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from tiny_vlm import data_url, picture, png, tiny_vlm

import actorserve
from actorserve.errors import RequestError

STEPS = 6
GREEDY = {"temperature": 0.0, "max_new_tokens": STEPS, "ignore_eos": True}
SETTINGS = {"placement": "inline", "device": "cpu", "dtype": "float32", "max_total_tokens": 2048}
ONE, WIDE, TALL = picture(1), picture(2, 90, 30), picture(3, 31, 90)


@pytest.fixture(scope="module", params=["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def vlm(request, tmp_path_factory):
    return tiny_vlm(request.param, tmp_path_factory.mktemp("vlm") / request.param)


@pytest.fixture(scope="module")
def engine(vlm):
    # Chunks of 24 tokens begin and end inside images.
    limits = {"max_images": 2, "max_image_pixels": 10_000}
    with actorserve.Engine.sync(vlm.folder, chunked_prefill_size=24, **limits, **SETTINGS) as engine:
        yield engine


def turn(*items, role="user"):
    """A message of texts and images."""
    urls = [item if isinstance(item, str) else {"url": data_url(item)} for item in items]
    parts = [
        {"type": "text", "text": url} if isinstance(url, str) else {"type": "image_url", "image_url": url}
        for url in urls
    ]
    return {"role": role, "content": parts}


def chat_text(content):
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_one_image(vlm, engine):
    first = engine.chat([turn(ONE, "What is this?")], **GREEDY)
    assert first.ids == vlm.greedy(chat_text("<image>What is this?"), [ONE], STEPS)
    again = engine.chat([turn(ONE, "What is this?")], **GREEDY)
    assert again.ids == first.ids
    assert again.cached_tokens == again.prompt_tokens - 1
    other = engine.chat([turn(picture(9), "What is this?")], **GREEDY)
    assert other.cached_tokens == len(engine_ids(vlm, "<|im_start|>user\n"))
    assert other.ids == vlm.greedy(chat_text("<image>What is this?"), [picture(9)], STEPS)
    assert other.prompt_tokens == first.prompt_tokens


def engine_ids(vlm, text):
    return vlm.processor.tokenizer(text)["input_ids"]


def test_several_images(vlm, engine):
    """The second image's rows are its own, and an image that another prompt brought is found behind the same text."""
    outputs = [engine.chat([turn("A", a, "B", b)], **GREEDY) for a, b in ((WIDE, TALL), (TALL, WIDE), (WIDE, WIDE))]
    for output, images in zip(outputs, ((WIDE, TALL), (TALL, WIDE), (WIDE, WIDE)), strict=True):
        assert output.ids == vlm.greedy(chat_text("A<image>B<image>"), list(images), STEPS)
    before = len(engine_ids(vlm, "<|im_start|>user\nA"))
    assert outputs[2].cached_tokens > before + 16


def test_text_only_beside_images(vlm, engine):
    """Requests at once, with and without images, each as it is alone."""
    texts = ["Hello <image> there", "How are you?", "<image>Hello"]
    images = [[png(TALL)], None, [png(ONE)]]
    outputs = engine.generate(texts, n=2, image_data=images, **GREEDY)
    for i, (text, own) in enumerate(zip(texts, ([TALL], [], [ONE]), strict=True)):
        expected = vlm.greedy(text, own, STEPS)
        assert [output.ids for output in outputs[2 * i : 2 * i + 2]] == [expected, expected]


def test_image_data_as_base64_and_penalties(vlm, engine):
    """An image's numbers beyond the vocabulary reach no sampler: it counts as its token, as in transformers."""
    encoded = base64.b64encode(png(ONE)).decode()
    ids = engine_ids(vlm, "<image>Hello")
    output = engine.generate(ids, image_data=encoded, repetition_penalty=1.7, **GREEDY)
    assert output.ids == vlm.greedy("<image>Hello", [ONE], STEPS, repetition_penalty=1.7)


def test_videos(vlm, engine):
    """Frames as a video, twice, and beside an image: what transformers says, from the prefix cache and not."""
    patched = "qwen" in vlm.model.config.model_type
    frames = [picture(20 + i, *((84, 56) if patched else (28, 28))) for i in range(4)]
    files = [png(frame) for frame in frames]
    if vlm.model.config.model_type in ("llava", "llava_next"):
        with pytest.raises(RequestError, match="this model takes no videos") as caught:
            engine.generate("<video>Hello", video_data=files)
        assert caught.value.param == "video_data"
        return
    expected = vlm.greedy_video("A <video>Hello", frames, STEPS)
    first, again = (engine.generate("A <video>Hello", video_data=files, **GREEDY) for _ in range(2))
    assert first.ids == again.ids == expected
    assert again.cached_tokens == again.prompt_tokens - 1
    parts = [{"type": "video", "video": [data_url(frame) for frame in frames]}, {"type": "text", "text": "Hello"}]
    said = engine.chat([{"role": "user", "content": parts}], **GREEDY)
    assert said.ids == vlm.greedy_video(chat_text("<video>Hello"), frames, STEPS)
    both = engine.generate("A <video>B <image>", video_data=files, image_data=png(ONE), **GREEDY)
    assert both.cached_tokens >= first.prompt_tokens - len(engine_ids(vlm, "Hello"))
    alone = engine.generate("C <video>B <image>", video_data=files, image_data=png(ONE), **GREEDY)
    assert len(both.ids) == len(alone.ids) == STEPS and both.prompt_tokens == alone.prompt_tokens


WRONG = [
    ({"image_data": "!!"}, "image_data", "base64"),
    ({"image_data": "http://127.0.0.1/a.png"}, "image_data", "not fetched"),
    ({"image_data": "file:///etc/passwd"}, "image_data", "not read"),
    ({"image_data": base64.b64encode(b"GIF89a" + bytes(50)).decode()}, "image_data", "PNG, JPEG, WEBP"),
    ({"image_data": png(ONE)[:900]}, "image_data", "cannot be decoded"),
    ({"image_data": png(picture(4, 101, 100))}, "image_data", "101 x 100 pixels"),
    ({"image_data": png(picture(4, 201, 2))}, "image_data", "times the other"),
    ({"image_data": [png(ONE)] * 2}, "prompt", "2 images were sent, but the prompt has 1"),
    ({"image_data": [png(ONE)] * 3}, "image_data", "the most is 2"),
    ({"image_data": png(ONE), "logprobs": 0, "logprob_start_len": 0}, "logprob_start_len", "not served"),
    ({"image_data": {"url": "x"}}, "image_data", "an image or a list"),
]


@pytest.mark.parametrize(("wrong", "param", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_refused(vlm, engine, wrong, param, message):
    with pytest.raises(RequestError, match=message) as caught:
        engine.generate("<image>Hello", **(GREEDY | wrong))
    assert caught.value.param == param


@pytest.fixture
def shop():
    """An HTTP server with one picture, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(ONE))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/one.png", asked
        server.shutdown()


def test_an_image_by_its_address(vlm, shop):
    """Fetched from a host that the operator names, and from this machine not otherwise."""
    if vlm.model.config.model_type != "llava":
        pytest.skip("it does not depend on the model")
    url, asked = shop
    part = {"type": "image_url", "image_url": {"url": url}}
    with actorserve.Engine.sync(vlm.folder, allow_image_urls=True, **SETTINGS) as engine:
        with pytest.raises(RequestError, match="localhost is not a public host") as caught:
            engine.chat([{"role": "user", "content": [part]}], **GREEDY)
        assert caught.value.param == "messages[0].content[0].image_url" and asked == []
    with actorserve.Engine.sync(
        vlm.folder, allow_image_urls=True, allowed_media_domains="a.example, localhost", **SETTINGS
    ) as engine:
        said = engine.chat([{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}], **GREEDY)
        assert said.ids == vlm.greedy(chat_text("<image>What is this?"), [ONE], STEPS)
        with pytest.raises(RequestError, match="--allowed-media-domains"):
            engine.generate("<image>Hello", image_data=url.replace("localhost", "127.0.0.1"))
    assert asked == ["/one.png"]


def test_refused_in_a_conversation(engine):
    with pytest.raises(RequestError, match="not base64") as caught:
        bad = {"type": "image_url", "image_url": "data:image/png;base64,?"}
        engine.chat([turn("Hi"), {"role": "user", "content": [bad]}])
    assert caught.value.param == "messages[1].content[0].image_url"
    # A user's text is no place for an image.
    assert engine.chat([turn("<image> Hi")], **GREEDY).ids


def test_smallest_images(engine):
    """One pixel, and three: not taken for channels."""
    for side in (1, 3):
        assert len(engine.generate("<image>Hello", image_data=png(picture(side, side, side)), **GREEDY).ids) == STEPS
