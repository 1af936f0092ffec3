"""What an inference scenario asks of a frozen model, and the sizes of its engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from scenarios.frozen import Frozen

if TYPE_CHECKING:
    from scenarios.scenario import ModelConfig

INFERENCE_METRICS = (
    "generated_tokens",
    "generated_text",
    "logprobs",
    "prompt_logprobs",
    "logits",
)
"""Judged for every request; ``logits`` are digests, one for each generated token."""


class EngineConfig(Frozen):
    """Sizes of an engine; none of them changes a number."""

    block_size: PositiveInt = 256
    """Tokens of a block of the KV cache."""
    kv_budget_nbytes: PositiveInt = 2**30
    """Of the keys and values of one replica, over all its ranks."""
    max_batch_tokens: PositiveInt = 256
    """Tokens that go through the model in one step; a longer prompt is prefilled in chunks."""
    max_running: PositiveInt = 64
    """Requests that are generated at a time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens: got {self.max_batch_tokens}, expected at least max_running = "
                f"{self.max_running}, a token of each running request"
            )
        return self

    def num_blocks(self, model: "ModelConfig") -> int:
        """Blocks of the budget: the same number in every layout.

        Raises:
            ValueError: it holds none.
        """
        itemsize = 4 if model.precision == "fp32" else 2
        nbytes = 2 * model.num_layers * model.hidden_size * itemsize * self.block_size
        if nbytes > self.kv_budget_nbytes:
            raise ValueError(
                f"kv_budget_nbytes: got {self.kv_budget_nbytes}, expected at least the {nbytes} of "
                f"one block of {self.block_size} tokens"
            )
        return self.kv_budget_nbytes // nbytes


class InferenceConfig(Frozen):
    """The requests of an inference scenario."""

    prompt: str
    """Text; every request continues another piece of it."""
    num_requests: PositiveInt = 32
    num_tokens_to_generate: PositiveInt = 30
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0, as in Megatron-LM, is all tokens."""
    engine: EngineConfig = EngineConfig()
    model_folder: Path | None = None
    """The frozen model; None: none of this size is there."""


def inference_of(fields: Mapping[str, Mapping[str, Any]], folder: Path) -> InferenceConfig:
    """From the sections ``inference`` and ``engine`` of a case's flags.

    Args:
        fields: section -> field -> value.
        folder: of the frozen model, if it is there.

    Raises:
        ValueError: a value that cannot be.
    """
    engine = dict(fields.get("engine", {}))
    if "buffer_size_gb" in engine:
        engine["kv_budget_nbytes"] = int(engine.pop("buffer_size_gb") * 2**30)
    return InferenceConfig.build(
        **fields.get("inference", {}),
        engine=EngineConfig.build(**engine),
        model_folder=folder if folder.is_dir() else None,
    )
