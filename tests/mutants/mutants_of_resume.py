"""State that a resume does not bring back.

Two of the edits are noticed by the proof that ends a load; the others hide from it, so that the
numbers of the resumed run must tell.
"""

from mutant import Edit, Mutant, Play

OPTIMIZER = "scenarios/parallel/distributed_optimizer.py"
STATE = "scenarios/engines/training_state.py"

RESUME = (
    Mutant(
        "moment-entry-not-loaded",
        "one entry of the first moments is zero after the load",
        Play("S1", "dp1", resumes=True),
        (
            Edit(
                STATE,
                "        manager.load(state, latest)\n",
                "        manager.load(state, latest)\n"
                '        next(iter(state["exp_avg"].values())).zero_()\n',
            ),
        ),
    ),
    Mutant(
        "second-moments-not-saved",
        "exp_avg_sq is neither saved nor loaded: zero after a resume",
        Play("S1", "dp1", resumes=True),
        (
            Edit(
                STATE,
                'KINDS = ("main", "exp_avg", "exp_avg_sq")',
                'KINDS = ("main", "exp_avg")',
            ),
        ),
    ),
    Mutant(
        "loss-scale-not-restored",
        "the loss scaler begins anew",
        Play("S1", "dp1", resumes=True),
        (
            Edit(STATE, '            "loss_scaler": self._scaler.state(),\n', ""),
            Edit(STATE, '        self._scaler.load(saved["loss_scaler"])\n', ""),
        ),
    ),
    Mutant(
        "schedule-not-restored",
        "the learning rate begins anew",
        Play("S1", "dp1", resumes=True),
        (
            Edit(STATE, '            "schedule_samples": self._schedule.num_samples,\n', ""),
            Edit(STATE, '        self._schedule.num_samples = saved["schedule_samples"]\n', ""),
        ),
    ),
    Mutant(
        "data-position-not-restored",
        "data and dropout begin with the first sample again",
        Play("S1", "dp1", resumes=True),
        (
            Edit(STATE, '            "consumed_samples": self.consumed_samples,\n', ""),
            Edit(STATE, ', "next_sample": self.consumed_samples}', "}"),
            Edit(STATE, '        self.consumed_samples = saved["consumed_samples"]\n', ""),
        ),
    ),
    Mutant(
        "bias-correction-off-by-one",
        "after a resume the powers of the betas lack one multiplication",
        Play("S1", "dp1", resumes=True),
        (
            Edit(
                OPTIMIZER,
                "        for _ in range(num_updates):\n            self._count_update()\n",
                "        for _ in range(num_updates - 1):\n            self._count_update()\n"
                "        self.num_updates = num_updates\n",
            ),
        ),
    ),
    Mutant(
        "update-count-off-by-one",
        "after a resume one update fewer is counted",
        Play("S1", "dp1", resumes=True),
        (
            Edit(
                OPTIMIZER,
                "        for _ in range(num_updates):\n",
                "        for _ in range(num_updates - 1):\n",
            ),
        ),
    ),
)
