"""The learning rate, counted in samples, the same double on every machine."""

from dataclasses import dataclass
from decimal import Decimal, localcontext

PI = Decimal("3.14159265358979323846264338327950288419716939937510")


def cos_pi(ratio: float) -> float:
    """cos(pi * ratio) for 0 <= ratio <= 1, correctly rounded: no libm, whose last bit differs.

    Numerics: Taylor series in 50 decimal digits, rounded once to a double.
    """
    with localcontext() as context:
        context.prec = 50
        x = PI * Decimal(ratio)
        square, term, total = x * x, Decimal(1), Decimal(1)
        n = 0
        while abs(term) > Decimal("1e-45"):
            n += 2
            term = -term * square / (n * (n - 1))
            total += term
        return float(total)


@dataclass
class LearningRateSchedule:
    """Linear warmup from zero, then a decay to ``min_lr``; ``num_samples`` is its whole state.

    Source: megatron/core/optimizer_param_scheduler.py. A skipped step does not advance it.
    """

    max_lr: float
    min_lr: float
    style: str
    warmup_samples: float
    decay_samples: float
    num_samples: int = 0

    def __post_init__(self) -> None:
        if self.style not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"lr decay style {self.style!r}; expected 'constant', 'linear' or 'cosine'"
            )
        if not 0 <= self.warmup_samples < self.decay_samples:
            raise ValueError(
                f"lr warmup of {self.warmup_samples} samples and decay of {self.decay_samples}; "
                "expected 0 <= warmup < decay"
            )

    @property
    def lr(self) -> float:
        """The learning rate for the next update."""
        done = self.num_samples
        if self.warmup_samples > 0 and done <= self.warmup_samples:
            return self.max_lr * done / self.warmup_samples
        if self.style == "constant":
            return self.max_lr
        if done > self.decay_samples:
            return self.min_lr
        ratio = (done - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        coefficient = 1.0 - ratio if self.style == "linear" else 0.5 * (cos_pi(ratio) + 1.0)
        return self.min_lr + coefficient * (self.max_lr - self.min_lr)

    def advance(self, num_samples: int) -> None:
        """Counts the samples of one update that was made."""
        self.num_samples += num_samples
