"""What a field becomes in each family, and what is refused."""

from typing import Any

import pytest
from transformers import AutoConfig

from scenarios.convert import convert
from tests.convert_cases import DEEPSEEK_YARN, LLAMA3, published

Config = dict[str, Any]


# What converters in use were measured to get wrong, each on a configuration where it counts.
@pytest.mark.parametrize(
    ("model_type", "change", "expected"),
    [
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0}}, {"rope_scaling_factor": 32.0}),
        ("llama", {}, {"rope_scaling": True, "seq_len_interpolation_factor": None}),
        (
            "llama",
            {"rope_scaling": None, "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
            {"rope_scaling": True, "rotary_base": 500000},
        ),
        (
            "qwen2",
            {"rope_theta": None, "rope_parameters": {**DEEPSEEK_YARN, "rope_theta": 10000.0}},
            {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 40.0},
        ),
        ("mixtral", {}, {"moe_router_pre_softmax": False}),
        ("qwen3_moe", {}, {"moe_router_pre_softmax": False}),
        ("qwen3_moe", {"norm_topk_prob": False}, {"moe_router_pre_softmax": True}),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4},
            {"moe_layer_freq": (0, 0, 0, 1)},
        ),
        ("deepseek_v3", {}, {"moe_router_num_groups": 8, "moe_router_group_topk": 4}),
        ("gpt_oss", {"swiglu_limit": 5.0}, {"activation_func_clamp_value": 5.0}),
        ("gpt_oss", {"sliding_window": 64}, {"window_size": (63, 0)}),
        ("glm4_moe", {}, {"rotary_percent": 0.5, "add_qkv_bias": True}),
        ("qwen2_5_vl", {}, {"position_embedding_type": "mrope", "mrope_section": (16, 24, 24)}),
        ("gpt2", {}, {"position_embedding_type": "learned_absolute", "kv_channels": 64}),
        ("gemma", {}, {"embedding_scale": 2048**0.5, "layernorm_zero_centered_gamma": True}),
        ("gemma", {"hidden_act": "gelu"}, {"activation_func": "openai_gelu"}),
        ("gemma2", {}, {"softmax_scale": 1 / 12, "attention_softcap": 50.0, "logit_softcap": 30.0}),
        ("gemma3", {}, {"seq_len_interpolation_factor": 8.0, "local_rotary_base": 10000}),
        ("gemma3_text", {}, {"window_attn_skip_freq": ((1,) * 5 + (0,)) * 4 + (1, 1)}),
        ("glm4", {}, {"rotary_percent": 0.5, "rotary_interleaved": True, "post_norms": True}),
        ("olmoe", {}, {"qk_layernorm": False, "all_heads_qk_norm": True}),
        (
            "qwen3_next",
            {"num_hidden_layers": 4},
            {"linear_attention_freq": (1, 1, 1, 0), "attention_output_gate": True},
        ),
        ("qwen3_next", {}, {"rotary_percent": 0.25, "moe_shared_expert_gate": True}),
    ],
)
def test_what_other_converters_lose(
    model_type: str, change: Config, expected: dict[str, Any]
) -> None:
    model = convert(published(model_type) | change)
    fields = model.transformer.model_dump() | model.gpt_model.model_dump()
    fields |= model.extra.model_dump() if model.extra is not None else {}
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("model_type", "change", "expected"),
    [
        ("llama", {"attention_bias": True}, "attention_bias True and mlp_bias False"),
        ("qwen3", {"attention_bias": True}, "a bias on all four projections"),
        ("mixtral", {"num_experts_per_tok": 1}, "of which a softmax is always 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "expected at most 8 experts"),
        ("mixtral", {"router_jitter_noise": 0.1}, "noise"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "set norm_topk_prob to false"),
        ("qwen3_moe", {"mlp_only_layers": [48]}, "expected a layer below 48"),
        ("qwen3_moe", {"decoder_sparse_step": 49}, "leave no layer of experts"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok: got None"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            "would choose other experts",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "which the source's router does not compute"),
        ("deepseek_v3", {"n_group": 7}, "expected a divisor of the 256 experts"),
        ("deepseek_v3", {"topk_group": 9}, "expected at most n_group = 8"),
        ("deepseek_v3", {"num_experts_per_tok": 4}, "would choose other experts"),
        ("deepseek_v3", {"norm_topk_prob": False}, "expected true and 2 or more"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "the source norms latent vectors"),
        ("deepseek_v3", {"attention_bias": True}, "biases in latent attention"),
        ("deepseek_v3", {"rope_interleave": False}, "rotated halves"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("deepseek_v3", {"num_key_value_heads": 64}, "latent attention has no groups"),
        ("glm4_moe", {"head_dim": None}, "or give head_dim"),
        ("glm4_moe", {"head_dim": 126}, "rotates 63 of 126"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "another slope"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "expected 24 of"),
        ("gpt_oss", {"experts_per_token": 3}, "two spellings of one field"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "expected one of ['BertForPreTraining'"),
        ("bert", {"is_decoder": True}, "a decoder"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative positions"),
        ("bert", {"hidden_act": "gelu_new"}, "BertLMHead has gelu built in"),
        ("bert", {"hidden_act": "relu"}, "hidden_act: got 'relu'"),
        ("bert", {"tie_word_embeddings": False}, "two biases of the output and reads one"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size: got 0"),
        ("bert", {"hidden_size": 1000}, "expected a multiple of the 16 heads"),
        ("gpt2", {"embd_pdrop": 0.0}, "one hidden_dropout for both"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "divided by the layer's number"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: got 'relu'"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "rope type 'su'"),
        ("qwen2_5_vl", {"rope_scaling": None}, "mrope_section: got None"),
        ("qwen2_5_vl", {"text_config": {"hidden_size": 1}}, "and 1 in text_config"),
        ("gemma", {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("gemma", {"hidden_act": "silu"}, "another activation than tanh-GELU"),
        ("gemma", {"attention_bias": True}, "a bias on all four projections"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "expected a positive number or none"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "expected a positive number"),
        ("gemma2", {"layer_types": ["full_attention"]}, "expected 46 of"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "the source's class does not compute"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window: got None"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "expected objects"),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "in layers with a window, too",
        ),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "expected rope_type"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope of layers with a window: got type 'linear'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 500.0}}},
            "rope_theta: got 10000 and 500.0",
        ),
        ("gemma3", {"text_config": {"head_dim": 0}}, "head_dim: got 0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "the source's class does not compute"),
        ("glm4", {"partial_rotary_factor": 1.0, "rope_scaling": DEEPSEEK_YARN}, "neighbours"),
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "expected 48 of"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 48}, "full_attention_interval 4 says"),
        ("qwen3_next", {"linear_num_value_heads": 24}, "expected a multiple of linear_num_key"),
        ("qwen3_next", {"attention_bias": True}, "a bias on all four projections"),
        ("olmoe", {"clip_qkv": 8.0}, "clipped queries, keys and values"),
        ("mistral", {"layer_types": ["sliding_attention"] * 32}, "some layers only"),
    ],
)
def test_refused(model_type: str, change: Config, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        convert(published(model_type) | change)
    assert expected in str(caught.value)


def test_ties_of_a_text_model_inside_a_larger_one() -> None:
    config = published("qwen2_5_vl")

    def tied(outer: bool, inner: bool, version: str) -> bool:
        around = {"tie_word_embeddings": outer, "transformers_version": version}
        text = {"text_config": {"tie_word_embeddings": inner}}
        return convert(config | around | text).gpt_model.share_embeddings_and_output_weights

    assert not tied(True, False, "4.57.1"), "transformers 4 reads the text model's"
    assert tied(False, True, "4.57.1")
    assert tied(False, True, "5.23.0")
    with pytest.raises(ValueError, match="tie_word_embeddings: got True, and False in text_config"):
        tied(True, False, "5.23.0")


def test_the_text_model_of_gemma_3_with_images() -> None:
    source = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 12})
    inside, alone = convert(source), convert(source.text_config)
    assert inside.model_type == "gemma3"
    assert alone == inside.model_copy(
        update={"model_type": "gemma3_text", "ignored": alone.ignored}
    )
    assert "the text model is converted" in inside.ignored["vision_config"]
