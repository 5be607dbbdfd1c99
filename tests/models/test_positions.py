"""Three positions of a token: those of transformers for whole prompts, and the same for every part of one."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from actorserve.actors.messages import ImageSpan
from actorserve.models.positions import positions_between, shift_of

TEXT, IMAGE, VIDEO = 0, 1, 2
Part = tuple[int, tuple[int, int, int], float]
"""(TEXT, (tokens, 0, 0), 0) or an image or a video with its grid of tokens and its step."""
PROMPTS: dict[str, list[Part]] = {
    "text": [(TEXT, (9, 0, 0), 0)],
    "an image": [(TEXT, (4, 0, 0), 0), (IMAGE, (1, 3, 5), 1), (TEXT, (6, 0, 0), 0)],
    "images in a row": [
        (IMAGE, (1, 6, 2), 1), (TEXT, (1, 0, 0), 0), (IMAGE, (1, 2, 2), 1), (TEXT, (1, 0, 0), 0),
        (IMAGE, (1, 1, 9), 1), (TEXT, (3, 0, 0), 0),
    ],
    "a wide video": [(TEXT, (2, 0, 0), 0), (VIDEO, (3, 2, 4), 1), (TEXT, (5, 0, 0), 0)],
    "both": [
        (TEXT, (3, 0, 0), 0), (VIDEO, (2, 4, 3), 1.5), (TEXT, (2, 0, 0), 0), (IMAGE, (1, 2, 3), 1),
        (TEXT, (4, 0, 0), 0),
    ],
}  # fmt: skip


def spans_of(prompt: list[Part]) -> tuple[tuple[ImageSpan, ...], int]:
    spans, length = [], 0
    for kind, grid, step in prompt:
        tokens = grid[0] if kind == TEXT else int(np.prod(grid))
        if kind != TEXT:
            spans.append(ImageSpan(b"", length, tokens, 7, grid, step))
        length += tokens
    return tuple(spans), length


def of_transformers(prompt: list[Part]) -> tuple[np.ndarray, int]:
    config: Any = transformers.Qwen2_5_VLConfig(text_config={"num_hidden_layers": 0, "layer_types": []})
    config.vision_config.tokens_per_second = 1
    model = transformers.Qwen2_5_VLModel.__new__(transformers.Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    kinds = [kind for kind, grid, _ in prompt for _ in range(grid[0] if kind == TEXT else int(np.prod(grid)))]
    grids = {kind: [[t, 2 * h, 2 * w] for own, (t, h, w), _ in prompt if own == kind] for kind in (IMAGE, VIDEO)}
    positions, deltas = model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long),
        torch.tensor([kinds], dtype=torch.int32),
        torch.tensor(grids[IMAGE]) if grids[IMAGE] else None,
        torch.tensor(grids[VIDEO]) if grids[VIDEO] else None,
        torch.tensor([step for kind, _, step in prompt if kind == VIDEO]) if grids[VIDEO] else None,
    )
    return positions[:, 0].numpy(), int(deltas)


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_are_those_of_transformers(name: str) -> None:
    """Of the whole, of what generation adds, and of every chunk."""
    prompt = PROMPTS[name]
    spans, length = spans_of(prompt)
    wanted, delta = of_transformers(prompt)
    assert positions_between(spans, 0, length).tolist() == wanted.tolist()
    assert shift_of(spans) == delta
    for start in range(length):
        for stop in (start + 1, min(start + 7, length), length):
            assert positions_between(spans, start, stop).tolist() == wanted[:, start:stop].tolist(), (start, stop)
    assert positions_between(spans, length, length + 3).tolist() == [[length + delta + i for i in range(3)]] * 3


def test_text_behind_a_long_video_begins_after_its_last_frame() -> None:
    """As the paper has it, and transformers before 5: its positions would else be those of the frames once more."""
    (span,), length = spans_of([(TEXT, (2, 0, 0), 0), (VIDEO, (5, 1, 2), 3.0), (TEXT, (2, 0, 0), 0)])
    found = positions_between((span,), 0, length)
    assert found[0].tolist() == [0, 1, 2, 2, 5, 5, 8, 8, 11, 11, 14, 14, 15, 16]
    assert found[1].tolist() == [0, 1, *[2] * 10, 15, 16]
    assert found[2].tolist() == [0, 1, *[2, 3] * 5, 15, 16]
    assert shift_of((span,)) == 17 - length


def test_spans_without_a_grid_count_on() -> None:
    span = ImageSpan(b"", 3, 5, 7)
    assert positions_between((span,), 2, 12).tolist() == [list(range(2, 12))] * 3
    assert shift_of((span,)) == 0
    cuts = [0, 3, 4, 8, 12]
    parts = [positions_between((span,), *cut) for cut in pairwise(cuts)]
    assert np.concatenate(parts, axis=1)[0].tolist() == list(range(12))
