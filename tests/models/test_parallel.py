"""Tensor parallel ranks against one rank that has the whole model: two processes over gloo for every family, dense
and quantized; for all else the ranks are threads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from packers import CASES
from rank_process import Ranks, load, said
from repacked import ALL, REPACKED, make
from test_quantized_models import KERNEL, SIZES, has_kernels, quantised, quantised_checkpoint
from thread_group import ThreadGroup, on_ranks
from tiny import Driver
from torch import Tensor

from actorserve.config import EngineConfig
from actorserve.errors import StartupError
from actorserve.models import ledger
from actorserve.models.decoder import Decoder
from actorserve.models.families import spec_of
from actorserve.models.kv_cache import KVCache
from actorserve.models.parallel import RankDrawer
from actorserve.models.places import allocate, block_part
from actorserve.models.runner import ChunkWork, Runner
from actorserve.models.shapes import KNOWN
from actorserve.models.shard import Share, sharded
from actorserve.models.stepper import Stepper
from actorserve.models.weights import load_decoder
from actorserve.sampler.drawer import Drawer
from actorserve.sampler.params import SamplingParams
from actorserve.sampler.state import SamplerState

TOLERANCE = 1e-5
"""Of the logits' standard deviation."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def some_logits(decoder: Decoder) -> Tensor:
    """A prompt in two chunks, then two requests in one batch, one of them decoding; logits of all tokens."""
    driver = Driver.of(decoder)
    first, second = driver.request(tiny.prompt(41)), driver.request(tiny.prompt(19, seed=2))
    works = [[(first, 25)], [(first, 15)], [(first, 1), (second, 19)]]
    return torch.cat([driver.forward(work) for work in works])


