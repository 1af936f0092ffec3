"""The mixture of experts: router, dispatch, and the sums over expert ranks."""

from mutant import Edit, Mutant, Play

DISPATCH = "scenarios/parallel/dispatch.py"
ROUTER = "scenarios/parallel/router.py"

EXPERTS = (
    Mutant(
        "aux-loss-of-a-rank",
        "one replica leaves out the coefficient of the aux loss",
        Play("S2", "dp2"),
        (
            Edit(
                ROUTER,
                "router.balance_factor(mb) * router.aux_loss_coeff * mb.loss_weight",
                "router.balance_factor(mb) * mb.loss_weight\n"
                "        slope *= router.aux_loss_coeff if mb.mesh.dp.rank == 0 else 1.0",
            ),
        ),
    ),
    Mutant(
        "router-counts-of-a-rank",
        "with sp each rank balances by the choices of its own tokens",
        Play("S2", "tp2,sp,etp2"),
        (
            Edit(
                ROUTER,
                "counts = gathered[:, 0].sum(dim=0)",
                "counts = counts * mb.mesh.tp.num_ranks",
            ),
        ),
    ),
    Mutant(
        "expert-gradients-not-reduced",
        "the gradients of experts are not summed over expert_dp",
        Play("S2", "dp2,zero0"),
        (
            Edit(
                "scenarios/parallel/gradient_reduce.py",
                "            work = dp.all_reduce(full, async_op=self._overlap)\n",
                "            work = None\n"
                "            if not bucket.expert:\n"
                "                work = dp.all_reduce(full, async_op=self._overlap)\n",
            ),
        ),
    ),
    Mutant(
        "expert-parts-rounded",
        "each etp rank rounds its part of an expert's output before the sum",
        Play("S2", "tp2,sp,etp2"),
        (
            Edit(
                DISPATCH,
                "pieces = self._etp.all_to_all_rows(partials[self._arrival],",
                "partials = partials.to(dtype).float()\n"
                "        pieces = self._etp.all_to_all_rows(partials[self._arrival],",
            ),
        ),
    ),
    Mutant(
        "expert-rows-unsorted",
        "an expert takes its rows as they arrive, not by microbatch and token",
        Play("S2", "dp2,ep2"),
        (
            Edit(
                DISPATCH,
                "return self._etp.all_gather_rows(rows, self._columns)[self._sorting]",
                "return self._etp.all_gather_rows(rows, self._columns)",
            ),
        ),
    ),
)
