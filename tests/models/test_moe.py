"""Experts: the grouped path and a GPU's against one token and one expert at a time, and what routers choose."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from actorserve.models import moe_gemm
from actorserve.models.layers import ACTIVATIONS
from actorserve.models.moe import route, run_experts
from actorserve.models.spec import Moe

HIDDEN, INTER, EXPERTS = 16, 8, 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 2, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_equals_one_by_one(tokens: int, dtype: torch.dtype) -> None:
    """Also where experts have no token, and where one has all."""
    gate_up, down = randn(EXPERTS, 2 * INTER, HIDDEN).to(dtype), randn(EXPERTS, HIDDEN, INTER, seed=1).to(dtype)
    x, weights = randn(tokens, HIDDEN, seed=2).to(dtype), randn(tokens, 2, seed=3).abs()
    few = torch.tensor([[4, 1], [1, 5]])[torch.arange(tokens) % 2]
    for ids in (few, torch.tensor([[3, 0]]).expand(tokens, 2)):
        expected = torch.zeros(tokens, HIDDEN)
        for token in range(tokens):
            for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
                gate, up = (gate_up[expert].float() @ x[token].float()).chunk(2)
                expected[token] += weight * (down[expert].float() @ (ACTIVATIONS["silu"](gate) * up))
        got = run_experts(x, weights, ids, gate_up, down, "silu")
        assert got.dtype == dtype
        assert (got.float() - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 1e-2)


def test_weights_are_the_softmax_of_all() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    weights, ids = route(logits, None, Moe(4, 2, 8, (True,), renorm=False, routed_scale=2.0))
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, 2 * logits.softmax(-1)[:, [1, 2]])
    renormed, _ = route(logits, None, Moe(4, 2, 8, (True,)))
    torch.testing.assert_close(renormed.sum(-1), torch.ones(1))


def test_a_bias_chooses_but_does_not_weigh() -> None:
    moe = Moe(4, 1, 8, (True,), scoring="sigmoid", score_bias=True, renorm=False)
    weights, ids = route(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.tensor([0.0, 0.0, 0.0, 5.0]), moe)
    assert ids.tolist() == [[3]] and weights.item() == 0.5


def test_only_the_best_groups() -> None:
    """The best single expert is in a group whose best two are not the best pair."""
    logits = torch.tensor([[9.0, -9.0, -9.0, 8.0, 8.0, -9.0]])
    one = Moe(6, 2, 8, (True,), scoring="sigmoid", groups=2, top_groups=1, group_best=1)
    two = Moe(6, 2, 8, (True,), scoring="sigmoid", groups=2, top_groups=1, group_best=2)
    assert sorted(route(logits, None, one)[1][0].tolist())[0] == 0
    assert sorted(route(logits, None, two)[1][0].tolist()) == [3, 4]


# ------------------------------------------------------------------ a GPU's kernels

ROUTERS = {
    "softmax": Moe(6, 2, INTER, (True,)),
    "as they are": Moe(6, 3, INTER, (True,), renorm=False, routed_scale=2.5),
    "sigmoid with a bias": Moe(6, 2, INTER, (True,), scoring="sigmoid", score_bias=True),
    "softcap": Moe(8, 2, INTER, (True,), renorm=False, router_softcap=10.0),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_on_a_gpu(name: str) -> None:
    moe = ROUTERS[name]
    x, router = randn(9, 40).to(DEVICE, torch.float16), randn(moe.experts, 40, seed=1).to(DEVICE)
    bias = randn(moe.experts, seed=2).to(DEVICE)
    weights, ids = moe_gemm.choose_experts(x, router, bias, moe)
    expected, chosen = route(F.linear(x.float(), router), bias if moe.score_bias else None, moe)
    assert torch.equal(ids.long(), chosen)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_that_is_not_a_number_is_at_experts_that_there_are(name: str) -> None:
    """Each at most once, or it would overrun a queue; and the others' are what they were."""
    moe = ROUTERS[name]
    x, router = randn(3, 40).to(DEVICE, torch.float16), randn(moe.experts, 40, seed=1).to(DEVICE)
    bias = randn(moe.experts, seed=2).to(DEVICE)
    expected = moe_gemm.choose_experts(x, router, bias, moe)
    x[1] = float("nan")
    weights, ids = moe_gemm.choose_experts(x, router, bias, moe)
    assert sorted(set(ids[1].tolist())) == sorted(ids[1].tolist())
    assert int(ids.min()) >= 0 and int(ids.max()) < moe.experts
    assert weights[1].isnan().all()
    for got, wanted in zip((weights, ids), expected, strict=True):
        assert torch.equal(got[::2], wanted[::2])


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_experts_on_a_gpu(tokens: int, shared: bool) -> None:
    """Sizes that no tile divides; experts without tokens, and one with more than fit into a tile."""
    moe, hidden, inter = replace(ROUTERS["softmax"], inter=40), 72, 40
    gate_up = (randn(6, 2 * inter, hidden) / hidden**0.5).to(DEVICE, torch.float16)
    down = (randn(6, hidden, inter, seed=1) / inter**0.5).to(DEVICE, torch.float16)
    x, weights = randn(tokens, hidden, seed=2).to(DEVICE, torch.float16), randn(tokens, 2, seed=3).abs().to(DEVICE)
    ids = torch.stack((torch.full((tokens,), 4), torch.arange(tokens) % 3), 1).to(DEVICE)
    common, gate = (randn(tokens, hidden, seed=4).to(x), randn(tokens, 1, seed=5).to(x)) if shared else (None, None)
    got = moe_gemm.run_experts(x, weights, ids, gate_up, down, "silu", moe, common, gate)
    expected = run_experts(x.float(), weights, ids, gate_up.float(), down.float(), "silu")
    if common is not None and gate is not None:
        expected = expected + common.float() * torch.sigmoid(gate.float())
    assert (got.float() - expected).norm() / expected.norm() < 1e-3
    few = moe_gemm.run_experts(x[:1], weights[:1], ids[:1], gate_up, down, "silu", moe, common, gate)
    assert torch.equal(got[:1], few), "the others change nothing"


def test_how_many_tokens_have_kernels() -> None:
    moe = Moe(8, 2, INTER, (True,))
    assert moe_gemm.takes(1, moe, torch.bfloat16) and moe_gemm.takes(256, moe, torch.float16)
    assert not any((moe_gemm.takes(0, moe, torch.bfloat16), moe_gemm.takes(257, moe, torch.bfloat16)))
    assert not moe_gemm.takes(1, moe, torch.float32)
    assert [moe_gemm.tile_rows(tokens, moe) for tokens in (1, 64, 128, 256)] == [16, 32, 64, 128]
