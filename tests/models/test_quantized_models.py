"""Tiny models quantized in every format, through the whole loader: as transformers with the dequantised weights."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from packers import CASES, Case, shared_order
from repacked import REPACKED, make, write
from safetensors.torch import load_file, save_file
from tiny import Driver

from actorserve.errors import StartupError
from actorserve.models.cpu_kernels import kernels
from actorserve.models.layers import PackedLinear
from actorserve.models.part_maps import Beside, Reordered
from actorserve.models.quantized import DenseLinear, QuantizedLinear

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
IDS = tiny.prompt(40)
DENSE = re.compile(r"embed|wte|lm_head|output|gate\.weight$")
"""Matrices that quantizers leave as they are."""
KERNEL = 2e-3
"""Tolerance of the C kernels, whose inputs are integers; measured: 6e-4."""
BLOCKS = {"awq", "gptq", "gptq-asym", "gptq-v2", "gptq-row", "gptq-8", "marlin", "packed-4", "packed-4-asym",
          "packed-8", "w8a8", "w8a16"}  # fmt: skip
"""What our C kernels take as it is; of act-order only where a layer's maps share one."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Matrices this small lose more to handing work over than they gain."""
    torch.set_num_threads(1)


def has_kernels() -> bool:
    """Whether C kernels can be had; the engine goes on without them."""
    try:
        kernels()
    except StartupError:
        return False
    return True


@pytest.fixture
def compiled() -> None:
    if not has_kernels():
        pytest.skip("there are no C kernels here")


def quantised(folder: Path, case: Case, name: str = "llama", **changed: Any) -> Any:
    """Save a tiny model quantized as the case says; returns transformers' model with the dequantised weights."""
    model = tiny.build(name, **(SIZES | changed))
    tiny.save(model, folder)
    tiny.edit_config(str(folder), quantization_config=case.config)
    held, dense = load_file(folder / "model.safetensors"), {}
    for key in [key for key in held if "_proj." in key and key.endswith(".weight")]:
        torch.manual_seed(len(dense))
        tensors, dense[key] = case.pack(held.pop(key))
        held |= {f"{key.removesuffix('weight')}{kind}": tensor.contiguous() for kind, tensor in tensors.items()}
    plain = load_file(folder / "model.safetensors") | dense
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    if model.load_state_dict(dense, strict=False).unexpected_keys:  # experts, which it keeps in one tensor
        other = folder / "dense"
        model.config.save_pretrained(other)
        save_file(plain, other / "model.safetensors", {"format": "pt"})
        loader = transformers.AutoModelForCausalLM.from_pretrained
        model = loader(other, attn_implementation="eager", dtype=torch.float32).eval()
    return model


def quantised_checkpoint(folder: Path, case: Case) -> str:
    """Quantize the linear maps of a checkpoint, whatever their names; returns the folder of the dequantised."""
    held = load_file(folder / "model.safetensors")
    plain, config = dict(held), json.loads((folder / "config.json").read_text())
    for key in [key for key, tensor in held.items() if tensor.ndim == 2 and not DENSE.search(key)]:
        torch.manual_seed(len(key))
        tensors, plain[key] = case.pack(held.pop(key))
        held |= {f"{key.removesuffix('weight')}{kind}": tensor.contiguous() for kind, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    tiny.edit_config(str(folder), quantization_config=case.config)
    return write(folder / "dense", config, plain)


def check(folder: Path, model: Any, tolerance: float = 1e-5, **fields: str) -> Any:
    """Compare logits with transformers', in deviations; returns our decoder.

    Where they are further apart, as on CPUs that sum in other orders, ours are about as near to those of float64.
    """
    expected = tiny.reference_logits(model, IDS)
    decoder = tiny.load(str(folder), **fields)
    got = Driver.of(decoder).logits(IDS, [30] + [1] * 10)
    if (got - expected).abs().max() >= tolerance * expected.std():
        exact = tiny.exact_logits(model, IDS)
        assert (got - exact).abs().max() < 1.5 * (expected - exact).abs().max()
    return decoder


@pytest.mark.parametrize("name", CASES)
def test_formats(name: str, tmp_path: Path) -> None:
    """Dequantised, and by our C kernels: in float32 these multiply with the very same values, in one chain of sums."""
    model = quantised(tmp_path, CASES[name])
    decoder = check(tmp_path, model)
    assert isinstance(decoder.weights.layers[0].qkv, DenseLinear if has_kernels() else PackedLinear)
    if name.startswith("fp8") or not has_kernels():
        return
    layer = check(tmp_path, model, KERNEL, dtype="auto").weights.layers[1]
    assert isinstance(layer.o, QuantizedLinear) == (name in BLOCKS)
    assert isinstance(layer.qkv, Beside) == ("act-order" in name), "three orders"


@pytest.mark.usefixtures("compiled")
def test_act_order_that_a_layer_shares(tmp_path: Path) -> None:
    case = shared_order(CASES["gptq-act-order"])
    layer = check(tmp_path, quantised(tmp_path, case), KERNEL, dtype="auto").weights.layers[0]
    for linear in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down):
        assert isinstance(linear, Reordered) and isinstance(linear.map, QuantizedLinear)


