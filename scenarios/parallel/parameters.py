"""How a parameter is cut: canonical blocks, slices of the blocks, partial sums of its gradient."""

import math
from dataclasses import dataclass, replace

from primitives.layout import NUM_PARTS, NUM_SLICES
from scenarios.parallel.mesh import Mesh


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter in canonical layout: all of it, or what ``cut`` leaves to this rank.

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
    sums_tokens: bool = False
    """The gradient is a sum over tokens, so with sequence parallelism each tp rank has a part."""
    tied: bool = False
    """First and last pipeline stage hold copies, each with its own gradient accumulator."""
    expert: bool = False
    """It belongs to one expert: cut over etp, and summed over the ranks of expert_dp."""
    first_block: int = 0
    """Where this rank's run of blocks begins."""
    total_blocks: int = 0
    """Blocks of the whole parameter; set by itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_blocks", self.total_blocks or self.num_blocks)
        if self.numel % (self.num_blocks * NUM_SLICES):
            raise ValueError(
                f"parameter {self.name} has {self.numel} elements in {self.num_blocks} canonical "
                f"blocks; expected a multiple of {self.num_blocks * NUM_SLICES}, so that each "
                f"block has {NUM_SLICES} equal slices"
            )

    def cut(self, mesh: Mesh) -> "ParameterSpec":
        """This rank's part: a run of the blocks, or the one block, which all tp ranks hold."""
        tp = mesh.etp if self.expert else mesh.tp
        partials = self.partials_per_gradient
        if self.sums_tokens and mesh.sp and partials > 1:
            partials //= tp.num_ranks
        if self.num_blocks == 1:
            return replace(self, partials_per_gradient=partials)
        num_blocks = self.num_blocks // tp.num_ranks
        return replace(
            self,
            shape=(num_blocks, *self.shape[1:]),
            num_blocks=num_blocks,
            first_block=tp.rank * num_blocks,
            partials_per_gradient=partials,
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
        sums_tokens=True,
    )
