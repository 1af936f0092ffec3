"""Four ranks that play the cases of test_native_training.py, in native arithmetic but for one.

See ``tests.engine_ranks``.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from primitives import arithmetic, backend
from scenarios.engines.builtin import Trainer
from scenarios.scenario import Scenario
from tests.engine_ranks import BUGS as ENGINE_BUGS
from tests.engine_ranks import NUM_STEPS, Player, play
from tests.engine_scenarios import tiny_scenario

NUM_RANKS = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "bert": {"family": "bert", "precision": "bf16"},
    "moe": {"family": "moe", "precision": "bf16"},
}
LAYOUTS = {"gpt": ["dp4", "tp2,pp2,sp"], "bert": ["tp2,pp2"], "moe": ["tp2,ep2,etp2,dp2,sp"]}
"""In which each family is trained beside dp1."""
Bug = tuple[str, Callable[[Trainer], Any]]


def wrong_rate(factor: float) -> Callable[[Trainer], Any]:
    """The optimizer steps with another learning rate than the one that is logged."""

    def inject(trainer: Trainer) -> Any:
        step = trainer.optimizer.step
        return mock.patch.object(trainer.optimizer, "step", lambda lr: step(factor * lr))

    return inject


def keep_norm(trainer: Trainer) -> Any:
    """Gradients are not clipped."""
    return mock.patch.object(trainer.optimizer, "clip")


SEEN: dict[str, Bug] = {
    name: ENGINE_BUGS[name]
    for name in ("reduce_scatter left out", "stale parameters", "dropout of other tokens")
} | {
    "learning rate 2 % high": ("dp1", wrong_rate(1.02)),
    "no clipping": ("dp1", keep_norm),
}
UNSEEN: dict[str, Bug] = {
    "token block dropped": ENGINE_BUGS["token block dropped"],
    "learning rate 0.001 % high": ("dp1", wrong_rate(1.00001)),
}
"""Real errors that are smaller than rounding may be; canonical arithmetic sees them."""


class NativePlayer(Player):
    """Plays whole scenarios, with a bug or without; no bug here makes replicas differ."""

    def play(self, name: str, scenario: Scenario, bug: Callable[[Trainer], Any] | None) -> None:
        """From the start to the end."""
        with self.world(str(scenario.layout)) as inside:
            if not inside:
                return
            trainer = Trainer(scenario)
            with bug(trainer) if bug else nullcontext():
                self.write(name, play(trainer, NUM_STEPS))


def main(folder: str, rank: str) -> None:
    """The life of a rank."""
    torch.set_num_threads(1)
    backend.register()
    player = NativePlayer(Path(folder), int(rank))
    for family, how in FAMILIES.items():
        player.play(f"{family} canonical", tiny_scenario("dp1", **how), None)
    with arithmetic.use("native"):
        for family, how in FAMILIES.items():
            for layout in ("dp1", *LAYOUTS[family]):
                player.play(f"{family} {layout}", tiny_scenario(layout, **how), None)
        player.play("gpt dp1 again", tiny_scenario("dp1"), None)
        for name, (layout, bug) in {**SEEN, **UNSEEN}.items():
            player.play(name, tiny_scenario(layout), bug)
