"""Loss scaling for fp16, as Megatron-LM's DynamicGradScaler does it."""

from dataclasses import dataclass


@dataclass
class LossScaler:
    """Halves the scale after ``hysteresis`` overflows, doubles it after ``window`` good steps.

    As in Megatron-LM, once the hysteresis is used up every further overflow halves the scale;
    only a growth restores it.

    Source: megatron/core/optimizer/grad_scaler.py.
    """

    scale: float
    min_scale: float
    window: int
    hysteresis: int
    dynamic: bool = True
    num_good_steps: int = 0
    hysteresis_left: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.scale or self.window < 1 or self.hysteresis < 1:
            raise ValueError(
                f"loss scale {self.scale}, minimum {self.min_scale}, window {self.window}, "
                f"hysteresis {self.hysteresis}; expected 0 < minimum <= scale and the others >= 1"
            )
        self.hysteresis_left = self.hysteresis

    @classmethod
    def off(cls) -> "LossScaler":
        """The scaler of bf16 and fp32: scale 1, for ever."""
        return cls(scale=1.0, min_scale=1.0, window=1, hysteresis=1, dynamic=False)

    def update(self, overflow: bool) -> None:
        """Learns whether this step's gradients held an infinity or a NaN."""
        if not self.dynamic:
            return
        if overflow:
            self.num_good_steps = 0
            self.hysteresis_left -= 1
            if self.hysteresis_left <= 0:
                self.scale = max(self.scale * 0.5, self.min_scale)
            return
        self.num_good_steps += 1
        if self.num_good_steps == self.window:
            self.num_good_steps = 0
            self.hysteresis_left = self.hysteresis
            self.scale *= 2.0

    def state(self) -> dict[str, float | int]:
        """What a checkpoint keeps."""
        return {
            "scale": self.scale,
            "num_good_steps": self.num_good_steps,
            "hysteresis_left": self.hysteresis_left,
        }

    def load(self, state: dict[str, float | int]) -> None:
        """Takes what ``state`` gave."""
        self.scale = float(state["scale"])
        self.num_good_steps = int(state["num_good_steps"])
        self.hysteresis_left = int(state["hysteresis_left"])
