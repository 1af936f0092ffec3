"""The base of every configuration model: frozen, strict about keys, with errors of one line."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """A configuration that cannot change once it has been checked."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def build(cls, **values: Any) -> Self:
        """Check the values and make the model.

        Args:
            values: the fields by name.
        Returns:
            The frozen model.
        Raises:
            ValueError: one line that says every field that is wrong, what was got and expected.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError("; ".join(map(_sentence, error.errors()))) from None


def _sentence(item: Any) -> str:
    text: str = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return text
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: got {item['input']!r}: {text}"
