"""What a family's table is made of: a rule for every field of its Hugging Face configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fields:
    """The Megatron fields collected so far."""

    transformer: dict[str, Any] = field(default_factory=dict)
    gpt_model: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Only:
    """A field of which only some values can be converted, and which then sets nothing."""

    values: tuple[Any, ...]
    meaning: str
    """What another value would ask for."""


@dataclass(frozen=True)
class Together:
    """A field that ``Family.combine`` reads along with others."""


Rule = str | Only | Together
"""A text is the target: "transformer.num_layers" or "gpt_model.vocab_size"; the value is copied."""


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is converted."""

    model_type: str
    defaults: Mapping[str, Any]
    """What the source's own class assumes for a field its file leaves out."""
    rules: Mapping[str, Rule]
    irrelevant: Mapping[str, str]
    """Field -> why it says nothing about the model's numbers."""
    constants: Mapping[str, Any]
    """Target -> value that every model of the family has."""
    combine: Callable[[Mapping[str, Any], Fields], None]
    """Converts the fields marked Together."""


_GENERATION = "a setting of text generation"
_OUTPUT = "what a call of the model returns besides its numbers"
_LABELS = "a setting of classification heads, which are refused"

IRRELEVANT: dict[str, str] = {
    "_name_or_path": "where the file came from",
    "transformers_version": "which library wrote the file",
    "_attn_implementation_autoset": "the kernel, not the model",
    "tokenizer_class": "a setting of the tokenizer",
    "chunk_size_feed_forward": "computes the same numbers in pieces",
    "use_cache": _GENERATION,
    "bos_token_id": "a token's number, known to the tokenizer",
    "eos_token_id": "a token's number, known to the tokenizer",
    "pad_token_id": "a token's number; Megatron-LM masks padding by the loss mask",
    **dict.fromkeys(("id2label", "label2id", "problem_type"), _LABELS),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), _OUTPUT),
    **dict.fromkeys(("output_scores", "return_dict_in_generate"), _OUTPUT),
    **dict.fromkeys(
        (
            *("temperature", "top_k", "top_p", "typical_p", "do_sample", "early_stopping"),
            *("num_beams", "num_beam_groups", "num_return_sequences", "max_length", "min_length"),
            *("repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size"),
            *("encoder_no_repeat_ngram_size", "bad_words_ids", "remove_invalid_values"),
            *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "prefix"),
            *("begin_suppress_tokens", "exponential_decay_length_penalty"),
            *("decoder_start_token_id", "sep_token_id"),
        ),
        _GENERATION,
    ),
}
"""Fields that every Hugging Face configuration has and none of which changes a number."""

ONLY: dict[str, Only] = {
    "is_encoder_decoder": Only((False,), "an encoder"),
    "is_decoder": Only((False, True), "something else than a decoder"),
    "add_cross_attention": Only((False,), "cross attention"),
    "tie_encoder_decoder": Only((False,), "an encoder"),
    "cross_attention_hidden_size": Only((None,), "cross attention"),
    "pruned_heads": Only((None, {}), "pruned heads"),
    "quantization_config": Only((None,), "quantized weights"),
    "auto_map": Only((None, {}), "code of its own"),
}
"""Fields that every Hugging Face configuration may have and that must not ask for anything."""
