"""Buckets: whatever their size and dp, every slice gets the tree sum of its own elements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import canonical
from scenarios.parallel.buckets import make_buckets
from scenarios.parallel.parameters import (
    NUM_SLICES,
    ParameterSpec,
    column_spec,
    row_spec,
    token_spec,
)

SPECS = [
    ParameterSpec("words", (8, 2, 8), 8, ("words.lookup", "words.head")),
    token_spec("norm", 16, mean=1.0),
    column_spec("column.weight", (16, 8)),
    column_spec("column.bias", (64,), weight_decay=False),
    row_spec("row", 8, 16, init_std=1.0),
]


def gradients(spec: ParameterSpec, rank: int) -> torch.Tensor:
    """[partials, *shape] of one rank."""
    generator = torch.Generator().manual_seed(1000 * len(spec.name) + rank)
    return torch.randn(spec.num_partials, *spec.shape, generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 700))
def test_reduce_and_gather_restore_every_element(dp: int, bucket_numel: int) -> None:
    ranks = [make_buckets(SPECS, dp, torch.bfloat16, bucket_numel) for _ in range(dp)]
    names = [spec.name for bucket in reversed(ranks[0]) for spec in bucket.specs]
    assert names == [spec.name for spec in SPECS]
    for rank, buckets in enumerate(ranks):
        for bucket in buckets:
            for spec in bucket.specs:
                values = gradients(spec, rank)
                per = spec.partials_per_gradient
                for first in range(0, spec.num_partials, per):
                    bucket.write_gradient(spec, first, values[first : first + per].clone())
    for same in zip(*ranks, strict=True):
        summed = canonical.tree_sum(torch.stack([bucket.gradient_full for bucket in same]))
        for rank, bucket in enumerate(same):
            bucket.gradient_shard.copy_(summed[rank])  # what reduce_scatter does
            for spec in bucket.specs:
                everything = torch.stack([gradients(spec, r) for r in range(dp)])
                expected = canonical.tree_sum(everything).view(
                    spec.num_partials, spec.num_blocks, dp, NUM_SLICES // dp, spec.slice_numel
                )[:, :, rank]
                got = bucket.read_gradient(spec)
                assert torch.equal(got, expected)
                bucket.shards[spec.name].main.copy_(got[0])
            bucket.round_parameters()
        full = torch.stack([bucket.parameter_shard for bucket in same])
        for bucket in same:
            bucket.parameter_full.copy_(full)  # what all_gather does
            for spec in bucket.specs:
                out = torch.empty(spec.shape, dtype=torch.bfloat16)
                bucket.read_parameter(spec, out)
                everything = torch.stack([gradients(spec, r) for r in range(dp)])
                expected = canonical.tree_sum(everything)[0].view(spec.shape).bfloat16()
                assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="data-parallel size is 3"):
        make_buckets(SPECS, 3, torch.float32, 100)
    with pytest.raises(ValueError, match="odd has 12 elements"):
        token_spec("odd", 12)
    with pytest.raises(ValueError, match="12 rows"):
        column_spec("odd", (12, 8))
    with pytest.raises(ValueError, match="12 columns"):
        row_spec("odd", 8, 12, init_std=1.0)
