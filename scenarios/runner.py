"""Plays a scenario's TEST_TYPE and judges what came out.

``regular`` is one run. ``ckpt-resume``: run 1 trains all steps and saves on the way; its last
checkpoint is deleted, so that an earlier one is the newest; run 2, new processes, resumes from that
and trains to the end. ``frozen-start`` is inference (``scenarios.inference.play``). Run 1 is held
against the golden, run 2 against run 1, bit for bit; native arithmetic has tolerances against its
golden and in another layout (``scenarios.tolerance``).
"""

import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TextIO

from scenarios.compare import compare_strict
from scenarios.fork_server import ForkServer
from scenarios.golden import Golden, Metrics, Value, is_finite, metrics_from_steps
from scenarios.launch import launch
from scenarios.metrics_file import read_steps
from scenarios.progress import show_steps
from scenarios.schema import Scenario
from scenarios.tolerance import compare_golden, describe_cost
from scenarios.verdict import Check
from scenarios.worker import Job

ENGINE = "scenarios.engines.builtin:train"

Steps = dict[int, dict[str, Value]]


@dataclass(frozen=True)
class LaunchOptions:
    """How the ranks are started and shown."""

    progress: TextIO
    master_port: int = 0
    timeout_s: float = 300.0
    device: str = "cpu"
    """What the ranks train on, cpu or cuda."""
    server: ForkServer | None = None
    """Starts the ranks; None: one for each scenario."""


@dataclass(frozen=True)
class Played:
    """What the runs of one scenario gave."""

    metrics: Metrics
    """Of run 1."""
    checks: tuple[Check, ...]
    """The invariants that hold without a golden."""
    runs: tuple[tuple[str, float], ...]
    rounds_tokens_s: tuple[float, ...] = ()
    """Throughput of inference, measured so many times."""


def check_device(device: str, scenario: Scenario) -> None:
    """Whether a scenario can run there.

    Raises:
        ValueError: there is no GPU, or nothing that this scenario could run on it.
    """
    if device == "cpu":
        return
    if scenario.inference is not None:
        raise ValueError(f"--device {device}: {scenario.name} is inference; training runs there")
    if scenario.arithmetic != "canonical":
        raise ValueError(
            f"--device {device}: expected canonical arithmetic, got {scenario.arithmetic}"
        )
    from primitives.devices import missing_gpu

    if reason := missing_gpu():
        raise ValueError(f"--device {device}: {reason}")


def make_out_dir(wish: Path | None, name: str) -> Path:
    """The folder for everything that a scenario writes.

    Raises:
        ValueError: it is a file or holds something already.
    """
    if wish is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        wish = Path("runs") / f"{name}-{stamp}"
        number = 1
        while wish.exists():
            number += 1
            wish = Path("runs") / f"{name}-{stamp}-{number}"
    if wish.exists() and not wish.is_dir():
        raise ValueError(f"--out {wish}: expected a new or empty folder, got a file")
    if wish.is_dir() and any(wish.iterdir()):
        raise ValueError(f"--out {wish}: expected a new or empty folder, got one with files in it")
    wish.mkdir(parents=True, exist_ok=True)
    return wish.resolve()


