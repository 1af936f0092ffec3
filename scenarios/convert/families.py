"""The families that are converted, and those that Megatron-LM cannot express."""

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
)
from scenarios.convert.family import Family
from scenarios.flags import close_match

_MODULES = (
    *(bert, gpt2, llama, mistral, mixtral, qwen2, qwen2_moe, qwen2_5_vl, qwen3, qwen3_moe),
    *(phi3, deepseek_v2, deepseek_v3, glm4_moe, gpt_oss),
    *(gemma, gemma2, gemma3_text, gemma3, glm4, olmoe),
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
FAMILIES["qwen2_5_vl_text"] = FAMILIES["qwen2_5_vl"]

REFUSED: dict[str, str] = {
    "qwen3_next": "gated delta net layers, which megatron-core computes with "
    "flash-linear-attention on a GPU only; nothing here could prove them",
}
"""model_type -> what the model has that Megatron-LM's GPTModel has not."""


def family_of(model_type: object) -> Family:
    """The table of a ``model_type``.

    Raises:
        ValueError: it is unknown, or Megatron-LM cannot express it.
    """
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ValueError(
            f"model_type {model_type!r} is not supported: the model has {REFUSED[model_type]}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type: got {model_type!r}, expected one of {sorted(FAMILIES)}"
            f"{close_match(str(model_type), FAMILIES)}"
        )
    return FAMILIES[model_type]
