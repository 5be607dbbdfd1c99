"""Vision-language models on a GPU: towers, features, three positions of a token, with CUDA graphs and without.

What the CPU's engine says is the reference. Arithmetic differs by rounding, so tokens are compared where float32 leaves
no doubt, and logprobs everywhere.
"""

from pathlib import Path

import pytest
import torch
from tiny_vlm import picture, png, tiny_vlm

import actorserve

STEPS = 12
SETTINGS = {"placement": "inline", "dtype": "float32", "max_total_tokens": 4096, "chunked_prefill_size": 40}
PROMPTS = ["Hello <image> there", "How are you?", "A <image> and <image>", "<image>Hello"]
IMAGES = [[png(picture(1))], None, [png(picture(2, 90, 30)), png(picture(3, 31, 90))], [png(picture(1))]]
VIDEO = [png(picture(20 + i, 84, 56)) for i in range(5)]


def outputs(folder: str, videos: bool, **settings: object) -> list[actorserve.Output]:
    """Of all prompts at once, twice: the second time from the prefix cache."""
    prompts = [*PROMPTS, "A <video>Hello"] if videos else PROMPTS
    images = [*IMAGES, None] if videos else IMAGES
    frames = [*([None] * len(IMAGES)), VIDEO] if videos else None
    with actorserve.Engine.sync(folder, **(SETTINGS | settings)) as engine:
        found = []
        for _ in range(2):
            found += engine.generate(
                prompts, image_data=images, video_data=frames,
                temperature=0.0, max_new_tokens=STEPS, ignore_eos=True, logprobs=0,
            )  # fmt: skip
    return found


@pytest.mark.gpu
@pytest.mark.timeout(600)  # kernels are compiled on first use
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_a_gpu_says_what_a_cpu_says(kind: str, tmp_path: Path) -> None:
    folder = tiny_vlm(kind, tmp_path / kind).folder
    videos = kind not in ("llava", "llava_next")
    expected = outputs(folder, videos, device="cpu")
    for graphs in (False, True):
        found = outputs(folder, videos, device="cuda", disable_cuda_graph=not graphs)
        again = found[len(found) // 2 :]
        assert [output.cached_tokens for output in again] == [output.prompt_tokens - 1 for output in again]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.ids == theirs.ids, (graphs, mine.index)
            for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert abs(one.logprob - other.logprob) < 1e-2
