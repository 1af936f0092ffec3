"""The proof of a conversion: the source's model and Megatron-LM's, same weights, same logits.

Both models are small (``shrink``), in fp32, with random weights that leave no mechanism idle:
norms differ from 1, biases and sinks from 0, attention is far from uniform. The source's weights go
through its own safetensors files, so what is proven is the conversion of files too.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scenarios.convert import bert_proof, delta_net, extra, gpt_proof, latent_core, predictor
from scenarios.convert.build import transformer_config
from scenarios.convert.converter import convert
from scenarios.convert.megatron import MegatronModel
from scenarios.convert.megatron_on_cpu import megatron_on_cpu
from scenarios.convert.shrink import shrink
from scenarios.convert.source_model import SourceModel
from scenarios.convert.weight_files import HuggingFaceWeights
from scenarios.convert.weights import parameters

TOLERANCE = 1e-5
"""Largest difference of a token's logits, relative to its largest logit."""
FEW_OUTPUTS = 8
NUM_SEQUENCES, SEQ_LENGTH = 2, 24


@dataclass(frozen=True)
class Proof:
    """How far the two models are apart."""

    model_type: str
    config: dict[str, Any]
    """The small configuration that was run."""
    errors: dict[str, float]
    """Place -> largest difference there, relative to the token's largest value."""
    note: str
    """What stands in on either side."""
    outputs: tuple[str, ...]
    """The places of what the model returns, which must agree."""
    megatron_class: str

    @property
    def error(self) -> float:
        """The largest of an output."""
        return max(self.errors[place] for place in self.outputs)

    @property
    def passed(self) -> bool:
        """Whether the outputs agree."""
        return self.error <= TOLERANCE

    @property
    def first_difference(self) -> str | None:
        """The first place that differs, unless the proof passed."""
        if self.passed:
            return None
        return next(place for place, error in self.errors.items() if not error <= TOLERANCE)

    def lines(self) -> list[str]:
        """The outcome for a person."""
        outputs = ", ".join(self.outputs)
        about = f"{self.model_type}: {outputs} differ by {self.error:.1e} (at most {TOLERANCE:.0e})"
        lines = [f"pass  {about}" if self.passed else f"FAIL  {about}"]
        if not self.passed:
            place = self.first_difference
            lines.append(f"      first difference: {place}, {self.errors[str(place)]:.1e}")
        lines.append(
            f"      {NUM_SEQUENCES} x {SEQ_LENGTH} tokens, {len(self.errors)} places, fp32, random "
            f"weights; Megatron side: megatron-core's {self.megatron_class} on CPU"
        )
        if self.note:
            lines.append(f"      {self.note}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "passed": self.passed,
            "error": _plain(self.error),
            "tolerance": TOLERANCE,
            "first_difference": self.first_difference,
            "errors": {place: _plain(error) for place, error in self.errors.items()},
            "config": self.config,
            "note": self.note,
        }


def _plain(error: float) -> float | str:
    return error if math.isfinite(error) else "infinite"  # which JSON has no number for


def prove(config: Any, *, overrides: Mapping[str, Any] | None = None, seed: int = 1) -> Proof:
    """Run the source's model and megatron-core's on the same weights and tokens.

    Args:
        config: as ``convert`` takes it.
        overrides: as ``convert`` takes them; they change the Megatron side alone.
        seed: of weights and tokens.
    Returns:
        The differences at every place of the model.
    Raises:
        ValueError: as ``convert``, for the small model too.
        ModuleNotFoundError: transformers or megatron-core is not installed.
    """
    convert(config, overrides=overrides)
    small = shrink(config)
    model = convert(small, overrides=overrides)
    kind = gpt_proof if model.bert is None else bert_proof
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        source = SourceModel(small)
        source.save(Path(folder))
        weights = HuggingFaceWeights(Path(folder), model)
        tokens = torch.randint(0, small["vocab_size"], (NUM_SEQUENCES, SEQ_LENGTH))
        inputs = kind.random_inputs(model, tokens)
        expected = kind.run_source(source, model, inputs)
        with megatron_on_cpu(), torch.no_grad():
            actual = kind.run_megatron(build(model, weights), model, inputs)
    return Proof(
        model.model_type,
        small,
        {place: relative_error(actual[place], value) for place, value in expected.items()},
        "; ".join(_notes(model)),
        kind.outputs_of(model),
        kind.MEGATRON_CLASS,
    )


def _notes(model: MegatronModel) -> Iterator[str]:
    """What a reader of the outcome should know of both sides."""
    if model.mla is not None:
        yield latent_core.NOTE
    if model.transformer.linear_attention_freq is not None:
        yield delta_net.NOTE
    if model.transformer.mtp_num_layers:
        yield predictor.NOTE
    if names := extra.class_names(model):
        yield extra.NOTE.format(", ".join(names))
    if model.transformer.layernorm_zero_centered_gamma:
        yield extra.ZERO_CENTERED_NOTE


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference of a token, relative to the token's largest value; NaN counts as one.

    A head of few outputs leaves a token near zero by chance: its scale is that of all tokens.
    """
    if actual.shape != expected.shape:
        return float("inf")
    few = expected.shape[-1] < FEW_OUTPUTS
    scale = (expected.abs().max() if few else expected.abs().amax(dim=-1)).clamp_min(1e-30)
    error = ((actual - expected).abs().amax(dim=-1) / scale).max().detach()
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def build(model: MegatronModel, weights: HuggingFaceWeights) -> Any:
    """megatron-core's model with these weights, for evaluation, on its local specification."""
    settings = {"use_cpu_initialization": True, "perform_initialization": False}
    config = transformer_config(model, **settings)
    built = (gpt_proof if model.bert is None else bert_proof).build(model, config)
    state = {parameter.name: weights.read(parameter) for parameter in parameters(model)}
    found = built.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
    assert not missing, missing
    assert not found.unexpected_keys, found.unexpected_keys
    return built.eval()
