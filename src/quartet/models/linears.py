"""Linear layers for passes with gradients on the CPU: the same numbers to rounding, with fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SMALLEST_SIDE = 64
"""Features below which a call of oneDNN costs more than it saves."""
SMALLEST_TRANSPOSED = 512
"""Features from which oneDNN beats MKL at a product with the transposed weight."""


def use_fast_linears(model: nn.Module) -> None:
    """Give linear layers and LoRA layers on the CPU passes of their own where gradients are taken.

    Without gradients they compute exactly what they did: frozen roles stay bit-identical to their checkpoints.

    float32 products go through oneDNN: torch multiplies float32 matrices with MKL, which leaves the widest vectors of some
    processors unused. A LoRA layer adds its low-rank part inside matrix products, forward and backward, where PEFT takes
    three more passes over the layer's output.

    Only plain layers change (class `Linear` of torch, `Linear` of PEFT); GPT-2's Conv1D, quantized layers and LoRA
    variants stay as they are, and so does every layer whose forward another library has replaced.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear and has_onednn(module.weight) and min(module.weight.shape) >= SMALLEST_SIDE:
            _change(module, FastLinear)
        elif type(module) is LoraLinear and isinstance(module.base_layer, nn.Linear):
            _change(module, FastLoraLinear)


def restore_linears(model: nn.Module) -> None:
    """Undo `use_fast_linears`: for engines that take the weights of single layers apart."""
    for module in model.modules():
        if type(module) is FastLinear:
            _change(module, nn.Linear)
        elif type(module) is FastLoraLinear:
            _change(module, LoraLinear)


def _change(module: nn.Module, kind: type[nn.Module]) -> None:
    """Another forward for the same parameters; copies of the module take it along."""
    module.__class__ = kind


def has_onednn(weight: Tensor) -> bool:
    """Whether this weight can be multiplied by oneDNN in float32; quantized and sharded tensors only look like one."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not is_traceable_wrapper_subclass(weight)
    )


class FastLinear(nn.Linear):
    """`nn.Linear` in float32 through oneDNN; anything else as it was."""

    def forward(self, input: Tensor) -> Tensor:
        """`x W^T + b`."""
        if not torch.is_grad_enabled():
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class FastLoraLinear(LoraLinear):
    """PEFT's LoRA layer with one adapter on, or none."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x W^T + b + s x A^T B^T`."""
        base, names = self.base_layer, self.active_adapters
        name = names[0] if len(names) == 1 else None
        if (
            not torch.is_grad_enabled()
            or self.disable_adapters
            or args
            or kwargs
            or self.merged
            or name is None
            or name not in self.lora_A
            or name in self.lora_variant
            or type(self.lora_dropout[name]) is not nn.Identity
            or self.lora_B[name].bias is not None
            or base.weight.requires_grad
            or not isinstance(base, nn.Linear)
        ):
            general: Tensor = super().forward(x, *args, **kwargs)
            return general
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        return lora_linear(x, base.weight, base.bias, down.weight, up.weight, self.scaling[name])


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, in float32 through oneDNN where that is available."""
    if states.dtype == torch.float32 and has_onednn(weight) and not torch.is_autocast_enabled("cpu"):
        apply: Callable[..., Tensor] = _Float32.apply
        return apply(states, weight, bias)
    return nn.functional.linear(states, weight, bias)


def lora_linear(states: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """A frozen linear layer and its adapter: `x W^T + b + s x A^T B^T` (arXiv 2106.09685).

    Args:
        states: x, `[..., in]`.
        weight: W, `[out, in]`; gets no gradient.
        down: A, `[r, in]`.
        up: B, `[out, r]`.
        scale: s.
    """
    apply: Callable[..., Tensor] = _Lora.apply
    return apply(states, weight, bias, down, up, scale)


class _Float32(torch.autograd.Function):
    """A float32 linear layer; the gradient of the weight is left to MKL, which is as fast there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states if weight.requires_grad else None, weight)
        return _product(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        by_states = _by_transposed(gradient, weight) if ctx.needs_input_grad[0] else None
        flat = gradient.flatten(0, -2)
        by_weight = flat.t() @ states.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return by_states, by_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


class _Lora(torch.autograd.Function):
    """A frozen linear layer with an adapter. Saves its input and the low-rank states only."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        ctx.states_dtype, ctx.adapter_dtype, ctx.scale = states.dtype, down.dtype, scale
        states, down, up = states.to(dtype), down.to(dtype), up.to(dtype)
        result = _product(states, weight.to(dtype), None if bias is None else bias.to(dtype))
        low = states.flatten(0, -2) @ down.t()
        result.flatten(0, -2).addmm_(low, up.t(), alpha=scale)
        ctx.save_for_backward(states, weight, down, up, low)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, down, up, low = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        low_gradient = (flat @ up).mul_(ctx.scale)
        by_states = None
        if ctx.needs_input_grad[0]:
            by_states = _by_transposed(gradient, weight.to(gradient.dtype))
            by_states.flatten(0, -2).addmm_(low_gradient, down)
            by_states = by_states.to(ctx.states_dtype)
        by_down = (low_gradient.t() @ states.flatten(0, -2)).to(ctx.adapter_dtype) if ctx.needs_input_grad[3] else None
        by_up = (flat.t() @ low).mul_(ctx.scale).to(ctx.adapter_dtype) if ctx.needs_input_grad[4] else None
        return by_states, None, None, by_down, by_up, None


def _product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if states.dtype == torch.float32 and has_onednn(weight):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return result
    return nn.functional.linear(states, weight, bias)


def _by_transposed(gradient: Tensor, weight: Tensor) -> Tensor:
    """`g W`."""
    if gradient.dtype == torch.float32 and has_onednn(weight) and min(weight.shape) >= SMALLEST_TRANSPOSED:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
        return result
    return gradient @ weight
