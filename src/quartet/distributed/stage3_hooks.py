"""The hooks of DeepSpeed's ZeRO stage 3, which fetch a module's weights before it runs and release them after.

DeepSpeed makes 18 KiB of them for each module: two autograd functions, four hooks, a dictionary that notices weights used by
other modules, and methods. With adapters seven modules in ten hold no weight that could be fetched. Here these have none of it;
the others share two autograd functions, and the four hooks that DeepSpeed made for the outermost module: hooks are told whose
they are when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quartet.distributed.stage3_code import inner, names

REGISTER, EXTERNAL, INJECT = "_register_deepspeed_module", "_init_external_params", "_inject_parameters"
"""What is wrapped: the first puts hooks on a module and those inside of it; the second makes room at a module for weights of
other modules that it uses; the third puts dictionaries that notice such a use in place of those that hold weights."""
FETCH, RELEASE = "pre_bwd_fn", "post_bwd_fn"
"""Attributes of a module under which its hooks find the autograd functions, and which they leave as they are if set."""
TIMES = "applied_pre_backward_ref_cnt"
"""DeepSpeed's count, at a module, of the times it ran and will be fetched for again."""
BEFORE = ("_pre_forward_module_hook", "_post_backward_module_hook")
AFTER = ("_post_forward_module_hook", "_pre_backward_module_hook")
"""DeepSpeed's hooks before and after a module's forward pass, in their order."""
_MESSAGE = "_bwd_hook_unexpected_inputs_msg"
USED = {
    REGISTER: {FETCH, RELEASE, "forward_hooks", "backward_hooks", "ds_id", "ds_recompute_parameters"},
    EXTERNAL: {"_external_params", "ds_external_parameters", "all_parameters"},
    INJECT: {"modules", "_parameters", "_original_parameters"},
}
"""What each of them is to use, so that wrapping it does what is meant."""


def as_expected(found: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's functions look like those this was written for.

    Args:
        found: the functions by name.
    """
    if not all(used <= names(found[name]) for name, used in USED.items()):
        return False
    made = inner(found[REGISTER])
    if found[REGISTER].__defaults__ is None or not made.keys() >= {*BEFORE, *AFTER}:
        return False
    # They know the object that put them there, and nothing of the module.
    return all(set(made[name].co_freevars) <= {"self", _MESSAGE} for name in (*BEFORE, *AFTER))


def has_weights(module: Any) -> bool:
    """Whether a module holds weights of its own."""
    return next(module.parameters(recurse=False), None) is not None


def external_of_few(theirs: FunctionType) -> Callable[[Any], None]:
    """In place of `theirs`, which is called for every module: modules with hooks get what it makes with these."""

    def external(module: Any) -> None:
        pass

    return external


def injected_into_few(theirs: FunctionType) -> Callable[..., None]:
    """`theirs` for modules that hold weights; all others share one dictionary of none."""

    def injected(module: Any, cls: type) -> None:
        full = [inside for inside in module.modules() if inside._parameters]
        empty = [inside for inside in module.modules() if not inside._parameters]
        theirs(SimpleNamespace(modules=lambda: full), cls)
        none = type("NoWeights", (cls,), {"__setitem__": _refused})(parent_module=module)
        for inside in empty:
            inside._parameters = none

    return injected


def on_weights_only(theirs: FunctionType) -> Callable[..., None]:
    """`theirs` for the outermost module, whose hooks the others share; it calls itself for each child, and so this."""
    numbers = (theirs.__defaults__ or ([0],))[0]  # a list with the number of the last module
    sharing: list[Any] = []

    def register(self: Any, module: Any, count: list[int] = numbers) -> None:
        outermost, at_once = module is self.module, getattr(module, "_z3_leaf", False)
        if outermost or at_once or has_weights(module):
            _prepare(module, self)
        if outermost or at_once:  # at once: with all that is inside of it
            theirs(self, module, count=count)
            if outermost:
                self.forward_hooks.append(SharedHooks(self, sharing.copy()))
                sharing.clear()
            return
        if has_weights(module):
            module.ds_id, module.ds_recompute_parameters = count[0], set()
            sharing.append(module)
        for child in module.children():
            count[0] += 1
            register(self, child, count)

    return register


class SharedHooks:
    """The hooks of the outermost module on other modules; stands for all of them in DeepSpeed's list."""

    def __init__(self, hooks: Any, modules: list[Any]) -> None:
        """
        Args:
            hooks: DeepSpeed's object, which has just put hooks on its outermost module.
        """
        made = {handle.id for handle in (*hooks.forward_hooks[-2:], *hooks.backward_hooks[-2:])}
        outermost = hooks.module
        self._before = [hook for number, hook in outermost._forward_pre_hooks.items() if number in made]
        self._after = [hook for number, hook in outermost._forward_hooks.items() if number in made]
        assert (len(self._before), len(self._after)) == (len(BEFORE), len(AFTER))
        self._modules = modules
        for module in modules:
            for hook in self._before:
                module.register_forward_pre_hook(hook)
            for hook in self._after:
                module.register_forward_hook(hook)

    def remove(self) -> None:
        """Take them off."""
        for module in self._modules:
            for here, hooks in ((module._forward_pre_hooks, self._before), (module._forward_hooks, self._after)):
                for number in [number for number, hook in here.items() if any(hook is one for one in hooks)]:
                    del here[number]
        self._modules = []


def _prepare(module: Any, hooks: Any) -> None:
    """Give a module what the hooks on it look for."""
    held = vars(module)
    held.setdefault(FETCH, Around(_Fetch, module, hooks))
    held.setdefault(RELEASE, Around(_Release, module, hooks))
    held.setdefault("_external_params", {})
    held.setdefault("ds_external_parameters", MethodType(_external_parameters, module))


def _external_parameters(module: Any) -> Iterator[tuple[int, Any]]:
    """The weights of other modules that a module uses."""
    items: Iterator[tuple[int, Any]] = module._external_params.items()
    return items


def _refused(self: Any, name: str, weight: Any) -> None:
    raise RuntimeError(f"a module without weights cannot be given {name} once its model is cut")


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
