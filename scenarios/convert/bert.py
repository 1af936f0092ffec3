"""BERT (transformers.BertConfig): norms after the sums, token types, pooler and LM head.

megatron-core's BertModel takes it with the two modules of ``post_norm``.
"""

from scenarios.convert.every_family import labels_of
from scenarios.convert.family import HF, Family, Fields, Ignored, Only, whole
from scenarios.convert.gpt2 import ACTIVATIONS
from scenarios.convert.mapping import QKV, Copy, Mapped
from scenarios.convert.weight_names import BERT_LAYER, HF_BERT_LAYER

PRETRAINING = "BertForPreTraining"
HEADS: dict[str, dict[str, bool]] = {
    PRETRAINING: {"lm_head": True, "pooler": True, "binary_head": True},
    "BertForMaskedLM": {"lm_head": True, "pooler": False, "binary_head": False},
    "BertModel": {"lm_head": False, "pooler": True, "binary_head": False},
    "BertForTokenClassification": {"lm_head": False, "pooler": False, "binary_head": False},
}
"""Class -> which parts of BertModel it has after the layers."""


def heads_of_class(hf: HF, fields: Fields) -> None:
    """The class says which heads there are; an LM head shares the table of words."""
    names = hf["architectures"] or []
    if not isinstance(names, list | tuple) or len(names) > 1:
        raise ValueError(f"architectures: got {names!r}, expected a list of one class name")
    if not names:
        fields.ignored["architectures"] = f"none is named: {PRETRAINING}, which has every head"
    name = names[0] if names else PRETRAINING
    if name not in HEADS:
        raise ValueError(f"architectures: got {name!r}, expected one of {[*HEADS]}")
    fields.bert |= HEADS[name]
    labels = ("id2label", "label2id", "num_labels", "classifier_dropout")
    if name == "BertForTokenClassification":
        fields.ignored |= dict.fromkeys(labels[:2], "only the number of labels counts")
        dropout = hf["classifier_dropout"]
        fields.head |= {
            "num_labels": labels_of(hf),
            "dropout": hf["hidden_dropout_prob"] if dropout is None else dropout,
        }
    else:
        fields.ignored |= dict.fromkeys(labels, "a setting of classification heads")
    if HEADS[name]["lm_head"] and hf["tie_word_embeddings"] is not True:
        raise ValueError(
            f"tie_word_embeddings: got {hf['tie_word_embeddings']!r}, expected true: untied, the "
            "source holds two biases of the output and reads one"
        )
    if not HEADS[name]["lm_head"]:
        fields.ignored["tie_word_embeddings"] = "there is no output embedding to tie"
    fields.gpt_model["share_embeddings_and_output_weights"] = HEADS[name]["lm_head"]


def activation(hf: HF, fields: Fields) -> None:
    """GELU by erf or by tanh; BertLMHead has the former always."""
    name = hf["hidden_act"]
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act: got {name!r}, expected one of {[*ACTIVATIONS]}")
    if fields.bert["lm_head"] and ACTIVATIONS[name] != "gelu":
        raise ValueError(
            f"hidden_act: got {name!r}, expected 'gelu': the source's LM head has it too, and "
            "megatron-core's BertLMHead has gelu built in"
        )
    fields.transformer["activation_func"] = ACTIVATIONS[name]


def heads(hf: HF, fields: Fields) -> None:
    """A head is hidden_size / num_attention_heads."""
    hidden, num_heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
    if hidden % num_heads:
        raise ValueError(f"hidden_size: got {hidden}, expected a multiple of the {num_heads} heads")
    fields.transformer |= {
        "hidden_size": hidden,
        "num_attention_heads": num_heads,
        "num_query_groups": num_heads,
        "kv_channels": hidden // num_heads,
    }


def token_types(hf: HF, fields: Fields) -> None:
    """Megatron-LM takes 0 for no token types; the source has one at least."""
    fields.bert["num_tokentypes"] = whole(hf, "type_vocab_size")


def _pair(megatron: str, hf: str) -> dict[str, Mapped]:
    return {f"{megatron}.{kind}": Copy(f"{hf}.{kind}") for kind in ("weight", "bias")}


