"""Loads a case: its file, the scale's overrides and the caller's choices become one Scenario."""

from pathlib import Path
from typing import Any, Literal

from primitives.layout import NUM_PARTS
from scenarios.case_files import (
    CaseFile,
    alias_of,
    case_folders,
    family_of,
    find_case,
    read_case_file,
)
from scenarios.flags import ParsedFlags, close_match, parse_flags
from scenarios.inference_config import INFERENCE_METRICS, InferenceConfig, inference_of
from scenarios.layout import Layout
from scenarios.moe_config import WIDTH_STEP, MoeConfig
from scenarios.scenario import (
    Arithmetic,
    CheckpointConfig,
    DataConfig,
    IgnoredFlag,
    ModelConfig,
    OptimizerConfig,
    Scenario,
    ScenarioInfo,
    TrainingConfig,
    metrics_of,
)

__all__ = [
    "Arithmetic",
    "CheckpointConfig",
    "DataConfig",
    "IgnoredFlag",
    "Layout",
    "ModelConfig",
    "OptimizerConfig",
    "Scenario",
    "ScenarioInfo",
    "TrainingConfig",
    "list_scenarios",
    "load_scenario",
]

FULL_RANKS = 8
"""Megatron-LM's cases are written for one node of eight GPUs."""
FAMILIES = ("gpt", "moe", "bert")
"""Families of cases that have a model here."""
VOCAB_SIZES = {"gpt": 50304, "moe": 50304, "bert": 30592}
"""Its cases name GPT-2's and BERT's tokenizers: 50257 and 30522, padded to a multiple of 128."""
TOKENS = "num_tokens_to_generate"
NO_DATA_VALUE = (
    "the value is a placeholder of Megatron-LM's launcher; --data PREFIX gives real data"
)
UNJUDGED_METRICS = {
    "iteration-time": "time differs from run to run and is recorded, not judged",
    "mem-allocated-bytes": "memory of a GPU allocator, which is not used here",
    "mem-max-allocated-bytes": "memory differs from run to run and is recorded, not judged",
}


def load_scenario(
    case_or_path: str,
    *,
    scale: str,
    layout: str | None = None,
    data: Path | None = None,
    arithmetic: Arithmetic = "canonical",
) -> Scenario:
    """Load a case, shipped or the caller's own.

    Args:
        case_or_path: name of a shipped case, its alias (``S1``), a model_config.yaml or its folder.
        scale: ``ci`` applies the scale_ci.yaml beside the file, ``full`` is the file as it is.
        layout: parallel degrees like ``tp1,pp1,dp2`` instead of the file's.
        data: prefix of Megatron .bin/.idx files instead of the corpus made on the spot.
        arithmetic: ``canonical`` or ``native``.

    Returns:
        The scenario; what the file asks for and is not needed is listed in ``ignored``.

    Raises:
        ValueError: no such case, an unknown flag, a contradiction, or an unsupported feature.
    """
    scale_name = _check_scale(scale)
    path = find_case(case_or_path)
    base = read_case_file(path)
    overrides = path.with_name("scale_ci.yaml")
    if scale_name == "ci" and overrides.is_file():
        base = _merge(base, read_case_file(overrides))
        return _assemble(base, scale_name, layout, data, arithmetic)
    scenario = _assemble(base, scale_name, layout, data, arithmetic)
    if scale_name == "ci":
        raise ValueError(
            f"{path}: --scale ci: got no {overrides.name} beside it, "
            "expected one with smaller sizes; --scale full runs the file as it is"
        )
    return scenario


def list_scenarios() -> list[ScenarioInfo]:
    """The shipped cases, sorted by family and name, with their default layouts."""
    infos = []
    for folder in case_folders():
        scales = ["full", *(["ci"] if (folder / "scale_ci.yaml").is_file() else [])]
        loaded = {scale: load_scenario(str(folder), scale=scale) for scale in scales}
        infos.append(
            ScenarioInfo(
                family=loaded["full"].family,
                name=folder.name,
                alias=alias_of(folder.name),
                path=folder,
                test_type=loaded["full"].test_type,
                layouts={scale: scenario.layout for scale, scenario in loaded.items()},
            )
        )
    return infos


def _check_scale(scale: str) -> Literal["ci", "full"]:
    match scale:
        case "ci":
            return "ci"
        case "full":
            return "full"
    raise ValueError(f"scale: got {scale!r}, expected 'ci' or 'full'")


