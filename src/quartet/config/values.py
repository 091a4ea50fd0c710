"""What the configuration's fields are made of: a frozen section, and numbers within bounds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_switch(given: Any) -> Any:
    """YAML's true and false are numbers to Python, and never meant as such."""
    if isinstance(given, bool):
        raise ValueError(f"a number or name is needed, and {str(given).lower()} was given")
    return given


def _right_gradients(given: Any) -> Any:
    """Formats that users know by name and that no adapter can be trained over."""
    reasons = {
        "torchao-int8-dynamic": "rounds activations too, and the gradients of LoRA over it are wrong",
        "torchao-int4": "has no backward",
        "quanto-int4": "compiles code when it is first used",
        "hqq": "cannot be loaded by transformers 5",
    }
    if given in reasons:
        raise ValueError(f"models.quantization={given} {reasons[given]}; use 4bit, 8bit or torchao-int8")
    return given


Number = BeforeValidator(_no_switch)
RightGradients = BeforeValidator(_right_gradients)
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1), Number]
NonNegativeInt = Annotated[int, Field(ge=0), Number]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
