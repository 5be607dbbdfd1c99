"""Vision-language models as config.json describes them: the language model in it, and how many tokens an image is.

Used by families.py and resolve.py (the decoder's part), images.py (the text actor's) and vision.py (the executor's).
No torch here: the root reads a model's facts with it. The counts are those of transformers' processors
(processing_llava*.py), computed from config.json alone. Invariant: `VisionFacts.tokens` is the number of feature rows
that the tower and projector make of an image.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

from ..errors import StartupError

Config = dict[str, Any]

LLAVA: Final = "llava"
NEXT: Final = "llava_next"
ONEVISION: Final = "llava_onevision"
QWEN2: Final = "qwen2_vl"
QWEN2_5: Final = "qwen2_5_vl"
QWEN: Final = (QWEN2, QWEN2_5)
YI: Final = "yi_vl"
KINDS: Final = (LLAVA, NEXT, ONEVISION, *QWEN)
PLACEHOLDER: Final = "<image_placeholder>"
"""What Yi-VL's prompts have for an image: no token of its vocabulary."""

_LLAMA: Final[Config] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
}
_DEFAULTS: Final[dict[str, Config]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 4096 * 32},
    "qwen2": _LLAMA
    | {
        "vocab_size": 151936,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
    },
}
_QWEN_TEXT: Final[Config] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_window_layers": 80,
}
"""transformers' defaults: `text_config` says only what differs from them."""


def is_vision_model(config: Config) -> bool:
    """Whether a config.json is of a vision-language model that is served."""
    return config.get("model_type") in KINDS


def is_yi(config: Config) -> bool:
    """Whether it is in the form of the first LLaVA, of which Yi-VL is served."""
    return config.get("model_type") == LLAVA and "mm_vision_tower" in config


def language_config(config: Config) -> Config:
    """The config of the language model in a vision-language model's, whole; any other config as it is.

    Raises StartupError if there is none.
    """
    if not is_vision_model(config):
        return config
    if is_yi(config):
        return {key: value for key, value in config.items() if key != "vision_config"} | {"model_type": "llama"}
    text = config.get("text_config")
    outer = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if config.get(key)}
    if config["model_type"] in QWEN:
        return outer | _qwen_text(config)
    if not isinstance(text, dict):
        raise StartupError(f"config.json of model_type {config['model_type']!r} has no text_config")
    kind = text.get("model_type", "llama" if config["model_type"] != ONEVISION else "qwen2")
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return _DEFAULTS.get(kind, {}) | outer | text | {"model_type": kind, "tie_word_embeddings": tied}