def _merge(base: CaseFile, overrides: CaseFile) -> CaseFile:
    """The overrides change sizes; what kind of test it is stays with the case."""
    for key in ("test_type", "mode", "metrics"):
        if getattr(overrides, key) is not None:
            raise ValueError(f"{overrides.path}: {key.upper()} belongs into {base.path.name}")
    parse_flags(overrides.model_args, str(overrides.path))
    return CaseFile(
        path=base.path,
        model_args=base.model_args | overrides.model_args,
        test_type=base.test_type,
        mode=base.mode,
        metrics=base.metrics,
        ranks=overrides.ranks or base.ranks,
        ignored=base.ignored + overrides.ignored,
    )


def _assemble(
    case: CaseFile,
    scale: Literal["ci", "full"],
    layout_text: str | None,
    data: Path | None,
    arithmetic: Arithmetic,
) -> Scenario:
    where = str(case.path)
    flags = parse_flags(case.model_args, where)
    flags.ignored = [*case.ignored, *flags.ignored]
    given = flags.fields.get("given", {})
    family = family_of(case.path)
    test_type = case.test_type or "regular"
    try:
        layout = _layout(case, given, layout_text)
        _refuse_unsupported(case, flags, family, test_type, layout)
        scenario = Scenario.build(
            family=family,
            name=case.path.resolve().parent.name,
            scale=scale,
            test_type=test_type,
            model=_model(flags, family),
            training=_training(flags, layout, case.mode),
            optimizer=_optimizer(flags, layout),
            layout=layout,
            checkpoint=CheckpointConfig.build(**flags.fields.get("checkpoint", {})),
            data=_data(flags, given),
            metrics=_metrics(case, flags, _known_metrics(case, family, flags)),
            ignored=tuple(IgnoredFlag(flag=flag, reason=why) for flag, why in flags.ignored),
            arithmetic=arithmetic,
            inference=inference_of(flags.fields, case.path.resolve().parent / f"frozen_{scale}")
            if case.mode == "inference"
            else None,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if data and scenario.inference:
        raise ValueError(f"{where}: --data {data}: got training data, expected none for inference")
    prefix = data or scenario.data.prefix
    return scenario if prefix is None else _with_data(scenario, prefix)


def _layout(case: CaseFile, given: dict[str, Any], text: str | None) -> Layout:
    degrees = {name: given.get(name, 1) for name in ("tp", "pp", "ep", "etp")}
    if any(degree < 1 for degree in degrees.values()) or (case.ranks or 1) < 1:
        raise ValueError(
            f"got RANKS {case.ranks} and degrees {degrees}, expected 1 or more of each"
        )
    if text is not None:
        return Layout.parse(text)
    ranks = case.ranks or max(FULL_RANKS, degrees["tp"] * degrees["pp"])
    return Layout.fill(ranks, **degrees, sp=given.get("sp", False))


def _refuse_unsupported(
    case: CaseFile, flags: ParsedFlags, family: str, test_type: str, layout: Layout
) -> None:
    """One error that names every feature the case needs and this version lacks."""
    missing = [f"{feature} ({_first(names)})" for feature, names in flags.unsupported.items()]
    if family not in FAMILIES:
        missing.append(f"family {family} ({' and '.join(FAMILIES)} are)")
    spec = flags.fields.get("given", {}).get("spec")
    if spec is not None and (family, spec) != ("bert", "local"):
        missing.append(f"a layer spec of the caller's own (--spec {spec})")
    if family == "bert" and "moe" in flags.fields:
        missing.append("experts in a BERT (--num-experts)")
    if family == "bert" and flags.fields.get("model", {}).get("disable_bias_linear"):
        missing.append("a BERT without biases (--disable-bias-linear)")
    if case.mode not in (None, "pretraining", "inference"):
        missing.append(f"MODE {case.mode} (pretraining and inference are)")
    if test_type not in ("regular", "ckpt-resume", "frozen-start"):
        missing.append(f"TEST_TYPE {test_type} (regular, ckpt-resume and frozen-start are)")
    if (case.mode == "inference") != (test_type == "frozen-start"):
        missing.append(f"MODE {case.mode or 'pretraining'} with TEST_TYPE {test_type}")
    inference = [name for name in ("inference", "engine") if name in flags.fields]
    if inference and case.mode != "inference":
        missing.append("flags of inference (in another MODE)")
    checkpoint_format = flags.fields.get("checkpoint", {}).get("format", "torch_dist")
    if checkpoint_format not in ("torch_dist", "torch"):
        missing.append(f"--ckpt-format {checkpoint_format} (torch_dist and torch are)")
    experts = [f"{name} {got}" for name in ("ep", "etp") if (got := getattr(layout, name)) > 1]
    if experts and "moe" not in flags.fields:
        missing.append(f"{', '.join(experts)} (there are no experts to cut)")
    if missing:
        raise ValueError(f"not supported by this version: {'; '.join(missing)}")


def _first(names: list[str]) -> str:
    more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
    return ", ".join(names[:3] + more)


def _model(flags: ParsedFlags, family: str) -> ModelConfig:
    values = dict(flags.fields.get("model", {}))
    given = flags.fields.get("given", {})
    if given.get("fp16") and given.get("bf16"):
        raise ValueError("--fp16 and --bf16 exclude each other: expected one of them")
    values["precision"] = "fp16" if given.get("fp16") else "bf16" if given.get("bf16") else "fp32"
    values.setdefault("vocab_size", VOCAB_SIZES[family])
    if "hidden_size" in values:
        values.setdefault("ffn_hidden_size", 4 * values["hidden_size"])
    if "moe" in flags.fields:
        values["moe"] = _moe(flags.fields["moe"], values.get("ffn_hidden_size"))
    return ModelConfig.build(**values)


def _moe(fields: dict[str, Any], mlp_width: int | None) -> MoeConfig:
    if "num_experts" not in fields:
        raise ValueError(f"moe: got {', '.join(sorted(fields))}, expected --num-experts with it")
    width = {} if mlp_width is None else {"ffn_hidden_size": mlp_width}
    return MoeConfig.build(**width | fields)


def _training(flags: ParsedFlags, layout: Layout, mode: str | None) -> TrainingConfig:
    values = dict(flags.fields.get("training", {}))
    if mode == "inference":
        # Nothing is trained; the steps that are judged are the generated tokens.
        tokens = flags.fields.get("inference", {}).get("num_tokens_to_generate")
        values |= {"train_iters": tokens or InferenceConfig.model_fields[TOKENS].default, "lr": 1.0}
    if "micro_batch_size" in values:
        values.setdefault("global_batch_size", values["micro_batch_size"] * layout.dp)
    if "train_iters" in values:
        values.setdefault("lr_decay_iters", values["train_iters"])
    return TrainingConfig.build(**values)


def _known_metrics(case: CaseFile, family: str, flags: ParsedFlags) -> tuple[str, ...]:
    if case.mode == "inference":
        return INFERENCE_METRICS
    return metrics_of(family, "moe" in flags.fields)


def _optimizer(flags: ParsedFlags, layout: Layout) -> OptimizerConfig:
    values = dict(flags.fields.get("optimizer", {}))
    if layout.zero1 is not None:
        values["use_distributed_optimizer"] = layout.zero1
        if not layout.zero1:
            # Without shards there is nothing to gather.
            values["overlap_param_gather"] = False
    return OptimizerConfig.build(**values)


def _data(flags: ParsedFlags, given: dict[str, Any]) -> DataConfig:
    values = dict(flags.fields.get("data", {}))
    data_path = given.get("data_path")
    if data_path is not None and "${" in data_path:
        flags.ignored.append(("--data-path", NO_DATA_VALUE))
    elif data_path is not None:
        if len(data_path.split()) != 1:
            raise ValueError(f"--data-path: got {data_path!r}, expected one prefix, not a mixture")
        values["prefix"] = Path(data_path)
    return DataConfig.build(**values)


def _metrics(case: CaseFile, flags: ParsedFlags, known: tuple[str, ...]) -> tuple[str, ...]:
    if case.metrics is None:
        return known
    for name in case.metrics:
        if name in UNJUDGED_METRICS:
            flags.ignored.append((f"METRICS {name}", UNJUDGED_METRICS[name]))
        elif name not in known:
            raise ValueError(f"METRICS: unknown {name!r}{close_match(name, frozenset(known))}")
    if case.mode == "inference":
        return known  # more than Megatron-LM judges
    return tuple(name for name in case.metrics if name in known)


def _with_data(scenario: Scenario, prefix: Path) -> Scenario:
    """The scenario on real data: the vocabulary follows the files."""
    # Reading data needs numpy and torch, which listing and checking cases must not wait for.
    from scenarios.data.bert import NUM_SPECIAL_TOKENS
    from scenarios.data.indexed import IndexedDataset

    dataset = IndexedDataset(prefix)
    dataset.verify()
    if scenario.family == "bert":
        vocab_size = -(-(dataset.vocab_size + NUM_SPECIAL_TOKENS) // WIDTH_STEP) * WIDTH_STEP
    else:
        vocab_size = -(-dataset.vocab_size // NUM_PARTS) * NUM_PARTS
    model = scenario.model.model_dump() | {"vocab_size": vocab_size}
    data = scenario.data.model_dump() | {"prefix": prefix.resolve()}
    return scenario.model_copy(
        update={"model": ModelConfig.build(**model), "data": DataConfig.build(**data)}
    )
