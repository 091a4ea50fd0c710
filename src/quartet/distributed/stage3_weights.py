"""The weights that DeepSpeed's ZeRO stage 3 cuts.

DeepSpeed makes two dozen functions for each weight, 6 KiB of them. Here all weights that are cut together share those of the
first: a function that knows the weight is put together for each call from the same code, and the weight.

The shares of what is trained are cut into one flat tensor, for which DeepSpeed otherwise makes a copy of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from quartet.distributed.stage3_code import inner, names

CONVERT = "_convert_to_deepspeed_param"
"""What is wrapped: gives a weight its attributes and functions."""
WEIGHT = "param"
"""The name under which its functions know the weight they belong to."""
COMMON = ("all_gather_coalesced", "convert_to_zero_parameters")
"""Functions that do not know it."""
METHOD = "ds_summary"
"""One that DeepSpeed makes a method of it."""
OWN = (
    *("all_gather", "partition", "reduce_gradients_at_owner", "partition_gradients"),
    *("aligned_size", "padding_size", "partition_numel"),
)
"""Functions that know it."""
ITEM = ("allgather_before", "item_override")
"""DeepSpeed wraps a method of the weight in the first; the second is not used."""


def as_expected(found: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's function looks like the one this was written for.

    Args:
        found: the functions by name.
    """
    made = inner(found[CONVERT])
    given = {*COMMON, *OWN, METHOD}
    if not made.keys() >= {*given, *ITEM} or not names(found[CONVERT]) >= {*given, "item", WEIGHT}:
        return False
    if not all({WEIGHT} <= set(made[name].co_freevars) <= {WEIGHT, "self"} for name in OWN):
        return False
    rest = made.keys() - {*OWN, *ITEM}  # what the common ones use is among them
    return all(WEIGHT not in made[name].co_freevars for name in rest)


def sharing_functions(theirs: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`theirs`, which makes functions for each weight; all but the first get those of the first."""
    common: dict[int, dict[str, Any]] = {}
    methods: dict[int, dict[str, Callable[..., Any]]] = {}

    def convert(self: Any, weight: Any) -> None:
        theirs(self, weight)
        held, number = vars(weight), id(self)
        if number not in common and not all(_knows(held[name]) for name in OWN):
            return  # wrapped in something else: each keeps its own
        if number not in common:
            common[number] = {name: held[name] for name in COMMON}
            methods[number] = {name: _of_any(held[name]) for name in OWN}
            methods[number] |= {METHOD: held[METHOD].__func__, "item": _item}
        held.update(common[number])
        held.update((name, MethodType(function, weight)) for name, function in methods[number].items())
        weight.__dict__ = dict(held)  # which has room for as many again, not for four times as many

    return convert


def _knows(function: Any) -> bool:
    return isinstance(function, FunctionType) and WEIGHT in function.__code__.co_freevars


def _of_any(function: FunctionType) -> Callable[..., Any]:
    """A function of one weight as one that is given the weight first."""
    code, cells = function.__code__, function.__closure__ or ()
    known = [None if name == WEIGHT else cell for name, cell in zip(code.co_freevars, cells, strict=True)]
    surroundings, defaults = function.__globals__, function.__defaults__

    def of(weight: Any, /, *arguments: Any, **options: Any) -> Any:
        closure = tuple(CellType(weight) if cell is None else cell for cell in known)
        return FunctionType(code, surroundings, code.co_name, defaults, closure)(*arguments, **options)

    return of


def _item(weight: Any) -> Any:
    weight.all_gather()
    return Tensor.item(weight)


def place_for_shares(weights: Iterable[Tensor], processes: int, device: torch.device) -> dict[Tensor, Tensor]:
    """By weight, where its share goes: one flat tensor, in the weights' order."""
    weights = list(weights)
    sizes = [-(-weight.numel() // processes) for weight in weights]
    flat = torch.empty(sum(sizes), dtype=weights[0].dtype, device=device)
    return dict(zip(weights, flat.split(sizes), strict=True))


def joined(tensors: list[Tensor]) -> Tensor | None:
    """The flat tensor that some tensors make up one after the other, each whole; None where they do not."""
    first, at = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.dtype != first.dtype or not tensor.is_contiguous() or tensor.data_ptr() != at:
            return None
        at += tensor.nbytes
    storage = first.untyped_storage()
    if (storage.data_ptr(), storage.nbytes()) != (first.data_ptr(), at - first.data_ptr()):
        return None
    whole: Any = first.new_empty(0)
    result: Tensor = whole.set_(storage)
    return result
