"""The product of a gated MLP: computed again in the backward pass, where the library keeps it and the gate's activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from quartet import kernels
from quartet.models.gradients import IN_PLACE
from quartet.models.linears import weights_of
from quartet.models.low_rank import by_low_rank, low_rank_gradients, through, with_low_rank
from quartet.models.products import computed_in, linear_product

Activation = Callable[[Tensor], Tensor]


def gated_down(gate: Tensor, up: Tensor, activation: Activation, down: nn.Module) -> Tensor:
    """`down(activation(gate) * up)`, which keeps `gate` and `up`; the product too where only `down` knows how it computes.

    Args:
        gate: `[..., intermediate]`, like `up`.
        down: the linear layer back to the hidden size.
    """
    weights = weights_of(down)
    if weights is None:
        result: Tensor = down(gated(gate, up, activation))
        return result
    apply: Callable[..., Tensor] = _GatedDown.apply
    return apply(gate, up, activation, weights.weight, weights.bias, weights.down, weights.up, weights.scale)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up`; keeps these two and computes the activation again in the backward pass."""
    apply: Callable[..., Tensor] = _Gated.apply
    return apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return multiplied(activation, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        active, slope = with_slope(ctx.activation, gate)
        room = gradient * up
        return slope(room, room), active.mul_(gradient), None


class _GatedDown(torch.autograd.Function):
    """`y = h W^T + b + s h A^T B^T` with `h = activation(gate) * up`. The weight has a gradient, or the adapter, or neither."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: Activation,
        weight: Tensor,
        bias: Tensor | None,
        lora_down: Tensor | None,
        lora_up: Tensor | None,
        scale: float,
    ) -> Tensor:
        dtype = computed_in(gate)
        ctx.activation, ctx.scale, ctx.dtype, ctx.weight = activation, scale, dtype, weight
        between = multiplied(activation, gate, up).to(dtype)
        computed = weight.to(dtype), None if bias is None else bias.to(dtype)
        if lora_down is not None and lora_up is not None:
            result, low = with_low_rank(between, *computed, lora_down.to(dtype), lora_up.to(dtype), scale)
        else:
            result, low = linear_product(between, *computed), None
        ctx.save_for_backward(gate, up, weight, lora_down, lora_up, low)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, lora_down, lora_up, low = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, ctx.dtype
        active, slope = with_slope(ctx.activation, gate)
        flat = gradient.flatten(0, -2)
        adapter = None if low is None else (lora_down.to(dtype), by_low_rank(flat, lora_up.to(dtype), ctx.scale))
        by_between = through(gradient, weight.to(dtype), adapter)
        by_weight = by_lora_down = by_lora_up = None
        between = (active * up).to(dtype) if needs[3] or low is not None else None
        if between is not None and needs[3]:
            by_weight = IN_PLACE.add_product(ctx.weight, flat.t(), between.flatten(0, -2))
        if between is not None and adapter is not None:
            found = low_rank_gradients(gradient, adapter[1], between, low, ctx.scale)
            by_lora_down, by_lora_up = found[0].to(lora_down.dtype), found[1].to(lora_up.dtype)
        by_bias = flat.sum(0) if needs[4] else None
        by_between = by_between.to(gate.dtype)
        # Into the memory of what is not needed any more: fresh memory costs as much as a pass over it.
        room = between if between is not None and between.dtype == gate.dtype else torch.empty_like(gate)
        by_up = active.mul_(by_between)
        by_gate = slope(by_between.mul_(up), room)
        return by_gate, by_up, None, by_weight, by_bias, by_lora_down, by_lora_up, None


def multiplied(activation: Activation, gate: Tensor, up: Tensor, room: Tensor | None = None) -> Tensor:
    """`activation(gate) * up` in the memory of the activation, which is the first columns of `room` if that can be."""
    if room is not None and is_silu(activation):
        if kernels.silu_product(gate, up, room[:, : gate.shape[1]]):
            return room[:, : gate.shape[1]]
        active: Tensor = torch.ops.aten.silu.out(gate, out=room[:, : gate.shape[1]])
        return active.mul_(up)
    active = activation(gate)
    return active * up if active is gate else active.mul_(up)


def is_silu(activation: Activation) -> bool:
    """Whether this is `x sigmoid(x)`, which has kernels of its own."""
    return isinstance(activation, SiLUActivation | nn.SiLU)


def with_slope(
    activation: Activation, gate: Tensor, room: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """`activation(gate)`, in `room` if that can be, and the function from a gradient of it to that of the gate, which may use
    the memory of its second argument, even the gate's own."""
    if is_silu(activation):
        active = nn.functional.silu(gate) if room is None else torch.ops.aten.silu.out(gate, out=room)
        return active, lambda gradient, room: torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=room)
    leaf = gate.detach().requires_grad_()
    with torch.enable_grad():
        active = activation(leaf)

    def slope(gradient: Tensor, _: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(active, leaf, gradient)
        return found

    # A copy: the callers write into it, and some activations (ReLU, sigmoid) take their slope from what they gave.
    return active.detach().clone(), slope
