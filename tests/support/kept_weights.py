"""The real model in transformers, with the weights that an engine on a CPU computes with by itself."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from actorserve.models.gguf import KEPT_FILE
from actorserve.models.quantized import dequantise


@torch.no_grad()
def with_kept_weights(model: Any, folder: str) -> Any:
    """Give transformers' model what the blocks mean that are kept beside a converted GGUF's weights; returns it."""
    for name, blocks in load_file(Path(folder) / KEPT_FILE).items():
        parameter = model.get_parameter(name)
        parameter.copy_(dequantise(blocks, parameter.shape[1]))
    return model
