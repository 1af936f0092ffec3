"""What a family's table is made of: a rule for every field of its Hugging Face configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scenarios.convert.mapping import Mapped


@dataclass
class Fields:
    """The Megatron fields collected so far."""

    transformer: dict[str, Any] = field(default_factory=dict)
    gpt_model: dict[str, Any] = field(default_factory=dict)
    mla: dict[str, Any] = field(default_factory=dict)
    bert: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def put(self, target: str, value: Any) -> None:
        """Set "section.name"."""
        section, name = target.split(".")
        getattr(self, section)[name] = value


@dataclass(frozen=True)
class Only:
    """A field of which only some values can be converted, and which then sets nothing."""

    values: tuple[Any, ...]
    meaning: str
    """What another value would ask for."""


@dataclass(frozen=True)
class Ignored:
    """A field that says nothing about the model's numbers."""

    reason: str


HF = Mapping[str, Any]
Together = Callable[[HF, Fields], None]
"""Reads several fields at once; stands at each of them and runs once."""
Rule = str | Only | Ignored | Together
"""A text is the target: "transformer.num_layers" or "gpt_model.vocab_size"; the value is copied."""
Row = tuple[Any, Rule]
"""What the source's own class assumes for a field that its file leaves out, and the rule."""


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is converted."""

    model_type: str
    table: Mapping[str, Row]
    """Field -> its row, in the order in which rules run."""
    constants: Mapping[str, Any]
    """Target -> value that every model of the family has."""
    weights: Mapping[str, Mapped]
    """Name of a Megatron parameter, with {layer} and {expert} -> where its numbers come from."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a field -> the one in the table."""
    text_part: str | None = None
    """Field that holds the configuration of the text model, if that is a part of a larger one."""
    bases: tuple[str, ...] = ("model.", "")
    """What {base} in a tensor's name may stand for."""
    other_tensors: tuple[str, ...] = ()
    """How names of tensors begin that are not the converted model's."""
    old_endings: Mapping[str, str] = field(default_factory=dict)
    """How names of tensors end in old files -> in new ones."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor that a file may hold besides -> the tensor that it must equal."""
    label_layer: str = "score"
    """Name of the linear layer of token classification."""


def whole(hf: HF, name: str, minimum: int = 1) -> int:
    """The field as an integer that can be counted with.

    Raises:
        ValueError: it is something else, or less than ``minimum``.
    """
    value = hf[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}: got {value!r}, expected an integer of {minimum} or more")
    return value


def number(hf: HF, name: str) -> float:
    """The field as a finite number.

    Raises:
        ValueError: it is something else.
    """
    value = hf[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"{name}: got {value!r}, expected a number")
    return float(value)


def switch(hf: HF, name: str) -> bool:
    """The field as true or false.

    Raises:
        ValueError: it is something else.
    """
    value = hf[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected true or false")
    return value
