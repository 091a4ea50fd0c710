"""DeepSpeed's ZeRO stage 3 without what its set-up makes and nobody needs yet, or at all.

Its optimizer copies every trained weight for masters, which mixed precision needs and trained weights in float32 do not, and
fills gradients of all of them with zeros. Here the masters are the weights, and the gradients are made by the first backward
pass. Its hooks take 18 KiB for each module, most of it two autograd functions of each module's own; with adapters seven modules
in ten hold no weight that could be fetched. Here these have no hooks, and the others share two functions.

A DeepSpeed that does not look like the one this was written for (0.19.8) sets up in its own way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""DeepSpeed's place for each weight's gradient within the flat ones, by the weight's number (a private name)."""
SETUP, STATES, HOOKS = "_setup_for_real_optimizer", "initialize_optimizer_states", "_register_deepspeed_module"
"""What is wrapped: DeepSpeed makes masters, states and gradients in the first, which calls the second; the third puts hooks on
a module and those inside of it."""
FETCH, RELEASE = "pre_bwd_fn", "post_bwd_fn"
"""Attributes of a module under which its hooks find the autograd functions, and which they leave as they are if set."""
TIMES = "applied_pre_backward_ref_cnt"
"""DeepSpeed's count, at a module, of the times it ran and will be fetched for again."""
USED = {"_create_fp32_partitions", STATES, "device", "grad_partitions_flat_buffer", GRADIENTS}
"""What the first is to use, so that wrapping it does what is meant."""

_log = logging.getLogger("quartet")


@contextmanager
def lean_stage3() -> Iterator[None]:
    """While this is open, DeepSpeed's stage 3 is set up without the waste; in its own way where it is not as expected."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    optimizer, hooks = vars(DeepSpeedZeroOptimizer_Stage3), vars(DeepSpeedZeRoOffload)
    with ExitStack() as stack:
        if as_expected(optimizer, hooks):
            stack.enter_context(_replaced(DeepSpeedZeroOptimizer_Stage3, SETUP, _setup(optimizer[SETUP])))
            stack.enter_context(_replaced(DeepSpeedZeroOptimizer_Stage3, STATES, _states(optimizer[STATES])))
            stack.enter_context(_replaced(DeepSpeedZeRoOffload, HOOKS, _on_weights_only(hooks[HOOKS])))
        else:
            _say_once()
        yield


def as_expected(optimizer: Any, hooks: Any) -> bool:
    """Whether DeepSpeed's classes have what is wrapped here.

    Args:
        optimizer, hooks: what the two classes define.
    """
    found = [optimizer.get(SETUP), optimizer.get(STATES), hooks.get(HOOKS)]
    if not all(isinstance(function, FunctionType) for function in found):
        return False
    setup, _, register = found
    looked_for = {FETCH, RELEASE} <= set(register.__code__.co_consts)
    return set(setup.__code__.co_names) >= USED and register.__defaults__ is not None and looked_for


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


def _on_weights_only(theirs: FunctionType) -> Callable[..., None]:
    """`theirs` calls itself for each child, and so this."""
    numbers = (theirs.__defaults__ or ([0],))[0]  # a list with the number of the last module

    def register(self: Any, module: Any, count: list[int] = numbers) -> None:
        if module is self.module or next(module.parameters(recurse=False), None) is not None:
            vars(module).setdefault(FETCH, Around(_Fetch, module, self))
            vars(module).setdefault(RELEASE, Around(_Release, module, self))
            theirs(self, module, count=count)
            return
        module.ds_id, module.ds_recompute_parameters = count[0], set()
        for child in module.children():
            count[0] += 1
            register(self, child, count)

    return register


class Around:
    """In place of an autograd function of a module's own: the shared one, told whose it is."""

    __slots__ = ("_function", "hooks", "module")

    def __init__(self, function: type[torch.autograd.Function], module: Any, hooks: Any) -> None:
        """
        Args:
            hooks: DeepSpeed's object that fetches and releases weights.
        """
        self._function, self.module, self.hooks = function, module, hooks

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor, with the module's turn in the backward pass tied to it."""
        result: Tensor = self._function.apply(self, tensor)
        return result


class _Through(torch.autograd.Function):
    """Gives on what it is given."""

    @staticmethod
    def forward(around: Around, tensor: Tensor) -> Tensor:
        return tensor.detach()


class _Fetch(_Through):
    """On what a module returns: before its backward pass its weights are fetched, once for each time that it ran."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Around, Tensor], output: Tensor) -> None:
        ctx.around, _ = inputs
        held = vars(ctx.around.module)
        held[TIMES] = held.get(TIMES, 0) + 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        module = ctx.around.module
        if getattr(module, TIMES) > 0:
            ctx.around.hooks.pre_sub_module_backward_function(module)
            setattr(module, TIMES, getattr(module, TIMES) - 1)
        return None, *gradients


class _Release(_Through):
    """On what a module is given: when the gradients of all of it are known, its weights are released."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Around, Tensor], output: Tensor) -> None:
        ctx.around, given = inputs
        if given.requires_grad:
            ctx.around.module.ds_grads_remaining += 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        module = ctx.around.module
        module.ds_grads_remaining -= 1
        if module.ds_grads_remaining == 0:
            ctx.around.hooks.post_sub_module_backward_function(module)
        return None, *gradients


@contextmanager
def _replaced(owner: type, name: str, function: Callable[..., None]) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


@cache
def _say_once() -> None:
    from deepspeed import __version__

    if dist.get_rank() == 0:
        _log.warning(
            "DeepSpeed %s sets up ZeRO stage 3 in a way that is not known here (that of 0.19.8 is): loading takes up to three "
            "times the memory of what is trained, and more for each module",
            __version__,
        )
