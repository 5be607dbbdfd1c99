"""Towers and projectors, counts of tokens, and image files, against transformers on tiny models."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tiny_vlm import picture, png, tiny_vlm

from actorserve.actors.messages import ImageSpan
from actorserve.actors.prompts import pixels_of
from actorserve.config import EngineConfig
from actorserve.errors import RequestError, StartupError
from actorserve.models import vision
from actorserve.models.batch import plain_batch
from actorserve.models.families import names_of, spec_of
from actorserve.models.image_features import image_features
from actorserve.models.images import ImageReader, decoded, placeholders
from actorserve.models.kv_cache import KVCache
from actorserve.models.runner import ChunkWork
from actorserve.models.vision import MOST_TILES, Pixels, VisionTower, _groups
from actorserve.models.vision_config import language_config, vision_facts
from actorserve.models.weights import load_decoder

CPU = torch.device("cpu")
FRAME = {True: (84, 56), False: (28, 28)}
"""Sizes of frames that need no resizing, of models that take patches and of others."""
KINDS = ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"]


@pytest.fixture(scope="module", params=KINDS)
def vlm(request, tmp_path_factory):
    return tiny_vlm(request.param, tmp_path_factory.mktemp("vlm") / request.param)


def pixels(image):
    return Pixels(torch.from_numpy(image.pixels), image.size, image.alone, image.video)


def test_features_and_counts_are_those_of_transformers(vlm):
    """For images of many shapes, alone and together; what is encoded together is what it is alone."""
    reader, tower = ImageReader(Path(vlm.folder), 10**6), VisionTower(Path(vlm.folder), CPU, torch.float32)
    sizes = [(40, 30), (90, 30), (31, 90), (200, 190), (28, 28), (7, 60)]
    alone = []
    for i, size in enumerate(sizes):
        image = reader.read(png(picture(i, *size)), alone=True)
        alone.append(image)
        (features,) = tower.encode([pixels(image)])
        torch.testing.assert_close(features, expected(vlm, [picture(i, *size)]))
        assert len(features) == image.tokens
    together = tower.encode([pixels(image) for image in alone])
    for features, image in zip(together, alone, strict=True):
        torch.testing.assert_close(features, tower.encode([pixels(image)])[0], atol=1e-5, rtol=1e-4)
    several = [reader.read(png(picture(i, *size)), alone=False) for i, size in enumerate(sizes)]
    found = tower.encode([pixels(image) for image in several])
    wanted = expected(vlm, [picture(i, *size) for i, size in enumerate(sizes)])
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-5, rtol=1e-4)
    assert [len(features) for features in found] == [image.tokens for image in several]


def test_logits_are_those_of_transformers(vlm):
    """Of every token of a prompt with two images, in chunks that cut them."""
    check_logits(vlm, [picture(1), picture(2, 90, 30)], "Hello <image> and <image>?")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_other_weights(kind, tmp_path):
    vlm = tiny_vlm(kind, tmp_path / kind, seed=6)
    check_logits(vlm, [picture(3, 70, 70)], "<image> Hello")
    check_logits(vlm, [picture(4, 30, 80), picture(5, 60, 40), picture(4, 30, 80)], "<image>A<image>B<image>")


def check_logits(vlm, images, text):
    inputs = vlm.inputs(text, images)
    with torch.no_grad():
        wanted = vlm.model(**inputs).logits[0]
    reader = ImageReader(Path(vlm.folder), 10**6)
    features = image_features(VisionTower(Path(vlm.folder), CPU, torch.float32))
    ids, spans, at = inputs["input_ids"][0].numpy(), [], 0
    for image in (reader.read(png(image), alone=len(images) == 1) for image in images):
        start = at + int(np.flatnonzero(ids[at:] == reader.facts.image_token)[0])
        spans.append(ImageSpan(image.digest, start, image.tokens, reader.facts.image_token, image.grid, image.step))
        features.take(pixels_of(image))
        at = start + image.tokens
    features.admit(0, tuple(spans))
    decoder = load_decoder(vlm.folder, EngineConfig(device="cpu", dtype="float32"), lambda fraction: None)
    pages, logits = torch.randperm(len(ids) // 16 + 1, dtype=torch.int32), []
    kv = KVCache(decoder.spec, len(pages), 16, CPU, torch.float32, torch.float32)
    for start in range(0, len(ids), 11):
        chunk = ChunkWork(0, start, ids[start : start + 11].astype(np.int32), draws=False)
        features.apply([chunk])
        batch = plain_batch(chunk.ids.tolist(), start, pages, 16, all_logits=True)
        if chunk.features:
            rows = [torch.arange(place, place + len(values)) for place, values in chunk.features]
            batch.features = torch.cat(rows), torch.cat([values for _, values in chunk.features])
        if chunk.positions is not None:
            batch.positions = torch.from_numpy(chunk.positions)
        logits.append(decoder.forward(batch, kv))
    difference = (torch.cat(logits) - wanted).abs().max()
    assert difference <= 1e-5 * wanted.std(), difference / wanted.std()


def expected(vlm, images):
    inputs = vlm.inputs("<image>" * len(images), images)
    given = {
        key: inputs[key]
        for key in ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw")
        if key in inputs
    }
    with torch.no_grad():
        return torch.cat(list(vlm.model.model.get_image_features(**given, return_dict=True).pooler_output))


@pytest.mark.parametrize("count", [1, 4, 5])
def test_features_of_videos_are_those_of_transformers(vlm, count):
    """Frames one after another: of patches two are one, the last may stand alone. More than go through at once."""
    reader, tower = ImageReader(Path(vlm.folder), 10**6), VisionTower(Path(vlm.folder), CPU, torch.float32)
    if reader.facts.video_token is None:
        pytest.skip("takes no videos")
    frames = [picture(i, *FRAME[reader.facts.patched]) for i in range(count)]
    inputs = vlm.video_inputs("<video>", frames)
    given = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw") if key in inputs}
    with torch.no_grad():
        (wanted,) = vlm.model.model.get_video_features(**given, return_dict=True).pooler_output
    video = reader.read_video([png(frame) for frame in frames], None)
    image = pixels(reader.read(png(frames[0]), alone=False))
    vision.MOST_TILES, most = 2, vision.MOST_TILES
    try:
        features, _ = tower.encode([pixels(video), image])
    finally:
        vision.MOST_TILES = most
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-4)
    assert len(features) == video.tokens == (inputs["input_ids"] == reader.facts.video_token).sum()


def test_frames_that_are_no_video(vlm):
    reader = ImageReader(Path(vlm.folder), 10**6)
    if reader.facts.video_token is None:
        pytest.skip("takes no videos")
    with pytest.raises(RequestError, match=r"frame 1 has \(30, 40\) pixels, the first has \(40, 30\)"):
        reader.read_video([png(picture(1, 40, 30)), png(picture(1, 30, 40))], None)
    with pytest.raises(RequestError, match="frame 1: not an image"):
        reader.read_video([png(picture(1)), b"GIF"], None)
    one, same, other = (reader.read_video([png(picture(1))] * 2, seconds) for seconds in (0.5, None, 2.0))
    assert one.digest == same.digest
    assert (one.digest != other.digest) == (reader.facts.per_second is not None)


def test_a_long_video_has_smaller_frames(tmp_path):
    """Of patches, all frames together have a limit, as in transformers' own processor."""
    vlm = tiny_vlm("qwen2_vl", tmp_path / "model")
    reader = ImageReader(Path(vlm.folder), 10**6)
    least, most, total = reader._video_pixels
    assert total == 115_200 * 14**2
    few, many = (reader._frame(picture(1, 300, 200), count)[1] for count in (2, 8000))
    assert few[0] * few[1] > 150 and many[0] * many[1] * 49 <= max(total * 2 // 8000, least * 1.05) < most


def test_equal_files_are_one_image_and_others_are_not(vlm):
    reader = ImageReader(Path(vlm.folder), 10**6)
    one, same = (reader.read(png(picture(1)), True) for _ in range(2))
    assert one is same
    other = reader.read(png(picture(2)), True)
    assert one.digest != other.digest
    ids, again = placeholders(b"secret", one, 416), placeholders(b"secret", same, 416)
    assert ids.dtype == np.int32 and len(ids) == one.tokens and ids.min() >= 416
    assert (ids == again).all() and len(set(ids.tolist())) == len(ids)
    assert not set(ids.tolist()) & set(placeholders(b"secret", other, 416).tolist())
    assert not set(ids.tolist()) & set(placeholders(b"another", one, 416).tolist())


def test_groups_go_through_the_tower_together_within_bounds():
    def image(tiles, side=4, alone=True):
        return Pixels(torch.zeros(tiles, 3, side, side), (side, side), alone)

    given = [image(5), image(5), image(2, 8), image(5), image(5), image(MOST_TILES + 9), image(1, alone=False)]
    assert list(_groups(given)) == [[0, 1, 3], [4], [5], [2], [6]]


# ------------------------------------------------------------------ files of strangers


def bomb(width, height):
    """A PNG of that many pixels in a few bytes of file."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (bomb(65_000, 65_000), "too many pixels"),
        (bomb(1001, 1000), "1001 x 1000 pixels, the most is 1000000"),
        (bomb(500_000, 1), "one side is more than"),
        (bomb(2000, 200), "the longest side is 1414"),
        (bomb(20, 20), "cannot be decoded"),
        (png(picture(1))[:-40], "cannot be decoded"),
        (png(picture(1))[:30], "not an image|cannot be decoded"),
    ],
)
def test_refused_files(file, message):
    with pytest.raises(RequestError, match=message):
        decoded(file, 1_000_000)


def test_formats_and_turned_images():
    image = picture(1, 40, 30)
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        image.save(file, kind, exif=exif)
        assert decoded(file.getvalue(), 10_000).size == (30, 40)
    grey = io.BytesIO()
    image.convert("LA").save(grey, "PNG")
    assert decoded(grey.getvalue(), 10_000).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "WEBP"])
def test_what_shows_through_is_white(mode):
    """Half a picture is opaque and grey, a quarter transparent over black, a quarter half so where a mode has that."""
    pixels = np.full((8, 8, 4), 120, dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:4, :4], pixels[4:, :4] = (0, 0, 0, 0), (0, 0, 0, 128)
    image, halves, options = Image.fromarray(pixels), mode in ("RGBA", "LA", "WEBP"), {}
    if mode in ("LA", "P"):
        image = image.convert(mode)
    elif mode in ("RGB", "L"):  # a colour that stands for nothing
        image, options = image.convert(mode), {"transparency": 0 if mode == "L" else (0, 0, 0)}
    elif mode == "WEBP":
        options = {"lossless": True, "exact": True}
    file = io.BytesIO()
    image.save(file, "WEBP" if mode == "WEBP" else "PNG", **options)
    found = np.asarray(decoded(file.getvalue(), 10_000))
    assert (found[:, 4:] == 120).all() and (found[:4, :4] == 255).all()
    assert not halves or (np.abs(found[4:, :4].astype(int) - 127) <= 1).all()


def test_sixteen_bits_of_grey():
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    found = np.asarray(decoded(png(Image.fromarray(ramp)), 10_000))
    assert (found == (ramp >> 8)[:, :, None]).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_is_as_pillow_has_it(turn):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    picture(1, 7, 5).save(file, "PNG", exif=exif)
    with Image.open(file) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert (np.asarray(decoded(file.getvalue(), 10_000)) == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_broken_exif_turns_nothing(kind):
    file = io.BytesIO()
    picture(1, 40, 30).save(file, kind, exif=b"Exif\0\0no TIFF header")
    assert decoded(file.getvalue(), 10_000).size == (40, 30)


# ------------------------------------------------------------------ checkpoints and configurations

REAL = {
    "llava": {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "vocab_size": 32064,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float16",
    },
    "mistral": {
        "model_type": "llava_next",
        "image_token_index": 32000,
        "text_config": {
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "vocab_size": 32064,
            "rope_theta": 1000000.0,
        },
        "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    },
}


def test_a_text_config_says_only_what_differs():
    spec = spec_of(REAL["llava"])
    assert (spec.vocab, spec.hidden, spec.layers, spec.heads, spec.kv_heads) == (32064, 4096, 32, 32, 32)
    assert names_of(REAL["llava"]).beside is not None
    assert language_config(REAL["llava"])["torch_dtype"] == "float16"
    spec = spec_of(REAL["mistral"])
    assert (spec.hidden, spec.inter, spec.kv_heads, spec.rope.theta) == (4096, 14336, 8, 1000000.0)
    assert vision_facts(REAL["llava"]).tokens((336, 336), (480, 640), True) == 576
    # llava-v1.6's: 576 of the whole, 2 x 2 tiles of 24 x 24 without the padding, an end for each line.
    assert vision_facts(REAL["mistral"]).tokens((336, 336), (480, 640), True) == 576 + 36 * 48 + 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "no text_config"),
        ({"vision_config": {"image_size": "big"}}, "positive integers"),
        ({"model_type": "llava_onevision", "vision_aspect_ratio": "square"}, "vision_aspect_ratio"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(StartupError, match=message):
        config = REAL["llava"] | change
        spec_of(config)
        vision_facts(config)


def test_checkpoints_that_do_not_fit(tmp_path):
    """Names as they were before transformers 5 are taken; what lacks, is left over or misshapen is not."""
    vlm = tiny_vlm("llava", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "vision_tower.post_layernorm.bias"

    def tower(changed):
        save_file(changed, file)
        return VisionTower(Path(vlm.folder), CPU, torch.float32)

    old = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in tensors.items()}
    image = pixels(ImageReader(Path(vlm.folder), 10**6).read(png(picture(1)), True))
    (features,) = tower(old).encode([image])
    torch.testing.assert_close(features, expected(vlm, [picture(1)]))
    with pytest.raises(StartupError, match=r"lacks vision_tower\.post_layernorm\.bias"):
        tower({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(StartupError, match="does not account for"):
        tower(tensors | {"vision_tower.more": torch.zeros(2)})
    with pytest.raises(StartupError, match=r"is \[3\], config.json asks for \[32\]"):
        tower(tensors | {name: torch.zeros(3)})
