"""The memory ledger against what the loader really allocates; the floors against figures worked out elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from actorserve.config import EngineConfig
from actorserve.errors import StartupError
from actorserve.models import assembly, floors, ledger
from actorserve.models.families import spec_of
from actorserve.models.floors import GIB, GPUS, Limits
from actorserve.models.kv_cache import KVCache
from actorserve.models.places import allocate
from actorserve.models.quantization import ONLINE, Scheme, quantization_of
from actorserve.models.shapes import KNOWN, write_shape
from actorserve.models.shard import sharded
from actorserve.models.spec import Spec

H200 = Limits(4.3e12, 790e12)
SPECS = {name: spec_of(config) for name, config in KNOWN.items()}
QWEN = SPECS["qwen2-7b"]


def total(spec: Spec, **fields: object) -> ledger.Ledger:
    demand = ledger.demand_of(spec, EngineConfig(**fields), "bfloat16", 32768)  # type: ignore[arg-type]
    return ledger.balance(GPUS["h200"].memory, 0.88, demand)


# ------------------------------------------------------------------ the ledger


@pytest.mark.parametrize("largest", [1, 100, 128, 129, 256, 400])
def test_a_graph_holds_every_full_chunk(largest: int) -> None:
    """Beside any number of rows that has graphs, and the row that the chunk's prompt becomes."""
    buckets = ledger.mixed_ladder(largest)
    assert buckets == sorted(buckets) and len(buckets) == len(set(buckets))
    for rows in range(1, largest):
        assert any(rows + 1 <= r and ledger.mixed_chunk(rows) <= tokens for r, tokens in buckets), rows


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_parameters_are_what_the_loader_allocates(name: str) -> None:
    spec = spec_of(tiny.build(name).config.to_dict())
    _, places = allocate(spec, torch.device("meta"), torch.bfloat16)
    assert ledger.parameters(spec) == sum(place.view.numel() for place in places.values())


def test_parameters_of_known_models() -> None:
    """The published counts."""
    assert ledger.parameters(QWEN) == 7_615_616_512
    assert ledger.parameters(SPECS["llama-3.1-8b"]) == 8_030_261_248
    assert ledger.parameters(SPECS["qwen2-72b"]) == 72_706_203_648
    assert ledger.parameters(SPECS["gemma-2-9b"]) == 9_241_705_984
    assert ledger.parameters(SPECS["mixtral-8x7b"]) == 46_702_792_704
    repeated = 48 * (32 - 1 + 4 - 1) * 128  # the heads' norms, which we keep for each head
    assert ledger.parameters(SPECS["qwen3-30b-a3b"]) == 30_532_122_624 + repeated
    assert ledger.parameters(SPECS["deepseek-v2-lite"]) == 15_706_484_224


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "qwen2-moe", "deepseek-v2", "deepseek-v2-lite"])
def test_quantized_weights_are_what_the_loader_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "FEWEST_OUTPUTS", 2)
    spec = spec_of(tiny.build(name).config.to_dict())
    keeper = assembly.Keeper(lambda parts, bias: lambda x: x, torch.device("meta"), None)
    _, places = allocate(spec, torch.device("meta"), torch.bfloat16, keeper=keeper)
    shapes = {weight: shape for each in keeper.assemblies.values() for weight, shape in each.shapes.items()}
    weights, outputs = ledger.linear_parameters(spec)
    assert weights == sum(size * inputs for size, inputs in shapes.values())
    assert outputs == sum(size for size, _ in shapes.values())
    rest = sum(place.view.numel() for place in places.values())
    assert ledger.weight_bytes(spec, 2, Scheme("int8", 8)) == 2 * rest + weights + 4 * outputs


def test_a_quantized_model_takes_less() -> None:
    rules = quantization_of({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})
    demand = ledger.demand_of(QWEN, EngineConfig(), "bfloat16", 32768, rules)
    rows = {row.name: row for row in ledger.balance(GPUS["h200"].memory, 0.88, demand).rows}
    layers, outer = 6_525_288_448, 2 * 152064 * 3584  # layers' weights without biases and norms; tables
    assert ledger.linear_parameters(QWEN)[0] == layers
    assert rows["weights"].bytes == pytest.approx(layers * (0.5 + 4 / 128) + 2 * outer, rel=1e-3)
    assert rows["unpacking buffer"].bytes == 2 * 37888 * 3584
    for fields, bits in (({"quantization": "none"}, None), ({"quantization": "auto"}, 4)):
        found = ledger.demand_of(QWEN, EngineConfig(**fields), "bfloat16", 32768, rules).scheme  # type: ignore[arg-type]
        assert (found and found.bits) == bits
    online = ledger.demand_of(QWEN, EngineConfig(quantization="fp8"), "bfloat16", 32768)
    assert online.scheme == ONLINE["fp8"]
    names = [row.name for row in ledger.balance(GPUS["h200"].memory, 0.88, online).rows]
    assert "unpacking buffer" not in names
    floor = floors.decode_seconds(QWEN, 1, 1024, H200, quantized=ledger.quantized_bytes(QWEN, demand.scheme))
    assert 0.3 < floor / floors.decode_seconds(QWEN, 1, 1024, H200) < 0.36


