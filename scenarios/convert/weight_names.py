"""Hugging Face's names of a decoder's tensors, as most families write them."""

from scenarios.convert.mapping import QKV, Copy, Mapped, Stacked

LAYER, HF_LAYER = "decoder.layers.{layer}.", "{base}layers.{layer}."
BERT_LAYER, HF_BERT_LAYER = "encoder.layers.{layer}.", "{base}encoder.layer.{layer}."
PREDICTOR = "mtp.layers.{layer}."
"""A module of multi-token prediction; its layer counts on after the model's in the source."""
PREDICTOR_LAYER = f"{PREDICTOR}transformer_layer."
ATTENTION, HF_ATTENTION = f"{LAYER}self_attention.", f"{HF_LAYER}self_attn."
AFTER_ATTENTION = f"{ATTENTION}linear_proj.post_layernorm.weight"
AFTER_MLP = f"{LAYER}mlp.linear_fc2.post_layernorm.weight"

HEAD: dict[str, Mapped] = {
    "embedding.word_embeddings.weight": Copy("{base}embed_tokens.weight"),
    "decoder.final_layernorm.weight": Copy("{base}norm.weight"),
    "output_layer.weight": Copy("lm_head.weight"),
}
PREDICTION: dict[str, Mapped] = {
    f"{PREDICTOR}enorm.weight": Copy(f"{HF_LAYER}enorm.weight"),
    f"{PREDICTOR}hnorm.weight": Copy(f"{HF_LAYER}hnorm.weight"),
    f"{PREDICTOR}eh_proj.weight": Copy(f"{HF_LAYER}eh_proj.weight"),
    f"{PREDICTOR}final_layernorm.weight": Copy(f"{HF_LAYER}shared_head.norm.weight"),
}
NORMS: dict[str, Mapped] = {
    f"{LAYER}input_layernorm.weight": Copy(f"{HF_LAYER}input_layernorm.weight"),
    f"{LAYER}pre_mlp_layernorm.weight": Copy(f"{HF_LAYER}post_attention_layernorm.weight"),
}
QUERY_KEY_NORMS: dict[str, Mapped] = {
    f"{ATTENTION}q_layernorm.weight": Copy(f"{HF_ATTENTION}q_norm.weight"),
    f"{ATTENTION}k_layernorm.weight": Copy(f"{HF_ATTENTION}k_norm.weight"),
}


def sandwich_norms(after_attention: str, before_mlp: str, after_mlp: str) -> dict[str, Mapped]:
    """Norms on both sides of attention and MLP; those after them belong to their last linear."""
    return {
        f"{LAYER}input_layernorm.weight": Copy(f"{HF_LAYER}input_layernorm.weight"),
        AFTER_ATTENTION: Copy(f"{HF_LAYER}{after_attention}.weight"),
        f"{LAYER}pre_mlp_layernorm.weight": Copy(f"{HF_LAYER}{before_mlp}.weight"),
        AFTER_MLP: Copy(f"{HF_LAYER}{after_mlp}.weight"),
    }


def attention(kind: str = "weight") -> dict[str, Mapped]:
    """The four projections: their weights, or their biases."""
    names = [f"{HF_ATTENTION}{letter}_proj.{kind}" for letter in "qkv"]
    return {
        f"{ATTENTION}linear_qkv.{kind}": QKV((names[0], names[1], names[2])),
        f"{ATTENTION}linear_proj.{kind}": Copy(f"{HF_ATTENTION}o_proj.{kind}"),
    }


def gated_mlp(megatron: str = "mlp.", hf: str = "mlp.", kind: str = "weight") -> dict[str, Mapped]:
    """Gate, up and down projections of the MLP below these names."""
    names = [f"{HF_LAYER}{hf}{part}_proj.{kind}" for part in ("gate", "up", "down")]
    return {
        f"{LAYER}{megatron}linear_fc1.{kind}": Stacked((names[0], names[1])),
        f"{LAYER}{megatron}linear_fc2.{kind}": Copy(names[2]),
    }


ROUTER: dict[str, Mapped] = {f"{LAYER}mlp.router.weight": Copy(f"{HF_LAYER}mlp.gate.weight")}
EXPERTS = ROUTER | gated_mlp("mlp.experts.local_experts.{expert}.", "mlp.experts.{expert}.")
DENSE_DECODER = HEAD | NORMS | attention() | gated_mlp()
