"""Experts: the grouped path against one token and one expert at a time, and what routers choose."""

import pytest
import torch
from torch import Tensor

from actorserve.models.layers import ACTIVATIONS
from actorserve.models.moe import route, run_experts
from actorserve.models.spec import Moe

HIDDEN, INTER, EXPERTS = 16, 8, 6


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
