"""A whole gated MLP over frozen weights, with adapters or without: its states pass through the CPU's caches in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet.models.gated import Activation, gated_down, multiplied, weights_of, with_slope
from quartet.models.lending import LENDER
from quartet.models.linears import (
    Weights,
    add_low_rank,
    has_onednn,
    low_rank_gradients,
    upright,
)

BLOCK = 512
"""Intermediate features at once: a block of a microbatch's tokens stays in the caches until all is done with it."""
TENSORS = 4
"""Of a linear layer: weight, bias, A, B."""


def gated_mlp(states: Tensor, gate: nn.Module, up: nn.Module, activation: Activation, down: nn.Module) -> Tensor:
    """`down(activation(gate(x)) * up(x))`, which keeps x and what `gate` and `up` give.

    Over frozen weights, in float32 on a CPU that multiplies with MKL, this is one pass: nothing of the intermediate size is
    made besides these two, and the backward pass writes their gradients over them. Elsewhere the linear layers compute for
    themselves (trained weights gain nothing from it: measured).

    Args:
        states: x, `[..., hidden]`.
    """
    layers = [weights_of(layer) for layer in (gate, up, down)]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers) or not _in_one_pass(states, known):
        return gated_down(gate(states), up(states), activation, down)
    apply: Callable[..., Tensor] = GatedMLP.apply
    tensors = [tensor for layer in known for tensor in (layer.weight, layer.bias, layer.down, layer.up)]
    return apply(states, activation, [layer.scale for layer in known], *tensors)


def _in_one_pass(states: Tensor, layers: list[Weights]) -> bool:
    tensors = [t for layer in layers for t in (layer.weight, layer.bias, layer.down, layer.up) if t is not None]
    return (
        states.device.type == "cpu"
        and states.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and all(tensor.dtype == states.dtype and tensor.device == states.device for tensor in tensors)
        and not any(layer.weight.requires_grad or has_onednn(layer.weight) for layer in layers)
        and not any(layer.bias is not None and layer.bias.requires_grad for layer in layers)
    )


class GatedMLP(torch.autograd.Function):
    """`down(activation(gate(x)) * up(x))` of three layers with frozen weights; x and the adapters get gradients.

    Tensors after the scales: weight, bias, A and B of gate, up and down; None for what a layer lacks.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, activation: Activation, scales: list[float], *tensors: Tensor | None
    ) -> Tensor:
        gate, up, down = _layers(tensors, scales)
        flat = states.flatten(0, -2)
        gates, low_gates = _raised(flat, gate)
        ups, low_ups = _raised(flat, up)
        result, low_between = _lowered(gates, ups, activation, down)
        ctx.activation, ctx.scales, ctx.shape = activation, scales, states.shape
        ctx.save_for_backward(flat, gates, ups, low_gates, low_ups, low_between, *tensors)
        return result.view(*states.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, gates, ups, low_gates, low_ups, low_between, *tensors = ctx.saved_tensors
        gate, up, down = _layers(tensors, ctx.scales)
        by_down = _through_activation(gradient.flatten(0, -2), gates, ups, low_between, ctx.activation, down)
        # From here on `gates` and `ups` are the gradients of what they were.
        by_states = None
        if ctx.needs_input_grad[0]:
            by_states = (gates @ gate.weight).addmm_(ups, up.weight)
        by_gate = _of_adapter(gates, by_states, flat, low_gates, gate)
        by_up = _of_adapter(ups, by_states, flat, low_ups, up)
        LENDER.given_back(gates, ups)
        by_states = None if by_states is None else by_states.view(ctx.shape)
        return by_states, None, None, *by_gate, *by_up, *by_down


def _layers(tensors: tuple[Tensor | None, ...] | list[Tensor | None], scales: list[float]) -> Iterator[Weights]:
    for number, scale in enumerate(scales):
        weight, bias, down, up = tensors[number * TENSORS : (number + 1) * TENSORS]
        assert weight is not None, "every linear layer has a weight"
        yield Weights(weight, bias, down, up, scale)


def _blocks(features: int) -> Iterator[slice]:
    for start in range(0, features, BLOCK):
        yield slice(start, min(start + BLOCK, features))


def _raised(states: Tensor, layer: Weights) -> tuple[Tensor, Tensor | None]:
    """What a layer gives, `[tokens, intermediate]` in borrowed memory, and its low-rank states."""
    result = LENDER.borrowed(states, len(states), len(layer.weight))
    torch.mm(states, layer.weight.t(), out=result)
    if layer.bias is not None:
        result += layer.bias
    if layer.down is None or layer.up is None:
        return result, None
    return result, add_low_rank(result, states, layer.down, layer.up, layer.scale)


def _lowered(gates: Tensor, ups: Tensor, activation: Activation, layer: Weights) -> tuple[Tensor, Tensor | None]:
    """`down(activation(gate) * up)`, and the low-rank states of `down`."""
    result = gates.new_zeros(len(gates), len(layer.weight))
    low = gates.new_zeros(len(gates), len(layer.down)) if layer.down is not None else None
    room = LENDER.borrowed(gates, len(gates), min(BLOCK, gates.shape[1]))
    for block in _blocks(gates.shape[1]):
        between = multiplied(activation, gates[:, block], ups[:, block], room)
        result.addmm_(between, layer.weight[:, block].t())
        if low is not None and layer.down is not None:
            low.addmm_(between, upright(layer.down[:, block]))
    LENDER.given_back(room)
    if layer.bias is not None:
        result += layer.bias
    if low is not None and layer.up is not None:
        result.addmm_(low, upright(layer.up), alpha=layer.scale)
    return result, low


def _through_activation(
    gradient: Tensor, gates: Tensor, ups: Tensor, low: Tensor | None, activation: Activation, layer: Weights
) -> tuple[Tensor | None, ...]:
    """Gradients of the down projection's tensors; those of `gates` and `ups` are written over them."""
    by_low = by_lora_down = by_lora_up = None
    if low is not None and layer.down is not None and layer.up is not None:
        by_low = (gradient @ upright(layer.up).t()).mul_(layer.scale)
        by_lora_down = torch.empty_like(layer.down.t())
        by_lora_up = (gradient.t() @ low).mul_(layer.scale)
    rooms = [LENDER.borrowed(gates, len(gates), min(BLOCK, gates.shape[1])) for _ in range(3)]
    for block in _blocks(gates.shape[1]):
        gate, up = gates[:, block], ups[:, block]
        room, by_between, between = (room[:, : gate.shape[1]] for room in rooms)
        torch.mm(gradient, layer.weight[:, block], out=by_between)
        active, slope = with_slope(activation, gate, room)
        if by_low is not None and by_lora_down is not None and layer.down is not None:
            torch.mul(active, up, out=between)
            torch.mm(between.t(), by_low, out=by_lora_down[block])
            by_between.addmm_(by_low, layer.down[:, block])
        by_active = torch.mul(by_between, up, out=between)
        torch.mul(by_between, active, out=up)
        found = slope(by_active, gate)
        if found is not gate:
            gate.copy_(found)
    LENDER.given_back(*rooms)
    return None, None, None if by_lora_down is None else by_lora_down.t(), by_lora_up


def _of_adapter(
    gradient: Tensor, by_states: Tensor | None, states: Tensor, low: Tensor | None, layer: Weights
) -> tuple[Tensor | None, ...]:
    """Gradients of a layer's tensors; what its adapter passes on is added to `by_states`."""
    if low is None or layer.down is None or layer.up is None:
        return (None,) * TENSORS
    return None, None, *low_rank_gradients(gradient, by_states, states, low, layer.down, layer.up, layer.scale)
