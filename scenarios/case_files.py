"""Where cases lie and how their YAML files are read: Megatron-LM's keys plus RANKS."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scenarios.flags import close_match

CASES = Path(__file__).parent / "cases"
CONFIG = "model_config.yaml"
ALIASES = {
    "S1": "gpt3_mcore_tp1_pp1_resume_torch_dist_dist_optimizer_overlap_grad_reduce_param_gather",
    "S2": "gpt3_moe_mcore_te_tp4_ep2_etp2_pp2_resume_torch_dist_dist_optimizer",
    "S3": "gpt_dynamic_inference_tp2_pp2_dp2_583m_logitsmatch_zmq",
    "S4": "bert_mcore_tp2_pp2_resume_torch_dist_local_spec",
}
FAMILIES = ("gpt", "moe", "bert", "t5", "hybrid", "multimodal-llava", "mixtral")
"""Megatron-LM's folders of cases; a file that lies in none of them is a gpt case."""

IGNORED_ENVIRONMENT = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "NVTE_APPLY_QK_LAYER_SCALING",
    "NCCL_ALGO",
    "CUBLAS_WORKSPACE_CONFIG",
    "SKIP_PYTEST",
    "N_REPEAT",
)
IGNORED_KEYS = {"LAUNCHER": "ranks are started by the test bed or by torchrun, mpirun or srun"}
KEYS = frozenset(
    {"ENV_VARS", "MODEL_ARGS", "TEST_TYPE", "METRICS", "MODE", "RANKS", *IGNORED_KEYS},
)
ENVIRONMENT_REASON = "an environment variable of the GPU libraries, which changes no number here"


@dataclass
class CaseFile:
    """One YAML file, its keys checked, its flags not yet understood."""

    path: Path
    model_args: dict[str, object] = field(default_factory=dict)
    test_type: str | None = None
    mode: str | None = None
    metrics: tuple[str, ...] | None = None
    ranks: int | None = None
    ignored: list[tuple[str, str]] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def case_folders() -> Iterator[Path]:
    """The folders of the cases that come with this package, sorted."""
    return iter(sorted(path.parent for path in CASES.glob(f"*/*/{CONFIG}")))


def find_case(case_or_path: str) -> Path:
    """The model_config.yaml that a name, an alias or a path means.

    Args:
        case_or_path: name of a shipped case, ``S1``, a model_config.yaml or its folder.
    Returns:
        The file.
    Raises:
        ValueError: there is no such case or file.
    """
    shipped = {folder.name: folder / CONFIG for folder in case_folders()}
    name = ALIASES.get(case_or_path.upper(), case_or_path)
    if name in shipped:
        return shipped[name]
    path = Path(case_or_path)
    if path.is_dir():
        path = path / CONFIG
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.parent.name:
        raise ValueError(f"case {case_or_path}: no such file: {path}")
    hint = close_match(name, frozenset(shipped) | frozenset(ALIASES))
    raise ValueError(
        f"case {case_or_path!r} is unknown{hint or '; known: ' + ', '.join(sorted(ALIASES))}"
    )


def alias_of(name: str) -> str | None:
    """The short name of a shipped case, or None."""
    return next((alias for alias, full in ALIASES.items() if full == name), None)


def family_of(path: Path) -> str:
    """The family a case file belongs to, by its folder as in Megatron-LM."""
    folder = path.resolve().parent.parent.name
    return folder if folder in FAMILIES else "gpt"


def read_case_file(path: Path) -> CaseFile:
    """Read one YAML file.

    Args:
        path: a model_config.yaml or a scale's overrides.
    Returns:
        Its keys, checked for name and type.
    Raises:
        ValueError: unreadable, not YAML, an unknown key, or a value of the wrong type.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise ValueError(f"{path}:{line} not valid YAML: {problem}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected keys like MODEL_ARGS")
    case = CaseFile(path)
    for key in content:
        if isinstance(key, str) and key.startswith("MODEL_ARGS_"):
            raise ValueError(
                f"{path}: {key}: other arguments for one of the runs are not supported"
            )
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{close_match(str(key), KEYS)}")
        if key in IGNORED_KEYS:
            case.ignored.append((key, IGNORED_KEYS[key]))
    case.model_args = _mapping(content, "MODEL_ARGS", path)
    for name in _mapping(content, "ENV_VARS", path):
        if name not in IGNORED_ENVIRONMENT:
            hint = close_match(name, frozenset(IGNORED_ENVIRONMENT))
            raise ValueError(f"{path}: ENV_VARS: unknown variable {name!r}{hint}")
        case.ignored.append((name, ENVIRONMENT_REASON))
    case.test_type = _typed(content, "TEST_TYPE", str, path)
    case.mode = _typed(content, "MODE", str, path)
    case.ranks = _typed(content, "RANKS", int, path)
    metrics = _typed(content, "METRICS", list, path)
    if metrics is not None:
        case.metrics = tuple(str(name) for name in metrics)
    return case


def _mapping(content: dict[Any, Any], key: str, path: Path) -> dict[str, object]:
    value = _typed(content, key, dict, path) or {}
    return {str(name): item for name, item in value.items()}


def _typed(content: dict[Any, Any], key: str, kind: type, path: Path) -> Any:
    value = content.get(key)
    if key in content and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{path}: {key}: got {value!r}, expected {kind.__name__}")
    return value