def assert_equal_to_one_rank(folder: str, ranks: int, tolerance: float = TOLERANCE, **fields: object) -> None:
    expected = some_logits(tiny.load(folder, **fields))  # type: ignore[arg-type]
    found = on_ranks(ranks, lambda group: some_logits(load(folder, group, **fields)))[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.std()


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def assert_two_processes_equal_one(two: Ranks, folder: str, out: Path) -> None:
    """Logits, and greedy text on both ranks."""
    expected, ids = said(tiny.load(folder), None)
    found, of_ranks = two.said(folder, out / "logits.safetensors")
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()
    assert of_ranks == [ids, ids]


@pytest.mark.parametrize("name", sorted(ALL))
def test_two_processes_say_what_one_does(name: str, two: Ranks, tmp_path: Path) -> None:
    assert_two_processes_equal_one(two, make(name, tmp_path)[1], tmp_path)


@pytest.mark.parametrize("name", ["llama", "olmo2", "stablelm-12b"])
def test_ranks_may_share_kv_heads(name: str, tmp_path: Path) -> None:
    """Six ranks of two KV heads: three have the same one. The MLP's 80 columns are padded to 6 x 16."""
    model = tiny.build(name, num_key_value_heads=2)
    assert_equal_to_one_rank(tiny.save(model, tmp_path), 6)


@pytest.mark.parametrize("name", ["awq", "gptq-act-order", "fp8-block", "packed-8"])
def test_ranks_of_quantized_weights(name: str, tmp_path: Path) -> None:
    """Dequantised, and where our C kernels take them as they are; blocks of 128 inputs are cut in two."""
    quantised(tmp_path, CASES[name])
    assert_equal_to_one_rank(str(tmp_path), 2, 2 * TOLERANCE)  # both round sums of more numbers than families have
    if has_kernels() and not name.startswith("fp8"):  # which CPUs dequantise, some to bfloat16
        assert_equal_to_one_rank(str(tmp_path), 2, KERNEL, dtype="auto")


WIDTHS = {"head_dim": 32, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "q_lora_rank": 32}
WIDTHS |= {"kv_lora_rank": 64, "v_head_dim": 32, "num_key_value_heads": 4}
"""Of fields that a family has, so that groups of 32 inputs divide them, on two ranks too."""
QUANTIZED = ["awq", "gptq", "fp8"]
TAKEN = sorted(set(ALL) - {"gpt2", "dbrx", "phi3-longrope"})
"""GPT-2's and DBRX's turned tensors are not served quantized; longrope's factors are of one width of heads."""


@pytest.mark.parametrize("case", QUANTIZED)
@pytest.mark.parametrize("name", TAKEN)
def test_two_processes_of_quantized_weights(name: str, case: str, two: Ranks, tmp_path: Path, thorough: bool) -> None:
    """Dequantised, which the tolerance is for."""
    if not thorough and TAKEN.index(name) % 3 != QUANTIZED.index(case):
        pytest.skip("--thorough")
    if name in REPACKED:
        make(name, tmp_path, **SIZES, moe_intermediate_size=64)
        quantised_checkpoint(tmp_path, CASES[case])
    else:
        fields = tiny.FAMILIES[name][1]
        quantised(tmp_path, CASES[case], name, **{key: value for key, value in WIDTHS.items() if fields.get(key)})
    assert_two_processes_equal_one(two, str(tmp_path), tmp_path)


def test_dummy_weights_are_those_of_one_rank(tmp_path: Path) -> None:
    """Routers, which all ranks have whole, must be the same; so that ranks can be compared, all else is too."""
    folder = tiny.save(tiny.build("qwen2-moe"), tmp_path)
    expected = some_logits(tiny.load(folder, load_format="dummy"))
    found = on_ranks(2, lambda group: some_logits(load(folder, group, load_format="dummy")))[0]
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()


@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_a_real_model_on_three_ranks(smollm: str, thorough: bool, quantization: str) -> None:
    """SmolLM2 has 9 heads and 3 KV heads: its quantized blocks, cut between blocks, and dequantised."""
    if not thorough:
        pytest.skip("--thorough")
    dtype = "auto" if quantization == "auto" else "float32"
    config = EngineConfig(device="cpu", quantization=quantization, dtype=dtype)  # type: ignore[arg-type]

    def text(group: ThreadGroup | None) -> tuple[list[int], Tensor]:
        driver = Driver.of(load_decoder(smollm, config, lambda fraction: None, group=group))
        request = driver.request(tiny.prompt(24), room=12)
        first = logits = driver.forward([(request, 24)])
        while len(request.ids) < request.goal:
            drawn = logits[-1].argmax()
            request.ids.append(int(drawn if group is None else group.broadcast(drawn)))
            logits = driver.forward([(request, 1)])
        return request.ids, first

    ids, logits = text(None)
    ranks = on_ranks(3, text)
    assert [found for found, _ in ranks] == [ids] * 3
    assert (ranks[0][1] - logits).abs().max() < 1e-4 * logits.std()


# ------------------------------------------------------------------ steps


def drawn_tokens(decoder: Decoder, group: ThreadGroup | None, params: SamplingParams) -> tuple[list[list[int]], Tensor]:
    """Two slots through a chunk step and four decode steps; the ids of each step, and a score of the prompt."""
    state = SamplerState(2, tiny.VOCAB, (2,), decoder.device)
    drawer: Drawer | RankDrawer = Drawer(state, 2)
    if group is not None:
        drawer = RankDrawer(Drawer(state, 2) if group.rank == 0 else None, group)
    runner = Runner(decoder, KVCache(decoder.spec, 11, tiny.PAGE, decoder.device, decoder.dtype), 2, 5)
    for slot in range(2):
        runner.admit(slot, np.arange(5, dtype=np.int32) + 5 * slot, 0, 1000)
        state.admit(slot, params, np.empty(0, np.int32), np.empty(0, np.int32), 20, 0, -1, 0)
    runner.slots.flush()
    stepper = Stepper(runner, drawer, None)
    prompts = [tiny.prompt(20, seed=slot) for slot in range(2)]
    chunks = [ChunkWork(slot, 0, np.array(ids), draws=True) for slot, ids in enumerate(prompts)]
    chunks[0].targets = np.array(prompts[0][1:])
    steps = [stepper.launch(np.empty(0, np.int64), chunks)]
    steps += [stepper.launch(np.arange(2), []) for _ in range(4)]
    scores = steps[0].scores
    assert scores is not None
    rows = [step.rows() for step in steps]
    return [[] if r is None else r.ids.tolist() for r in rows], torch.empty(
        0
    ) if scores.logprobs is None else scores.logprobs


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rank_0_draws_for_all(temperature: float, tmp_path: Path) -> None:
    """Ids are on all ranks in the step in which they are drawn; logprobs of a prompt are rank 0's."""
    folder = tiny.save(tiny.build("llama"), tmp_path)
    params = SamplingParams(temperature=temperature, seed=7, max_new_tokens=9, ignore_eos=True, logprobs=0)
    expected, scores = drawn_tokens(tiny.load(folder), None, params)
    ranks = on_ranks(2, lambda group: drawn_tokens(load(folder, group), group, params))
    assert [ids for ids, _ in ranks] == [expected, expected]
    assert len(scores) == 19 and torch.allclose(ranks[0][1], scores, atol=1e-4)
    assert not len(ranks[1][1])


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("ranks", [2, 6])
def test_parts_are_together_the_whole(name: str, ranks: int) -> None:
    """Every value of every tensor is some rank's, and what is cut is nobody else's but for shared KV heads."""
    whole = spec_of(tiny.build(name).config.to_dict())
    if whole.heads % ranks or not (whole.kv_heads % ranks == 0 or ranks % whole.kv_heads == 0):
        pytest.skip("does not divide")
    every = [allocate(s.spec, torch.device("meta"), torch.float32, None, s)[1] for s in
             (Share(whole, ranks, rank) for rank in range(ranks))]  # fmt: skip
    _, places = allocate(whole, torch.device("meta"), torch.float32)
    for key, place in places.items():
        cuts = [rank[key].cut for rank in every]
        assert all(rank[key].shape == place.shape for rank in every), key
        if cuts[0] is None:
            continue
        seen = np.zeros(cuts[0].whole, dtype=int)
        for cut, rank in zip(cuts, every, strict=True):
            assert cut is not None
            seen[cut.start : cut.stop] += 1
            view = rank[key].view
            assert view.numel() == 0 or view.shape == rank[key].part(torch.empty(place.shape, device="meta")).shape
        assert (seen == 1).all() or (("k_" in key or "v_proj" in key) and len(set(seen.tolist())) == 1), key


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_ledger_knows_a_ranks_weights(name: str) -> None:
    whole = spec_of(tiny.build(name).config.to_dict())
    weights, _ = allocate(sharded(whole, 2), torch.device("meta"), torch.float32)
    spec = sharded(whole, 2)
    assert weights.embed.shape == (spec.vocab, spec.hidden)
    assert ledger.parameters(spec) < 0.8 * ledger.parameters(whole)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(
        StartupError, match="--tp-size 3 does not divide 28 attention heads and 4 KV heads; possible: 2, 4"
    ):
        sharded(spec_of(KNOWN["qwen2-7b"]), 3)
    with pytest.raises(StartupError, match="possible: 3"):
        sharded(spec_of(KNOWN["smollm2-135m"]), 2)


def test_blocks_are_cut_between_blocks() -> None:
    """Of a GGUF: rows anywhere, inputs only at multiples of 32; what ends early ends in zeros, which blocks can say."""
    whole = spec_of(KNOWN["smollm2-135m"])  # 9 heads of 64, 1536 columns
    share = Share(whole, 3, 1)
    down = torch.randint(0, 255, (576, 1536 // 32 * 20), dtype=torch.uint8)
    found = block_part("model.layers.0.mlp.down_proj.weight", down, (576, 512), share)
    assert found is not None and torch.equal(found, down[:, 320:640])
    up = torch.randint(0, 255, (1536, 360), dtype=torch.uint8)
    found = block_part("model.layers.0.mlp.up_proj.weight", up, (512, 576), share)
    assert found is not None and torch.equal(found, up[512:1024])
    table = torch.ones(49152, 360, dtype=torch.uint8)
    last = Share(whole, 7, 6)
    found = block_part("model.embed_tokens.weight", table, (7040, 576), last)
    assert found is not None and found.shape == (7040, 360)
    assert int(found[:, 0].sum()) == 49152 - 6 * 7040
    assert block_part("model.layers.0.mlp.down_proj.weight", down, (576, 376), Share(whole, 5, 1)) is None
