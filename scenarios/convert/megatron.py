"""What a conversion yields: Megatron-LM's TransformerConfig fields and GPTModel arguments."""

from typing import Annotated, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from scenarios.convert.layout import stages
from scenarios.frozen import Frozen

Probability = Annotated[float, Field(ge=0, lt=1)]


class _Strict(Frozen):
    """No value is coerced: "12", 12.0 and True are no 12."""

    model_config = ConfigDict(strict=True)


class TransformerFields(_Strict):
    """Fields of megatron.core.transformer.TransformerConfig, under its names."""

    num_layers: PositiveInt
    mtp_num_layers: NonNegativeInt | None = None
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
    layernorm_zero_centered_gamma: bool = False
    """Norms multiply by 1 + weight."""
    activation_func: Literal["silu", "gelu", "openai_gelu", "quick_gelu"] = "gelu"
    """Name of the function; TransformerConfig takes the function itself."""
    activation_func_clamp_value: PositiveFloat | None = None
    gated_linear_unit: bool = False
    glu_linear_offset: float = 0.0
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    softmax_scale: PositiveFloat | None = None
    """Factor on the scores of attention; none: 1 / sqrt(kv_channels)."""
    softmax_type: Literal["vanilla", "learnable"] = "vanilla"
    """learnable: a sink for each head."""
    multi_latent_attention: bool = False
    bf16: bool = False
    fp16: bool = False
    window_size: tuple[NonNegativeInt, int] | None = None
    """Tokens a position sees to the left and to the right of itself."""
    window_attn_skip_freq: tuple[Literal[0, 1], ...] | None = None
    """1 for each layer with the window, 0 for each with full attention."""
    attention_output_gate: bool = False
    """The output of attention is multiplied by the sigmoid of a gate beside the query."""
    experimental_attention_variant: Literal["gated_delta_net"] | None = None
    linear_attention_freq: tuple[Literal[0, 1], ...] | None = None
    """1 for each layer with that variant, 0 for each with attention."""
    linear_conv_kernel_dim: PositiveInt | None = None
    linear_key_head_dim: PositiveInt | None = None
    linear_value_head_dim: PositiveInt | None = None
    linear_num_key_heads: PositiveInt | None = None
    linear_num_value_heads: PositiveInt | None = None
    rotary_interleaved: bool = False
    """Pairs are neighbours in a head, and not half a head apart."""
    mrope_section: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Pairs of a head that time, height and width rotate."""
    num_moe_experts: PositiveInt | None = None
    moe_ffn_hidden_size: PositiveInt | None = None
    moe_layer_freq: tuple[Literal[0, 1], ...] | None = None
    """1 for each layer with experts, 0 for each dense one; none: experts in all."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    moe_shared_expert_gate: bool = False
    moe_router_topk: PositiveInt = 2
    moe_router_pre_softmax: bool = False
    """Weights are a softmax over all experts, and not over the chosen ones."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_enable_expert_bias: bool = False
    moe_router_topk_scaling_factor: PositiveFloat | None = None
    moe_router_num_groups: PositiveInt | None = None
    moe_router_group_topk: PositiveInt | None = None
    moe_router_dtype: Literal["fp32"] | None = None
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
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
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    context_parallel_size: PositiveInt = 1
    expert_model_parallel_size: PositiveInt = 1
    expert_tensor_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups: got {self.num_query_groups}, "
                f"expected a divisor of num_attention_heads = {self.num_attention_heads}"
            )
        tp, etp = self.tensor_model_parallel_size, self.expert_tensor_parallel_size
        for name, degree in {
            "num_attention_heads": tp,
            "num_query_groups": tp,
            "linear_num_key_heads": tp,
            "ffn_hidden_size": tp,
            "moe_shared_expert_intermediate_size": tp,
            "moe_ffn_hidden_size": etp,
            "num_moe_experts": self.expert_model_parallel_size,
        }.items():
            _check_divisible(name, getattr(self, name), degree)
        if self.num_moe_experts is None and self.expert_model_parallel_size > 1:
            raise ValueError(
                f"ep: got {self.expert_model_parallel_size}, expected 1: the model has no experts"
            )
        if self.num_moe_experts is not None and tp > 1 and not self.sequence_parallel:
            raise ValueError(
                f"tp {tp} with experts: Megatron-LM trains that with sequence parallelism only; "
                "add sp to the layout"
            )
        if self.linear_attention_freq is not None and self.context_parallel_size > 1:
            raise ValueError(
                f"cp: got {self.context_parallel_size}, expected 1: megatron-core's GatedDeltaNet "
                "has no context parallelism"
            )
        self.stages()
        return self

    def stages(self) -> list[list[range]]:
        """The layers of each pipeline stage's virtual parts.

        Raises:
            ValueError: the layers cannot be dealt out as the layout says.
        """
        return stages(
            self.num_layers,
            pp=self.pipeline_model_parallel_size,
            vpp=self.virtual_pipeline_model_parallel_size or 1,
            first=self.num_layers_in_first_pipeline_stage,
            last=self.num_layers_in_last_pipeline_stage,
        )

    def has_delta_net(self, layer: int) -> bool:
        """Whether the layer, counted from 0, has linear attention."""
        return self.linear_attention_freq is not None and bool(self.linear_attention_freq[layer])

    def has_experts(self, layer: int) -> bool:
        """Whether the layer, counted from 0, is a mixture of experts."""
        if self.num_moe_experts is None:
            return False
        return self.moe_layer_freq is None or bool(self.moe_layer_freq[layer])


class LatentFields(_Strict):
    """Fields that megatron.core.transformer.MLATransformerConfig has besides."""

    q_lora_rank: PositiveInt | None
    """None: queries are projected in one step."""
    kv_lora_rank: PositiveInt
    qk_head_dim: PositiveInt
    qk_pos_emb_head_dim: PositiveInt
    v_head_dim: PositiveInt
    rope_type: Literal["rope", "yarn"]
    rotary_base: PositiveFloat
    rotary_scaling_factor: PositiveFloat = 1.0
    original_max_position_embeddings: PositiveInt = 4096
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: PositiveFloat = 1.0
    mscale_all_dim: NonNegativeFloat = 0.0


class GPTModelArguments(_Strict):
    """Arguments of megatron.core.models.gpt.GPTModel, under its names."""

    vocab_size: PositiveInt
    max_sequence_length: PositiveInt
    share_embeddings_and_output_weights: bool
    position_embedding_type: Literal["rope", "yarn", "mrope", "learned_absolute"]
    rotary_base: PositiveInt = 10000
    rotary_percent: PositiveFloat = 1.0
    rope_scaling: bool = False
    """Llama 3's scaling; Megatron fixes its low 1, high 4 and original length 8192."""
    rope_scaling_factor: PositiveFloat = 8.0
    seq_len_interpolation_factor: PositiveFloat | None = None


