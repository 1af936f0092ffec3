"""Every Megatron-LM flag this project knows, and what it does with it: one table.

A flag sets a field, allows only some values, is ignored for a stated reason, or asks for a feature
that is not here. A flag that is in no row is unknown, and an unknown flag is an error.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Value = bool | int | float | str


def _integer(value: Value) -> int:
    if isinstance(value, bool | float):
        raise ValueError("an integer")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError("64 bits")
    return number


def _number(value: Value) -> float:
    """YAML 1.1 reads ``1e-2`` as text, so text that is a number is one."""
    if isinstance(value, bool):
        raise ValueError("a number")
    return float(value)


def _switch(value: Value) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Value) -> str:
    if isinstance(value, bool):
        raise ValueError("text")
    return str(value)


def _split(value: Value) -> tuple[str, ...]:
    weights = tuple(part.strip() for part in _text(value).split(","))
    if not 1 <= len(weights) <= 3 or any(Fraction(weight) < 0 for weight in weights):
        raise ValueError("1 to 3 weights")
    if Fraction(weights[0]) <= 0:
        raise ValueError("a positive weight for the training part")
    return weights


PARSERS = {
    int: (_integer, "an integer of 64 bits"),
    float: (_number, "a number"),
    bool: (_switch, "true or false"),
    str: (_text, "text"),
    tuple: (_split, "weights like 949,50,1"),
}

# Flag -> (field, type): the section of the Scenario and the field in it. The section "given" holds
# what schema.py combines into other fields.
FIELDS: dict[str, tuple[str, type]] = {
    "--num-layers": ("model.num_layers", int),
    "--hidden-size": ("model.hidden_size", int),
    "--ffn-hidden-size": ("model.ffn_hidden_size", int),
    "--num-attention-heads": ("model.num_attention_heads", int),
    "--seq-length": ("model.seq_length", int),
    "--max-position-embeddings": ("model.max_position_embeddings", int),
    "--vocab-size": ("model.vocab_size", int),
    "--norm-epsilon": ("model.layernorm_epsilon", float),
    "--layernorm-epsilon": ("model.layernorm_epsilon", float),
    "--hidden-dropout": ("model.hidden_dropout", float),
    "--attention-dropout": ("model.attention_dropout", float),
    "--init-method-std": ("model.init_method_std", float),
    "--apply-query-key-layer-scaling": ("model.apply_query_key_layer_scaling", bool),
    "--disable-bias-linear": ("model.disable_bias_linear", bool),
    "--no-bias-gelu-fusion": ("model.exact_gelu", bool),
    "--num-experts": ("moe.num_experts", int),
    "--moe-router-topk": ("moe.router_topk", int),
    "--moe-ffn-hidden-size": ("moe.ffn_hidden_size", int),
    "--moe-shared-expert-intermediate-size": ("moe.shared_expert_intermediate_size", int),
    "--moe-aux-loss-coeff": ("moe.aux_loss_coeff", float),
    "--fp16": ("given.fp16", bool),
    "--bf16": ("given.bf16", bool),
    "--micro-batch-size": ("training.micro_batch_size", int),
    "--global-batch-size": ("training.global_batch_size", int),
    "--train-iters": ("training.train_iters", int),
    "--lr": ("training.lr", float),
    "--min-lr": ("training.min_lr", float),
    "--lr-decay-style": ("training.lr_decay_style", str),
    "--lr-decay-iters": ("training.lr_decay_iters", int),
    "--lr-warmup-iters": ("training.lr_warmup_iters", int),
    "--lr-warmup-fraction": ("training.lr_warmup_fraction", float),
    "--weight-decay": ("training.weight_decay", float),
    "--clip-grad": ("training.clip_grad", float),
    "--adam-beta1": ("training.adam_beta1", float),
    "--adam-beta2": ("training.adam_beta2", float),
    "--adam-eps": ("training.adam_eps", float),
    "--seed": ("training.seed", int),
    "--initial-loss-scale": ("training.initial_loss_scale", float),
    "--min-loss-scale": ("training.min_loss_scale", float),
    "--loss-scale-window": ("training.loss_scale_window", int),
    "--hysteresis": ("training.hysteresis", int),
    "--use-distributed-optimizer": ("optimizer.use_distributed_optimizer", bool),
    "--overlap-grad-reduce": ("optimizer.overlap_grad_reduce", bool),
    "--overlap-param-gather": ("optimizer.overlap_param_gather", bool),
    "--tensor-model-parallel-size": ("given.tp", int),
    "--pipeline-model-parallel-size": ("given.pp", int),
    "--expert-model-parallel-size": ("given.ep", int),
    "--expert-tensor-parallel-size": ("given.etp", int),
    "--sequence-parallel": ("given.sp", bool),
    "--save-interval": ("checkpoint.save_interval", int),
    "--async-save": ("checkpoint.async_save", bool),
    "--ckpt-format": ("checkpoint.format", str),
    "--verify-integrity": ("checkpoint.verify_integrity", bool),
    "--temperature": ("inference.temperature", float),
    "--top_k": ("inference.top_k", int),
    "--top_p": ("inference.top_p", float),
    "--num-tokens-to-generate": ("inference.num_tokens_to_generate", int),
    "--prompts": ("inference.prompt", str),
    "--incoming-requests-per-step": ("inference.num_requests", int),
    "--inference-dynamic-batching-buffer-size-gb": ("engine.buffer_size_gb", float),
    "--inference-dynamic-batching-block-size": ("engine.block_size", int),
    "--inference-dynamic-batching-max-tokens": ("engine.max_batch_tokens", int),
    "--inference-dynamic-batching-max-requests": ("engine.max_running", int),
    "--data-path": ("given.data_path", str),
    "--spec": ("given.spec", str),
    "--split": ("data.split", tuple),
}

# Flag -> (type, the values that change nothing here, what another value would need).
ONLY: dict[str, tuple[type, tuple[Value, ...], str]] = {
    "--optimizer": (str, ("adam",), "another optimizer than adam"),
    "--normalization": (str, ("LayerNorm",), "another normalization than LayerNorm"),
    "--position-embedding-type": (str, ("learned_absolute",), "rotary or relative positions"),
    "--context-parallel-size": (int, (1,), "context parallelism"),
    "--transformer-impl": (
        str,
        ("local", "transformer_engine", "inference_optimized"),
        "another implementation",
    ),
    "--lr-warmup-init": (float, (0.0,), "a warmup that starts above 0"),
    "--num-query-groups": (int, (), "grouped-query attention"),
    "--kv-channels": (int, (), "a head size other than hidden / heads"),
    "--loss-scale": (float, (), "a constant loss scale"),
    "--train-samples": (int, (), "a schedule given in samples"),
    "--lr-decay-samples": (int, (), "a schedule given in samples"),
    "--lr-warmup-samples": (int, (0,), "a schedule given in samples"),
    "--rampup-batch-size": (str, (), "a growing batch"),
    "--start-weight-decay": (float, (), "a weight decay schedule"),
    "--end-weight-decay": (float, (), "a weight decay schedule"),
    "--weight-decay-incr-style": (str, ("constant",), "a weight decay schedule"),
    "--num-layers-per-virtual-pipeline-stage": (int, (), "an interleaved pipeline"),
    "--mask-prob": (float, (0.15,), "another share of masked tokens"),
    "--short-seq-prob": (float, (0.1,), "another share of short samples"),
    "--moe-token-dispatcher-type": (str, ("alltoall",), "another token dispatcher than alltoall"),
    "--moe-router-load-balancing-type": (str, ("aux_loss",), "other load balancing than aux_loss"),
    "--moe-router-dtype": (str, ("fp32",), "a router in another dtype than fp32"),
    "--moe-layer-freq": (int, (1,), "layers without experts between the others"),
    "--moe-z-loss-coeff": (float, (0.0,), "a router z-loss"),
}

IGNORED: dict[str, tuple[str, ...]] = {
    "decides what Megatron prints; every metric is recorded here": (
        *("--log-interval", "--log-params-norm", "--log-num-zeros-in-grad", "--timing-log-level"),
        *("--log-validation-ppl-to-tensorboard", "--log-timers-to-tensorboard"),
        *("--log-memory-to-tensorboard", "--log-throughput", "--log-progress"),
        *("--tensorboard-dir", "--tensorboard-log-interval", "--timing-log-option"),
    ),
    "the test bed sets the folders of a run itself": ("--save", "--load", "--data-cache-path"),
    "token ids come ready from the data files; no text is read in training": (
        *("--vocab-file", "--merge-file", "--tokenizer-type", "--tokenizer-model"),
        *("--tiktoken-pattern", "--num-workers", "--no-mmap-bin-files"),
    ),
    "the vocabulary has one size for every tp, not one padded to 128 * tp": (
        "--make-vocab-size-divisible-by",
    ),
    "the corpus made on the spot is the default": ("--mock-data",),
    "training here has no evaluation phase, which changes no training number": (
        *("--eval-interval", "--eval-iters"),
    ),
    "collectives always go through this project's backend": (
        *("--distributed-backend", "--distributed-timeout-minutes"),
    ),
    "canonical arithmetic is always deterministic": ("--deterministic-mode",),
    "canonical arithmetic fixes the kernels and keeps softmax and sums in fp32": (
        *("--no-gradient-accumulation-fusion", "--no-bias-dropout-fusion"),
        *("--no-masked-softmax-fusion", "--no-rope-fusion", "--no-persist-layer-norm"),
        *(
            "--attention-softmax-in-fp32",
            "--attention-backend",
            "--accumulate-allreduce-grads-in-fp32",
        ),
        *("--use-flash-attn", "--cross-entropy-loss-fusion", "--tp-comm-overlap"),
    ),
    "grouping of the experts' products changes their speed, not their numbers": (
        *("--moe-grouped-gemm", "--moe-permute-fusion"),
    ),
    "there is one model implementation": ("--use-mcore-models",),
    "the file here is the whole configuration; none is taken from a checkpoint": (
        "--use-checkpoint-args",
    ),
    "a resume always takes the schedule from the checkpoint": (
        "--use-checkpoint-opt_param-scheduler",
    ),
    "every checkpoint here can be loaded at every layout": (
        *("--dist-ckpt-optim-fully-reshardable", "--ckpt-fully-parallel-load"),
        *(
            "--ckpt-fully-parallel-save",
            "--ckpt-assume-constant-structure",
            "--auto-detect-ckpt-format",
        ),
    ),
    "a missing or extra checkpoint entry is always an error": ("--dist-ckpt-strictness",),
    "how a checkpoint is written in the background changes no byte of it": (
        *("--use-persistent-ckpt-worker", "--async-ckpt-use-cpu-shm", "--async-strategy"),
    ),
    "inference reads a frozen model, which has no optimizer, and its own tokenizer": (
        *("--no-load-optim", "--no-load-rng", "--no-use-tokenizer-model-from-checkpoint-args"),
        "--inference-ckpt-non-strict",
    ),
    "the KV budget and the model's positions are the limits, and each is checked": (
        *("--max-tokens-to-oom", "--inference-max-seq-length"),
    ),
    "inference fuses nothing, and its log-probabilities are always judged": (
        *("--inference-fuse-tp-communication", "--use-flashinfer-fused-rope"),
        *("--return-log-probs", "--inference-logging-step-interval", "--output-path"),
    ),
    "a bucket's size changes the overlap, not the numbers": (
        *("--ddp-bucket-size", "--ddp-num-buckets"),
    ),
}

# Feature -> the flags that ask for it.
UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "a start from a foreign checkpoint": ("--finetune", "--pretrained-checkpoint"),
    "BERT without its sentence-order head": ("--bert-no-binary-head",),
    "biases in the QKV projection alone": ("--add-qkv-bias",),
    "untied embeddings": ("--untie-embeddings-and-output-weights",),
    "another activation than GELU": ("--swiglu", "--squared-relu", "--geglu"),
    "rotary positions": ("--use-rotary-position-embeddings", "--rotary-base", "--rotary-percent"),
    "activation recomputation": (
        *("--recompute-granularity", "--recompute-method", "--recompute-num-layers"),
        "--recompute-activations",
    ),
    "fp8": ("--fp8-format", "--fp8-recipe", "--fp8-param-gather"),
    "sharding by FSDP inside a scenario": ("--use-torch-fsdp2", "--use-megatron-fsdp"),
}

_IGNORED = {flag: reason for reason, flags in IGNORED.items() for flag in flags}
_UNSUPPORTED = {flag: feature for feature, flags in UNSUPPORTED.items() for flag in flags}
KNOWN = frozenset(FIELDS) | frozenset(ONLY) | frozenset(_IGNORED) | frozenset(_UNSUPPORTED)


@dataclass
class ParsedFlags:
    """What the flags of a case say."""

    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Section -> field -> value."""
    ignored: list[tuple[str, str]] = field(default_factory=list)
    """(flag, why it is ignored), in the order of the file."""
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    """Feature that is not here -> the flags that ask for it."""


