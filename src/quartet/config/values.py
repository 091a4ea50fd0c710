"""What the configuration's fields are made of: a frozen section, and numbers within bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

_LONGEST_NAME, _LONGEST_PATH = 255, 4000
"""Bytes of one name and of a whole path that every common file system takes."""


def _no_switch(given: Any) -> Any:
    """YAML's true and false are numbers to Python, and never meant as such."""
    if isinstance(given, bool):
        raise PydanticCustomError("switch", "a number or name is needed")
    return given


def _right_gradients(given: Any) -> Any:
    """Formats that users know by name and that no adapter can be trained over."""
    reasons = {
        "torchao-int8-dynamic": "rounds activations too, and the gradients of LoRA over it are wrong",
        "torchao-int4": "has no backward",
        "quanto-int4": "compiles code when it is first used",
        "hqq": "cannot be loaded by transformers 5",
    }
    if isinstance(given, str) and given in reasons:
        raise ValueError(f"models.quantization={given} {reasons[given]}; use 4bit, 8bit or torchao-int8")
    return given


def _nameable(given: str) -> str:
    """Looking up a name that no file can have raises, in the middle of whatever asks."""
    try:
        names = given.encode().split(b"/")
    except UnicodeEncodeError:
        names = [b"\0"]
    if any(b"\0" in name for name in names):
        raise PydanticCustomError("name", "it holds a character that no name of a file has")
    if max(map(len, names)) > _LONGEST_NAME or len(given) > _LONGEST_PATH:
        limits = f"a file's name has at most {_LONGEST_NAME} bytes, a path {_LONGEST_PATH}"
        raise PydanticCustomError("name", "{limits}", {"limits": limits})
    return given


def _in_float32(given: float) -> float:
    """Numbers of the configuration meet tensors in float32, which refuse larger ones in the middle of a run."""
    if abs(given) > 3.4e38:
        raise PydanticCustomError("float32", "float32 holds no number beyond 3.4e38")
    return given


def _as_text(given: Any) -> Any:
    """Paths, as Python has them."""
    return os.fsdecode(given) if isinstance(given, os.PathLike) else given


Place = Annotated[str, Field(min_length=1), AfterValidator(_nameable), BeforeValidator(_as_text)]
"""A path, or the name of something on the Hub."""
Number = BeforeValidator(_no_switch)
RightGradients = BeforeValidator(_right_gradients)
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1), Number]
NonNegativeInt = Annotated[int, Field(ge=0), Number]
Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_in_float32)]
NonNegative = Annotated[Finite, Field(ge=0.0)]
Positive = Annotated[Finite, Field(gt=0.0)]
Seconds = Annotated[float, Field(gt=0.0, le=1.0e6)]
"""A limit that threads and sockets can wait for: they refuse those of some centuries."""
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Epsilon = Annotated[Finite, Field(ge=1.0e-37)]
"""What keeps a quotient finite: smaller numbers are zero in float32."""


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def by_key(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections by dotted key; entries of a list of sections by number (`rewards.0.url`)."""
    for key, value in tree.items():
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from by_key(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
