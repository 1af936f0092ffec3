"""Cases: Megatron-LM's files load as they are, and what is wrong with a file is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scenarios.case_files import CONFIG, case_folders, find_case
from scenarios.flags import FIELDS, IGNORED, KNOWN, ONLY, UNSUPPORTED, parse_flags
from scenarios.schema import Layout, Scenario, list_scenarios, load_scenario

S1_FOLDER = next(folder for folder in case_folders() if folder.name.startswith("gpt3_mcore_tp1"))


def write_case(folder: Path, changes: dict[str, Any], **keys: Any) -> Path:
    """S1's file with some flags changed (None removes one) and other top-level keys."""
    content = yaml.safe_load((S1_FOLDER / CONFIG).read_text())
    args = content["MODEL_ARGS"] | changes
    content["MODEL_ARGS"] = {flag: value for flag, value in args.items() if value is not None}
    path = folder / CONFIG
    path.write_text(yaml.safe_dump({**content, **keys}))
    return path


def error_of(path: Path | str, **choices: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_scenario(str(path), **({"scale": "full"} | choices))
    assert "\n" not in str(caught.value), "one clear line"
    return str(caught.value)


def refusal(call: Callable[[], object]) -> str | None:
    """The message of the ValueError a call raises, None if it raises none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def test_s1_full_is_what_megatron_trains() -> None:
    s = load_scenario("S1", scale="full")
    assert s.golden_path.parts[-4:-2] == ("golden", "gpt")
    assert (s.model.num_layers, s.model.hidden_size, s.model.ffn_hidden_size) == (12, 512, 2048)
    assert (s.model.hidden_dropout, s.model.layernorm_epsilon) == (0.1, 1e-5)
    assert (s.model.precision, s.model.apply_query_key_layer_scaling) == ("fp16", True)
    assert s.training.weight_decay == 1e-2, "YAML 1.1 reads 1e-2 as text"
    assert (s.training.lr, s.training.min_lr, s.training.lr_decay_style) == (1.5e-4, 1e-5, "cosine")
    assert (s.training.lr_decay_samples, s.training.lr_warmup_samples) == (10_240_000, 102_400)
    assert s.training.initial_loss_scale == 2**32
    assert (s.training.adam_beta1, s.training.adam_beta2, s.training.adam_eps) == (0.9, 0.999, 1e-8)
    assert s.optimizer.use_distributed_optimizer
    assert s.optimizer.overlap_grad_reduce
    assert s.optimizer.overlap_param_gather
    assert (s.checkpoint.save_interval, s.checkpoint.async_save) == (50, True)
    assert (str(s.layout), s.num_microbatches, s.test_type) == ("tp1,pp1,dp8", 1, "ckpt-resume")
    assert s.data.split == ("949", "50", "1")
    assert s.data.prefix is None


def test_s4_full_is_what_megatron_trains() -> None:
    s = load_scenario("S4", scale="full")
    assert s.golden_path.parts[-4:-2] == ("golden", "bert")
    assert (s.model.num_layers, s.model.hidden_size, s.model.ffn_hidden_size) == (24, 1024, 4096)
    assert (s.model.num_attention_heads, s.model.seq_length) == (16, 512)
    assert (s.model.vocab_size, s.model.precision) == (30592, "bf16")
    assert (s.model.hidden_dropout, s.model.attention_dropout) == (0.1, 0.1)
    assert (s.training.lr, s.training.min_lr, s.training.lr_decay_style) == (1e-4, 1e-5, "linear")
    assert (s.training.lr_decay_iters, s.training.lr_warmup_fraction) == (990_000, 0.01)
    assert (s.training.weight_decay, s.training.clip_grad) == (0.01, 1.0)
    assert not s.optimizer.use_distributed_optimizer
    assert (str(s.layout), s.num_microbatches, s.test_type) == ("tp2,pp2,dp2", 16, "ckpt-resume")
    assert set(s.metrics) > {"lm loss", "sop loss", "params-digest"}


@pytest.mark.parametrize("case", ["S1", "S4"])
def test_every_line_of_a_case_is_used_or_listed_as_ignored(case: str) -> None:
    content = yaml.safe_load(find_case(case).read_text())
    ignored = {item.flag: item.reason for item in load_scenario(case, scale="full").ignored}
    for flag in content["MODEL_ARGS"]:
        assert (flag in FIELDS and flag != "--data-path") != (flag in ignored), flag
    assert {*content["ENV_VARS"], "LAUNCHER"} <= set(ignored)
    assert all(ignored.values())


@pytest.mark.parametrize("case", ["S1", "S4"])
def test_ci_keeps_every_mechanism_and_shrinks_sizes(case: str) -> None:
    full, ci = (load_scenario(case, scale=scale) for scale in ("full", "ci"))
    for section in ("optimizer", "metrics", "ignored", "test_type", "name", "data"):
        assert getattr(full, section) == getattr(ci, section), section
    assert ci.model.precision == full.model.precision
    assert ci.model.hidden_dropout == full.model.hidden_dropout > 0
    assert ci.checkpoint.async_save == full.checkpoint.async_save
    assert ci.layout.world_size == 4
    samples = ci.training.train_iters * ci.training.global_batch_size
    assert 0 < ci.training.lr_warmup_samples < samples / 2, "the schedule leaves its warmup"
    assert ci.training.lr_decay_samples <= samples, "and decays inside the run"
    if ci.model.precision == "fp16":
        assert 2 * ci.training.loss_scale_window < ci.training.train_iters, "the scale can grow"
    assert ci.training.train_iters == 2 * (ci.checkpoint.save_interval or 0)


@pytest.mark.parametrize("layout", ["dp1", "dp2", "dp4", "tp1,pp1,dp8"])
def test_scenario_survives_json(layout: str) -> None:
    scenario = load_scenario("S1", scale="ci", layout=layout)
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario
    assert scenario.num_microbatches * scenario.layout.dp == 8


@pytest.mark.parametrize("spelling", ["S1", "s1", S1_FOLDER.name, str(S1_FOLDER)])
def test_a_case_has_many_names(spelling: str) -> None:
    assert load_scenario(spelling, scale="ci").name == S1_FOLDER.name


def test_list() -> None:
    (info,) = [info for info in list_scenarios() if info.alias == "S1"]
    assert (info.family, info.name, info.test_type) == ("gpt", S1_FOLDER.name, "ckpt-resume")
    assert {scale: layout.dp for scale, layout in info.layouts.items()} == {"ci": 4, "full": 8}


def test_unknown_case_and_missing_file() -> None:
    assert "'S9' is unknown" in error_of("S9")
    assert S1_FOLDER.name in error_of(S1_FOLDER.name[:-1])
    assert "no such file: /nowhere/model_config.yaml" in error_of("/nowhere/model_config.yaml")
    assert "got 'tiny', expected 'ci' or 'full'" in error_of("S1", scale="tiny")


def test_a_file_without_ci_scale_says_so(tmp_path: Path) -> None:
    message = error_of(write_case(tmp_path, {}), scale="ci")
    assert "scale_ci.yaml" in message
    assert "--scale full" in message


@given(
    flag=st.text(st.characters(codec="utf-8"), max_size=30).map("--".__add__)
    | st.sampled_from(sorted(KNOWN)).map(lambda flag: flag[:-1] + "x")
)
def test_an_unknown_flag_is_always_named(flag: str) -> None:
    if flag not in KNOWN:
        with pytest.raises(ValueError, match="unknown flag") as caught:
            parse_flags({"--num-layers": 2, flag: 1}, "a.yaml")
        assert repr(flag) in str(caught.value)
        assert "a.yaml" in str(caught.value)


def test_unknown_flag_comes_with_a_close_match(tmp_path: Path) -> None:
    message = error_of(write_case(tmp_path, {"--num-layer": 2}))
    assert (
        f"{tmp_path}/{CONFIG}: unknown flag '--num-layer'; did you mean '--num-layers'?" == message
    )


@given(
    flag=st.sampled_from(sorted(KNOWN)),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none()),
)
def test_any_value_of_any_flag_is_taken_or_refused_in_one_line(flag: str, value: object) -> None:
    message = refusal(lambda: parse_flags({flag: value}, "a.yaml"))
    if message is not None:
        assert flag in message
        assert "expected" in message
    else:
        parsed = parse_flags({flag: value}, "a.yaml")
        places = [fields for fields in parsed.fields.values() if fields]
        assert len(places) + len(parsed.ignored) + len(parsed.unsupported) == 1


@given(
    flag=st.sampled_from(sorted(FIELDS)),
    value=st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
    | st.sampled_from([2**31, 10**400, "1e400", "nan", "-0", "1_0", "../x"]),
)
@example(flag="--lr", value=10**400)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_case_with_any_value_loads_or_is_refused_in_one_line(
    tmp_path: Path, flag: str, value: object
) -> None:
    path = str(write_case(tmp_path, {flag: value}))
    message = refusal(lambda: load_scenario(path, scale="full"))
    if message is not None:
        assert path in message or message.endswith("cannot be read: No such file or directory")
        assert "\n" not in message
    else:
        scenario = load_scenario(path, scale="full")
        assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario


def test_the_table_of_flags_has_each_flag_once() -> None:
    rows = [*FIELDS, *ONLY]
    rows += [flag for table in (IGNORED, UNSUPPORTED) for flags in table.values() for flag in flags]
    assert sorted(rows) == sorted(set(rows))


OTHER_SEEDS = {
    "moe": (
        "disable-bias-linear transformer-impl expert-model-parallel-size sequence-parallel "
        "expert-tensor-parallel-size num-experts moe-token-dispatcher-type moe-router-topk "
        "moe-router-load-balancing-type moe-router-dtype moe-ffn-hidden-size moe-grouped-gemm "
        "moe-shared-expert-intermediate-size ckpt-fully-parallel-load attention-softmax-in-fp32 "
        "ckpt-assume-constant-structure no-bias-gelu-fusion async-ckpt-use-cpu-shm bf16"
    ),
    "inference": (
        "tiktoken-pattern tokenizer-type tokenizer-model auto-detect-ckpt-format top_k prompts "
        "max-tokens-to-oom inference-max-seq-length attention-backend use-checkpoint-args "
        "no-load-optim no-use-tokenizer-model-from-checkpoint-args temperature return-log-probs "
        "inference-fuse-tp-communication num-tokens-to-generate incoming-requests-per-step "
        "inference-dynamic-batching-buffer-size-gb inference-ckpt-non-strict output-path "
        "use-flashinfer-fused-rope inference-logging-step-interval"
    ),
    "bert": "spec use-checkpoint-args attention-backend vocab-file dist-ckpt-strictness bf16",
}


@pytest.mark.parametrize("seed", OTHER_SEEDS)
def test_flags_of_megatrons_other_seed_cases_are_known(seed: str) -> None:
    """Their features come later; until then the error must be about the feature, not the flag."""
    assert {f"--{flag}" for flag in OTHER_SEEDS[seed].split()} <= KNOWN


def test_folders_of_other_families_are_refused_by_name(tmp_path: Path) -> None:
    for family in ("mixtral", "t5"):
        folder = tmp_path / family / "case"
        folder.mkdir(parents=True)
        assert f"family {family} (" in error_of(write_case(folder, {}))


def test_a_bert_has_its_metrics_vocabulary_and_spec(tmp_path: Path) -> None:
    folder = tmp_path / "bert" / "case"
    folder.mkdir(parents=True)
    scenario = load_scenario(str(write_case(folder, {"--spec": "local"})), scale="full")
    assert "sop loss" in scenario.metrics
    assert scenario.model.vocab_size == 30592
    message = error_of(write_case(folder, {"--vocab-size": 1000}))
    assert "vocab_size: got 1000, expected a multiple of 64" in message
    assert "--spec x.py" in error_of(write_case(folder, {"--spec": "x.py"}))
    experts = error_of(write_case(folder, EXPERTS))
    assert "experts in a BERT (--num-experts); a BERT without biases" in experts
    assert "--bert-no-binary-head" in error_of(write_case(folder, {"--bert-no-binary-head": True}))


EXPERTS = {"--num-experts": 8, "--disable-bias-linear": True}
WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # flags changed, top-level keys changed, what the one line must say
    ({"--tensor-model-parallel-size": 2}, {"RANKS": 3}, "3 ranks cannot be cut into tp 2"),
    ({"--tensor-model-parallel-size": 3}, {"RANKS": 4}, "4 ranks cannot be cut into tp 3"),
    (
        {"--expert-model-parallel-size": 2},
        {},
        "not supported by this version: ep 2 (there are no experts to cut)",
    ),
    ({"--spec": "local"}, {}, "--spec local"),
    ({"--num-experts": 8}, {}, "disable_bias_linear: got False, expected True"),
    ({"--moe-router-topk": 2}, {}, "moe: got router_topk, expected --num-experts"),
    (EXPERTS | {"--moe-router-topk": 9}, {}, "router_topk: got 9, expected at most"),
    (EXPERTS | {"--moe-router-topk": 1}, {}, "router_topk: got 1"),
    (EXPERTS | {"--moe-ffn-hidden-size": 100}, {}, "moe ffn_hidden_size: got 100"),
    (EXPERTS | {"--moe-router-dtype": "fp64"}, {}, "--moe-router-dtype fp64"),
    (EXPERTS | {"--moe-z-loss-coeff": 0.1}, {}, "a router z-loss (--moe-z-loss-coeff 0.1)"),
    ({"--ckpt-format": "zarr"}, {}, "--ckpt-format zarr"),
    ({}, {"TEST_TYPE": "frozen-start"}, "TEST_TYPE frozen-start"),
    ({}, {"MODE": "inference"}, "MODE inference"),
    ({"--num-layers": None}, {}, "num_layers: missing"),
    ({"--num-layers": 0}, {}, "num_layers: got 0"),
    ({"--num-layers": "twelve"}, {}, "--num-layers: got 'twelve', expected an integer"),
    ({"--num-layers": 1.5}, {}, "--num-layers: got 1.5, expected an integer"),
    ({"--fp16": 1}, {}, "--fp16: got 1, expected true or false"),
    ({"--bf16": True}, {}, "--fp16 and --bf16 exclude each other"),
    ({"--num-attention-heads": 12}, {}, "num_attention_heads: got 12, expected a multiple of 8"),
    ({"--hidden-size": 516}, {}, "hidden_size: got 516, expected a multiple"),
    ({"--hidden-size": 520}, {}, "hidden_size: got 520, expected a multiple of 64"),
    ({"--ffn-hidden-size": 72}, {}, "ffn_hidden_size: got 72, expected a multiple of 64"),
    ({"--num-attention-heads": 24}, {}, "a multiple of num_attention_heads = 24"),
    ({"--vocab-size": 1001}, {}, "vocab_size: got 1001, expected a multiple of 8"),
    ({"--seq-length": 2048}, {}, "max_position_embeddings: got 1024, expected at least"),
    ({"--global-batch-size": 30}, {}, "global_batch_size: got 30, expected a multiple"),
    ({"--global-batch-size": 36}, {}, "global_batch_size: got 36, expected a multiple"),
    ({"--global-batch-size": 96}, {}, "3 microbatches on each of 8 replicas, expected a power"),
    ({}, {"RANKS": 6}, "dp must divide the 8 slices"),
    ({"--lr-warmup-iters": 5}, {}, "exclude each other"),
    ({"--lr-decay-iters": 0}, {}, "lr_decay_iters: got 0"),
    ({"--lr-warmup-fraction": 1.0}, {}, "lr_warmup_fraction: got 1.0"),
    ({"--min-lr": 1.0}, {}, "min_lr: got 1.0, expected at most lr"),
    ({"--lr": float("inf")}, {}, "lr: got inf"),
    ({"--lr-decay-style": "sqrt"}, {}, "lr_decay_style: got 'sqrt'"),
    ({"--initial-loss-scale": 3}, {}, "initial_loss_scale: got 3.0, expected a power of two"),
    ({"--overlap-grad-reduce": None}, {}, "overlap_param_gather: got it alone"),
    ({"--save-interval": 100}, {}, "save_interval: got 100"),
    ({"--split": "0,1,1"}, {}, "--split: got '0,1,1'"),
    ({"--data-path": "0.5 a 0.5 b"}, {}, "not a mixture"),
    ({"--layernorm-epsilon": 1e-5, "--norm-epsilon": 1e-5}, {}, "given twice, under two names"),
    ({}, {"METRICS": []}, "METRICS: got none"),
    ({}, {"METRICS": ["lm los"]}, "unknown 'lm los'; did you mean 'lm loss'?"),
    ({}, {"METRIC": ["lm loss"]}, "unknown key 'METRIC'; did you mean 'METRICS'?"),
    ({}, {"MODEL_ARGS_2": {}}, "MODEL_ARGS_2"),
    ({}, {"ENV_VARS": {"NCCL_ALGOS": 1}}, "unknown variable 'NCCL_ALGOS'"),
    ({}, {"RANKS": "four"}, "RANKS: got 'four', expected int"),
    ({}, {"RANKS": -8}, "expected 1 or more"),
]


@pytest.mark.parametrize(("flags", "keys", "expected"), WRONG)
def test_wrong_files(
    tmp_path: Path, flags: dict[str, Any], keys: dict[str, Any], expected: str
) -> None:
    message = error_of(write_case(tmp_path, flags, **keys))
    assert expected in message
    assert str(tmp_path) in message, "says which file"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "MODEL_ARGS:\n  --lr: 1\n  --lr: 2\n",
            "line 3: not valid YAML: key '--lr' is given twice",
        ),
        ("MODEL_ARGS: {}\nMODEL_ARGS: {}\n", "key 'MODEL_ARGS' is given twice"),
        ("MODEL_ARGS: [", "not valid YAML"),
        ("- a\n", "got list, expected keys"),
        ("", "got NoneType, expected keys"),
        ("MODEL_ARGS: 3\n", "MODEL_ARGS: got 3, expected dict"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
        ("\0", "not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / CONFIG
    path.write_text(text)
    assert expected in error_of(path)


def test_not_utf8_and_overrides_out_of_place(tmp_path: Path) -> None:
    path = write_case(tmp_path, {})
    (tmp_path / "scale_ci.yaml").write_text("TEST_TYPE: regular\n")
    assert "TEST_TYPE belongs into model_config.yaml" in error_of(path, scale="ci")
    (tmp_path / "scale_ci.yaml").write_text("MODEL_ARGS:\n  --hiden-size: 8\n")
    assert "scale_ci.yaml: unknown flag '--hiden-size'" in error_of(path, scale="ci")
    path.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in error_of(path)


@given(
    tp=st.integers(1, 16),
    pp=st.integers(1, 16),
    dp=st.integers(1, 16),
    ep=st.sampled_from([1, 2, 4]),
    etp=st.sampled_from([1, 2]),
    sp=st.booleans(),
    zero1=st.none() | st.booleans(),
)
def test_layout_text_round_trip(
    tp: int, pp: int, dp: int, ep: int, etp: int, sp: bool, zero1: bool | None
) -> None:
    if tp * dp % (ep * etp) or (sp and tp == 1):
        with pytest.raises(ValueError, match="layout"):
            Layout.build(tp=tp, pp=pp, dp=dp, ep=ep, etp=etp, sp=sp)
    else:
        layout = Layout.build(tp=tp, pp=pp, dp=dp, ep=ep, etp=etp, sp=sp)
        with_zero1 = layout.model_copy(update={"zero1": zero1})
        assert Layout.parse(str(with_zero1)) == with_zero1
        assert layout.world_size == tp * pp * dp
        assert Layout.fill(layout.world_size, tp=tp, pp=pp, ep=ep, etp=etp, sp=sp) == layout


def test_layout_decides_on_zero1() -> None:
    optimizers = {
        text: load_scenario("S1", scale="ci", layout=text).optimizer
        for text in ("dp2", "dp2,zero1", "dp2,zero0")
    }
    assert optimizers["dp2"] == optimizers["dp2,zero1"]
    assert optimizers["dp2"].overlap_param_gather
    without = optimizers["dp2,zero0"]
    assert not without.use_distributed_optimizer
    assert not without.overlap_param_gather
    assert without.overlap_grad_reduce


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("tp3", "tp and etp must divide the 8 canonical parts"),
        ("dp16", "dp must divide the 8 slices"),
        ("pp3", "got pp 3, expected a divisor of num_layers = 4"),
        ("pp8", "got pp 8"),
        ("sp", "needs tp > 1"),
        ("tp2,ep2", "ep 2 (there are no experts to cut)"),
        ("dp2,etp2", "etp 2 (there are no experts to cut)"),
    ],
)
def test_layouts_that_cannot_work_are_refused(layout: str, reason: str) -> None:
    assert reason in error_of("S1", scale="ci", layout=layout)


@given(st.text(alphabet="tpde0123456789,s -", max_size=12))
def test_layout_text_fuzz(text: str) -> None:
    message = refusal(lambda: Layout.parse(text))
    if message is not None:
        assert "layout" in message
    else:
        assert Layout.parse(str(Layout.parse(text))) == Layout.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dp",
        "dp0",
        "dp-1",
        "dp2 pp2",
        "dp2,dp2",
        "DP2",
        "dp02",
        "x4",
        "zero",
        "zero2",
        "zero0,zero1",
    ],
)
def test_wrong_layouts(text: str) -> None:
    assert "layout" in error_of("S1", scale="ci", layout=text)
