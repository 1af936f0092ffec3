"""Gradients, their norm, and new parameters on their way: a collective lost, an order changed."""

from mutant import Edit, Mutant, Play

BUILTIN = "scenarios/engines/builtin.py"
GATHER = "scenarios/parallel/parameter_gather.py"
OPTIMIZER = "scenarios/parallel/distributed_optimizer.py"
REDUCE = "scenarios/parallel/gradient_reduce.py"

GRADIENTS = (
    Mutant(
        "microbatches-as-they-come",
        "microbatch gradients are added one after the other instead of by the tree",
        Play("S1", "dp1"),
        (
            Edit(
                "scenarios/parallel/tree.py",
                "        node = leaf\n",
                "        others = self._nodes.pop((self._root_level, 0), None)\n"
                "        total = value if others is None else others.add_(value)\n"
                "        self._nodes[self._root_level, 0] = total\n"
                "        return\n"
                "        node = leaf\n",
            ),
        ),
    ),
    Mutant(
        "bucket-not-scattered",
        "with ZeRO-1 the first bucket's gradients are this replica's own",
        Play("S1", "dp2"),
        (
            Edit(
                REDUCE,
                "            work = dp.reduce_scatter_into("
                "bucket.gradient_shard, full, async_op=self._overlap)\n",
                "            source = full\n"
                "            if not self._works:\n"
                "                source = torch.zeros_like(full)\n"
                "                source.view_as(bucket.gradient_full)[dp.rank] = "
                "bucket.gradient_full[dp.rank]\n"
                "            work = dp.reduce_scatter_into("
                "bucket.gradient_shard, source, async_op=self._overlap)\n",
            ),
        ),
    ),
    Mutant(
        "bucket-not-reduced",
        "without ZeRO one bucket is not summed over dp",
        Play("S1", "dp2,zero0"),
        (
            Edit(
                REDUCE,
                "work = dp.all_reduce(full, async_op=self._overlap)",
                "work = dp.all_reduce(full, async_op=self._overlap) if self._works else None",
            ),
        ),
    ),
    Mutant(
        "bucket-scaled",
        "one bucket's gradients are the mean over dp, the others' the sum",
        Play("S1", "dp2"),
        (
            Edit(
                REDUCE,
                "        dp, full = self._mesh.replicas(bucket.expert), "
                "bucket.gradient_full.view(-1)\n",
                "        dp, full = self._mesh.replicas(bucket.expert), "
                "bucket.gradient_full.view(-1)\n"
                "        if not self._works:\n"
                "            full /= dp.num_ranks\n",
            ),
        ),
    ),
    Mutant(
        "token-sums-not-reduced",
        "with sp the gradients of norms, row biases and positions stay those of a rank's tokens",
        Play("S1", "tp2,sp"),
        (
            Edit(
                REDUCE,
                "            _all_reduce([s for s in shards if s.spec.sums_tokens], self._mesh.tp)",
                "            pass",
            ),
        ),
    ),
    Mutant(
        "tied-table-not-exchanged",
        "first and last stage keep their own gradient of the word table",
        Play("S1", "pp2"),
        (
            Edit(
                REDUCE,
                "        _all_reduce([s for s in shards if s.spec.tied], self._mesh.embedding)\n",
                "",
            ),
        ),
    ),
    Mutant(
        "norm-without-a-bias",
        "one LayerNorm bias is missing in the gradient norm",
        Play("S1", "dp1"),
        (
            Edit(
                OPTIMIZER,
                "[kernels.sum_of_squares(s.grad).view(-1) for s in self.shards]",
                "[kernels.sum_of_squares(s.grad).view(-1)"
                ' * float(s.spec.name != "decoder.final_layernorm.bias") for s in self.shards]',
            ),
        ),
    ),
    Mutant(
        "zeros-counted-twice",
        "every rank counts the zero gradients of what tp ranks share",
        Play("S4", "tp2"),
        (Edit(OPTIMIZER, "            if owned\n", ""),),
    ),
    Mutant(
        "stale-parameters",
        "with overlap all buckets but the first are gathered only once, at the start",
        Play("S1", "dp2"),
        (
            Edit(
                GATHER,
                "        if bucket.dp > 1:\n",
                "        if bucket.dp > 1 and not (self._num_started"
                " and bucket.parameter_full.any()):\n",
            ),
        ),
    ),
    Mutant(
        "overflow-without-agreement",
        "a rank skips a step when its own gradients overflow, whatever the others do",
        Play("S1", "pp4", 7),
        (
            Edit(
                BUILTIN,
                "not bool((gathered[:, count] == 1.0).all())",
                "not finite",
            ),
        ),
    ),
    Mutant(
        "loss-of-one-replica",
        "the logged loss is that of the first replica's microbatches",
        Play("S1", "dp2"),
        (
            Edit(
                BUILTIN,
                "gathered[self.mesh.loss_ranks(), : len(losses)]",
                "gathered[self.mesh.loss_ranks()[:1] * dist.get_world_size(), : len(losses)]",
            ),
        ),
    ),
)
