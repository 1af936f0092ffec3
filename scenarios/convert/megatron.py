"""What a conversion yields: Megatron-LM's TransformerConfig fields and GPTModel arguments."""

from typing import Annotated, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from scenarios.frozen import Frozen

Probability = Annotated[float, Field(ge=0, lt=1)]


class _Strict(Frozen):
    """No value is coerced: "12", 12.0 and True are no 12."""

    model_config = ConfigDict(strict=True)


class TransformerFields(_Strict):
    """Fields of megatron.core.transformer.TransformerConfig, under its names."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    kv_channels: PositiveInt
    """Size of one head."""
    layernorm_epsilon: PositiveFloat
    init_method_std: NonNegativeFloat
    attention_dropout: Probability
    hidden_dropout: Probability = 0.0
    normalization: Literal["RMSNorm", "LayerNorm"] = "LayerNorm"
    activation_func: Literal["silu", "gelu"] = "gelu"
    """Name of the function; TransformerConfig takes the function itself."""
    gated_linear_unit: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    bf16: bool = False
    fp16: bool = False
    window_size: tuple[int, int] | None = None
    """Tokens a position sees to the left and to the right of itself."""
    window_attn_skip_freq: tuple[Literal[0, 1], ...] | None = None
    """1 for each layer with the window, 0 for each with full attention."""
    yarn_rotary_scaling_factor: PositiveFloat | None = None
    """This and the other yarn fields are attributes that GPTModel looks up in its config."""
    yarn_original_max_position_embeddings: PositiveInt | None = None
    yarn_beta_fast: PositiveFloat | None = None
    yarn_beta_slow: PositiveFloat | None = None
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool | None = None
    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups: got {self.num_query_groups}, "
                f"expected a divisor of num_attention_heads = {self.num_attention_heads}"
            )
        cuts = {
            "num_attention_heads": self.tensor_model_parallel_size,
            "num_query_groups": self.tensor_model_parallel_size,
            "ffn_hidden_size": self.tensor_model_parallel_size,
            "num_layers": self.pipeline_model_parallel_size,
        }
        for name, degree in cuts.items():
            _check_divisible(name, getattr(self, name), degree)
        return self


class GPTModelArguments(_Strict):
    """Arguments of megatron.core.models.gpt.GPTModel, under its names."""

    vocab_size: PositiveInt
    max_sequence_length: PositiveInt
    share_embeddings_and_output_weights: bool
    position_embedding_type: Literal["rope", "yarn", "learned_absolute"] = "learned_absolute"
    rotary_base: PositiveInt = 10000
    rotary_percent: PositiveFloat = 1.0
    rope_scaling: bool = False
    """Llama 3's scaling; Megatron fixes its low 1, high 4 and original length 8192."""
    rope_scaling_factor: PositiveFloat = 8.0
    seq_len_interpolation_factor: PositiveFloat | None = None


class MegatronModel(_Strict):
    """One converted model for one layout."""

    transformer: TransformerFields
    gpt_model: GPTModelArguments
    ignored: dict[str, str]
    """Field of the source -> why it changes nothing in this model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = self.transformer
        tp, cp = fields.tensor_model_parallel_size, fields.context_parallel_size
        _check_divisible("vocab_size", self.gpt_model.vocab_size, tp)
        _check_divisible(
            "max_sequence_length", self.gpt_model.max_sequence_length, 2 * cp if cp > 1 else 1
        )
        return self

    def flags(self) -> dict[str, bool | int | float | str]:
        """The model as Megatron-LM's command-line flags.

        Returns:
            Flag -> value, True for a switch.
        Raises:
            ValueError: the model needs a field that has no flag.
        """
        fields, model = self.transformer, self.gpt_model
        if model.position_embedding_type == "yarn":
            raise ValueError(
                "position_embedding_type yarn has no flags; build TransformerConfig instead"
            )
        factor = model.seq_len_interpolation_factor
        if factor is not None and not factor.is_integer():
            raise ValueError(
                f"seq_len_interpolation_factor: got {factor}, the flag takes integers only"
            )
        window, pattern = fields.window_size, fields.window_attn_skip_freq
        flags: dict[str, bool | int | float | str | None] = {
            "--num-layers": fields.num_layers,
            "--hidden-size": fields.hidden_size,
            "--ffn-hidden-size": fields.ffn_hidden_size,
            "--num-attention-heads": fields.num_attention_heads,
            "--group-query-attention": fields.num_query_groups != fields.num_attention_heads,
            "--num-query-groups": fields.num_query_groups,
            "--kv-channels": fields.kv_channels,
            "--norm-epsilon": fields.layernorm_epsilon,
            "--init-method-std": fields.init_method_std,
            "--attention-dropout": fields.attention_dropout,
            "--hidden-dropout": fields.hidden_dropout,
            "--normalization": fields.normalization,
            "--swiglu": fields.gated_linear_unit and fields.activation_func == "silu",
            "--disable-bias-linear": not fields.add_bias_linear,
            "--add-qkv-bias": fields.add_qkv_bias,
            "--qk-layernorm": fields.qk_layernorm,
            "--bf16": fields.bf16,
            "--fp16": fields.fp16,
            "--window-size": None if window is None else f"{window[0]},{window[1]}",
            "--window-attn-skip-freq": None if pattern is None else str([*pattern]),
            "--tensor-model-parallel-size": fields.tensor_model_parallel_size,
            "--pipeline-model-parallel-size": fields.pipeline_model_parallel_size,
            "--context-parallel-size": fields.context_parallel_size,
            "--vocab-size": model.vocab_size,
            "--max-position-embeddings": model.max_sequence_length,
            "--untie-embeddings-and-output-weights": not model.share_embeddings_and_output_weights,
            "--position-embedding-type": model.position_embedding_type,
            "--rotary-base": model.rotary_base,
            "--rotary-percent": model.rotary_percent,
            "--use-rope-scaling": model.rope_scaling,
            "--rope-scaling-factor": model.rope_scaling_factor if model.rope_scaling else None,
            "--rotary-seq-len-interpolation-factor": None if factor is None else int(factor),
        }
        return {
            flag: value for flag, value in flags.items() if value is not None and value is not False
        }


def _check_divisible(name: str, got: int, degree: int) -> None:
    if got % degree:
        raise ValueError(f"{name}: got {got}, expected a multiple of {degree} for this layout")
