"""Losses of a microbatch: means of what counts, and what backward starts from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scenarios.parallel.losses import Loss


def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(num, generator=generator) * 9
    counted = torch.rand(num, generator=generator) < 0.15
    counted[int(torch.randint(num, (1,), generator=generator))] = True
    return values, counted


@given(st.integers(1, 40).map(lambda n: 8 * n), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_mean_of_what_counts(num: int, seed: int, masked: bool) -> None:
    values, counted = draw(num, seed)
    if not masked:
        counted[:] = True
    loss = Loss(values, counted if masked else None)
    exact = float(values[counted].double().mean())
    assert loss.num_counted == int(counted.sum())
    assert float(loss.mean()) == pytest.approx(exact, rel=1e-6)
    elsewhere = torch.where(counted, values, torch.inf)
    assert torch.equal(Loss(elsewhere, counted).mean(), Loss(values, counted).mean())


@given(st.integers(1, 40).map(lambda n: 8 * n), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_gradient_is_the_weight_of_each_item(num: int, seed: int) -> None:
    values, counted = draw(num, seed)
    gradient = Loss(values, counted).gradient(1024.0, 4)
    weight = torch.tensor(1024.0 / (int(counted.sum()) * 4))
    assert torch.equal(gradient, torch.where(counted, weight, 0.0))
    assert torch.equal(Loss(values).gradient(1.0, 1), torch.full((num,), 1.0 / num))


def test_few_items_are_one_run() -> None:
    values = torch.tensor([0.5, 1.5, 4.0])
    assert Loss(values, num_blocks=1).mean() == 2.0
    with pytest.raises(ValueError, match="each of 8 blocks"):
        Loss(values).mean()
