"""A scenario as one frozen model: what is trained, how, and on which ranks."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from primitives.layout import NUM_PARTS
from scenarios.frozen import Frozen
from scenarios.inference_config import InferenceConfig
from scenarios.layout import Layout
from scenarios.machine import machine_key
from scenarios.moe_config import WIDTH_STEP, MoeConfig

Arithmetic = Literal["canonical", "native"]
"""Of the kernels: defined to the last bit, or the library's (``primitives.arithmetic``)."""
Probability = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
METRICS = (
    "lm loss",
    "grad-norm",
    "num-zeros",
    "params-norm",
    "learning-rate",
    "loss-scale",
    "params-digest",
)
"""What every scenario logs."""
FAMILY_METRICS: dict[str, tuple[str, ...]] = {"bert": ("sop loss",)}
"""What the scenarios of a family log besides."""
MOE_METRICS = ("aux loss",)
"""What a model with experts logs besides."""


def metrics_of(family: str, experts: bool = False) -> tuple[str, ...]:
    """What is judged when the file of a case of this family names no METRICS."""
    return METRICS + FAMILY_METRICS.get(family, ()) + (MOE_METRICS if experts else ())


class ModelConfig(Frozen):
    """A GPT or BERT: learned positions, pre-LayerNorm, GELU, tied embeddings."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    seq_length: PositiveInt
    max_position_embeddings: PositiveInt
    vocab_size: PositiveInt
    """One size for every layout; token ids that do not occur make it a multiple of 8."""
    layernorm_epsilon: PositiveFloat = 1e-5
    hidden_dropout: Probability = 0.1
    attention_dropout: Probability = 0.1
    init_method_std: PositiveFloat = 0.02
    """Output projections start with std / sqrt(2 * num_layers)."""
    apply_query_key_layer_scaling: bool = False
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of weights and activations; master weights, gradients and sums are fp32."""
    untie_embeddings: Literal[False] = False
    disable_bias_linear: bool = False
    """No bias in projections; LayerNorms keep theirs."""
    exact_gelu: bool = False
    """GELU by erf. Megatron-LM fuses its tanh form with a bias; without a bias it is exact, too."""
    moe: MoeConfig | None = None
    """Experts in the place of every layer's MLP."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("num_attention_heads", "vocab_size", "seq_length"):
            got = getattr(self, name)
            if got % NUM_PARTS:
                raise ValueError(
                    f"{name}: got {got}, expected a multiple of {NUM_PARTS}, "
                    "the number of canonical parts"
                )
        for name in ("hidden_size", "ffn_hidden_size"):
            got = getattr(self, name)
            if got % WIDTH_STEP:
                raise ValueError(
                    f"{name}: got {got}, expected a multiple of {WIDTH_STEP}, "
                    f"{NUM_PARTS} canonical parts of {NUM_PARTS} slices"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, "
                f"expected a multiple of num_attention_heads = {self.num_attention_heads}"
            )
        if self.moe is not None and not self.disable_bias_linear:
            raise ValueError(
                "disable_bias_linear: got False, expected True in a model with experts, which have "
                "no biases here"
            )
        if self.max_position_embeddings < self.seq_length:
            raise ValueError(
                f"max_position_embeddings: got {self.max_position_embeddings}, "
                f"expected at least seq_length = {self.seq_length}"
            )
        return self


class TrainingConfig(Frozen):
    """Batch, schedule, AdamW and loss scale; Megatron-LM's defaults."""

    micro_batch_size: PositiveInt
    """Samples in one forward pass of one replica."""
    global_batch_size: PositiveInt
    """Samples in one step over all replicas."""
    train_iters: PositiveInt
    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "linear"
    lr_decay_iters: PositiveInt
    lr_warmup_iters: NonNegativeInt = 0
    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Part of lr_decay_iters; excludes lr_warmup_iters."""
    weight_decay: NonNegativeFloat = 0.01
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    adam_beta1: Probability = 0.9
    adam_beta2: Probability = 0.999
    adam_eps: PositiveFloat = 1e-8
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    initial_loss_scale: PositiveFloat = 2.0**32
    """fp16 only, like the three fields below; a power of two, so that scaling rounds nothing."""
    min_loss_scale: PositiveFloat = 1.0
    loss_scale_window: PositiveInt = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: PositiveInt = 2
    """Overflows after which the scale halves."""

    @property
    def lr_decay_samples(self) -> int:
        """Samples after which the learning rate stays at min_lr."""
        return self.lr_decay_iters * self.global_batch_size

    @property
    def lr_warmup_samples(self) -> float:
        """Samples of linear warmup; as in Megatron-LM, a fraction need not give a whole number."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.lr_decay_samples
        return float(self.lr_warmup_iters * self.global_batch_size)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size: got {self.global_batch_size}, "
                f"expected a multiple of micro_batch_size = {self.micro_batch_size}"
            )
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise ValueError(
                f"lr_warmup_iters {self.lr_warmup_iters} and lr_warmup_fraction "
                f"{self.lr_warmup_fraction} exclude each other: expected one of them"
            )
        if self.lr_warmup_samples >= self.lr_decay_samples:
            raise ValueError(
                f"lr warmup: got {self.lr_warmup_samples:g} samples, "
                f"expected fewer than the {self.lr_decay_samples} of lr_decay_iters"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: got {self.min_lr}, expected at most lr = {self.lr}")
        for name in ("initial_loss_scale", "min_loss_scale"):
            scale = getattr(self, name)
            if scale.hex().split("p")[0] != "0x1.0000000000000":
                raise ValueError(f"{name}: got {scale}, expected a power of two")
        if self.min_loss_scale > self.initial_loss_scale:
            raise ValueError(
                f"min_loss_scale: got {self.min_loss_scale}, "
                f"expected at most initial_loss_scale = {self.initial_loss_scale}"
            )
        return self


class OptimizerConfig(Frozen):
    """Where optimizer state lies and what overlaps; no field changes a number."""

    use_distributed_optimizer: bool = False
    """ZeRO-1: each data-parallel rank keeps and updates its part of the state."""
    overlap_grad_reduce: bool = False
    """A bucket's reduce_scatter runs during the rest of the backward pass."""
    overlap_param_gather: bool = False
    """A bucket's all_gather runs during the forward pass before it is needed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise ValueError(
                "overlap_param_gather: got it alone, "
                "expected use_distributed_optimizer and overlap_grad_reduce with it"
            )
        return self


class CheckpointConfig(Frozen):
    """When and how state is saved."""

    save_interval: PositiveInt | None = None
    """Steps between checkpoints; None saves none."""
    async_save: bool = False
    """Files are written while training goes on."""
    format: Literal["torch_dist", "torch"] = "torch_dist"
    """Megatron-LM's names for checkpoints that load at any layout, and at one; here all do."""
    verify_integrity: bool = False
    """Megatron-LM writes SHA-256 sums only when asked; here they are always written and checked."""


class DataConfig(Frozen):
    """Where training samples come from."""

    prefix: Path | None = None
    """PREFIX.bin and PREFIX.idx; None is the corpus made on the spot."""
    split: tuple[str, ...] = ("969", "30", "1")
    """Weights of training, validation and test documents; the training part comes first."""


class IgnoredFlag(Frozen):
    """A flag that is known and changes nothing here."""

    flag: str
    reason: str


class Scenario(Frozen):
    """One case at one scale on one layout, complete and checked."""

    family: str
    name: str
    scale: Literal["ci", "full"]
    test_type: Literal["regular", "ckpt-resume", "frozen-start"]
    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    layout: Layout
    checkpoint: CheckpointConfig
    data: DataConfig
    metrics: tuple[str, ...]
    """Names of the metrics that are judged."""
    ignored: tuple[IgnoredFlag, ...] = ()
    arithmetic: Arithmetic = "canonical"
    inference: InferenceConfig | None = None
    """Instead of training, which then has no meaning but for its steps, the generated tokens."""

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one replica in one step."""
        return self.training.global_batch_size // self.training.micro_batch_size // self.layout.dp

    @property
    def golden_path(self) -> Path:
        """Where the golden of this case and arithmetic is recorded on this machine."""
        golden = Path(__file__).resolve().parent.parent / "golden"
        key = "canonical" if self.arithmetic == "canonical" else machine_key()
        return golden / self.family / self.name / f"golden_values_{key}.json"

    def first_steps(self, num_steps: int, resume: bool = False) -> "Scenario":
        """This scenario over the first steps; no number of theirs changes.

        Args:
            num_steps: at least 1, with ``resume`` 2.
            resume: after half of them; without it nothing is saved.

        Raises:
            ValueError: one step has no half.
        """
        if resume and num_steps < 2:
            raise ValueError(f"steps: got {num_steps}, expected at least 2 to resume between them")
        return self.model_copy(
            update={
                "test_type": "ckpt-resume" if resume else "regular",
                "training": self.training.model_copy(update={"train_iters": num_steps}),
                "checkpoint": self.checkpoint.model_copy(
                    update={"save_interval": num_steps // 2 if resume else None}
                ),
            }
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        layout, training = self.layout, self.training
        if NUM_PARTS % layout.tp or NUM_PARTS % layout.etp:
            raise ValueError(
                f"layout {layout}: tp and etp must divide the {NUM_PARTS} canonical parts "
                f"(1, 2, 4 or 8), got tp {layout.tp}, etp {layout.etp}"
            )
        if NUM_PARTS % layout.dp:
            raise ValueError(
                f"layout {layout}: dp must divide the {NUM_PARTS} slices of the optimizer state "
                f"(1, 2, 4 or 8), got dp {layout.dp}"
            )
        if self.model.num_layers % layout.pp:
            raise ValueError(
                f"layout {layout}: got pp {layout.pp}, expected a divisor of "
                f"num_layers = {self.model.num_layers}"
            )
        if self.model.moe is not None:
            self.model.moe.check_layout(layout)
        samples = training.micro_batch_size * layout.dp
        if training.global_batch_size % samples:
            raise ValueError(
                f"global_batch_size: got {training.global_batch_size}, expected a multiple of "
                f"micro_batch_size * dp = {samples}"
            )
        if self.num_microbatches & (self.num_microbatches - 1):
            raise ValueError(
                f"global_batch_size: got {training.global_batch_size}, which is "
                f"{self.num_microbatches} microbatches on each of {layout.dp} replicas, "
                "expected a power of two"
            )
        if self.family == "bert" and self.model.vocab_size % WIDTH_STEP:
            raise ValueError(
                f"vocab_size: got {self.model.vocab_size}, expected a multiple of {WIDTH_STEP} in "
                "a bert, whose output layer has a bias"
            )
        if self.inference is not None and (
            layout.zero1 is not None or self.family != "gpt" or self.arithmetic != "canonical"
        ):
            raise ValueError(
                f"inference: got a {self.family} at layout {layout} in {self.arithmetic} "
                "arithmetic, expected a gpt, tp, pp, dp and sp only, and canonical arithmetic"
            )
        if not self.metrics:
            raise ValueError("METRICS: got none, expected at least one; nothing would be judged")
        if self.test_type == "ckpt-resume":
            interval = self.checkpoint.save_interval
            if interval is None or not interval < training.train_iters:
                raise ValueError(
                    f"save_interval: got {interval}, expected less than train_iters = "
                    f"{training.train_iters}, so that a resumed run has steps to train"
                )
        return self


class ScenarioInfo(Frozen):
    """One line of the list of shipped cases."""

    family: str
    name: str
    alias: str | None
    path: Path
    test_type: str
    layouts: dict[str, Layout]
    """Scale -> default layout."""