def _qwen_text(config: Config) -> Config:
    """Of Qwen-VL: Qwen 2 with three positions for each token. Configs before transformers 5 have no text_config."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        text = {key: value for key, value in config.items() if key not in ("vision_config", "text_config")}
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("mrope_section", [16, 24, 24])
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return _QWEN_TEXT | text | {"model_type": "qwen2", "rope_parameters": rope, "tie_word_embeddings": tied}


@dataclass(frozen=True, slots=True)
class VisionFacts:
    """What a model makes of images."""

    kind: str
    image_token: int
    """Id of the token that stands for an image in a prompt."""
    side: int
    """Height and width of a tile, in pixels."""
    patch: int
    """The same of a patch."""
    extra: int
    """Features of a tile beside those of its patches: a class token's, or not."""
    grids: tuple[tuple[int, int], ...] = ()
    """(height, width) to which images may be resized before they are cut into tiles; (): no tiles."""
    most_tiles: int | None = None
    """Beyond it OneVision makes the features of the whole image fewer."""
    video_token: int | None = None
    """Id of the token that stands for a video; None: the model takes none."""
    square: bool = False
    """Images are made square before they are resized (Yi-VL)."""
    merge: int = 1
    """Qwen-VL: so many rows and columns of patches make one token,"""
    frames: int = 1
    """and so many frames one patch;"""
    per_second: float | None = None
    """positions of a second of video; None: patches of frames count as one each."""

    @property
    def patched(self) -> bool:
        """Whether images are patches of any number (Qwen-VL), not tiles of one size."""
        return self.kind in QWEN

    def tokens(self, tile: tuple[int, int], size: tuple[int, int], alone: bool) -> int:
        """How many tokens an image of `size` (height, width) is, processed to tiles of (height, width).

        `alone`: it is its prompt's only one.
        """
        rows, columns = tile[0] // self.patch, tile[1] // self.patch
        base = rows * columns + self.extra
        if not self.grids:
            return base
        if self.kind == ONEVISION and not alone:
            return base + 1  # an end of line
        height, width = self._unpadded(size, self.side // self.patch)
        return base + height * width + height

    def video_tokens(self, frames: int) -> int:
        """How many tokens a video of tiles is: a quarter of each frame's, and an end of line."""
        across = math.ceil(self.side // self.patch / 2)
        return frames * across * across + 1

    def _unpadded(self, size: tuple[int, int], across: int) -> tuple[int, int]:
        """Rows and columns of features of the tiles together, without those that only pad."""
        grid = best_grid(size, self.grids)
        rows, columns = grid[0] // self.side * across, grid[1] // self.side * across
        height, width = size
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        if self.most_tiles is not None:
            ratio = math.sqrt(rows * columns / (self.most_tiles * across**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return rows, columns


def vision_facts(config: Config) -> VisionFacts:
    """Read them from a config.json of one of KINDS. Raises StartupError for what is missing or not served."""
    kind, tower = config["model_type"], config.get("vision_config") or {}
    if kind in QWEN:
        return _qwen_facts(config, tower)
    if is_yi(config):
        return _yi_facts(config, tower)
    token = config.get("image_token_index", config.get("image_token_id", 151646 if kind == ONEVISION else 32000))
    side, patch = tower.get("image_size", 384 if kind == ONEVISION else 336), tower.get("patch_size", 14)
    strategy = config.get("vision_feature_select_strategy", "full" if kind == ONEVISION else "default")
    # CLIP puts a class token before the patches, SigLIP does not.
    classes = int(tower.get("model_type", "clip_vision_model") == "clip_vision_model" and kind != ONEVISION)
    grids = config.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    aspect = str(config.get("vision_aspect_ratio", "anyres_max_9"))
    most = aspect.removeprefix("anyres_max_")
    if not all(isinstance(n, int) and n > 0 for n in (side, patch)) or not isinstance(token, int):
        raise StartupError("config.json: image_size, patch_size and image_token_index must be positive integers")
    if kind == ONEVISION and not most.isdecimal():
        raise StartupError(f"config.json: vision_aspect_ratio {aspect!r} is not served; served: anyres_max_N")
    return VisionFacts(
        kind,
        token,
        side,
        patch,
        classes - (strategy == "default"),
        () if kind == LLAVA else tuple((int(height), int(width)) for height, width in grids),
        int(most) if kind == ONEVISION else None,
        config.get("video_token_index", config.get("video_token_id", 151647)) if kind == ONEVISION else None,
    )


def _yi_facts(config: Config, tower: Config) -> VisionFacts:
    """An image's token is the one behind the vocabulary's last."""
    side, patch, vocabulary = tower.get("image_size", 448), tower.get("patch_size", 14), config.get("vocab_size", 0)
    if not all(isinstance(n, int) and n > 0 for n in (side, patch, vocabulary)):
        raise StartupError("config.json: vocab_size, image_size and patch_size must be positive integers")
    extra = int(config.get("mm_vision_select_feature") == "cls_patch")
    return VisionFacts(YI, vocabulary, side, patch, extra, square=config.get("image_aspect_ratio") == "pad")


def _qwen_facts(config: Config, tower: Config) -> VisionFacts:
    patch, frames, merge = (
        tower.get(name, default)
        for name, default in (("patch_size", 14), ("temporal_patch_size", 2), ("spatial_merge_size", 2))
    )
    image, video = config.get("image_token_id", 151655), config.get("video_token_id", 151656)
    if not all(isinstance(n, int) and n > 0 for n in (patch, frames, merge, image, video)):
        raise StartupError("config.json: sizes of patches and tokens of images must be positive integers")
    rate = float(tower.get("tokens_per_second", 4)) if config["model_type"] == QWEN2_5 else None
    return VisionFacts(
        config["model_type"], image, patch * merge, patch, 0,
        video_token=video, merge=merge, frames=frames, per_second=rate,
    )  # fmt: skip


def best_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid in which an image of (height, width) keeps most of its pixels, then wastes the least."""

    def fit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=fit)
