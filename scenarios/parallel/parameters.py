"""How a parameter is cut: canonical blocks, slices of the blocks, partial sums of its gradient."""

import math
from dataclasses import dataclass

from primitives.layout import NUM_PARTS, NUM_SLICES


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter in canonical layout.

    ``shape`` begins with ``num_blocks`` when there are several blocks. ``gradients`` names the
    accumulators; each delivers ``partials_per_gradient`` partial sums of the parameter's shape.
    All partials stay apart until the data-parallel sum is done, then the tree adds them.
    """

    name: str
    shape: tuple[int, ...]
    num_blocks: int
    gradients: tuple[str, ...]
    partials_per_gradient: int = 1
    init_std: float = 0.0
    init_mean: float = 0.0
    weight_decay: bool = True

    def __post_init__(self) -> None:
        if self.numel % (self.num_blocks * NUM_SLICES):
            raise ValueError(
                f"parameter {self.name} has {self.numel} elements in {self.num_blocks} canonical "
                f"blocks; expected a multiple of {self.num_blocks * NUM_SLICES}, so that each "
                f"block has {NUM_SLICES} equal slices"
            )

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def slice_numel(self) -> int:
        """Elements of one slice of one block."""
        return self.numel // (self.num_blocks * NUM_SLICES)

    @property
    def num_partials(self) -> int:
        """Partial gradient sums that the data-parallel reduction carries."""
        return len(self.gradients) * self.partials_per_gradient


def column_spec(
    name: str, shape: tuple[int, ...], *, init_std: float = 0.0, weight_decay: bool = True
) -> ParameterSpec:
    """A parameter cut in NUM_PARTS blocks; ``shape`` is the natural one with the cut dim first."""
    if shape[0] % NUM_PARTS:
        raise ValueError(
            f"parameter {name} has {shape[0]} rows; expected a multiple of {NUM_PARTS}"
        )
    return ParameterSpec(
        name,
        (NUM_PARTS, shape[0] // NUM_PARTS, *shape[1:]),
        NUM_PARTS,
        (name,),
        init_std=init_std,
        weight_decay=weight_decay,
    )


def row_spec(name: str, out_features: int, in_features: int, *, init_std: float) -> ParameterSpec:
    """A weight cut along its input dim: ``[C, out, in / C]``."""
    if in_features % NUM_PARTS:
        raise ValueError(
            f"parameter {name} has {in_features} columns; expected a multiple of {NUM_PARTS}"
        )
    shape = (NUM_PARTS, out_features, in_features // NUM_PARTS)
    return ParameterSpec(name, shape, NUM_PARTS, (name,), init_std=init_std)


def token_spec(name: str, numel: int, *, mean: float = 0.0) -> ParameterSpec:
    """A vector whose gradient is a sum over tokens: it stays C token-block partials until last."""
    return ParameterSpec(
        name,
        (numel,),
        1,
        (name,),
        partials_per_gradient=NUM_PARTS,
        init_mean=mean,
        weight_decay=False,
    )
