"""``testbed bench step``: both sides train, in turn, and the figures are those of the steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from scenarios import bench_step
from scenarios.cli import EXIT_PASS, EXIT_USAGE, main
from scenarios.engines.step_race import train
from scenarios.metrics_file import MetricsWriter
from scenarios.run_context import LogValue, RunContext
from scenarios.worker import Job
from tests.engine_scenarios import tiny_scenario


def test_both_sides_train_from_the_same_weights(tmp_path: Path) -> None:
    logged: list[dict[str, LogValue]] = []
    run = RunContext(tmp_path, tmp_path, False, lambda step, metrics: logged.append({**metrics}))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(tiny_scenario("dp1").first_steps(3), run)
    finally:
        dist.destroy_process_group()
    losses = [[step[f"{side} lm loss"] for step in logged] for side in ("canonical", "native")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]
    assert all(
        step[f"{side} iteration-time"] for step in logged for side in ("canonical", "native")
    )


def test_figures_are_medians_of_the_timed_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(job: Job, *, world_size: int) -> None:
        assert world_size == 4
        writer = MetricsWriter(Path(job.run_dir) / "metrics.jsonl")
        # The first step is a warmup; a slower moment doubles both sides of the last.
        for step, (ours, theirs) in enumerate([(9.0, 1.0), (0.3, 0.2), (0.3, 0.2), (0.6, 0.4)], 1):
            writer.log(step, {"canonical iteration-time": ours, "native iteration-time": theirs})

    monkeypatch.setattr(bench_step, "launch", launch)
    assert main(["bench", "step", "--case", "S1", "-n", "3", "-w", "1", "--json"]) == EXIT_PASS
    step: dict[str, Any] = json.loads(capsys.readouterr().out)["step"]
    assert (step["canonical_s"], step["native_s"], step["num_steps"]) == (0.3, 0.2, 3)
    assert step["median_ratio"] == pytest.approx(1.5)
    assert main(["bench", "step", "-n", "3", "-w", "1"]) == EXIT_PASS
    assert capsys.readouterr().out.splitlines()[-1].split() == ["300.0", "200.0", "1.50"]
    for wrong in (["-n", "0"], ["--case", "S99"]):
        assert main(["bench", "step", *wrong]) == EXIT_USAGE
