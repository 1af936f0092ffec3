"""How a converted model is cut over ranks, and which layers a pipeline stage holds."""

import re
from typing import Any, Self

from pydantic import PositiveInt, model_validator

from scenarios.frozen import Frozen


class ParallelLayout(Frozen):
    """Parallel degrees under the field's names; data parallelism changes no model."""

    tp: PositiveInt = 1
    """Tensor parallel ranks."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    vpp: PositiveInt = 1
    """Parts of a stage that take turns (virtual pipeline)."""
    cp: PositiveInt = 1
    """Context parallel ranks."""
    ep: PositiveInt = 1
    """Expert parallel ranks."""
    etp: PositiveInt | None = None
    """Tensor parallel ranks of one expert; none: as tp."""
    sp: bool = False
    """Sequence parallel: the token-wise part of a layer is cut over the tp ranks."""
    first: PositiveInt | None = None
    """Layers of the first stage, if it holds another number than the others."""
    last: PositiveInt | None = None
    """Layers of the last stage, likewise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sp and self.tp == 1:
            raise ValueError("layout: sp cuts tokens over tp ranks and needs tp > 1, got tp 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"layout: vpp {self.vpp} needs pp > 1, got pp 1")
        if (self.first or self.last) and self.pp == 1:
            raise ValueError("layout: first and last name stages' layers and need pp > 1, got pp 1")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``tp2,pp4,vpp2,cp1,ep2,etp1,sp,first5,last3``; what is not named is 1.

        Raises:
            ValueError: a part is malformed or named twice, or the parts contradict each other.
        """
        values: dict[str, int | bool] = {}
        for part in text.split(","):
            match = re.fullmatch(
                r"(tp|pp|vpp|cp|ep|etp|first|last)([1-9][0-9]{0,5})|(sp)", part.strip()
            )
            if match is None:
                raise ValueError(
                    f"layout {text!r}: got {part.strip()!r}, expected parts like tp2, pp2, vpp2, "
                    "cp2, ep2, etp1, sp, first5, last3"
                )
            name = match[1] or match[3]
            if name in values:
                raise ValueError(f"layout {text!r}: {name} is given twice")
            values[name] = int(match[2]) if match[2] else True
        return cls.build(**values)

    def fields(self) -> dict[str, Any]:
        """The layout as fields of TransformerConfig."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.tp if self.etp is None else self.etp,
            "sequence_parallel": self.sp,
            "num_layers_in_first_pipeline_stage": self.first,
            "num_layers_in_last_pipeline_stage": self.last,
        }


def stages(
    num_layers: int, *, pp: int, vpp: int = 1, first: int | None = None, last: int | None = None
) -> list[list[range]]:
    """The layers of each stage's parts, as Megatron-LM deals them out.

    Args:
        num_layers: layers of the model.
        pp: stages.
        vpp: parts of each stage; part v of all stages comes before part v + 1 of the first.
        first: layers of the first stage, if not as many as of the others.
        last: layers of the last stage, likewise.
    Returns:
        For each stage its parts, in order, as ranges of layers counted from 0.
    Raises:
        ValueError: the layers cannot be dealt out like that.
    """
    named = [size for size in (first, last) if size is not None]
    others = pp - len(named)
    left = num_layers - sum(named)
    if left < 0 or (left and not others) or (others and (left % others or not left)):
        advice = "" if named else ", or first and last with another number of layers"
        raise ValueError(
            f"num_layers: got {num_layers}, expected a multiple of {others or pp} for this layout"
            f"{f' beside {sum(named)} in first and last' if named else ''}{advice}"
        )
    middle = left // others if others else 0
    sizes = [first or middle, *[middle] * (pp - 2), last or middle] if pp > 1 else [num_layers]
    wrong = [size for size in sizes if size % vpp]
    if wrong:
        raise ValueError(f"vpp: got {vpp}, expected a divisor of the {wrong[0]} layers of a stage")
    parts: list[list[range]] = [[] for _ in sizes]
    layer = 0
    for _ in range(vpp):
        for stage, size in enumerate(sizes):
            parts[stage].append(range(layer, layer + size // vpp))
            layer += size // vpp
    return parts
