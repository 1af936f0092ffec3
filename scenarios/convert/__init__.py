"""Hugging Face model configurations to Megatron-LM's: one table per family, nothing lost."""

from scenarios.convert.converter import convert
from scenarios.convert.layout import ParallelLayout
from scenarios.convert.megatron import GPTModelArguments, MegatronModel, TransformerFields

__all__ = [
    "GPTModelArguments",
    "MegatronModel",
    "ParallelLayout",
    "TransformerFields",
    "convert",
]