def _qkv(kind: str) -> Mapped:
    query, key, value = (
        f"{HF_BERT_LAYER}attention.self.{n}.{kind}" for n in ("query", "key", "value")
    )
    return QKV((query, key, value))


_UNREAD = Ignored("the source does not read it")
FAMILY = Family(
    model_type="bert",
    table={
        "vocab_size": (30522, "gpt_model.vocab_size"),
        "hidden_size": (768, heads),
        "num_attention_heads": (12, heads),
        "num_hidden_layers": (12, "transformer.num_layers"),
        "intermediate_size": (3072, "transformer.ffn_hidden_size"),
        **dict.fromkeys(("architectures", "id2label", "label2id"), (None, heads_of_class)),
        **dict.fromkeys(("num_labels", "classifier_dropout"), (None, heads_of_class)),
        "tie_word_embeddings": (True, heads_of_class),
        "hidden_act": ("gelu", activation),
        "hidden_dropout_prob": (0.1, "transformer.hidden_dropout"),
        "attention_probs_dropout_prob": (0.1, "transformer.attention_dropout"),
        "max_position_embeddings": (512, "gpt_model.max_sequence_length"),
        "position_embedding_type": ("absolute", Only(("absolute",), "relative positions")),
        "type_vocab_size": (2, token_types),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "layer_norm_eps": (1e-12, "transformer.layernorm_epsilon"),
        "is_decoder": (False, Only((False,), "a decoder")),
        "directionality": (None, Only((None, "bidi"), "attention to one side")),
        "pooler_type": (None, Only((None, "first_token_transform"), "another pooler")),
        **dict.fromkeys(("pooler_fc_size", "pooler_num_attention_heads"), (None, _UNREAD)),
        **dict.fromkeys(("pooler_num_fc_layers", "pooler_size_per_head"), (None, _UNREAD)),
        "gradient_checkpointing": (None, Ignored("computes the same numbers twice")),
    },
    constants={
        "transformer.normalization": "LayerNorm",
        "transformer.gated_linear_unit": False,
        "transformer.add_bias_linear": True,
        "transformer.add_qkv_bias": True,
        "gpt_model.position_embedding_type": "learned_absolute",
    },
    weights={
        "embedding.word_embeddings.weight": Copy("{base}embeddings.word_embeddings.weight"),
        "embedding.position_embeddings.weight": Copy("{base}embeddings.position_embeddings.weight"),
        "embedding.tokentype_embeddings.weight": Copy(
            "{base}embeddings.token_type_embeddings.weight"
        ),
        **_pair("embedding.embedding_dropout.norm", "{base}embeddings.LayerNorm"),
        f"{BERT_LAYER}self_attention.linear_qkv.weight": _qkv("weight"),
        f"{BERT_LAYER}self_attention.linear_qkv.bias": _qkv("bias"),
        **_pair(
            f"{BERT_LAYER}self_attention.linear_proj", f"{HF_BERT_LAYER}attention.output.dense"
        ),
        **_pair(f"{BERT_LAYER}self_attn_bda.norm", f"{HF_BERT_LAYER}attention.output.LayerNorm"),
        **_pair(f"{BERT_LAYER}mlp.linear_fc1", f"{HF_BERT_LAYER}intermediate.dense"),
        **_pair(f"{BERT_LAYER}mlp.linear_fc2", f"{HF_BERT_LAYER}output.dense"),
        **_pair(f"{BERT_LAYER}mlp_bda.norm", f"{HF_BERT_LAYER}output.LayerNorm"),
        **_pair("lm_head.dense", "cls.predictions.transform.dense"),
        **_pair("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
        "output_layer.bias": Copy("cls.predictions.bias"),
        **_pair("pooler.dense", "{base}pooler.dense"),
        **_pair("binary_head", "cls.seq_relationship"),
    },
    bases=("bert.", ""),
    label_layer="classifier",
    old_endings={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    copies={
        "cls.predictions.decoder.weight": "{base}embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)
