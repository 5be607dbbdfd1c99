"""Tiny random vision-language models as model folders, and what transformers makes of them."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_tokenizers import byte_level
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIDE, PATCH, VOCAB = 28, 7, 416
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Onevision(transformers.LlavaOnevisionProcessor):
    """Without a processor of videos, which would need torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> Any:
        return None


class _Qwen(transformers.Qwen2VLProcessor):
    """The same; Qwen2.5-VL's makes the same of images."""

    def check_argument_for_proper_class(self, *_: Any) -> Any:
        return None


@dataclass
class TinyVlm:
    """A model folder, transformers' model of it, and its processor."""

    folder: str
    model: Any
    processor: Any

    def inputs(self, text: str, images: list[Image.Image]) -> Any:
        """What the model takes, for one prompt with these images."""
        return self.processor(images=[images] if images else None, text=text, return_tensors="pt")

    def video_inputs(self, text: str, frames: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model takes, for one prompt with a video in the place of <video>.

        `frames` have a size that needs no resizing: what a processor does beside that is written out here, for
        transformers' own needs torchvision.
        """
        images = self.processor.image_processor
        pixels = torch.from_numpy(np.stack([np.asarray(frame, dtype=np.float32) for frame in frames])) / 255
        pixels = (pixels - torch.tensor(images.image_mean)) / torch.tensor(images.image_std)
        pixels = pixels.permute(0, 3, 1, 2)
        given: dict[str, Any] = {"pixel_values_videos": pixels[None]}
        tokens = len(frames) * ((SIDE // PATCH + 1) // 2) ** 2 + 1
        if "qwen" in self.model.config.model_type:
            pixels = torch.cat([pixels, pixels[-1:]]) if len(pixels) % 2 else pixels
            times, rows, columns = len(pixels) // 2, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
            cut = pixels.reshape(times, 2, 3, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
            flat = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(times * rows * columns, -1)
            given = {"pixel_values_videos": flat, "video_grid_thw": torch.tensor([[times, rows, columns]])}
            if self.model.config.model_type == "qwen2_5_vl":
                given["second_per_grid_ts"] = torch.tensor([1.0])
            tokens = times * rows * columns // 4
        ids = self.processor.tokenizer(text.replace("<video>", "<video>" * tokens), return_tensors="pt")["input_ids"]
        if "video_grid_thw" in given:
            given["mm_token_type_ids"] = 2 * (ids == self.model.config.video_token_id).int()
        return given | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def greedy_video(self, text: str, frames: list[Image.Image], count: int) -> list[int]:
        """As `greedy`, of a video."""
        inputs = self.video_inputs(text, frames)
        found = self.model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return found[0, inputs["input_ids"].shape[1] :].tolist()

    def greedy(self, text: str, images: list[Image.Image], count: int, **options: Any) -> list[int]:
        """What transformers continues `text`, with <image> for each image, by."""
        inputs = self.inputs(text, images)
        found = self.model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
        return found[0, inputs["input_ids"].shape[1] :].tolist()


def tiny_vlm(kind: str, folder: Path, seed: int = 5) -> TinyVlm:
    """Make the model of a kind: llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl."""
    byte_level(folder, chat_template=TEMPLATE, extra_special_tokens=["<image>", "<video>"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids("<image>")
    square = {"height": SIDE, "width": SIDE}
    common = {"patch_size": PATCH, "image_token": "<image>", "chat_template": TEMPLATE}
    fields: dict[str, Any] = {"image_token_index": token, "image_token_id": token}
    clip = CLIPVisionConfig(**TOWER)
    torch.manual_seed(seed)
    if kind.startswith("qwen"):
        return _qwen(kind, folder, tokenizer)
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        config = transformers.LlavaConfig(vision_config=clip, text_config=LlamaConfig(**TEXT), **fields)
        model = transformers.LlavaForConditionalGeneration(config)
        options = common | {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = transformers.LlavaProcessor(images, tokenizer, **options)
    elif kind == "llava_next":
        images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=GRIDS)
        fields["image_grid_pinpoints"] = GRIDS
        config = transformers.LlavaNextConfig(vision_config=clip, text_config=MistralConfig(**TEXT), **fields)
        model = transformers.LlavaNextForConditionalGeneration(config)
        options = common | {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = transformers.LlavaNextProcessor(images, tokenizer, **options)
    else:
        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=GRIDS)
        video = tokenizer.convert_tokens_to_ids("<video>")
        fields |= {"video_token_index": video, "video_token_id": video}
        fields |= {"image_grid_pinpoints": GRIDS, "vision_aspect_ratio": "anyres_max_2"}
        tower = SiglipVisionConfig(**(TOWER | {"vision_use_head": False}))
        config = transformers.LlavaOnevisionConfig(vision_config=tower, text_config=Qwen2Config(**TEXT), **fields)
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
        options = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
        options |= {"image_token": "<image>", "chat_template": TEMPLATE, "vision_aspect_ratio": "anyres_max_2"}
        processor = _Onevision(images, tokenizer, None, **options)
    model.eval().save_pretrained(folder)
    images.save_pretrained(folder)
    return TinyVlm(str(folder), model, processor)


def _qwen(kind: str, folder: Path, tokenizer: Any) -> TinyVlm:
    """Patches of PATCH pixels, 2 x 2 of which are a token; images are of any size."""
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 2, 1]}
    text = TEXT | {"rope_parameters": rope}
    tower = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "initializer_range": 0.2}
    if kind == "qwen2_vl":
        tower |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": TEXT["hidden_size"]}
        names = "Qwen2VLConfig", "Qwen2VLForConditionalGeneration"
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
        tower |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 3}
        names = "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": 1, "vision_end_token_id": 2}
    config = getattr(transformers, names[0])(text_config=text, vision_config=tower, **ids)
    model = getattr(transformers, names[1])(config)
    model.eval().save_pretrained(folder)
    pixels = {"shortest_edge": 72 * PATCH * PATCH, "longest_edge": 200 * PATCH * PATCH}
    images = Qwen2VLImageProcessorPil(size=pixels, patch_size=PATCH)
    images.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"size": pixels}))
    processor = _Qwen(images, tokenizer, None, chat_template=TEMPLATE)
    processor.image_token, processor.image_token_id = "<image>", image
    processor.video_token, processor.video_token_id = "<video>", video
    return TinyVlm(str(folder), model, processor)


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    """A file of it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
