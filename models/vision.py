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
from .vision_config import LLAVA, ONEVISION, vision_facts
from .weights import checkpoint_tensors, read_config

MOST_TILES: Final = 16
"""Tiles that go through the tower at once."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """A processed image: float32 [tiles, channels, height, width], and the (height, width) that it was sent with."""

    tiles: Tensor
    size: tuple[int, int]
    alone: bool
    """As in messages.ImagePixels."""


class VisionTower:
    """Tower and projector, on the decoder's device and in its dtype."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, dummy: bool = False) -> None:
        """Raises StartupError for a config or checkpoint that does not fit. `dummy`: the weights stay random."""
        self.facts = vision_facts(read_config(folder))
        self._device = device
        self._dtype = dtype
        self._model = _modules(folder)
        if not dummy:
            _fill(self._model, folder)
        self._model = self._model.to(device, dtype).eval()

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
        pixels = torch.cat([image.tiles for image in images]).to(self._device, self._dtype)
        arguments: dict[str, Any] = {}
        if self.facts.kind != LLAVA:
            arguments["image_sizes"] = torch.tensor([image.size for image in images])
        if self.facts.kind == ONEVISION:
            # Images of prompts with one are tiled, those of prompts with several are not: a number above 1 is all
            # that the model looks at.
            alone = images[0].alone
            arguments["batch_num_images"] = torch.tensor([1] * len(images) if alone else [len(images) + 1])
        found = self._model.get_image_features(pixel_values=pixels, return_dict=True, **arguments)
        return list(found.pooler_output)


def _groups(images: Sequence[Pixels]) -> Iterator[list[int]]:
    """Indices of images that go through the tower at once: of one tile's shape, MOST_TILES tiles or one image."""
    by_shape: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault((image.tiles.shape[1:], image.alone), []).append(i)
    for indices in by_shape.values():
        group, tiles = list[int](), 0
        for i in indices:
            count = len(images[i].tiles)
            if group and tiles + count > MOST_TILES:
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


def _fill(model: Any, folder: Path) -> None:
    places = model.state_dict()
    missing = {name for name in places if not name.startswith("vision_tower.head.")}  # features do not go through it
    for name, tensor in checkpoint_tensors(folder):
        if not re.match(BESIDE, name) or name.endswith(".position_ids"):
            continue
        name = name.removeprefix("model.")
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