class BertArguments(_Strict):
    """What megatron.core.models.bert.BertModel takes besides, and which of its heads there are.

    BertModel always has an LM head, and with its pooler a head for pairs of sentences; a head that
    the source's class has not is taken out.
    """

    num_tokentypes: PositiveInt
    lm_head: bool
    """Linear, GELU and norm, then the output layer with a bias for each word."""
    pooler: bool
    """Linear and tanh of the first token; BertModel's add_binary_head."""
    binary_head: bool
    """Two logits of the pooled token."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.binary_head and not self.pooler:
            raise ValueError("binary_head: got true without pooler, of which it takes the output")
        return self


class ExtraModules(_Strict):
    """What neither TransformerConfig nor GPTModel has a field for; ``extra.py`` has the modules."""

    embedding_scale: PositiveFloat | None = None
    """Factor on the embeddings, rounded to their dtype."""
    post_norms: bool = False
    """Norms after attention and after the MLP, before the sums with the residual."""
    all_heads_qk_norm: bool = False
    """One norm over the queries of all heads, and one over the keys."""
    plain_delta_norm: bool = False
    """The norm inside delta nets multiplies by its weight where others do by 1 + weight."""
    local_rotary_base: PositiveInt | None = None
    """Rotary base of the layers with a window; GPTModel's rotary_base is that of the others."""
    attention_softcap: PositiveFloat | None = None
    """c of c * tanh(score / c)."""
    logit_softcap: PositiveFloat | None = None
    """The same for the logits."""


class TokenClassificationHead(_Strict):
    """What takes the place of GPTModel's output_layer: dropout, then a linear layer with a bias."""

    num_labels: PositiveInt
    dropout: Probability


class MegatronModel(_Strict):
    """One converted model for one layout."""

    model_type: str
    transformer: TransformerFields
    gpt_model: GPTModelArguments
    mla: LatentFields | None = None
    bert: BertArguments | None = None
    """With it the model is BertModel, to which ``gpt_model``'s arguments go as well."""
    extra: ExtraModules | None = None
    head: TokenClassificationHead | None = None
    ignored: dict[str, str] = Field(default_factory=dict)
    """Field of the source -> why it changes nothing in this model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = self.transformer
        tp, cp = fields.tensor_model_parallel_size, fields.context_parallel_size
        _check_divisible("vocab_size", self.gpt_model.vocab_size, tp)
        _check_divisible(
            "max_sequence_length", self.gpt_model.max_sequence_length, 2 * cp if cp > 1 else 1
        )
        if self.bert is not None and cp > 1:
            raise ValueError(
                f"cp: got {cp}, expected 1: BertModel counts positions from 0 on every rank"
            )
        if self.extra is not None and self.extra.attention_softcap is not None and cp > 1:
            raise ValueError(
                f"cp: got {cp}, expected 1: capped scores are computed by megatron-core's "
                "DotProductAttention, which has no context parallelism"
            )
        return self


def _check_divisible(name: str, got: int | None, degree: int) -> None:
    if got is not None and got % degree:
        raise ValueError(f"{name}: got {got}, expected a multiple of {degree} for this layout")
