"""What is asked of an inference engine."""

from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from scenarios.frozen import Frozen
from scenarios.inference.stop_strings import UNREADABLE
from scenarios.inference_config import EngineConfig
from scenarios.scenario import ModelConfig


def _check_readable(string: str) -> str:
    if UNREADABLE in string:
        raise ValueError(
            f"stop_strings: got {string!r}, expected no U+FFFD, which stands for unreadable bytes"
        )
    return string


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_readable)]


class Sampling(Frozen):
    """How tokens are chosen, and when to stop."""

    max_new_tokens: PositiveInt = 16
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the logits; 0 is greedy: the largest logit, of equal ones that of the lowest id."""
    top_k: NonNegativeInt = 0
    """Only so many of the most likely tokens; 0 is all, 1 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the most likely tokens whose probabilities reach this sum."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The draw for a token is keyed by (seed, request id, position)."""
    stop_tokens: tuple[TokenId, ...] = ()
    """Generation ends after one of them."""
    stop_strings: Annotated[tuple[StopString, ...], Field(max_length=16)] = ()
    """Generation ends after the first token with which the text of the generated tokens, special
    ones by their names, contains one of them. The answer keeps all of that token, like a stop
    token, and so may have text behind the string."""
    prompt_log_probs: bool = False
    """Whether the log-probabilities of the prompt's own tokens are wanted, too."""


class Request(Frozen):
    """A prompt to continue."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    prompt: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    sampling: Sampling = Sampling()

    @property
    def max_tokens(self) -> int:
        """Tokens of the prompt and, at most, of its continuation."""
        return len(self.prompt) + self.sampling.max_new_tokens


def check_request(
    request: Request, model: ModelConfig, config: EngineConfig, *, has_tokenizer: bool
) -> None:
    """Refuses what could never be generated.

    Raises:
        ValueError: longer than the model's positions or the KV budget, an unknown token, or stop
            strings for a model without a tokenizer.
    """
    where = f"request {request.id!r}: {len(request.prompt)} prompt tokens and up to "
    where += f"{request.sampling.max_new_tokens} new ones"
    if request.max_tokens > model.max_position_embeddings:
        raise ValueError(
            f"{where}, expected at most {model.max_position_embeddings}, the positions of the model"
        )
    budget = config.num_blocks(model) * config.block_size
    if request.max_tokens > budget:
        raise ValueError(f"{where}, expected at most {budget}, the tokens of the KV budget")
    largest = max(request.prompt)
    if largest >= model.vocab_size:
        raise ValueError(
            f"request {request.id!r}: got token {largest}, expected less than {model.vocab_size}"
        )
    if request.sampling.stop_strings and not has_tokenizer:
        raise ValueError(
            f"request {request.id!r}: got stop_strings {request.sampling.stop_strings}, expected "
            "none: the model has no tokenizer.json to read them by"
        )
