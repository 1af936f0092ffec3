"""Loss scaler and learning-rate schedule against what Megatron-LM defines."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarios.parallel.loss_scaler import LossScaler
from scenarios.parallel.lr_schedule import LearningRateSchedule, cos_pi
from scenarios.parallel.random_keys import random_key


class MegatronScaler:
    """DynamicGradScaler of Megatron-LM, in its own words."""

    def __init__(self, scale: float, minimum: float, interval: int, hysteresis: int):
        self.scale, self.minimum, self.interval, self.hysteresis = (
            scale,
            minimum,
            interval,
            hysteresis,
        )
        self.growth_tracker, self.hysteresis_tracker = 0, hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = max(self.scale * 0.5, self.minimum)
        else:
            self.growth_tracker += 1
            if self.growth_tracker == self.interval:
                self.growth_tracker = 0
                self.hysteresis_tracker = self.hysteresis
                self.scale = self.scale * 2.0


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 6), st.integers(1, 4))
def test_scaler_is_megatrons(overflows: list[bool], window: int, hysteresis: int) -> None:
    ours = LossScaler(64.0, 2.0, window, hysteresis)
    theirs = MegatronScaler(64.0, 2.0, window, hysteresis)
    for overflow in overflows:
        # A resume at any step must not be noticed.
        resumed = LossScaler(64.0, 2.0, window, hysteresis)
        resumed.load(ours.state())
        ours.update(overflow)
        resumed.update(overflow)
        theirs.update(overflow)
        assert ours == resumed
        assert ours.scale == theirs.scale >= 2.0
        assert math.log2(ours.scale).is_integer()


def test_scaler_off_never_moves() -> None:
    scaler = LossScaler.off()
    for _ in range(3):
        scaler.update(False)
    scaler.update(True)
    assert scaler.scale == 1.0


def test_scaler_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="loss scale 1"):
        LossScaler(1.0, 2.0, 10, 2)


@given(st.floats(0.0, 1.0))
def test_cosine_is_right_and_symmetric(ratio: float) -> None:
    assert abs(cos_pi(ratio) - math.cos(math.pi * ratio)) <= 4e-16
    assert -1.0 <= cos_pi(ratio) <= 1.0


def test_cosine_at_known_points() -> None:
    assert (cos_pi(0.0), cos_pi(1.0)) == (1.0, -1.0)
    assert abs(cos_pi(0.5)) < 1e-45
    # Correctly rounded by an independent exact sum of the Taylor series at x = 1 / 2**20.
    pi = Fraction("3.14159265358979323846264338327950288419716939937510")
    x = pi / 2**20
    exact = 1 - x**2 / 2 + x**4 / 24 - x**6 / 720
    assert cos_pi(2.0**-20) == float(exact)


def schedule(style: str) -> LearningRateSchedule:
    return LearningRateSchedule(4e-3, 2e-4, style, warmup_samples=128.0, decay_samples=1280)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_warmup_then_decay(style: str) -> None:
    run = schedule(style)
    assert run.lr == 0.0
    rates = []
    for _ in range(60):
        run.advance(32)
        rates.append(run.lr)
    assert rates[0] == 4e-3 * 32 / 128
    assert rates[3] == 4e-3
    warm, cold = rates[:4], rates[3:]
    assert warm == sorted(warm)
    if style == "constant":
        assert set(cold) == {4e-3}
        return
    assert cold == sorted(cold, reverse=True)
    assert rates[40] == rates[-1] == 2e-4
    middle = rates[21]  # sample 704: half of the decay
    assert middle == pytest.approx((4e-3 + 2e-4) / 2, rel=1e-12)
    quarter = rates[12]  # sample 416
    expected = 2e-4 + 3.8e-3 * (0.75 if style == "linear" else (1 + math.sqrt(0.5)) / 2)
    assert quarter == pytest.approx(expected, rel=1e-12)


def test_schedule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="'sine'"):
        schedule("sine")
    with pytest.raises(ValueError, match="warmup < decay"):
        LearningRateSchedule(1.0, 0.0, "linear", 10.0, 10)


def test_random_keys_differ_by_purpose() -> None:
    keys = {
        random_key(seed, "dropout", layer, site)
        for seed in (1, 2)
        for layer in (0, 1, 10)
        for site in ("attention", "mlp output")
    }
    assert len(keys) == 12
    assert all(0 <= key < 2**63 for key in keys)
