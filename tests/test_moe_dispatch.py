"""Routing and dispatch: ties, the rows each expert gets, and what comes back, for any layout."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scenarios.layout import Layout
from scenarios.parallel.dispatch import Dispatch
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.router import top_k
from tests.thread_mesh import on_mesh

WIDTH = 3
LAYOUTS = [
    "dp1",
    "dp2,ep2",
    "dp2,etp2",
    "dp4,ep2",
    "dp4,ep2,etp2",
    "tp2,ep2,sp",
    "tp2,etp2,sp",
    "tp4,ep2,etp2,sp",
    "tp2,dp2,ep4,sp",
    "tp2,dp4,ep2,etp2,sp",
]


@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, -0.0, 0.5]), min_size=5, max_size=5), min_size=1),
    st.integers(1, 5),
)
def test_ties_go_to_the_lower_expert(rows: list[list[float]], k: int) -> None:
    experts, probs = top_k(torch.tensor(rows), k)
    for row, chosen in zip(rows, experts.tolist(), strict=True):
        assert chosen == sorted(range(5), key=lambda e: (-row[e], e))[:k]
    values = torch.tensor(rows).gather(1, experts)
    torch.testing.assert_close(probs, values.softmax(dim=1), rtol=1e-6, atol=0)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Layout, Tensor]:
    """A layout, and the experts [microbatches, tokens, 2] of 4 or 8; often some get no token."""
    layout = Layout.parse(draw(st.sampled_from(LAYOUTS)))
    num_experts = draw(st.sampled_from([4, 8]))
    num_tokens = 4 * draw(st.integers(1, 3))
    pairs = st.permutations(range(num_experts)).map(lambda order: order[:2])
    favourites = draw(st.lists(pairs, min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    picks = torch.randint(len(favourites), (layout.dp, num_tokens), generator=generator)
    return layout, torch.cat(
        (torch.tensor(favourites)[picks], torch.full((layout.dp, num_tokens, 1), num_experts)), 2
    )


def token_rows(microbatch: int, tokens: slice) -> Tensor:
    """[tokens, WIDTH], a row that names its token."""
    numbers = torch.arange(tokens.start, tokens.stop, dtype=torch.float32)
    return torch.stack((torch.full_like(numbers, microbatch), numbers, numbers % 5 + 1), 1)


@settings(deadline=None)
@given(routings())
def test_rows_reach_their_experts_and_return(case: tuple[Layout, Tensor]) -> None:
    layout, routing = case
    num_experts = int(routing[0, 0, 2])
    chosen = routing[:, :, :2]
    num_tokens = chosen.shape[1]

    def body(mesh: Mesh) -> None:
        microbatch = 3 + mesh.dp.rank
        local = mesh.token_slice(num_tokens)
        mine = chosen[mesh.dp.rank, local]
        dispatch = Dispatch(mine, num_experts, microbatch, mesh)
        by_slot = token_rows(microbatch, local)[:, None].expand(-1, 2, -1)
        rows = dispatch.to_experts(dispatch.to_slots(by_slot))

        per_rank = num_experts // layout.ep
        block = layout.ep * layout.etp // layout.tp  # microbatches that meet at these experts
        first = mesh.expert_dp.rank * block
        assert [(run.expert, run.microbatch) for run in dispatch.runs] == [
            (e, 3 + m) for e in range(per_rank) for m in range(first, first + block)
        ]
        for run in dispatch.runs:
            expert = run.expert + mesh.ep.rank * per_rank
            takes = (chosen[run.microbatch - 3] == expert).any(dim=1)
            expected = token_rows(run.microbatch, slice(0, num_tokens))[takes]
            assert torch.equal(rows[run.rows], expected)
        assert [(span.start, span.stop) for span in dispatch.spans] == [
            (runs[0].rows.start, runs[-1].rows.stop)
            for runs in (dispatch.runs[e * block : (e + 1) * block] for e in range(per_rank))
        ]

        partials = rows.clone()  # every etp rank adds its share, every expert its number
        for e, span in enumerate(dispatch.spans):
            partials[span] += 100.0 * (e + mesh.ep.rank * per_rank)
        back = dispatch.from_slots(dispatch.from_experts(partials, torch.float32))
        expected = layout.etp * (by_slot + 100.0 * mine[:, :, None])
        assert torch.equal(back, expected)

    on_mesh(layout, body)
