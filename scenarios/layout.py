"""How a scenario is cut over ranks: tensor, pipeline, data and expert parallel degrees."""

import re
from typing import Self

from pydantic import PositiveInt, model_validator

from scenarios.frozen import Frozen


class Layout(Frozen):
    """Parallel degrees; ``tp * pp * dp`` ranks, the expert degrees fold into ``tp * dp``."""

    tp: PositiveInt = 1
    """Tensor parallel ranks."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    dp: PositiveInt = 1
    """Data parallel replicas."""
    ep: PositiveInt = 1
    """Expert parallel ranks inside one pipeline stage."""
    etp: PositiveInt = 1
    """Tensor parallel ranks of one expert."""
    sp: bool = False
    """Sequence parallel: the token-wise part of a layer is cut over the tp ranks."""
    zero1: bool | None = None
    """Whether the dp ranks share out optimizer state; None: as --use-distributed-optimizer says."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tp * self.dp % (self.ep * self.etp):
            raise ValueError(
                f"layout {self}: ep * etp = {self.ep * self.etp} must divide "
                f"tp * dp = {self.tp * self.dp}"
            )
        if self.sp and self.tp == 1:
            raise ValueError(
                f"layout {self}: sp cuts tokens over tp ranks and needs tp > 1, got tp 1"
            )
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Read ``tp2,pp2,dp2,sp,zero0``; a degree that is not named is 1.

        Args:
            text: comma separated degrees, in any order.
        Returns:
            The layout.
        Raises:
            ValueError: a part is malformed or named twice, or the degrees contradict each other.
        """
        degrees: dict[str, int | bool] = {}
        for part in text.split(","):
            match = re.fullmatch(
                r"(tp|pp|dp|ep|etp)([1-9][0-9]{0,5})|(sp)|(zero)([01])", part.strip()
            )
            if match is None:
                raise ValueError(
                    f"layout {text!r}: got {part.strip()!r}, "
                    "expected parts like tp2, pp1, dp4, ep1, etp1, sp, zero0, zero1"
                )
            name = match[1] or match[3] or "zero1"
            if name in degrees:
                raise ValueError(f"layout {text!r}: {name} is given twice")
            degrees[name] = int(match[2]) if match[1] else match[5] != "0"
        return cls.build(**degrees)

    @classmethod
    def fill(cls, num_ranks: int, *, tp: int, pp: int, ep: int, etp: int, sp: bool) -> "Layout":
        """Give every rank that tp and pp leave over to data parallelism.

        Args:
            num_ranks: ranks of the whole job.
            tp, pp, ep, etp, sp: the other degrees.
        Returns:
            The layout with ``dp = num_ranks / (tp * pp)``.
        Raises:
            ValueError: the ranks cannot be cut that way.
        """
        if num_ranks % (tp * pp):
            raise ValueError(
                f"{num_ranks} ranks cannot be cut into tp {tp} x pp {pp}: "
                f"got {num_ranks} ranks, expected a multiple of {tp * pp}"
            )
        return cls.build(tp=tp, pp=pp, dp=num_ranks // (tp * pp), ep=ep, etp=etp, sp=sp)

    def __str__(self) -> str:
        """The text that ``parse`` reads; what is not given is left out, as expert degrees of 1."""
        parts = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}"]
        parts += [
            f"{name}{getattr(self, name)}" for name in ("ep", "etp") if getattr(self, name) > 1
        ]
        zero = [] if self.zero1 is None else [f"zero{int(self.zero1)}"]
        return ",".join(parts + ["sp"] * self.sp + zero)
