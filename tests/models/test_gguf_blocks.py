"""K-quants as blocks of 32 values: gguf's own values, bit for bit, from random bytes and out of a file."""

from pathlib import Path
from typing import Any

import gguf
import gguf_writer
import numpy as np
import pytest
import test_gguf
import torch
from safetensors.torch import load_file

from actorserve.models.gguf import KEPT_FILE, convert
from actorserve.models.gguf_blocks import K_TYPES, SIZES, Bytes, blocks_of_32, values_of, widened

bpe = test_gguf.bpe


@pytest.mark.parametrize("kind", K_TYPES)
def test_values_are_gguf_s(kind: str) -> None:
    rows = gguf_writer.random_rows(kind, 20, 2816)
    blocks, expected = blocks_of_32(kind, rows), gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert blocks.shape == (20, 88 * SIZES[kind])
    for form in (blocks, widened(blocks, 2816)):
        assert (values_of(form, 2816) == expected).all()


def test_a_scale_that_is_none() -> None:
    rows = gguf_writer.random_rows("Q6_K", 2, 256)
    rows[1, 208:] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="a scale of Q6_K"):
        blocks_of_32("Q6_K", rows)


KINDS = {"attn_q.weight": "Q4_K", "attn_v.weight": "Q6_K", "ffn_down.weight": "Q5_K", "token_embd.weight": "Q6_K"}


def test_files_of_k_quants(
    tmp_path: Path, bpe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tiny_hidden: None
) -> None:
    """Beside what they mean in bfloat16, and in the same order of rows."""
    raw = {}

    def quantize(tensor: np.ndarray, kind: gguf.GGMLQuantizationType) -> Bytes:
        raw[kind.name] = gguf_writer.random_rows(kind.name, *tensor.shape)
        return raw[kind.name]

    monkeypatch.setattr(gguf, "quantize", quantize)
    test_gguf.write_gguf(tmp_path / "m.gguf", bpe, kinds=KINDS)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    kept, loaded = load_file(tmp_path / "out" / KEPT_FILE), load_file(tmp_path / "out" / "model.safetensors")
    assert len(kept) == 3 * test_gguf.LAYERS + 1 and set(raw) == set(K_TYPES)
    for name, blocks in kept.items():
        assert torch.equal(
            loaded[name], torch.from_numpy(values_of(blocks.numpy(), loaded[name].shape[1])).bfloat16()
        ), name


@pytest.fixture
def tiny_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that K-quants can have."""
    for name in ("HIDDEN", "INTER"):
        monkeypatch.setattr(test_gguf, name, 256)
    monkeypatch.setattr(test_gguf, "HEAD_DIM", 256 // test_gguf.HEADS)