def test_bfloat16_weights_stay_beneath_float32() -> None:
    def rows(own: str | None, spec: Spec = QWEN, **fields: object) -> dict[str, int]:
        config = EngineConfig(**fields)  # type: ignore[arg-type]
        demand = ledger.demand_of(spec, config, "float32", 32768, own=own)
        return {row.name: row.bytes for row in ledger.balance(1 << 38, 0.88, demand).rows}

    wide, narrow = rows(None), rows("bfloat16")
    assert wide["weights"] == 2 * narrow["weights"] == 4 * ledger.parameters(QWEN)
    assert wide["activations"] == narrow["activations"]
    assert rows("float16") == rows("bfloat16", enable_torch_compile=True) == wide
    assert rows("bfloat16", SPECS["mixtral-8x7b"])["weights"] == 4 * ledger.parameters(SPECS["mixtral-8x7b"])


def test_latent_pages_hold_one_row_a_token() -> None:
    lite = SPECS["deepseek-v2-lite"]
    assert ledger.page_bytes(lite, 16, 2) == 27 * 16 * 576 * 2 == KVCache.bytes_per_page(lite, 16, torch.bfloat16)


def test_pages_are_the_caches() -> None:
    for dtype, itemsize in ((torch.bfloat16, 2), (torch.float8_e4m3fn, 1)):
        assert ledger.page_bytes(QWEN, 16, itemsize) == KVCache.bytes_per_page(QWEN, 16, dtype)


def test_rows_add_up() -> None:
    plan = total(QWEN)
    assert plan.fits and plan.limited_by == "memory"
    assert sum(row.bytes for row in plan.rows) == plan.total
    static = sum(row.bytes for row in plan.rows if row.kind == "static")
    assert 0.88 * plan.total - plan.demand.page_bytes < static <= 0.88 * plan.total
    assert plan.tokens == plan.pages * 16
    assert plan.requests_at(1024) == plan.pages // 64
    assert plan.requests_at(1025) == plan.pages // 65


def test_transient_memory_may_take_more_than_the_rest() -> None:
    """At a fraction near 1 the KV pages shrink so that activations fit."""
    assert ledger.kv_budget(100, 0.9, 50, 5) == 40
    assert ledger.kv_budget(100, 0.9, 50, 30) == 20
    assert ledger.kv_budget(100, 0.9, 95, 10) == -5


def test_pages_stop_where_the_batch_cannot_use_more() -> None:
    plan = total(QWEN, max_running_requests=2)
    assert plan.pages == 2 * 32768 // 16 and plan.limited_by == "requests"


def test_max_total_tokens() -> None:
    demand = ledger.demand_of(QWEN, EngineConfig(), "bfloat16", 4096)
    plan = ledger.balance(24 * GIB, 0.88, demand, 10_001)
    assert plan.pages == 626 and plan.limited_by == "setting" and plan.fits
    plan = ledger.balance(24 * GIB, 0.88, demand, 1_000_000)
    assert not plan.fits and plan.missing > GIB
    room = ledger.balance(24 * GIB, 0.88, demand)
    more = ledger.balance(24 * GIB + int(plan.missing / 0.88) + 16, 0.88, demand, 1_000_000)
    assert more.fits and room.fits


def test_what_does_not_fit_says_by_how_much() -> None:
    demand = ledger.demand_of(SPECS["qwen2-72b"], EngineConfig(), "bfloat16", 4096)
    plan = ledger.balance(GPUS["h200"].memory, 0.88, demand)
    assert plan.pages == 0 and not plan.fits
    assert ledger.balance(GPUS["h200"].memory + int(plan.missing / 0.88) + 16, 0.88, demand).pages == 1


def test_fp8_doubles_the_pages() -> None:
    assert total(QWEN, kv_cache_dtype="fp8_e4m3").pages == pytest.approx(2 * total(QWEN).pages, rel=1e-3)


def test_what_the_settings_change() -> None:
    base = {row.name: row.bytes for row in total(QWEN).rows}
    small = {row.name: row.bytes for row in total(QWEN, chunked_prefill_size=512, max_running_requests=16).rows}
    assert small["activations"] < base["activations"] / 10
    assert small["logits"] == base["logits"] // 16
    off = {row.name: row.bytes for row in total(QWEN, disable_cuda_graph=True).rows}
    assert off["CUDA graphs"] == 0
    whole = total(QWEN, chunked_prefill_size=-1).demand
    assert whole.forward_tokens == EngineConfig().max_prefill_tokens + 256


