"""The families that are converted."""

from scenarios.convert import (
    bert,
    deepseek_v2,
    deepseek_v3,
    gemma,
    gemma2,
    gemma3,
    gemma3_text,
    glm4,
    glm4_moe,
    gpt2,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    phi3,
    qwen2,
    qwen2_5_vl,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from scenarios.convert.family import Family
from scenarios.flags import close_match

_MODULES = (
    *(bert, gpt2, llama, mistral, mixtral, qwen2, qwen2_moe, qwen2_5_vl, qwen3, qwen3_moe),
    *(phi3, deepseek_v2, deepseek_v3, glm4_moe, gpt_oss),
    *(gemma, gemma2, gemma3_text, gemma3, glm4, olmoe, qwen3_next),
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
FAMILIES["qwen2_5_vl_text"] = FAMILIES["qwen2_5_vl"]


def family_of(model_type: object) -> Family:
    """The table of a ``model_type``.

    Raises:
        ValueError: it is unknown.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type: got {model_type!r}, expected one of {sorted(FAMILIES)}"
            f"{close_match(str(model_type), FAMILIES)}"
        )
    return FAMILIES[model_type]
