"""The mesh: every axis partitions the ranks, in Megatron-LM's order, the same on all ranks."""

import math

from hypothesis import given
from hypothesis import strategies as st

from scenarios.layout import Layout
from scenarios.parallel.mesh import AXES, Mesh, Stage, groups_along

DEGREES = st.sampled_from([1, 2, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp, dp, pp = (draw(DEGREES) for _ in range(3))
    etp = draw(st.sampled_from([d for d in (1, 2, 4) if d <= tp * dp]))
    ep = draw(st.sampled_from([d for d in (1, 2, 4, 8) if d <= tp * dp // etp]))
    return Layout.build(tp=tp, dp=dp, pp=pp, etp=etp, ep=ep, sp=draw(st.booleans()) and tp > 1)


@given(layouts())
def test_groups_partition_the_ranks(layout: Layout) -> None:
    sizes = {
        "world": layout.world_size,
        "tp": layout.tp,
        "dp": layout.dp,
        "pp": layout.pp,
        "etp": layout.etp,
        "ep": layout.ep,
        "expert_dp": layout.tp * layout.dp // (layout.etp * layout.ep),
    }
    for axis in AXES:
        groups = groups_along(layout, axis)
        assert sorted(rank for ranks in groups for rank in ranks) == [*range(layout.world_size)]
        assert all(list(ranks) == sorted(ranks) for ranks in groups)
        if axis != "embedding":
            assert {len(ranks) for ranks in groups} == {sizes[axis]}


@given(layouts())
def test_all_ranks_see_the_same_groups(layout: Layout) -> None:
    meshes = [Mesh(layout, rank, {}) for rank in range(layout.world_size)]
    for axis in AXES:
        for rank, mesh in enumerate(meshes):
            group = getattr(mesh, axis)
            assert group.ranks[group.rank] == rank
            assert all(getattr(meshes[peer], axis).ranks == group.ranks for peer in group.ranks)
    for mesh in meshes:
        assert mesh.tp.rank + layout.tp * (mesh.dp.rank + layout.dp * mesh.pp.rank) == mesh.rank
        in_stage = mesh.etp.rank + layout.etp * (mesh.ep.rank + layout.ep * mesh.expert_dp.rank)
        assert in_stage == mesh.rank % (layout.tp * layout.dp)


@given(layouts())
def test_embedding_group_is_first_and_last_stage(layout: Layout) -> None:
    for rank in range(layout.world_size):
        mesh = Mesh(layout, rank, {})
        if mesh.stage.is_first or mesh.stage.is_last:
            ends = {mesh.pp.ranks[0], mesh.pp.ranks[-1]}
            assert mesh.embedding.ranks == tuple(sorted(ends))
        else:
            assert mesh.embedding.ranks == (rank,)


def test_order_is_megatrons() -> None:
    """Its documentation's example: 16 ranks, tp2 pp4 dp2."""
    layout = Layout.build(tp=2, pp=4, dp=2)
    assert groups_along(layout, "tp")[:3] == [(0, 1), (2, 3), (4, 5)]
    assert groups_along(layout, "dp")[:3] == [(0, 2), (1, 3), (4, 6)]
    assert groups_along(layout, "pp") == [(r, r + 4, r + 8, r + 12) for r in range(4)]
    assert groups_along(layout, "embedding")[:4] == [(0, 12), (1, 13), (2, 14), (3, 15)]
    layout = Layout.build(tp=4, pp=2, ep=2, etp=2)
    assert groups_along(layout, "etp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups_along(layout, "ep") == [(0, 2), (1, 3), (4, 6), (5, 7)]


@given(layouts(), st.integers(1, 5))
def test_token_slices_and_layers_are_contiguous_runs(layout: Layout, factor: int) -> None:
    tokens, layers = 8 * factor, layout.pp * factor
    meshes = [Mesh(layout, rank, {}) for rank in range(layout.tp)]
    seen = [t for mesh in meshes for t in range(tokens)[mesh.token_slice(tokens)]]
    assert seen == [*range(tokens)] * (1 if layout.sp else layout.tp)
    stages = [Stage(index, layout.pp) for index in range(layout.pp)]
    assert [n for stage in stages for n in stage.layers(layers)] == [*range(layers)]
    assert math.prod(len(stage.layers(layers)) for stage in stages) == factor**layout.pp
    assert [s.is_first for s in stages].count(True) == [s.is_last for s in stages].count(True) == 1