def play(
    scenario: Scenario, out_dir: Path, options: LaunchOptions, resumed: Scenario | None = None
) -> Played:
    """Runs a scenario and checks what must hold without a golden.

    Args:
        scenario: what to train.
        out_dir: an empty folder.
        options: how to start the ranks.
        resumed: the same in the layout of run 2; default: that of run 1.

    Raises:
        RunFailed: a run crashed, hung or was interrupted.
    """
    if scenario.inference is not None:
        # It needs packages that training does not.
        from scenarios.inference.play import play_inference

        (out_dir / "scenario.json").write_text(scenario.model_dump_json(indent=1) + "\n")
        done = play_inference(scenario, out_dir, options.progress, options.timeout_s)
        return Played(done.metrics, done.checks, done.runs, done.rounds_tokens_s)
    if options.server is None:
        with ForkServer() as server:
            return play(scenario, out_dir, replace(options, server=server), resumed)
    (out_dir / "scenario.json").write_text(scenario.model_dump_json(indent=1) + "\n")
    last = scenario.training.train_iters
    first, wall_s = _train(scenario, out_dir, "run1", 1, options)
    runs = [(f"run 1: steps 1..{last}", wall_s)]
    checks = [check_complete(scenario, first, 1)]
    if scenario.test_type == "ckpt-resume":
        resumed_at = drop_last_checkpoint(out_dir / "checkpoints", last)
        if resumed_at is None:
            checks.append(Check("resume", False, f"run 1 saved no checkpoint before step {last}"))
        else:
            second, wall_s = _train(resumed or scenario, out_dir, "run2", resumed_at + 1, options)
            what = f"steps {resumed_at + 1}..{last}"
            where = f" in {resumed.layout}" if resumed else ""
            runs.append((f"run 2: {what}, resumed{where}", wall_s))
            nearly = resumed if resumed and scenario.arithmetic == "native" else None
            checks.append(check_resume(first, second, resumed_at, f" ({what})", nearly))
    metrics = metrics_from_steps(first, measured=scenario.arithmetic == "native")
    return Played(metrics, tuple(checks), tuple(runs))


def check_complete(scenario: Scenario, steps: Steps, first_step: int) -> Check:
    """Every step is there, with every metric that the scenario judges, and all values finite."""
    name = "complete and finite"
    expected = list(range(first_step, scenario.training.train_iters + 1))
    if sorted(steps) != expected:
        got = f"{min(steps)}..{max(steps)}" if steps else "none"
        return Check(name, False, f"expected steps {expected[0]}..{expected[-1]}, got {got}")
    for step in expected:
        for metric in scenario.metrics:
            if metric not in steps[step]:
                return Check(name, False, f"step {step} has no {metric}")
        for metric, value in steps[step].items():
            if not is_finite(metric, value):
                return Check(name, False, f"{metric} step {step} is {value!r}")
    return Check(name, True, f"{len(expected)} steps")


def check_resume(
    first: Steps, second: Steps, resumed_at: int, what: str = "", nearly: Scenario | None = None
) -> Check:
    """The resumed run repeats the uninterrupted one from the step after the save.

    Bit for bit, unless ``nearly`` names the scenario whose tolerances hold: native arithmetic
    resumed in another layout.
    """
    rest = metrics_from_steps({s: values for s, values in first.items() if s > resumed_at})
    again = metrics_from_steps(second)
    same = compare_golden(nearly, rest, again) if nearly else compare_strict(rest, again)
    return Check.of("resume", same, what)


def check_golden(scenario: Scenario, golden: Golden, metrics: Metrics) -> Check:
    """The run gave the recorded values: the same bits, or near ones in native arithmetic."""
    comparison = compare_golden(scenario, golden.metrics, metrics)
    what = describe_cost(golden.metrics, metrics)
    return Check.of("golden", comparison, f"; {what}" if what else "")


def drop_last_checkpoint(root: Path, last_step: int) -> int | None:
    """Deletes the checkpoint of the last step; gives the newest that is left, None without one."""
    from primitives.checkpoint import CheckpointManager

    manager = CheckpointManager(root)
    if last_step in manager.steps():
        manager.delete(last_step)
    return manager.latest()


def _train(
    scenario: Scenario, out_dir: Path, name: str, first_step: int, options: LaunchOptions
) -> tuple[Steps, float]:
    run_dir = out_dir / name
    run_dir.mkdir()
    job = Job(
        scenario=scenario.model_dump_json(),
        run_dir=str(run_dir),
        checkpoint_dir=str(out_dir / "checkpoints"),
        resume=first_step > 1,
        engine=ENGINE,
        device=options.device,
    )
    label = "run 1" if first_step == 1 else f"run 2 (resumed at {first_step - 1})"
    start = time.monotonic()
    with show_steps(options.progress, label, first_step, scenario.training.train_iters) as on_step:
        launch(
            job,
            world_size=scenario.layout.world_size,
            master_port=options.master_port,
            timeout_s=options.timeout_s,
            on_step=on_step,
            server=options.server,
        )
    return read_steps(run_dir / "metrics.jsonl"), time.monotonic() - start
