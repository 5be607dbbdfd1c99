"""The vision part of a vision-language model: transformers' tower and projector, from images to embeddings.

Used by the executor, through image_features.py. The modules are transformers' own, built from config.json without the
language model; their weights come from the checkpoint's safetensors, as the decoder's do (weights.py).
Invariant: every tensor of the modules is in the checkpoint, by its name and shape; anything else is a StartupError.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import StartupError
from .families import BESIDE
from .images import image_processor
from .resolve import read_facts
from .tensor_files import checkpoint_tensors
from .vision_config import ONEVISION, YI, vision_facts

MOST_TILES: Final = 16
"""Tiles that go through the tower at once."""
MOST_PATCHES: Final = 16384
"""The same of patches where images are of any size: some megapixels."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """A processed image or video; see messages.ImagePixels."""

    tiles: Tensor
    """float32 [tiles or frames, channels, height, width], or uint8 [patches, numbers]"""
    size: tuple[int, ...]
    alone: bool
    video: bool = False


class VisionTower:
    """Tower and projector, on the decoder's device and in its dtype."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, dummy: bool = False) -> None:
        """Raises StartupError for a config or checkpoint that does not fit. `dummy`: the weights stay random."""
        self.facts = vision_facts(read_facts(folder))
        self._device = device
        self._dtype = dtype
        self._model = _yi(folder) if self.facts.kind == YI else _modules(folder)
        if not dummy:
            _fill(self._model, folder)
        self._model = _moved(self._model, device, dtype)
        self._normal = _normalisation(folder) if self.facts.patched else None

    @torch.inference_mode()
    def encode(self, images: Sequence[Pixels]) -> list[Tensor]:
        """The features of images, each [tokens, hidden]. Those of one shape go through the tower together."""
        features: list[Tensor | None] = [None] * len(images)
        for group in _groups(images):
            found = self._encode([images[i] for i in group])
            for i, rows in zip(group, found, strict=True):
                features[i] = rows
        return [rows for rows in features if rows is not None]

    def _encode(self, images: list[Pixels]) -> list[Tensor]:
        if self._normal is not None:
            return self._encode_patches(images, *self._normal)
        if images[0].video:
            return [self._encode_video(image) for image in images]
        pixels = torch.cat([image.tiles for image in images]).to(self._device, self._dtype)
        arguments: dict[str, Any] = {}
        if self.facts.grids:
            arguments["image_sizes"] = torch.tensor([image.size for image in images])
        if self.facts.kind == ONEVISION:
            # Images of prompts with one are tiled, those of prompts with several are not: a number above 1 is all
            # that the model looks at.
            alone = images[0].alone
            arguments["batch_num_images"] = torch.tensor([1] * len(images) if alone else [len(images) + 1])
        found = self._model.get_image_features(pixel_values=pixels, return_dict=True, **arguments)
        return list(found.pooler_output)

    def _encode_video(self, video: Pixels) -> Tensor:
        """OneVision's: every frame through the tower, some at a time, and one end of line behind all."""
        tiles = torch.split(video.tiles, MOST_TILES)
        parts = [part.to(self._device, self._dtype) for part in tiles]
        found = [self._model.get_video_features(part[None], return_dict=True).pooler_output[0] for part in parts]
        return torch.cat([*(rows[:-1] for rows in found[:-1]), found[-1]])

    def _encode_patches(self, images: list[Pixels], scale: Tensor, shift: Tensor) -> list[Tensor]:
        """Qwen-VL's: patches of all images in a row."""
        facts = self.facts
        pixels = torch.cat([self._patches(image, scale, shift) for image in images]).to(self._dtype)
        grids = torch.tensor([image.size for image in images], device=self._device)
        # A video is what an image of several times is: its features are made the same way.
        found = self._model.get_image_features(pixels, grids, return_dict=True).pooler_output
        assert sum(map(len, found)) * facts.merge**2 == len(pixels)
        return list(found)

    def _patches(self, image: Pixels, scale: Tensor, shift: Tensor) -> Tensor:
        """float32 [patches, channels * frames * side * side], normalised; an image's frames are all the same."""
        facts = self.facts
        x = image.tiles.to(self._device).view(len(image.tiles), len(scale), -1, facts.patch**2).float()
        x = x * scale.to(self._device) - shift.to(self._device)
        return x.expand(-1, -1, facts.frames, -1).reshape(len(x), -1)


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    """(scale, shift) float32 [channels, 1, 1]: what the tower takes of a number 0 to 255 is number * scale - shift."""
    processor = image_processor(folder)
    mean, deviation = (torch.tensor(value) for value in (processor.image_mean, processor.image_std))
    return (processor.rescale_factor / deviation).view(-1, 1, 1), (mean / deviation).view(-1, 1, 1)


def _groups(images: Sequence[Pixels]) -> Iterator[list[int]]:
    """Indices of images that go through the tower at once: of one tile's shape, as many as a group holds or one."""
    by_shape: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault((image.tiles.dim(), image.tiles.shape[2:], image.alone, image.video), []).append(i)
    for (dimensions, _, _, video), indices in by_shape.items():
        most = MOST_PATCHES if dimensions == 2 else 1 if video else MOST_TILES
        group, tiles = list[int](), 0
        for i in indices:
            count = len(images[i].tiles)
            if group and tiles + count > most:
                yield group
                group, tiles = [], 0
            group.append(i)
            tiles += count
        yield group


def _modules(folder: Path) -> Any:
    """transformers' model without its language model, float32 on the CPU."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        # Next to nothing of a language model is made, and that is dropped.
        config.text_config.update({"num_hidden_layers": 0, "layer_types": [], "vocab_size": 1, "pad_token_id": None})
        model = AutoModel.from_config(config, dtype=torch.float32)
        model.language_model = None
    except Exception as error:  # whatever transformers raises for a config of its own kind
        raise StartupError(f"config.json: the vision tower cannot be built: {error}") from error
    return model


def _moved(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model on a device in a dtype; frequencies, which are no weights, stay float32."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    model = model.to(device, dtype).eval()
    for name, buffer in model.named_buffers():
        if name in kept and name not in model.state_dict():
            buffer.data = kept[name].to(device)
    return model


def _yi(folder: Path) -> Any:
    from .yi_vision import YiVision

    try:
        return YiVision(read_facts(folder))
    except StartupError:
        raise
    except Exception as error:  # whatever transformers raises for a config of its own kind
        raise StartupError(f"the vision tower cannot be built: {error}") from error


def _fill(model: Any, folder: Path) -> None:
    places = model.state_dict()
    missing = {name for name in places if not name.startswith("vision_tower.head.")}  # features do not go through it
    for name, tensor in checkpoint_tensors(folder):
        if not re.match(BESIDE, name) or name.endswith(".position_ids"):
            continue
        name = name.removeprefix("model.").replace("vision_tower.vision_tower.", "vision_tower.", 1)
        if name not in places:  # as written before transformers 5
            name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
        place = places.get(name)
        if place is None:
            raise StartupError(f"the checkpoint holds {name}, which config.json's vision_config does not account for")
        if place.shape != tensor.shape or not tensor.is_floating_point():
            raise StartupError(f"tensor {name} is {list(tensor.shape)}, config.json asks for {list(place.shape)}")
        place.copy_(tensor)
        missing.discard(name)
    if missing:
        raise StartupError(f"the checkpoint lacks {sorted(missing)[0]} of the vision tower")