def parse_flags(model_args: Mapping[str, object], where: str) -> ParsedFlags:
    """Sort Megatron flags into fields, ignored ones and features that are not here.

    Args:
        model_args: flag -> value, as YAML gives them.
        where: the file, for messages.
    Returns:
        The flags sorted; nothing is checked across flags.
    Raises:
        ValueError: an unknown flag, or a value of the wrong type.
    """
    parsed = ParsedFlags()
    for flag, value in model_args.items():
        if flag not in KNOWN:
            raise ValueError(f"{where}: unknown flag {flag!r}{close_match(flag, KNOWN)}")
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{where}: {flag}: got {value!r}, expected one value")
        if flag in FIELDS:
            target, kind = FIELDS[flag]
            section, name = target.split(".")
            fields = parsed.fields.setdefault(section, {})
            if name in fields:
                raise ValueError(f"{where}: {flag} is given twice, under two names")
            fields[name] = _parse(flag, value, kind, where)
        elif flag in ONLY:
            kind, allowed, feature = ONLY[flag]
            if _parse(flag, value, kind, where) in allowed:
                parsed.ignored.append((flag, f"{value} is what is done here in any case"))
            else:
                parsed.unsupported.setdefault(feature, []).append(f"{flag} {value}")
        elif flag in _IGNORED:
            parsed.ignored.append((flag, _IGNORED[flag]))
        elif value is False:
            parsed.ignored.append((flag, "switched off"))
        else:
            parsed.unsupported.setdefault(_UNSUPPORTED[flag], []).append(flag)
    return parsed


def close_match(name: str, known: "frozenset[str] | Mapping[str, object]") -> str:
    """``"; did you mean ...?"`` when a known name is close, otherwise nothing."""
    found = difflib.get_close_matches(str(name), [*known], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _parse(flag: str, value: Value, kind: type, where: str) -> Any:
    parser, expected = PARSERS[kind]
    try:
        return parser(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(f"{where}: {flag}: got {value!r}, expected {expected}") from None
