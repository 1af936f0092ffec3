"""Four ranks that play the cases of test_native_training.py, in native arithmetic but for one.

Run as ``python -m tests.native_ranks FOLDER RANK``; see ``tests.engine_ranks``.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from primitives import arithmetic, backend
from scenarios.engines.builtin import Trainer
from scenarios.layout import Layout
from scenarios.scenario import Scenario
from tests.engine_ranks import BUGS as ENGINE_BUGS
from tests.engine_ranks import NUM_STEPS, Player, play
from tests.engine_scenarios import tiny_moe_scenario, tiny_scenario

NUM_RANKS = 4
LAYOUTS = ["dp1", "dp4", "tp2,pp2,sp"]
MOE_LAYOUTS = ["dp1", "tp2,ep2,etp2,dp2,sp"]
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


def main() -> None:
    torch.set_num_threads(1)
    backend.register()
    player = NativePlayer(Path(sys.argv[1]), int(sys.argv[2]))
    player.play("canonical", tiny_scenario("dp1"), None)
    player.play("canonical moe", tiny_moe_scenario(Layout.parse("dp1")), None)
    with arithmetic.use("native"):
        for layout in LAYOUTS:
            player.play(layout, tiny_scenario(layout), None)
        for layout in MOE_LAYOUTS:
            player.play(f"{layout} moe", tiny_moe_scenario(Layout.parse(layout)), None)
        player.play("dp1 again", tiny_scenario("dp1"), None)
        for name, (layout, bug) in {**SEEN, **UNSEEN}.items():
            player.play(name, tiny_scenario(layout), bug)


if __name__ == "__main__":
    main()
