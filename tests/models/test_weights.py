"""Loading: shards, ties, dtypes, dummy weights, and every way in which a checkpoint can be wrong."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import Driver
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.errors import StartupError
from actorserve.models import dtypes
from actorserve.models.dtypes import pick_dtype
from actorserve.models.layers import Linear, PackedLinear, has_bfloat16
from actorserve.models.weights import load_decoder, pick_device

IDS = tiny.prompt(20)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return tiny.save(tiny.build("llama"), tmp_path)


def logits(folder: str, **fields: str) -> Tensor:
    return Driver.of(tiny.load(folder, **fields)).logits(IDS, [len(IDS)])


def change(folder: str, **tensors: Tensor | None) -> None:
    """Rewrite a one-file checkpoint with tensors replaced, added, or (None) removed; `__` in names stands for a dot."""
    path = Path(folder) / "model.safetensors"
    held = load_file(path)
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, path)


def test_shards_equal_one_file(folder: str, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny.save(tiny.build("llama"), sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(str(sharded)), logits(folder))


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama-tied"), tmp_path)
    expected = logits(folder)
    change(folder, lm_head__weight=torch.zeros(tiny.VOCAB, 48))
    assert torch.equal(logits(folder), expected), "a tied checkpoint's own lm_head is not read"


def test_bfloat16_checkpoint_in_float32(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("qwen2").to(torch.bfloat16), tmp_path)
    rounded = tiny.build("qwen2")
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    reference = tiny.reference_logits(rounded, IDS)
    assert (logits(folder) - reference).abs().max() < 1e-5 * reference.std()


def test_packing_changes_the_layout_only() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, *([torch.bfloat16] if has_bfloat16() else [])):
        linear = Linear(
            torch.randn(48, 32, generator=generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
        )
        packed = PackedLinear(linear)
        for rows in (0, 1, 8, 100):
            x = torch.randn(rows, 32, generator=generator).to(dtype)
            torch.testing.assert_close(packed(x), linear(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_float16_is_left_unpacked(folder: str) -> None:
    decoder = tiny.load(folder, dtype="float16")
    assert isinstance(decoder.weights.head.product, Linear)
    expected = logits(folder)
    assert (Driver.of(decoder).logits(IDS, [20]).float() - expected).norm() < 0.02 * expected.norm()


def test_progress_rises_to_one(folder: str) -> None:
    seen: list[float] = []
    load_decoder(folder, EngineConfig(device="cpu", dtype="float32"), seen.append)
    assert seen == sorted(seen) and seen[0] == 0.0 and seen[-1] == 1.0 and len(seen) > 10


def test_dummy_needs_only_the_config(tmp_path: Path) -> None:
    source = tiny.build("qwen3")
    source.config.save_pretrained(tmp_path)
    first = logits(str(tmp_path), load_format="dummy")
    assert torch.equal(first, logits(str(tmp_path), load_format="dummy"))
    assert not torch.equal(
        first, Driver.of(tiny.load(str(tmp_path), load_format="dummy", random_seed=5)).logits(IDS, [20])
    )
    assert first.isfinite().all() and first.std() > 0
    embed = tiny.load(str(tmp_path), load_format="dummy").weights.embed
    assert embed.std().item() == pytest.approx(0.02, rel=0.05) and abs(embed.mean().item()) < 0.001


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model__layers__1__mlp__up_proj__weight": None}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"lm_head__weight": None}, r"lacks lm_head\.weight"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.zeros(48)}, r"does not account for: .*q_proj\.bias"),
        ({"model__norm__weight": torch.ones(47)}, r"model\.norm\.weight is \[47\], config.json asks for \[48\]"),
        ({"model__norm__weight": torch.ones(1)}, r"is \[1\], config.json asks for \[48\]"),
        ({"model__norm__weight": torch.ones(48, dtype=torch.int8)}, r"torch\.int8: quantized, but"),
    ],
    ids=["missing", "no-head", "extra", "misshapen", "broadcastable", "quantized"],
)
def test_wrong_tensors_are_named(folder: str, tensors: dict[str, Tensor | None], message: str) -> None:
    change(folder, **tensors)
    with pytest.raises(StartupError, match=message):
        tiny.load(folder)


def test_many_missing_tensors_are_counted(folder: str) -> None:
    tiny.edit_config(folder, num_hidden_layers=5)
    with pytest.raises(StartupError, match=r"lacks model\.layers\.3.*and 14 more"):
        tiny.load(folder)


def test_old_buffers_are_ignored(folder: str) -> None:
    expected = logits(folder)
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert torch.equal(logits(folder), expected)


def test_the_same_tensor_in_two_files(folder: str) -> None:
    held = load_file(Path(folder) / "model.safetensors")
    save_file({"model.norm.weight": held["model.norm.weight"]}, Path(folder) / "more.safetensors")
    files = dict.fromkeys(held, "model.safetensors") | {"again": "more.safetensors"}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(StartupError, match="in two files"):
        tiny.load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b"[1]", "not a JSON object"),
        ("config.json", b"[" * 100_000, "config.json cannot be read"),
        ("config.json", None, "no config.json"),
        ("model.safetensors", None, "no .safetensors"),
        ("model.safetensors", b"\xff" * 100, "model.safetensors is not a readable"),
        ("model.safetensors.index.json", b"{}", "index.json cannot be read"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}', "index.json cannot be read"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../../x.safetensors"}}',
            "file x.safetensors is missing",
        ),
    ],
)
def test_broken_files(folder: str, name: str, content: bytes | None, message: str) -> None:
    path = Path(folder) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=message) as caught:
        tiny.load(folder)
    assert folder not in caught.value.message


def test_truncated_file(folder: str) -> None:
    path = Path(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StartupError, match="not a readable"):
        tiny.load(folder)


def test_dtype_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for features, ours, sparse, expected in (
        (set(), True, False, torch.float32),
        (set(), False, True, torch.float32),
        ({"avx512_bf16"}, True, False, torch.float32),
        ({"avx512_bf16"}, True, True, torch.bfloat16),
        ({"avx512_bf16"}, False, False, torch.bfloat16),
        ({"avx512_bf16", "amx_bf16"}, True, False, torch.float32),
        ({"amx_bf16"}, True, True, torch.bfloat16),
    ):
        monkeypatch.setattr(dtypes, "cpu_features", lambda features=features: features)
        monkeypatch.setattr(dtypes, "cpu_kernels_or_none", lambda ours=ours: object() if ours else None)
        assert pick_dtype("auto", {"dtype": "float16"}, cpu, sparse) == expected
        assert pick_dtype("float32", {}, cpu) == torch.float32
        rounded = ours and not sparse  # by our kernels, between whose products all is float32
        assert pick_dtype("bfloat16", {}, cpu, sparse) == (torch.float32 if rounded else torch.bfloat16)
    assert pick_dtype("bfloat16", {}, cuda) == torch.bfloat16
    assert pick_dtype("auto", {"torch_dtype": "float16"}, cuda) == torch.float16
    assert pick_dtype("auto", {"dtype": "float32"}, cuda) == torch.float32
    assert pick_dtype("auto", {}, cuda) == torch.bfloat16


def test_device() -> None:
    assert pick_device("cpu").type == "cpu"
    if torch.cuda.is_available():
        assert pick_device("auto").type == pick_device("cuda").type == "cuda"
    else:
        assert pick_device("auto").type == "cpu"
        with pytest.raises(StartupError, match="no CUDA device"):
            pick_device("cuda")
