"""The mixture of experts that stands in for the MLP of every layer."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from primitives.layout import NUM_PARTS, NUM_SLICES
from scenarios.frozen import Frozen
from scenarios.layout import Layout

WIDTH_STEP = NUM_PARTS * NUM_SLICES
"""Widths are multiples of it: each part of a bias has equal slices for the optimizer."""


class MoeConfig(Frozen):
    """Router, routed experts and shared expert, as Megatron-LM's ``--moe-`` flags name them."""

    num_experts: PositiveInt
    router_topk: Annotated[int, Field(ge=2)] = 2
    """Experts of a token. Softmax over one raw logit would be 1 and teach the router nothing."""
    ffn_hidden_size: PositiveInt
    """Width of one routed expert."""
    shared_expert_intermediate_size: PositiveInt | None = None
    """Width of the expert that sees every token, without a gate; None: there is none."""
    aux_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """What the load-balancing loss of one layer weighs beside the language model loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.router_topk > self.num_experts:
            raise ValueError(
                f"router_topk: got {self.router_topk}, "
                f"expected at most num_experts = {self.num_experts}"
            )
        for name in ("ffn_hidden_size", "shared_expert_intermediate_size"):
            got = getattr(self, name)
            if got is not None and got % WIDTH_STEP:
                raise ValueError(
                    f"moe {name}: got {got}, expected a multiple of {WIDTH_STEP}, "
                    f"{NUM_PARTS} canonical parts of {NUM_SLICES} slices"
                )
        return self

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError, with the reason, for a layout that these experts cannot have."""
        if self.num_experts % layout.ep:
            raise ValueError(
                f"layout {layout}: got ep {layout.ep}, expected a divisor of "
                f"num_experts = {self.num_experts}"
            )
        if layout.tp > 1 and not layout.sp:
            raise ValueError(
                f"layout {layout}: experts with tp {layout.tp} need sp, "
                "so that each tp rank sends tokens of its own to them"
            )
        if layout.ep * layout.etp % layout.tp:
            raise ValueError(
                f"layout {layout}: got ep * etp = {layout.ep * layout.etp}, expected a multiple of "
                f"tp = {layout.tp}, since one product takes all tokens that a microbatch sends to "
                "an expert"
            )
