"""Quantized weights of checkpoints, bit for bit against packers that follow each format's definition."""

from dataclasses import dataclass

import pytest
import torch
from packers import CASES, Case, words
from torch import Tensor

from actorserve.errors import StartupError
from actorserve.models.quantization import ONLINE, Scheme, quantization_of
from actorserve.models.unpack import Part, join, quantise, random_part, sorted_inputs, unpack


def scheme_of(case: Case) -> Scheme:
    quantization = quantization_of({"quantization_config": case.config})
    assert quantization is not None
    scheme = quantization.scheme("model.layers.0.mlp.up_proj")
    assert scheme is not None and quantization.scheme("lm_head") is None
    return scheme


@dataclass
class Half:
    """A cut."""

    axis: int
    start: int
    stop: int
    whole: int


def weight(outputs: int = 128, inputs: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_values_are_exact(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    tensors, dense = case.pack(weight())
    part = unpack(scheme_of(case), tensors)
    assert torch.equal(part.dequantise(), dense)
    assert (dense - weight()).norm() < 0.2 * dense.norm(), "the packer itself makes sense"
    assert (part.groups is not None) == ("act-order" in name)
    ordered = sorted_inputs(part)
    assert ordered is not None
    straight, order = ordered
    assert torch.equal(straight.dequantise(), dense if order is None else dense[:, order])


@pytest.mark.parametrize("name", ["gptq", "awq", "packed-4-asym", "packed-8", "fp8", "fp8-block", "gptq-act-order"])
def test_a_part_can_be_cut(name: str) -> None:
    """By inputs, through groups too, and by outputs: what tensor parallel ranks have; and filled up with zeros."""
    torch.manual_seed(0)
    tensors, dense = CASES[name].pack(weight())
    part = unpack(scheme_of(CASES[name]), tensors)
    for start, end in ((128, 256), (0, 128), (16, 256), (40, 41), (0, 250)):
        assert torch.equal(part.columns(start, end).dequantise(), dense[:, start:end])
    assert torch.equal(part.rows(lambda t: t[40:72]).dequantise(), dense[40:72])
    wide = part.rows(lambda t: t[:40]).columns(64, 200).padded(48, 144)
    assert wide.shape == (48, 144) and wide.padded(48, 144) is wide
    for cut, expected in ((Half(0, 64, 128, 128), dense[64:]), (Half(1, 0, 120, 256), dense[:, :120])):
        assert torch.equal(part.of_rank(cut, *expected.shape).dequantise(), expected)
    assert part.of_rank(None, 128, 256) is part
    values = wide.dequantise()
    assert torch.equal(values[:40, :136], dense[:40, 64:200]) and not values[40:].any()


def test_joined_parts() -> None:
    case = CASES["gptq-asym"]
    found = [case.pack(weight(seed=seed)) for seed in (1, 2)]
    parts = [unpack(scheme_of(case), tensors) for tensors, _ in found]
    joined = join(parts)
    assert joined is not None
    assert torch.equal(joined.dequantise(), torch.cat([dense for _, dense in found]))
    eight = unpack(scheme_of(CASES["gptq-8"]), CASES["gptq-8"].pack(weight())[0])
    assert join([parts[0], eight]) is None
    ordered = [unpack(scheme_of(CASES["gptq-act-order"]), CASES["gptq-act-order"].pack(weight())[0]) for _ in range(2)]
    assert join(ordered) is None, "two orders of the inputs"
    static = [unpack(scheme_of(CASES["fp8-static"]), CASES["fp8-static"].pack(weight())[0]) for _ in range(2)]
    static[1].input_scale = torch.tensor(0.5)
    both = join(static)
    assert both is not None and both.input_scale == 0.5


def test_last_group_may_be_smaller() -> None:
    tensors, dense = CASES["gptq"].pack(weight(64, 80))
    part = unpack(scheme_of(CASES["gptq"]), tensors)
    assert part.scales.shape == (64, 3) and torch.equal(part.dequantise(), dense)


def test_unequal_groups_have_no_order() -> None:
    part = unpack(scheme_of(CASES["gptq"]), CASES["gptq"].pack(weight(64, 64))[0])
    part.groups = torch.tensor([0] * 40 + [1] * 24)
    assert sorted_inputs(part) is None


def test_zero_points_of_version_1_wrap() -> None:
    """A zero point of 0 is stored as 15."""
    tensors, _ = CASES["gptq-asym"].pack(weight(8, 32))
    tensors["qzeros"] = words(torch.full((1, 8), 15), 4)
    part = unpack(scheme_of(CASES["gptq-asym"]), tensors)
    assert part.zeros is not None and (part.zeros == 0).all()


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("gptq", {"qweight": None}, "qweight is missing"),
        ("gptq-asym", {"qzeros": None}, "zero points are missing"),
        ("gptq", {"scales": torch.zeros(4, 128)}, r"scales are \[128, 4\], \[128, 8\] are needed"),
        ("gptq", {"scales": torch.zeros(8, 128, dtype=torch.int32)}, "scales are torch.int32"),
        ("gptq", {"qzeros": torch.zeros(8, 15, dtype=torch.int32)}, "zero points are"),
        ("gptq", {"qweight": torch.zeros(32, 128, dtype=torch.int64)}, "int32 words were expected"),
        ("gptq-act-order", {"g_idx": torch.full((256,), 8, dtype=torch.int32)}, "none of the 8 groups"),
        ("gptq-act-order", {"g_idx": torch.zeros(255, dtype=torch.int32)}, "not 256 numbers"),
        ("gptq-act-order", {"g_idx": torch.zeros(256)}, "not 256 numbers"),
        ("packed-4", {"weight_shape": torch.tensor([128, 300])}, "weight_shape says"),
        ("w8a16", {"weight": torch.zeros(128, 256)}, "int8 was expected"),
        ("fp8", {"weight_scale": None}, "weight_scale or weight_scale_inv is missing"),
        ("fp8-static", {"input_scale": None}, "input_scale is missing"),
        ("fp8-block", {"weight_scale_inv": torch.ones(1, 3)}, "scales are"),
        ("marlin", {"B": torch.zeros(16, 8, dtype=torch.int32)}, "no Marlin tiles"),
    ],
)
def test_what_does_not_fit(name: str, changed: dict[str, Tensor | None], message: str) -> None:
    torch.manual_seed(0)
    tensors, _ = CASES[name].pack(weight())
    tensors = {key: tensor for key, tensor in (tensors | changed).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        unpack(scheme_of(CASES[name]), tensors)


@pytest.mark.parametrize("method", ONLINE)
def test_quantising(method: str) -> None:
    dense = weight()
    dense[3] = 0
    dense[4] *= 1e-6
    part = quantise(ONLINE[method], dense)
    step = dense.abs().amax(1, keepdim=True) / (127 if method == "int8" else 14)
    assert ((part.dequantise() - dense).abs() <= 0.51 * step + 1e-4).all()


def test_random_parts_have_the_scheme_s_form() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in CASES.values():
        part = random_part(scheme_of(case), 64, 256, 0.02, generator)
        tensors, _ = case.pack(weight(64, 256))
        real = unpack(scheme_of(case), tensors)
        assert (part.shape, part.bits, part.group) == (real.shape, real.bits, real.group)
        assert part.codes.dtype == real.codes.dtype and part.scales.shape == real.scales.shape
        assert part.dequantise().std().item() == pytest.approx(0.02, rel=0.2)


# ------------------------------------------------------------------ configs


def rules(**config: object) -> str:
    """Which of some modules a config quantizes, as a string of initials."""
    quantization = quantization_of({"quantization_config": config})
    assert quantization is not None
    names = {"q": "self_attn.q_proj", "u": "mlp.up_proj", "g": "mlp.gate", "G": "mlp.gate_proj"}
    found = [key for key, name in names.items() if quantization.scheme(f"model.layers.1.{name}")]
    return "".join(found) + ("h" if quantization.scheme("lm_head") else "")


def test_modules_that_stay() -> None:
    assert rules(quant_method="awq", bits=4, group_size=128) == "qugG"
    assert rules(quant_method="awq", bits=4, group_size=128, modules_to_not_convert=["mlp.gate"]) == "quG"
    assert rules(quant_method="fp8", ignored_layers=["model.layers.1.self_attn.q_proj"]) == "ugG"
    assert rules(quant_method="gptq", bits=4, group_size=128, lm_head=True) == "qugGh"
    dynamic = {r"-:.*up_proj": {}, r"+:.*q_proj": {"bits": 8}}
    assert rules(quant_method="gptq", bits=4, group_size=128, dynamic=dynamic) == "qgG"
    quantization = quantization_of(
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": dynamic}}
    )
    assert quantization is not None and quantization.usual == Scheme("gptq", 4, 64)
    assert quantization.scheme("model.layers.1.self_attn.q_proj") == Scheme("gptq", 8, 64)
    config = CASES["packed-4"].config
    assert rules(**config | {"ignore": ["lm_head", "re:.*mlp.gate$"]}) == "quG"
    assert rules(**config | {"ignore": []}) == "qugGh"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "method 'hqq' is not served; served: awq, compressed-tensors, fp8, gptq, marlin"),
        ({"quant_method": ["awq"]}, "is not served"),
        ({"bits": 4}, "method None"),
        ({"quant_method": "awq", "bits": 3}, "AWQ of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group size 0"),
        ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": [5]}, "makes no sense"),
        ({"quant_method": "gptq", "group_size": 128}, "makes no sense: KeyError"),
        ({"quant_method": "gptq", "bits": 2}, "GPTQ of 2 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "bitblas"}, "layout 'bitblas'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}, "makes no sense"),
        ({"quant_method": "marlin", "bits": 8}, "Marlin of 8 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "format 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "fp8", "activation_scheme": "other"}, "activation_scheme 'other'"),
        ({"quant_method": "compressed-tensors"}, "makes no sense: KeyError"),
        (CASES["packed-4"].config | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized of 4-bit int"),
        (CASES["packed-4"].config | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse format"),
    ],
)
def test_configs_that_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        quantization_of({"quantization_config": config})
    assert "\n" not in caught.value.message


def test_no_config_is_no_quantization() -> None:
    assert quantization_of({}) is None and quantization_of({"quantization_config": None}) is None
    with pytest.raises(StartupError, match="not a JSON object"):
        quantization_of({"quantization_config": [1]})


def test_memory_of_a_scheme() -> None:
    assert Scheme("gptq", 4, 128).bytes_of(4096 * 256, 4096) == 4096 * 128 + 4096 * 2 * 4
    assert Scheme("fp8", 8).bytes_of(4096 * 128, 4096) == 4096 * 128 + 4096 * 4


def test_part_moves() -> None:
    part = quantise(ONLINE["int8"], weight(8, 32))
    assert isinstance(part.to(torch.device("cpu")), Part)
