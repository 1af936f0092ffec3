"""Sums, gathers and masks in the layers: lost, rounded early, in another order, keyed locally."""

from mutant import Edit, Mutant, Play

LAYERS_FILE = "scenarios/parallel/layers.py"
MESH = "scenarios/parallel/mesh.py"
MICROBATCH = "scenarios/parallel/microbatch.py"
VOCABULARY = "scenarios/parallel/vocabulary.py"

LAYERS = (
    Mutant(
        "row-forward-sum",
        "a row-parallel layer returns the sum over this rank's parts only",
        Play("S1", "tp2"),
        (
            Edit(
                LAYERS_FILE,
                "return sum_parts(partials, mb.mesh, x.dtype, bias)",
                "return kernels.tree_sum(partials, bias=bias, out_dtype=x.dtype)",
            ),
        ),
    ),
    Mutant(
        "column-backward-sum",
        "a column-parallel layer's input gradient is not summed over tp",
        Play("S1", "tp2"),
        (
            Edit(
                LAYERS_FILE,
                "dx = sum_parts(kernels.gemm(dy, weight), mb.mesh, dy.dtype)",
                "dx = kernels.tree_sum(kernels.gemm(dy, weight), out_dtype=dy.dtype)",
            ),
        ),
    ),
    Mutant(
        "row-backward-gather",
        "with sp a row layer's backward repeats its own tokens instead of gathering all",
        Play("S1", "tp2,sp"),
        (
            Edit(
                LAYERS_FILE,
                "dy = mb.mesh.gather_tokens(dy)  # [T, out]",
                "dy = dy.repeat(mb.tokens.numel() // len(dy), 1)",
            ),
        ),
    ),
    Mutant(
        "partials-rounded",
        "each rank rounds its partial sum to fp16 before the sum over ranks",
        Play("S1", "tp2"),
        (
            Edit(
                LAYERS_FILE,
                "total = mesh.sum_over_tp(kernels.tree_sum(partials))",
                "total = mesh.sum_over_tp(kernels.tree_sum(partials, out_dtype=dtype).float())",
            ),
        ),
    ),
    Mutant(
        "parts-pairs-shifted",
        "the tree over the parts of a rank pairs other neighbours",
        Play("S1", "tp2"),
        (
            Edit(
                LAYERS_FILE,
                "total = mesh.sum_over_tp(kernels.tree_sum(partials))",
                "total = mesh.sum_over_tp(kernels.tree_sum(partials.roll(1, 0).contiguous()))",
            ),
        ),
    ),
    Mutant(
        "ranks-in-sequence",
        "the sum over 4 tp ranks goes from rank to rank instead of by the tree",
        Play("S1", "tp4"),
        (
            Edit(
                MESH,
                "        self.tp.all_reduce(partial)\n        return partial",
                "        total, *others = self.tp.all_gather(partial[None]).unbind()\n"
                "        for other in others:\n"
                "            total = total + other\n"
                "        return total",
            ),
        ),
    ),
    Mutant(
        "vocabulary-maximum",
        "the maximum of the logits is that of this rank's part of the vocabulary",
        Play("S1", "tp2"),
        (Edit(VOCABULARY, "        tp.all_reduce(maximum, dist.ReduceOp.MAX)\n", ""),),
    ),
    Mutant(
        "vocabulary-sums",
        "the sum of exponentials is that of this rank's part of the vocabulary",
        Play("S1", "tp2"),
        (Edit(VOCABULARY, "        tp.all_reduce(sums)\n", ""),),
    ),
    Mutant(
        "position-gradient-of-a-rank",
        "with sp one rank's positions get no gradient",
        Play("S1", "tp2,sp"),
        (
            Edit(
                VOCABULARY,
                "kernels.tree_sum(by_position) + 0.0",
                "kernels.tree_sum(by_position) * float(mb.mesh.tp.rank == 0)",
            ),
        ),
    ),
    Mutant(
        "dropout-key-without-layer",
        "all layers draw the same dropout masks",
        Play("S1", "dp1"),
        (
            Edit(
                MICROBATCH,
                'random_key(self.seed, "dropout", layer, site)',
                'random_key(self.seed, "dropout", site)',
            ),
        ),
    ),
    Mutant(
        "dropout-by-local-sample",
        "hidden dropout is keyed by the place in the microbatch, not by the sample of the run",
        Play("S1", "dp2"),
        (
            Edit(
                MICROBATCH,
                "ids = (self.sample_index[None, :]",
                "ids = (torch.arange(self.num_samples)[None, :]",
            ),
        ),
    ),
    Mutant(
        "dropout-by-local-token",
        "with sp every rank uses the masks of the first tokens",
        Play("S1", "tp2,sp"),
        (
            Edit(
                MICROBATCH,
                "return ids[self.local_slice]",
                "return ids[: self.local_slice.stop - self.local_slice.start]",
            ),
        ),
    ),
    Mutant(
        "dropout-by-local-head",
        "attention dropout is keyed by the head's place on the rank, not among all heads",
        Play("S1", "tp2"),
        (
            Edit(
                MICROBATCH,
                "first = tp.rank * num_parts * heads_per_part",
                "first = 0",
            ),
        ),
    ),
    Mutant(
        "seed-of-a-rank",
        "each data-parallel rank adds its number to the seed",
        Play("S1", "dp2"),
        (
            Edit(
                "scenarios/engines/builtin.py",
                "                training.seed,\n                self.reducer,",
                "                training.seed + dp.rank,\n                self.reducer,",
            ),
        ),
    ),
    Mutant(
        "initial-weights-by-local-block",
        "every tp rank draws the weights of the first blocks",
        Play("S1", "tp2"),
        (
            Edit(
                "scenarios/parallel/distributed_optimizer.py",
                "first = spec.first_block * (spec.numel // spec.num_blocks)",
                "first = 0",
            ),
        ),
    ),
    Mutant(
        "token-types-unsummed",
        "BERT's token-type gradient counts each run of tokens with the types of the first run",
        Play("S4", "tp2,sp"),
        (
            Edit(
                VOCABULARY,
                "ctx.token_types = token_types[mb.local_slice]",
                "ctx.token_types = token_types[: mb.local_slice.stop - mb.local_slice.start]",
            ),
        ),
    ),
)
