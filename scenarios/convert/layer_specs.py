"""Layer specifications for Megatron-LM's ``--spec scenarios.convert.layer_specs NAME``.

Of Transformer Engine's modules where that is installed, of megatron-core's own elsewhere.
"""

from typing import Any

from megatron.core.models.gpt import gpt_layer_specs

from scenarios.convert.extra import extend_layer
from scenarios.convert.megatron import ExtraModules


def _layer(extra: ExtraModules, num_experts: int | None = None) -> Any:
    if gpt_layer_specs.HAVE_TE:
        stock = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts)
        return extend_layer(stock, extra, gpt_layer_specs.TENorm)
    stock = gpt_layer_specs.get_gpt_layer_local_spec(num_experts, normalization="RMSNorm")
    return extend_layer(stock, extra, stock.submodules.input_layernorm)


post_norms = _layer(ExtraModules(post_norms=True))
all_heads_qk_norm_moe = _layer(
    ExtraModules(all_heads_qk_norm=True),
    num_experts=1,  # read as "some": TransformerConfig has the number
)
