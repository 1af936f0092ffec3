"""S2 as a case: Megatron-LM's flags, what the small scale keeps, which layouts are refused."""

from typing import Any

import pytest
import torch.distributed as dist
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scenarios.case_files import CONFIG, find_case
from scenarios.engines.builtin import Trainer
from scenarios.flags import FIELDS
from scenarios.golden import read_golden
from scenarios.layout import Layout
from scenarios.parallel.dispatch import Dispatch, Run
from scenarios.schema import load_scenario

POWERS = st.sampled_from([1, 2, 4, 8])


def test_s2_full_is_what_megatron_trains() -> None:
    s = load_scenario("S2", scale="full")
    assert s.golden_path.parts[-4:-2] == ("golden", "moe")
    assert (s.model.num_layers, s.model.hidden_size, s.model.num_attention_heads) == (12, 512, 8)
    assert (s.model.precision, s.model.disable_bias_linear) == ("bf16", True)
    moe = s.model.moe
    assert moe is not None
    assert (moe.num_experts, moe.router_topk) == (8, 2)
    assert (moe.ffn_hidden_size, moe.shared_expert_intermediate_size) == (1024, 512)
    assert moe.aux_loss_coeff == 0.01, "Megatron-LM's default of 0 would leave it without effect"
    assert (str(s.layout), s.num_microbatches) == ("tp4,pp2,dp1,ep2,etp2,sp", 8)
    assert (s.test_type, s.checkpoint.save_interval) == ("ckpt-resume", 50)
    assert "aux loss" in s.metrics


def test_every_line_of_s2_is_used_or_listed_as_ignored() -> None:
    content = yaml.safe_load(find_case("S2").with_name(CONFIG).read_text())
    ignored = {item.flag: item.reason for item in load_scenario("S2", scale="full").ignored}
    for flag in content["MODEL_ARGS"]:
        assert (flag in FIELDS and flag != "--data-path") != (flag in ignored), flag
    assert all(ignored.values())


def test_ci_keeps_every_mechanism_and_shrinks_sizes() -> None:
    full, ci = (load_scenario("S2", scale=scale) for scale in ("full", "ci"))
    for section in ("optimizer", "metrics", "ignored", "test_type", "name", "data", "layout"):
        assert getattr(full, section) == getattr(ci, section), section
    sizes = ("ffn_hidden_size", "shared_expert_intermediate_size")
    assert full.model.moe
    assert ci.model.moe
    assert full.model.moe.model_dump(exclude={*sizes}) == ci.model.moe.model_dump(exclude={*sizes})
    assert ci.model.precision == full.model.precision
    assert ci.model.hidden_dropout == full.model.hidden_dropout > 0
    samples = ci.training.train_iters * ci.training.global_batch_size
    assert 0 < ci.training.lr_warmup_samples < samples / 2, "the schedule leaves its warmup"
    assert ci.training.lr_decay_samples <= samples, "and decays inside the run"
    assert ci.training.train_iters == 2 * (ci.checkpoint.save_interval or 0)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("tp2,ep2", "experts with tp 2 need sp"),
        ("tp4,ep2,sp", "got ep * etp = 2, expected a multiple of tp = 4"),
        ("tp2,sp", "got ep * etp = 1, expected a multiple of tp = 2"),
        ("tp2,dp8,ep16,sp", "got ep 16, expected a divisor of num_experts = 8"),
        ("ep2", "must divide"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_the_reason(layout: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("*", r"\*")) as caught:
        load_scenario("S2", scale="ci", layout=layout)
    assert "\n" not in str(caught.value), "one clear line"


def test_experts_need_a_model_that_has_some() -> None:
    with pytest.raises(ValueError, match="there are no experts to cut"):
        load_scenario("S1", scale="ci", layout="dp2,ep2")


@given(tp=POWERS, dp=POWERS, ep=POWERS, etp=POWERS, sp=st.booleans())
def test_every_other_layout_is_accepted(tp: int, dp: int, ep: int, etp: int, sp: bool) -> None:
    moe = load_scenario("S2", scale="ci", layout="dp1").model.moe
    assert moe is not None
    if sp == (tp == 1) or tp * dp % (ep * etp) or ep * etp % tp:
        return
    moe.check_layout(Layout.build(tp=tp, dp=dp, ep=ep, etp=etp, sp=sp))


def test_ci_has_experts_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some microbatch sends no token to some expert; the empty products and gradients work."""
    empty_runs: list[Run] = []
    init = Dispatch.__init__

    def watched(self: Dispatch, *args: Any) -> None:
        init(self, *args)
        empty_runs.extend(run for run in self.runs if run.rows.start == run.rows.stop)

    monkeypatch.setattr(Dispatch, "__init__", watched)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(load_scenario("S2", scale="ci", layout="dp1"))
        trainer.gather.start()
        for _ in range(6):
            trainer.train_step()
    finally:
        dist.destroy_process_group()
    assert empty_runs


def test_ci_learns() -> None:
    """The loss of the golden falls by more than 15 %."""
    losses = read_golden(load_scenario("S2", scale="ci").golden_path, "ci").metrics["lm loss"]
    first, *_, last = (losses.values[step] for step in sorted(losses.values))
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert last < 0.85 * first
