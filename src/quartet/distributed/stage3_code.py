"""What a function of DeepSpeed's looks like, to tell whether it is the one that wrapping it was written for."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType


def names(function: FunctionType) -> set[str]:
    """All names and strings in a function's own code."""
    code = function.__code__
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return {*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars, *strings}


def inner(function: FunctionType) -> dict[str, CodeType]:
    """The functions that a function defines, by name."""
    return {code.co_name: code for code in _constants(function.__code__)}


def _constants(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
