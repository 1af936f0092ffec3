"""Fields that every Hugging Face configuration may have, and what becomes of them."""

from scenarios.convert.family import HF, Fields, Ignored, Only, Row, whole

_GENERATION = Ignored("a setting of text generation")
_OUTPUT = Ignored("what a call of the model returns besides its numbers")
_TENSORFLOW = Ignored("a setting of TensorFlow models")
_TOKEN = Ignored("a token's number, known to the tokenizer")
TOKEN_CLASSIFICATION = "ForTokenClassification"
LANGUAGE_MODEL = ("ForCausalLM", "Model", "LMHeadModel", "ForConditionalGeneration")


def precision(hf: HF, fields: Fields) -> None:
    """The parameters' dtype; ``torch_dtype`` is its older name."""
    name = str(hf["dtype"] or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: got {name!r}, expected float32, bfloat16 or float16")
    fields.transformer |= {"bf16": name == "bfloat16", "fp16": name == "float16"}


def labels_tokens(hf: HF) -> bool:
    """Whether the head is one of token classification."""
    names = hf["architectures"]
    return isinstance(names, list | tuple) and any(
        str(name).endswith(TOKEN_CLASSIFICATION) for name in names
    )


def output_head(hf: HF, fields: Fields) -> None:
    """A language model, or one label for each token on top of the same layers."""
    names = hf["architectures"] or []
    if not isinstance(names, list | tuple) or len(names) > 1:
        raise ValueError(f"architectures: got {names!r}, expected a list of one class name")
    name = str(names[0]) if names else "ForCausalLM"
    if not names:
        fields.ignored["architectures"] = "none is named: a language model"
    labels = ("id2label", "label2id", "num_labels", "classifier_dropout")
    if not name.endswith(TOKEN_CLASSIFICATION):
        if not name.endswith(LANGUAGE_MODEL):
            raise ValueError(
                f"architectures: got {name!r}, which asks for another head; expected one that "
                f"ends with {', '.join((*LANGUAGE_MODEL, TOKEN_CLASSIFICATION))}"
            )
        fields.ignored |= dict.fromkeys(labels, "a setting of classification heads")
        return
    fields.ignored |= dict.fromkeys(("id2label", "label2id"), "only the number of labels counts")
    dropout = hf["classifier_dropout"]
    fields.head |= {
        "num_labels": labels_of(hf),
        "dropout": 0.1 if dropout is None else dropout,
    }
    fields.gpt_model["share_embeddings_and_output_weights"] = False
    fields.ignored["tie_word_embeddings"] = "there is no output embedding to tie"


def labels_of(hf: HF) -> int:
    """How many labels a classification head has.

    Raises:
        ValueError: the fields that say it contradict each other.
    """
    named = hf["id2label"] if hf["id2label"] is not None else {}
    ids = hf["label2id"] if hf["label2id"] is not None else {}
    if not isinstance(named, dict) or not isinstance(ids, dict):
        raise ValueError(f"id2label, label2id: got {named!r}, {ids!r}, expected objects")
    counts = {len(part) for part in (named, ids) if part}
    counts |= {whole(hf, "num_labels")} if hf["num_labels"] is not None else set()
    if len(counts) > 1:
        raise ValueError(
            f"num_labels, id2label and label2id: got {sorted(counts)} labels, expected one number"
        )
    return counts.pop() if counts else 2


EVERY_FAMILY: dict[str, Row] = {
    "dtype": (None, precision),
    **dict.fromkeys(("architectures", "id2label", "label2id"), (None, output_head)),
    **dict.fromkeys(("num_labels", "classifier_dropout"), (None, output_head)),
    "is_encoder_decoder": (False, Only((False,), "an encoder")),
    "is_decoder": (False, Only((False, True), "something else than a decoder")),
    "add_cross_attention": (False, Only((False,), "cross attention")),
    "tie_encoder_decoder": (False, Only((False,), "an encoder")),
    "cross_attention_hidden_size": (None, Only((None,), "cross attention")),
    "pruned_heads": (None, Only((None, {}), "pruned heads")),
    "quantization_config": (None, Only((None,), "quantized weights; convert them back first")),
    "auto_map": (None, Ignored("code that came with the file; the library's class is converted")),
    "_name_or_path": (None, Ignored("where the file came from")),
    "transformers_version": (None, Ignored("which library wrote the file")),
    "_attn_implementation_autoset": (None, Ignored("the kernel, not the model")),
    "attn_implementation": (None, Ignored("the kernel, not the model")),
    "_experts_implementation": (None, Ignored("the kernel, not the model")),
    "tokenizer_class": (None, Ignored("a setting of the tokenizer")),
    "chunk_size_feed_forward": (None, Ignored("computes the same numbers in pieces")),
    "pretraining_tp": (None, Ignored("computes the same numbers in pieces")),
    "problem_type": (None, Ignored("which loss a classification head gets")),
    "torchscript": (None, Ignored("how the model is exported")),
    "finetuning_task": (None, Ignored("what the model was trained for")),
    **dict.fromkeys(("tf_legacy_loss", "use_bfloat16"), (None, _TENSORFLOW)),
    "use_cache": (None, _GENERATION),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"), (None, _TOKEN)),
    "pad_token_id": (None, Ignored("a token's number; Megatron-LM masks padding in its loss")),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), (None, _OUTPUT)),
    **dict.fromkeys(("output_scores", "return_dict_in_generate"), (None, _OUTPUT)),
    **dict.fromkeys(
        (
            *("temperature", "top_k", "top_p", "typical_p", "do_sample", "early_stopping"),
            *("num_beams", "num_beam_groups", "num_return_sequences", "max_length", "min_length"),
            *("repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size"),
            *("encoder_no_repeat_ngram_size", "bad_words_ids", "remove_invalid_values"),
            *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "prefix"),
            *("begin_suppress_tokens", "exponential_decay_length_penalty"),
            *("decoder_start_token_id", "task_specific_params"),
        ),
        (None, _GENERATION),
    ),
}
"""Field -> its row; a family's own row for the same field goes before it."""
EVERY_ALIAS = {"torch_dtype": "dtype"}