@pytest.mark.parametrize("family", ["phi3", "qwen2", "qwen3", "gemma2", "cohere"])
def test_families(family: str, tmp_path: Path, thorough: bool) -> None:
    """Fused checkpoint tensors that are cut, biases, layouts of all kinds."""
    if not thorough and family not in ("phi3", "qwen2"):
        pytest.skip("--thorough")
    changed = {"pad_token_id": 0} if family == "phi3" else {}
    case = CASES["gptq-asym" if family != "qwen3" else "fp8-channel"]
    check(tmp_path, quantised(tmp_path, case, family, **changed))


@pytest.mark.parametrize("case", ["awq", "gptq", "fp8"])
@pytest.mark.parametrize("name", REPACKED)
def test_names_that_transformers_has_not(name: str, case: str, tmp_path: Path) -> None:
    """Against the same weights dequantised, which test_decoder.py compares with the reference."""
    make(name, tmp_path, **SIZES, moe_intermediate_size=64)
    sizes = [30] + [1] * 10
    before = Driver.of(tiny.load(str(tmp_path))).logits(IDS, sizes)
    expected = Driver.of(tiny.load(quantised_checkpoint(tmp_path, CASES[case]))).logits(IDS, sizes)
    found = Driver.of(tiny.load(str(tmp_path))).logits(IDS, sizes)
    assert (found - expected).abs().max() <= 1e-5 * expected.std()
    assert (found - before).abs().max() > 1e-3 * expected.std()


@pytest.mark.parametrize(
    ("family", "case"), [("qwen3-moe", "fp8-block"), ("deepseek-v3", "fp8-block"), ("mixtral", "awq")]
)
def test_experts_and_latents(family: str, case: str, tmp_path: Path) -> None:
    changed: dict[str, Any] = {"moe_intermediate_size": 64, "num_key_value_heads": 4} if family != "mixtral" else {}
    check(tmp_path, quantised(tmp_path, CASES[case], family, **changed))


def test_16_bits_on_a_cpu(tmp_path: Path) -> None:
    """A dtype that is asked for is the weights': they are dequantised."""
    model = quantised(tmp_path, CASES["awq"])
    expected = tiny.reference_logits(model, IDS)
    decoder = tiny.load(str(tmp_path), dtype="float16")
    got = Driver.of(decoder).logits(IDS, [40]).float()
    assert decoder.dtype == torch.float16 and (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.usefixtures("compiled")
def test_quantised_while_loading(tmp_path: Path) -> None:
    model = tiny.build("llama", **SIZES)
    tiny.save(model, tmp_path)
    decoder = tiny.load(str(tmp_path), dtype="auto", quantization="int8")
    assert isinstance(decoder.weights.layers[0].qkv, QuantizedLinear)
    expected = tiny.reference_logits(model, IDS)
    got = Driver.of(decoder).logits(IDS, [40])
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.1
    for fields, message in (
        ({"quantization": "fp8"}, "fp8: it is for GPUs"),
        ({"quantization": "int8", "dtype": "bfloat16"}, "drop --dtype bfloat16"),
    ):
        with pytest.raises(StartupError, match=message):
            tiny.load(str(tmp_path), **({"dtype": "auto"} | fields))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["awq", "w8a16", "gptq-row"])