def test_ranks_share_a_model() -> None:
    whole = ledger.parameters(QWEN)
    half = ledger.parameters(sharded(QWEN, 2))
    assert whole / 2 < half < 0.501 * whole, "norms are on both"
    kv = ledger.page_bytes(sharded(QWEN, 4), 16, 2)
    assert kv == ledger.page_bytes(QWEN, 16, 2) // 4
    wide = replace(QWEN, heads=32)
    assert ledger.page_bytes(sharded(wide, 8), 16, 2) == kv, "fewer KV heads than ranks are copied"
    assert sharded(QWEN, 1) == QWEN
    with pytest.raises(StartupError, match="--tp-size 3 does not divide"):
        sharded(QWEN, 3)


def test_ladder_ends_at_the_largest() -> None:
    assert ledger.ladder(1) == [1]
    assert ledger.ladder(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 100]
    assert ledger.ladder(256)[-1] == 256


# ------------------------------------------------------------------ floors


@pytest.mark.parametrize(
    ("name", "batch", "context", "ms"),
    [
        ("qwen2-7b", 1, 1024, 3.302),
        ("qwen2-7b", 128, 1024, 5.036),
        ("llama-3.1-8b", 128, 1024, 7.486),
        ("qwen2-0.5b", 128, 1024, 0.604),
        ("smollm2-135m", 128, 1024, 0.765),
    ],
)
def test_decode_floor(name: str, batch: int, context: int, ms: float) -> None:
    assert 1e3 * floors.decode_seconds(SPECS[name], batch, context, H200) == pytest.approx(ms, abs=1e-3)


def test_a_token_needs_its_experts_only() -> None:
    """Mixtral's published 12.9 billion active weights, less the embedding's and the norms'."""
    active = sum(weights * times for weights, times in floors.matmuls(SPECS["mixtral-8x7b"]))
    assert active == 12_748_587_008
    dense = sum(weights * times for weights, times in floors.matmuls(QWEN))
    assert dense == ledger.parameters(QWEN) - QWEN.vocab * 3584 - 28 * (4608 + 2 * 3584) - 3584


def test_a_batch_reads_the_experts_that_it_visits() -> None:
    mixtral = SPECS["mixtral-8x7b"]
    moe = mixtral.moe
    assert moe is not None
    assert floors.visited(moe, 1) == moe.top_k
    drawn = [len({int(e) for row in torch.rand(3, 8).topk(2).indices for e in row}) for _ in range(2000)]
    assert floors.visited(moe, 3) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)
    one, many = (floors.matmul_seconds(mixtral, batch, H200) for batch in (1, 64))
    experts = 32 * 3 * 4096 * 14336 * 2 / H200.bandwidth  # seconds for one expert of each layer
    assert many - one == pytest.approx((floors.visited(moe, 64) - 2) * experts, rel=0.02)


def test_prefill_floor() -> None:
    assert 1e3 * floors.prefill_seconds(QWEN, 1024, H200) == pytest.approx(17.18, abs=0.01)
    whole, first = (floors.prefill_flops(QWEN, n) for n in (1000, 600))
    assert floors.prefill_flops(QWEN, 1000, cached=600) == pytest.approx(whole - first)


def test_a_window_bounds_what_is_read() -> None:
    windowed = replace(QWEN, windows=(100,) * 14 + (None,) * 14)
    assert floors.visible_tokens(windowed, 50) == 28 * 50
    assert floors.visible_tokens(windowed, 1000) == 14 * 100 + 14 * 1000
    assert floors.decode_seconds(windowed, 64, 1000, H200) < floors.decode_seconds(QWEN, 64, 1000, H200)
    assert floors.prefill_flops(windowed, 80) == floors.prefill_flops(QWEN, 80)
    exact = sum(min(i + 1, 100) for i in range(5000))  # a token and itself count whole here
    assert floors._pairs(5000, 100) == pytest.approx(exact, rel=0.01)


def test_fp8_kv_is_half_the_reading() -> None:
    visible = floors.visible_tokens(QWEN, 1024) * 64
    full = floors.attention_seconds(QWEN, visible, H200)
    assert floors.attention_seconds(QWEN, visible, H200, kv_bytes=1.0) == pytest.approx(full / 2)


# ------------------------------------------------------------------ shapes


def test_a_shape_is_a_folder_that_loads(tmp_path: Path) -> None:
    folder = write_shape("smollm2-135m", tmp_path / "new" / "folder")
    assert (folder / "config.json").exists()
    with pytest.raises(StartupError, match="no known shape 'gpt-5'; known: qwen2-7b"):
        write_shape("gpt-5", tmp_path)
