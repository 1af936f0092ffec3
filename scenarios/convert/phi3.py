"""Phi-3 and Phi-4-mini (transformers.Phi3Config): Llama with fused projections."""

from scenarios.convert.attention import heads, one_window
from scenarios.convert.family import Family, Ignored, Only
from scenarios.convert.gpt2 import one_dropout
from scenarios.convert.mapping import Copy, FusedQKV
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import HEAD, HF_LAYER, LAYER, NORMS

FAMILY = Family(
    model_type="phi3",
    table={
        "vocab_size": (32064, "gpt_model.vocab_size"),
        "hidden_size": (3072, "transformer.hidden_size"),
        "intermediate_size": (8192, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (32, "transformer.num_layers"),
        "num_attention_heads": (32, heads),
        "num_key_value_heads": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (4096, "gpt_model.max_sequence_length"),
        "original_max_position_embeddings": (
            *(4096, Ignored("read for longrope only, which is refused")),
        ),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-5, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "resid_pdrop": (0.0, one_dropout),
        "embd_pdrop": (0.0, one_dropout),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "attention_bias": (False, Only((False,), "biases, which the source's class has not")),
        "sliding_window": (None, one_window),
        **rope_rows(Unsaid(rotates_parts=True)),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
    },
    weights=HEAD
    | NORMS
    | {
        f"{LAYER}self_attention.linear_qkv.weight": FusedQKV(
            f"{HF_LAYER}self_attn.qkv_proj.weight"
        ),
        f"{LAYER}self_attention.linear_proj.weight": Copy(f"{HF_LAYER}self_attn.o_proj.weight"),
        f"{LAYER}mlp.linear_fc1.weight": Copy(f"{HF_LAYER}mlp.gate_up_proj.weight"),
        f"{LAYER}mlp.linear_fc2.weight": Copy(f"{HF_LAYER}mlp.down_proj.weight"),
    },
)
