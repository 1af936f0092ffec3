"""GPT-2 (transformers.GPT2Config): learned positions, LayerNorm, biases, tied embeddings."""

from scenarios.convert.family import HF, Family, Fields, Ignored, Only, whole
from scenarios.convert.mapping import Copy, FusedQKV, Mapped, Transposed
from scenarios.convert.weight_names import LAYER

_HF = "{base}h.{layer}."
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "openai_gelu"),
    "gelu": "gelu",
}


def inner_size(hf: HF, fields: Fields) -> None:
    """n_inner may be left to be 4 n_embd, and a head is n_embd / n_head."""
    hidden, heads = whole(hf, "n_embd"), whole(hf, "n_head")
    if hidden % heads:
        raise ValueError(f"n_embd: got {hidden}, expected a multiple of the {heads} heads")
    inner = 4 * hidden if hf["n_inner"] is None else whole(hf, "n_inner")
    fields.transformer |= {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "ffn_hidden_size": inner,
    }


def one_dropout(hf: HF, fields: Fields) -> None:
    """Megatron-LM drops embeddings and residuals with one probability."""
    if hf["resid_pdrop"] != hf["embd_pdrop"]:
        raise ValueError(
            f"resid_pdrop {hf['resid_pdrop']} and embd_pdrop {hf['embd_pdrop']}: Megatron-LM has "
            "one hidden_dropout for both; expected the same"
        )
    fields.transformer["hidden_dropout"] = hf["resid_pdrop"]


def activation(hf: HF, fields: Fields) -> None:
    """GELU by tanh or by erf."""
    name = hf["activation_function"]
    if name not in ACTIVATIONS:
        raise ValueError(f"activation_function: got {name!r}, expected one of {[*ACTIVATIONS]}")
    fields.transformer["activation_func"] = ACTIVATIONS[name]


def _norm(megatron: str, hf: str) -> dict[str, Mapped]:
    return {f"{megatron}.{kind}": Copy(f"{hf}.{kind}") for kind in ("weight", "bias")}


def _linear(megatron: str, hf: str) -> dict[str, Mapped]:
    return {
        f"{megatron}.weight": Transposed(f"{hf}.weight"),
        f"{megatron}.bias": Copy(f"{hf}.bias"),
    }


_SUMMARY = Ignored("a setting of GPT2DoubleHeadsModel's second head, which no language model has")
FAMILY = Family(
    model_type="gpt2",
    table={
        "vocab_size": (50257, "gpt_model.vocab_size"),
        "n_positions": (1024, "gpt_model.max_sequence_length"),
        "n_embd": (768, inner_size),
        "n_head": (12, inner_size),
        "n_inner": (None, inner_size),
        "n_layer": (12, "transformer.num_layers"),
        "activation_function": ("gelu_new", activation),
        "resid_pdrop": (0.1, one_dropout),
        "embd_pdrop": (0.1, one_dropout),
        "attn_pdrop": (0.1, "transformer.attention_dropout"),
        "layer_norm_epsilon": (1e-5, "transformer.layernorm_epsilon"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "tie_word_embeddings": (True, "gpt_model.share_embeddings_and_output_weights"),
        "scale_attn_weights": (True, Only((True,), "scores that are not divided by sqrt(head)")),
        "scale_attn_by_inverse_layer_idx": (
            *(False, Only((False,), "scores divided by the layer's number")),
        ),
        "reorder_and_upcast_attn": (
            False,
            Ignored("the order of a product, and fp32 in fp16 runs"),
        ),
        "n_ctx": (None, Ignored("an older name of n_positions, which the source does not read")),
        "summary_type": ("cls_index", _SUMMARY),
        "summary_use_proj": (True, _SUMMARY),
        "summary_activation": (None, _SUMMARY),
        "summary_proj_to_labels": (True, _SUMMARY),
        "summary_first_dropout": (0.1, _SUMMARY),
    },
    constants={
        "transformer.normalization": "LayerNorm",
        "transformer.gated_linear_unit": False,
        "transformer.add_bias_linear": True,
        "transformer.add_qkv_bias": True,
        "gpt_model.position_embedding_type": "learned_absolute",
    },
    weights={
        "embedding.word_embeddings.weight": Copy("{base}wte.weight"),
        "embedding.position_embeddings.weight": Copy("{base}wpe.weight"),
        **_norm(f"{LAYER}input_layernorm", f"{_HF}ln_1"),
        f"{LAYER}self_attention.linear_qkv.weight": FusedQKV(f"{_HF}attn.c_attn.weight", True),
        f"{LAYER}self_attention.linear_qkv.bias": FusedQKV(f"{_HF}attn.c_attn.bias"),
        **_linear(f"{LAYER}self_attention.linear_proj", f"{_HF}attn.c_proj"),
        **_norm(f"{LAYER}pre_mlp_layernorm", f"{_HF}ln_2"),
        **_linear(f"{LAYER}mlp.linear_fc1", f"{_HF}mlp.c_fc"),
        **_linear(f"{LAYER}mlp.linear_fc2", f"{_HF}mlp.c_proj"),
        **_norm("decoder.final_layernorm", "{base}ln_f"),
        "output_layer.weight": Copy("lm_head.weight"),
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    bases=("transformer.", ""),
)