def test_dummy_weights_are_quantized(name: str, tmp_path: Path) -> None:
    quantised(tmp_path, CASES[name])
    (tmp_path / "model.safetensors").unlink()
    decoder = tiny.load(str(tmp_path), dtype="auto", load_format="dummy")
    assert isinstance(decoder.weights.layers[0].mlp.down, QuantizedLinear)
    logits = Driver.of(decoder).logits(IDS, [40])
    assert logits.isfinite().all() and logits.std() > 0


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Rewrite a checkpoint with tensors of the first layer's projections replaced, added, or (None) removed."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        key = "model.layers.0." + name.replace("__", ".")
        held.pop(key, None)
        if tensor is not None:
            held[key] = tensor
    save_file(held, folder / "model.safetensors")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    quantised(tmp_path, CASES["gptq"], num_hidden_layers=1)
    kept = (tmp_path / "model.safetensors").read_bytes()
    wrong: list[tuple[dict[str, torch.Tensor | None], str]] = [
        (
            {"mlp__up_proj__scales": None},
            r"module model\.layers\.0\.mlp\.up_proj cannot be read: its scales is missing",
        ),
        ({"mlp__up_proj__qweight": None}, r"lacks model\.layers\.0\.mlp\.up_proj\.weight"),
        ({"mlp__up_proj__qweight": torch.zeros(16, 248, dtype=torch.int32)}, r"up_proj cannot be read: its scales are"),
        ({"self_attn__q_proj__bias": torch.ones(128)}, r"does not account for: .*q_proj\.bias"),
        ({"mlp__up_proj__weight": torch.zeros(256, 128)}, r"up_proj\.weight is in two files"),
    ]
    for tensors, message in wrong:
        (tmp_path / "model.safetensors").write_bytes(kept)
        change(tmp_path, **tensors)
        for dtype in ("float32", "auto"):
            with pytest.raises(StartupError, match=message):
                tiny.load(str(tmp_path), dtype=dtype)
    (tmp_path / "model.safetensors").write_bytes(kept)
    tiny.edit_config(str(tmp_path), intermediate_size=192)
    for dtype in ("float32", "auto"):
        with pytest.raises(StartupError, match=r"is \[\d+, \d+\], config.json asks for"):
            tiny.load(str(tmp_path), dtype=dtype)


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    model = quantised(tmp_path, CASES["gptq"])
    change(tmp_path, self_attn__q_proj__bias=torch.zeros(128), self_attn__k_proj__k_scale=torch.ones(1))
    check(tmp_path, model)


def test_modules_that_stay_dense(tmp_path: Path) -> None:
    """One part of a fused map is dense: the map is."""
    case = copy.deepcopy(CASES["gptq"])
    model = quantised(tmp_path, case)
    name = "model.layers.0.self_attn.k_proj."
    held = {key: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items() if name not in key}
    held[f"{name}weight"] = model.state_dict()[f"{name}weight"]
    save_file(held, tmp_path / "model.safetensors")
    tiny.edit_config(
        str(tmp_path), quantization_config=case.config | {"modules_to_not_convert": ["layers.0.self_attn.k_proj"]}
    )
    check(tmp_path, model)
    check(tmp_path, model, KERNEL, dtype="auto")


def test_a_float8_weight_without_a_config(tmp_path: Path) -> None:
    quantised(tmp_path, CASES["fp8"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="quantization_config does not say how"):
        tiny.load(str(tmp_path))


def test_quantized_twice(tmp_path: Path) -> None:
    quantised(tmp_path, CASES["awq"])
    with pytest.raises(StartupError, match="quantized already"):
        tiny.load(str(tmp_path), quantization="int8")


def test_families_whose_weights_are_turned(tmp_path: Path) -> None:
    tiny.save(tiny.build("gpt2"), tmp_path)
    tiny.edit_config(str(tmp_path), quantization_config=CASES["gptq"].config)
    held = load_file(tmp_path / "model.safetensors")
    held["transformer.h.0.mlp.c_fc.qweight"] = torch.zeros(6, 80, dtype=torch.int32)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match="not served quantized: c_fc is stored"):
        tiny.load(str(tmp_path))
