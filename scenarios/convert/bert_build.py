"""A converted BERT as megatron-core's own BertModel, with the two modules of ``post_norm``."""

import copy
from typing import Any

from scenarios.convert.heads import AsTheyAre, LabelHead, StatesForLogits
from scenarios.convert.megatron import MegatronModel
from scenarios.convert.post_norm import NormThenDropout, SumThenNorm


def bert_arguments(model: MegatronModel) -> dict[str, Any]:
    """What BertModel takes besides the configuration and the layer specification."""
    assert model.bert is not None
    return model.gpt_model.model_dump(exclude_unset=True) | {
        "num_tokentypes": model.bert.num_tokentypes,
        "add_binary_head": model.bert.pooler,
    }


def bert_layer_spec(config: Any, *, use_transformer_engine: bool = True) -> Any:
    """The specification of a layer that norms after its sums.

    Args:
        config: the TransformerConfig.
        use_transformer_engine: its linear layers and norms, or megatron-core's.
    """
    from megatron.core.models.bert import bert_layer_specs
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    norm = bert_norm(use_transformer_engine)
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        spec = copy.deepcopy(bert_layer_specs.get_bert_layer_with_transformer_engine_spec())
        # Their default has a norm in front.
        spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        spec.submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    else:
        spec = copy.deepcopy(bert_layer_specs.bert_layer_local_spec)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attn_bda = layer.mlp_bda = ModuleSpec(SumThenNorm, {"config": config, "norm": norm})
    layer.sharded_state_dict_keys_map = {}
    return spec


def bert_model(
    model: MegatronModel, config: Any, *, use_transformer_engine: bool = True, **choices: Any
) -> Any:
    """The BertModel, or a pipeline stage of it.

    Args:
        model: the converted model.
        config: its ``transformer_config``.
        use_transformer_engine: as of ``bert_layer_spec``.
        choices: further arguments of BertModel: pre_process, post_process, vp_stage.
    """
    from megatron.core.models.bert.bert_model import BertModel

    spec = bert_layer_spec(config, use_transformer_engine=use_transformer_engine)
    built = BertModel(config, transformer_layer_spec=spec, **bert_arguments(model), **choices)
    if built.pre_process:
        norm = bert_norm(use_transformer_engine)
        built.embedding.embedding_dropout = NormThenDropout(config, norm)
    if built.post_process:
        built.encoder.final_layernorm = None  # Each layer's sum is normed, so the last one's, too.
        _take_heads_out(built, model)
    return built


def bert_norm(use_transformer_engine: bool) -> Any:
    """The class of the norms."""
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    from megatron.core.models.bert.bert_layer_specs import LNImpl

    return LNImpl


def _take_heads_out(built: Any, model: MegatronModel) -> None:
    assert model.bert is not None
    if not model.bert.lm_head:
        built.lm_head, built.output_layer = AsTheyAre(), StatesForLogits()
    if not model.bert.binary_head:
        built.binary_head = AsTheyAre() if model.bert.pooler else None
    if model.head is not None:
        built.output_layer = LabelHead(model.transformer.hidden_size, model.head)
