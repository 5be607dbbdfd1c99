"""Yi-VL through the whole engine, against its parts in plain torch: transformers has no model of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_tokenizers import byte_level
from tiny_vlm import TEXT, TOWER, picture, png
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import actorserve
from actorserve.errors import RequestError, StartupError
from actorserve.models.images import ImageReader
from actorserve.models.resolve import read_facts
from actorserve.models.vision import VisionTower

SIDE, STEPS = 28, 6
GREEDY = {"temperature": 0.0, "max_new_tokens": STEPS, "ignore_eos": True}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
SETTINGS: dict[str, Any] = {"placement": "inline", "device": "cpu", "dtype": "float32", "max_total_tokens": 2048}


@pytest.fixture(scope="module")
def yi(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The parts, and a folder as Yi-VL's are."""
    folder = tmp_path_factory.mktemp("yi")
    torch.manual_seed(3)
    byte_level(folder)
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)).eval()
    hidden = TEXT["hidden_size"]
    projector = torch.nn.Sequential(
        torch.nn.Linear(TOWER["hidden_size"], hidden), torch.nn.LayerNorm(hidden), torch.nn.GELU(),
        torch.nn.Linear(hidden, hidden), torch.nn.LayerNorm(hidden),
    )  # fmt: skip
    for norm in (projector[1], projector[4]):
        torch.nn.init.normal_(norm.weight, 1, 0.3)
    text.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    names = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    prefix = "model.vision_tower.vision_tower.vision_model."
    tensors |= {prefix + name: tensor for name, tensor in names.items() if not name.endswith("position_ids")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    vit = folder / "vit" / "clip"
    vit.mkdir(parents=True)
    (vit / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": TOWER}))
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=MEAN, image_std=STD
    ).save_pretrained(vit)
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": "./vit/clip",
        "mm_projector_type": "mlp2x_gelu_Norm", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad", "mm_hidden_size": TOWER["hidden_size"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(folder=folder, text=text, tower=tower, projector=projector)


def features(yi: SimpleNamespace, image: Image.Image) -> torch.Tensor:
    """As Yi's own code has it: a square of the mean's colour, resized, the last layer but one without its class."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = (pixels - np.float32(MEAN)) / np.float32(STD)
    with torch.no_grad():
        states = yi.tower(torch.from_numpy(pixels).permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
        found: torch.Tensor = yi.projector(states[-2][0, 1:])
    return found


def greedy(yi: SimpleNamespace, text: str, images: list[Image.Image]) -> list[int]:
    """What the parts continue a text by."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(yi.folder)
    embed, parts = yi.text.get_input_embeddings(), []
    for i, piece in enumerate(text.split("<image_placeholder>")):
        parts += [features(yi, images[i - 1])] if i else []
        parts += [embed(torch.tensor(tokenizer(piece)["input_ids"], dtype=torch.long))]
    x, ids = torch.cat(parts)[None], list[int]()
    with torch.no_grad():
        for _ in range(STEPS):
            ids.append(int(yi.text(inputs_embeds=x).logits[0, -1].argmax()))
            x = torch.cat([x, embed(torch.tensor([[ids[-1]]]))], 1)
    return ids


def test_features(yi: SimpleNamespace) -> None:
    reader, tower = ImageReader(yi.folder, 10**6), VisionTower(yi.folder, torch.device("cpu"), torch.float32)
    from test_vision import pixels

    for size in ((40, 30), (30, 90), (28, 28)):
        image = reader.read(png(picture(1, *size)), alone=True)
        (found,) = tower.encode([pixels(image)])
        torch.testing.assert_close(found, features(yi, picture(1, *size)), atol=1e-5, rtol=1e-4)
        assert len(found) == image.tokens == 16


@pytest.mark.timeout(600)  # on a GPU kernels are compiled on first use
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_engine(yi: SimpleNamespace, device: str) -> None:
    """Text and images, several, from the prefix cache; the mark for an image without one is refused."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    one, other = picture(1), picture(2, 90, 30)
    text = "A <image_placeholder> and <image_placeholder>?"
    with actorserve.Engine.sync(str(yi.folder), chunked_prefill_size=24, **(SETTINGS | {"device": device})) as engine:
        outputs = [engine.generate(text, image_data=[png(one), png(other)], **GREEDY) for _ in range(2)]
        assert [output.ids for output in outputs] == [greedy(yi, text, [one, other])] * 2
        assert outputs[1].cached_tokens == outputs[1].prompt_tokens - 1
        assert engine.generate("Hello", **GREEDY).ids == greedy(yi, "Hello", [])
        penalised = engine.generate(text, image_data=[png(one)] * 2, repetition_penalty=1.5, **GREEDY)
        assert len(penalised.ids) == STEPS
        with pytest.raises(RequestError, match="2 image tokens"):
            engine.generate(text, image_data=png(one), **GREEDY)
        with pytest.raises(RequestError, match="0 images were sent, but the prompt has 2"):
            engine.generate(text, **GREEDY)
        with pytest.raises(RequestError, match="ids must be between 0 and"):
            engine.generate([5, TEXT["vocab_size"], 6], **GREEDY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": "../outside"}, "no folder in the model's"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "no folder in the model's"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not served"),
    ],
)
def test_what_is_not_served(yi: SimpleNamespace, tmp_path: Path, change: dict[str, str], message: str) -> None:
    config = json.loads((yi.folder / "config.json").read_text()) | change
    (tmp_path / "vit").symlink_to(yi.folder / "vit")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "mm_projector_type" in change:
        (tmp_path / "vit").unlink()
        (tmp_path / "vit" / "clip").mkdir(parents=True)
        (tmp_path / "vit" / "clip" / "config.json").write_text((yi.folder / "vit/clip/config.json").read_text())
    with pytest.raises(StartupError, match=message):
        read_facts(tmp_path)
        VisionTower(tmp_path, torch.device("cpu"), torch.float32)
