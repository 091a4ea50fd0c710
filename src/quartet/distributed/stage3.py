"""DeepSpeed's ZeRO stage 3 without what its set-up makes and nobody needs yet, or at all.

Its optimizer copies every trained weight for masters, which mixed precision needs and trained weights in float32 do not, and
fills gradients of all of them with zeros. Here the masters are the weights, and the gradients are made by the first backward
pass. It also copies the shares of what is trained into one flat tensor; here they are cut into that tensor at once.

What is left are Python objects. DeepSpeed makes some 30 KiB of them for each weight of a model with adapters: functions that do
the same for all weights (`stage3_weights`) and all modules (`stage3_hooks`), names for messages that are not shown, and whole
weights that come and go while functions for their gradients are put on them. Here they take 7 KiB.

Another DeepSpeed than the one this was written for, and one whose functions look otherwise, sets up in its own way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quartet.distributed import stage3_hooks, stage3_weights
from quartet.distributed.stage3_code import names

GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""DeepSpeed's place for each weight's gradient within the flat ones, by the weight's number (a private name)."""
SETUP, STATES, FLAT = "_setup_for_real_optimizer", "initialize_optimizer_states", "defragment"
"""What is wrapped of the optimizer: it makes masters, states and gradients in the first, which calls the second; the third
copies shares into one flat tensor."""
REDUCE = "create_reduce_and_remove_grad_hooks"
"""Has a function called at every trained weight when its gradient is there; for old versions of torch it holds the weight whole
meanwhile."""
NAMES = "debug_extract_module_and_param_names"
"""What is left out of the engine: it keeps the name of every module and weight for messages that are not shown."""
USED: dict[str, set[str]] = {
    SETUP: {"_create_fp32_partitions", STATES, "device", "grad_partitions_flat_buffer", GRADIENTS},
    STATES: set(),
    FLAT: {"tensors", "get_mapping_to_flat_buffer", "narrow", "data"},
    REDUCE: {"fp16_groups", "all_gather", "partition"},
    NAMES: {"module_names", "param_names", "debug_clear_module_and_param_names"},
}
"""What each of them is to use, so that wrapping it does what is meant."""

WRITTEN_FOR = ("0.19.8",)
"""Versions of DeepSpeed whose functions were read: what is put in place of some of them does what theirs do."""

_log = logging.getLogger("quartet")


@contextmanager
def lean_stage3() -> Iterator[bool]:
    """While this is open, DeepSpeed's stage 3 is set up without the waste; in its own way where it is not as expected.

    Yields:
        Whether it is as expected.
    """
    with ExitStack() as stack:
        places = _places()
        found = {name: vars(owner).get(name) for name, owner in places.items()}
        known = _version() in WRITTEN_FOR and as_expected(found)
        if known:
            for name, wrap in _WRAPPED.items():
                stack.enter_context(_replaced(places[name], name, wrap(found[name])))
        else:
            _say_once()
        yield known


def as_expected(found: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed has what is wrapped here, and it looks like what this was written for.

    Args:
        found: DeepSpeed's functions by name.
    """
    if not all(isinstance(found.get(name), FunctionType) for name in _WRAPPED):
        return False
    if not all(used <= names(found[name]) for name, used in USED.items()):
        return False
    return stage3_hooks.as_expected(found) and stage3_weights.as_expected(found)


def found_functions() -> dict[str, Any]:
    """The functions of the DeepSpeed that is installed which are wrapped here, by name."""
    return {name: vars(owner).get(name) for name, owner in _places().items()}


def make_gradients(zero: Any) -> None:
    """Put zeros where the gradients of this process's share go, where they were left out so far."""
    flat = zero.grad_partitions_flat_buffer
    if not flat.is_meta:
        return
    zero.grad_partitions_flat_buffer = made = torch.zeros_like(flat, device=zero.device)
    places = getattr(zero, GRADIENTS)
    for number, place in places.items():
        places[number] = made.narrow(0, place.storage_offset(), place.numel())


def _setup(theirs: Callable[[Any], None]) -> Callable[[Any], None]:
    def setup(self: Any) -> None:
        device = self.device
        # DeepSpeed shares masters that have the weights' dtype and device, and compares the device with a name.
        self.device = torch.device(device)
        try:
            theirs(self)
        finally:
            self.device = device

    return setup


def _states(theirs: Callable[[Any], None]) -> Callable[[Any], None]:
    def states(self: Any) -> None:
        theirs(self)
        self.device = torch.device("meta")  # the gradients come next, and are made there

    return states


def _flat(theirs: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    def flat(tensors: list[Tensor]) -> Tensor:
        whole = stage3_weights.joined(tensors)
        return theirs(tensors) if whole is None else whole

    return flat


def _reduce(theirs: Callable[[Any], None]) -> Callable[[Any], None]:
    def reduce(self: Any) -> None:
        weights = [vars(weight) for group in self.fp16_groups for weight in group]
        before = [{name: weight[name] for name in ("all_gather", "partition")} for weight in weights]
        for weight in weights:
            weight.update(all_gather=_nothing, partition=_nothing)
        try:
            theirs(self)
        finally:
            for weight, functions in zip(weights, before, strict=True):
                weight.update(functions)

    return reduce


def _nothing() -> None:
    pass


def _no_names(theirs: Callable[[Any], None]) -> Callable[[Any], None]:
    def no_names(model: Any) -> None:
        pass

    return no_names


_WRAPPED: dict[str, Callable[[Any], Callable[..., Any]]] = {
    SETUP: _setup,
    STATES: _states,
    FLAT: _flat,
    REDUCE: _reduce,
    NAMES: _no_names,
    stage3_hooks.REGISTER: stage3_hooks.on_weights_only,
    stage3_hooks.EXTERNAL: stage3_hooks.external_of_few,
    stage3_hooks.INJECT: stage3_hooks.injected_into_few,
    stage3_weights.CONVERT: stage3_weights.sharing_functions,
}


def _places() -> dict[str, Any]:
    """Where DeepSpeed looks each function up; nothing where it has no such places."""
    try:
        from deepspeed.runtime import engine
        from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3

        offload, optimizer = parameter_offload.DeepSpeedZeRoOffload, stage3.DeepSpeedZeroOptimizer_Stage3
        init = partition_parameters.Init
    except (ImportError, AttributeError):
        return {}
    return {
        SETUP: optimizer,
        STATES: optimizer,
        REDUCE: optimizer,
        FLAT: stage3,
        NAMES: engine,
        stage3_hooks.REGISTER: offload,
        stage3_hooks.EXTERNAL: parameter_offload,
        stage3_hooks.INJECT: parameter_offload,
        stage3_weights.CONVERT: init,
    }


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _version() -> str:
    from deepspeed import __version__

    return str(__version__).partition("+")[0]


@cache
def _say_once() -> None:
    if dist.get_rank() == 0:
        _log.warning(
            "DeepSpeed %s sets up ZeRO stage 3 in a way that is not known here (that of 0.19.8 is): loading takes up to three "
            "times the memory of what is trained, and more for each module",
            _version(),
        )
