"""A case's first steps with a resume among them, against its golden: as S1 does it, but shorter.

    python resume_early.py CASE LAYOUT OUT

Run 1 saves in the middle, after the loss scale has fallen; run 2 is a new process that resumes
there. Prints one JSON document, as ``testbed run --layouts --json`` does, with the same exit codes.
"""

import io
import json
import sys
from pathlib import Path

from scenarios.commands import golden_of
from scenarios.failures import RunFailed
from scenarios.golden import Golden, Metric
from scenarios.runner import LaunchOptions, check_golden, make_out_dir, play
from scenarios.schema import load_scenario

SAVED_STEP = 10
LAST_STEP = 12


def main(case: str, layout: str, out: str) -> int:
    """Plays, prints and gives the exit code."""
    scenario = load_scenario(case, scale="ci", layout=layout)
    short = scenario.model_copy(
        update={
            "training": scenario.training.model_copy(update={"train_iters": LAST_STEP}),
            "checkpoint": scenario.checkpoint.model_copy(update={"save_interval": SAVED_STEP}),
        }
    )
    golden = golden_of(scenario, case)
    metrics = {
        name: Metric(
            metric.start_step,
            LAST_STEP,
            metric.step_interval,
            {step: value for step, value in metric.values.items() if step <= LAST_STEP},
        )
        for name, metric in golden.metrics.items()
    }
    differences, detail, code = [], "", 0
    try:
        played = play(short, make_out_dir(Path(out), case), LaunchOptions(io.StringIO()))
    except RunFailed as error:
        detail, code = str(error), 3
    else:
        checks = (*played.checks, check_golden(Golden(metrics, golden.provenance), played.metrics))
        for check in checks:
            if not check.passed:
                differences += check.as_json()["differences"]
                detail = detail or " ".join(line.strip() for line in check.lines()[:2])
                code = 1
    print(json.dumps({"layouts": [{"detail": detail, "differences": differences}]}))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
