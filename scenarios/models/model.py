"""What the engine asks of a model, whatever its family."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from scenarios.data import Batch
from scenarios.parallel.layers import Layer
from scenarios.parallel.losses import Loss
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameters import ParameterSpec


class Model(nn.Module, ABC):
    """One pipeline stage of a model; its parameters are empty until the optimizer fills them."""

    loss_names: tuple[str, ...] = ("lm loss",)
    """What ``losses`` gives."""

    def parameter_layers(self) -> list[Layer]:
        """The layers that own parameters, in order of use."""
        return [module for module in self.modules() if isinstance(module, Layer)]

    def allocate(self, mesh: Mesh) -> None:
        """Makes this rank's part of all parameters; once, before anything else."""
        for layer in self.parameter_layers():
            layer.allocate(mesh)

    def specs(self) -> list[ParameterSpec]:
        """All parameters of this rank, in order of use."""
        return [spec for layer in self.parameter_layers() for spec in layer.specs]

    def with_inputs(self, mb: Microbatch, batch: Batch) -> Microbatch:
        """The microbatch with what only this family reads of its batch."""
        return mb

    def losses(self, values: Tensor, mb: Microbatch) -> dict[str, Loss]:
        """The losses, by name, that are the means of what ``forward`` returned on the last stage.

        Every value belongs to one loss, in the order of ``values`` and of ``loss_names``.
        """
        return {"lm loss": Loss(values)}

    @abstractmethod
    def forward(self, x: Tensor | None, mb: Microbatch) -> Tensor:
        """One microbatch through this stage.

        Args:
            x: what the stage before returned; None on the first stage.
            mb: the microbatch.

        Returns:
            On the last stage the loss of every token (and whatever else has one), [tokens] fp32,
            the same on all tp ranks; on the others [local tokens, h] in the compute dtype.
        """
