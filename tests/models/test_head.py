"""Logits in float32 from 16-bit weights."""

import pytest
import torch

from actorserve.models.head import Head, plain_head
from actorserve.models.layers import Linear


def make(rows: int, vocab: int = 5000, hidden: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, hidden, generator=generator) * 3
    weight = torch.randn(vocab, hidden, generator=generator)
    return x.bfloat16(), weight.bfloat16()


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_best_tokens_are_those_of_float32(rows: int) -> None:
    x, weight = make(rows)
    logits, exact = Head(Linear(weight, None))(x), plain_head(x, weight)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))
    assert torch.allclose(logits.amax(-1), exact.amax(-1), rtol=1e-6)
    assert torch.allclose(logits, exact, atol=0.02 * float(exact.abs().max()))


def test_near_equals_come_in_the_right_order() -> None:
    """Two rows of the weight whose logits round to the same bfloat16."""
    x, weight = make(1)
    weight[100] = x[0] / 4
    weight[200] = weight[100]
    weight[200, 0] = weight[100, 0] + weight[100, 0].abs() * 2**-7 * x[0, 0].sign()
    exact = plain_head(x, weight)
    rounded = (x @ weight.t())[0]
    assert rounded[100] == rounded[200] and exact[0, 200] > exact[0, 100] > exact[0].topk(3).values[2]
    assert int(Head(Linear(weight, None))(x).argmax()) == 200


def test_a_flat_row_is_left_as_it_is() -> None:
    x, weight = make(2)
    assert torch.equal(Head(Linear(weight * 0, None))(x), torch.zeros(2, 5000))


def test_float32_is_the_product_itself() -> None:
    x, weight = make(2)
    assert torch.equal(Head(Linear(weight.float(), None))(x.float()), plain_head(x, weight))
