"""Yi-VL's tower and projector: LLaVA 1.5's, with norms in the projector, for which transformers has no model.

Used by vision.py in the place of transformers' model. The tower's config is in a folder of its own beside the language
model's (`mm_vision_tower`), its weights are in the checkpoint: they were trained with the rest.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StartupError
from .vision_config import Config


class YiVision(nn.Module):
    """Has what vision.py asks of transformers' models."""

    def __init__(self, config: Config) -> None:
        """`config` as resolve.read_facts has it, with the tower's as vision_config."""
        super().__init__()
        from transformers import AutoModel, CLIPVisionConfig

        kind = str(config.get("mm_projector_type"))
        if kind != "mlp2x_gelu_Norm":
            raise StartupError(f"config.json: mm_projector_type {kind!r} is not served; served: mlp2x_gelu_Norm")
        tower = CLIPVisionConfig(**config["vision_config"])
        hidden = config["hidden_size"]
        self.vision_tower: Any = AutoModel.from_config(tower, dtype=torch.float32)
        self.mm_projector = nn.Sequential(
            nn.Linear(tower.hidden_size, hidden), nn.LayerNorm(hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden),
        )  # fmt: skip
        self._layer = int(config.get("mm_vision_select_layer", -2))
        self._from = 0 if config.get("mm_vision_select_feature") == "cls_patch" else 1

    def get_image_features(self, pixel_values: Tensor, return_dict: bool) -> Any:
        """pixels [images, 3, side, side] -> `pooler_output`, [tokens, hidden] of each."""
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[self._layer]
        return SimpleNamespace(pooler_output=list(self.mm_projector(states[:, self._from :])))
