"""Checkpoints as their authors name and store them: spellings that transformers does not write, and wrong ones."""

from pathlib import Path

import pytest
import tiny
import torch
from repacked import make
from safetensors.torch import load_file, save_file
from tiny import Driver
from torch import Tensor

from actorserve.errors import StartupError
from actorserve.models.families import FAMILIES
from actorserve.models.names import pieces
from actorserve.models.spec import Moe, Spec

IDS = tiny.prompt(20)
SPEC = Spec(10, 6, 1, 4, 2, 3, 8, moe=Moe(2, 1, 5, (True,)))


def logits(folder: str) -> Tensor:
    return Driver.of(tiny.load(folder)).logits(IDS, [len(IDS)])


def rewritten(folder: str, *changes: tuple[str, str], **more: Tensor) -> None:
    """Rename the tensors of a one-file checkpoint and add more; `__` in names stands for a dot."""
    path = Path(folder) / "model.safetensors"
    held = load_file(path)
    for old, new in changes:
        held = {name.replace(old, new, 1): tensor for name, tensor in held.items()}
    save_file(held | {name.replace("__", "."): tensor for name, tensor in more.items()}, path)


def test_gpt2_without_its_prefix(tmp_path: Path) -> None:
    """As on the hub, with the mask that was saved beside the weights."""
    _, folder = make("gpt2", tmp_path)
    expected = logits(folder)
    rewritten(folder, ("transformer.", ""), h__0__attn__bias=torch.ones(1, 1, 8, 8))
    assert torch.equal(logits(folder), expected)


def test_grok_in_its_second_spelling(tmp_path: Path) -> None:
    _, folder = make("grok-1", tmp_path)
    expected = logits(folder)
    changes = [("block_sparse_moe", "moe_block"), (".w1.", ".linear."), (".w3.", ".linear_v."), (".w2.", ".linear_1.")]
    rewritten(folder, *changes, ("self_attn", "attn"))
    assert torch.equal(logits(folder), expected)


def test_layers_for_several_tokens_are_left_out(tmp_path: Path) -> None:
    _, folder = make("deepseek-v3", tmp_path)
    expected = logits(folder)
    rewritten(folder, model__layers__3__eh_proj__weight=torch.ones(3))
    assert torch.equal(logits(folder), expected)
    rewritten(folder, model__layers__2__eh_proj__weight=torch.ones(3))
    with pytest.raises(StartupError, match=r"layers\.2\.eh_proj"):
        tiny.load(folder)


def test_every_value_lands_in_one_piece() -> None:
    cases = [
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (24, 6), {"q_proj": (12, 6), "k_proj": (6, 6)}),
        ("internlm2", "model.layers.0.attention.wqkv.weight", (24, 6), {"q_proj": (12, 6), "v_proj": (6, 6)}),
        ("chatglm", "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight", (16, 6), {"up_proj": (8, 6)}),
        ("gpt2", "h.0.attn.c_attn.weight", (6, 24), {"q_proj": (12, 6), "k_proj": (6, 6), "v_proj": (6, 6)}),
        ("gpt2", "h.0.attn.c_attn.bias", (24,), {"q_proj": (12,)}),
        ("dbrx", "transformer.blocks.0.ffn.experts.mlp.w2", (10, 6), {"1.down_proj": (6, 5)}),
        ("dbrx", "transformer.blocks.0.ffn.experts.mlp.v1", (10, 6), {"0.up_proj": (5, 6)}),
        ("cohere", "model.layers.0.self_attn.q_norm.weight", (4, 3), {"q_norm.3": (3,)}),
    ]
    for family, name, shape, expected in cases:
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        cut = dict(pieces(FAMILIES[family].names, SPEC, name, whole))
        assert torch.equal(torch.cat([piece.flatten() for piece in cut.values()]).sort().values, whole.flatten())
        for part, size in expected.items():
            found = [tuple(piece.shape) for ours, piece in cut.items() if f".{part}." in ours]
            assert found == [size] and all(ours.startswith("model.layers.0.") for ours in cut)


def test_a_fused_tensor_of_the_wrong_size_is_named(tmp_path: Path) -> None:
    _, folder = make("phi3", tmp_path)
    rewritten(folder, model__layers__1__self_attn__qkv_proj__weight=torch.ones(79, 48))
    with pytest.raises(StartupError, match=r"layers\.1\.self_attn\.qkv_proj\.weight \[79, 48\] does not fit"):
        tiny.load(folder)


def test_dummy_weights_of_experts_and_latents(tmp_path: Path) -> None:
    _, folder = make("deepseek-v3", tmp_path)
    decoder = tiny.load(folder, load_format="dummy")
    found = Driver.of(decoder).logits(IDS, [len(IDS)])
    assert found.isfinite().all() and found.std() > 0
