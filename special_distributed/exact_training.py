"""Models whose arithmetic is exact, so that every layout must equal one process bit for bit.

[Note: exact arithmetic] Weights, inputs and step sizes are small multiples of powers of two, the
nonlinearity is ReLU and the losses are linear in the output. Every product and every sum is then a
multiple of a power of two with fewer than 24 significant bits: float32 holds it exactly, and the
order in which a layout adds does not matter. A model that outgrew the 24 bits would fail its test,
never pass by chance.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

NUM_RANKS = 4
WIDTHS = (8, 16, 4)
ROWS = 4  # of a rank's batch
LR = 0.125


def fill(module: M, seed: int = 0) -> M:
    """Gives every parameter values in {-1, -0.5, 0, 0.5, 1}, by its place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randint(-2, 3, parameter.shape, generator=generator)
            parameter.copy_(values.to(parameter.dtype) / 2)
    return module


def mlp(seed: int = 0) -> nn.Sequential:
    """Linear layers [8, 16, 4] with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(WIDTHS):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return fill(nn.Sequential(*layers[:-1]), seed)


def batch(step: int, rank: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Inputs [rows, 8] and loss weights [rows, 4] of a rank: integers in [-2, 2]."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randint(-2, 3, (rows, WIDTHS[0]), generator=generator).float()
    return x, torch.randint(-2, 3, (rows, WIDTHS[-1]), generator=generator).float()


def loss(model: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the outputs."""
    return (model(x) * weights).sum()


def mean_loss(model: nn.Module, step: int, ranks: Iterable[int] = range(NUM_RANKS)) -> Tensor:
    """The loss of ``ranks`` over the number of all ranks, as data parallelism defines it."""
    dtype = next(model.parameters()).dtype
    batches = [[tensor.to(dtype) for tensor in batch(step, r)] for r in ranks]
    return torch.stack([loss(model, x, weights) for x, weights in batches]).sum() / NUM_RANKS


def sgd(model: nn.Module, momentum: float = 0.5) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)


def train_alone(num_steps: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """What one process makes of the batches of all ranks; exact for up to four steps."""
    model = mlp().to(dtype)
    optimizer = sgd(model)
    for step in range(num_steps):
        optimizer.zero_grad()
        mean_loss(model, step).backward()
        optimizer.step()
    return model


def assert_same_parameters(actual: nn.Module, expected: nn.Module) -> None:
    """The same names and bits."""
    assert_same_tensors(dict(actual.named_parameters()), dict(expected.named_parameters()))


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), (name, actual[name], tensor)
