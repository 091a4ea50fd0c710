"""A whole gated MLP in one pass, whose memory goes from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.kernels import Term
from quartet.models.converted import CONVERTED
from quartet.models.gated import Activation, gated_down, is_silu, multiplied, with_slope
from quartet.models.gradients import IN_PLACE
from quartet.models.lending import LENDER
from quartet.models.linears import Weights, weights_of
from quartet.models.low_rank import add_low_rank, by_low_rank, low_rank_gradients, transposed
from quartet.models.precision import on_cpu
from quartet.models.products import add_product, computed_in, has_kernels, has_onednn, product, product_into, sum_into

BLOCK = 1024
"""Intermediate features at once over frozen weights in float32: a block of a microbatch's tokens stays in the caches until
all is done with it."""
TENSORS = 4
"""Of a linear layer: weight, bias, A, B."""
FIRST = 3
"""Arguments of the pass before those of its layers."""


def gated_mlp(states: Tensor, gate: nn.Module, up: nn.Module, activation: Activation, down: nn.Module) -> Tensor:
    """`down(activation(gate(x)) * up(x))`, which keeps x and what `gate` and `up` give.

    On a CPU this is one pass. Of the intermediate size it makes these two and a few rooms that one layer lends the next (a
    block wide over frozen weights in float32), and the backward pass writes their gradients over them. Elsewhere, and in
    float32 where oneDNN multiplies, the linear layers compute for themselves.

    Args:
        states: x, `[..., hidden]`.
    """
    layers = [weights_of(layer) for layer in (gate, up, down)]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers) or not in_one_pass(states, known):
        return gated_down(gate(states), up(states), activation, down)
    apply: Callable[..., Tensor] = GatedMLP.apply
    tensors = [tensor for layer in known for tensor in (layer.weight, layer.bias, layer.down, layer.up)]
    return apply(states, activation, [layer.scale for layer in known], *tensors)


def in_one_pass(states: Tensor, layers: list[Weights]) -> bool:
    """Whether layers can be computed in one pass: on a CPU, in one dtype, and not in float32 where oneDNN multiplies."""
    tensors = [t for layer in layers for t in (layer.weight, layer.bias, layer.down, layer.up) if t is not None]
    dtype = computed_in(states)
    return (
        on_cpu(states)
        and all(tensor.device == states.device for tensor in tensors)
        and (torch.is_autocast_enabled("cpu") or all(tensor.dtype == dtype for tensor in tensors))
        and not (dtype == torch.float32 and any(has_onednn(layer.weight) for layer in layers))
    )


def by_kernels(layers: list[Weights]) -> bool:
    """Whether kernels that can wait for each other compute the products of all layers: those in float32."""
    return all(layer.weight.dtype == torch.float32 and has_kernels(layer.weight) for layer in layers)


class GatedMLP(torch.autograd.Function):
    """`down(activation(gate(x)) * up(x))` of three layers.

    Tensors after the scales: weight, bias, A and B of gate, up and down; None for what a layer lacks.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, activation: Activation, scales: list[float], *tensors: Tensor | None
    ) -> Tensor:
        dtype = computed_in(states)
        layers = list(_layers([None if tensor is None else CONVERTED.of(tensor, dtype) for tensor in tensors], scales))
        gate, up, down = layers
        flat = states.flatten(0, -2).to(dtype)
        # Sums of blocks would be rounded once for each in bfloat16, and trained weights want all features for their gradient.
        frozen = dtype != torch.bfloat16 and not any(ctx.needs_input_grad[FIRST::TENSORS])
        ctx.block = BLOCK if frozen else len(gate.weight)
        with kernels.together(is_silu(activation) and by_kernels(layers)):
            gates, low_gates = _raised(flat, gate)
            ups, low_ups = _raised(flat, up)
            # No view, so that whoever gets it may write into it.
            result = flat.new_empty(*states.shape[:-1], down.weight.shape[0])
            low_between = _lowered(result.flatten(0, -2), gates, ups, activation, down, ctx.block)
        ctx.activation, ctx.scales, ctx.shape, ctx.dtype = activation, scales, states.shape, states.dtype
        ctx.given = tensors  # themselves: what is saved may be a copy, in another dtype
        kept = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.down, layer.up)]
        ctx.save_for_backward(flat, gates, ups, low_gates, low_ups, low_between, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, gates, ups, low_gates, low_ups, low_between, *tensors = ctx.saved_tensors
        layers = list(_layers(tensors, ctx.scales))
        gate, up, down = (_Gradients(ctx, number, layer) for number, layer in enumerate(layers))
        by_states = None
        with kernels.together(is_silu(ctx.activation) and by_kernels(layers)):
            _through_activation(gradient.flatten(0, -2), gates, ups, low_between, ctx.activation, down, ctx.block)
            # From here on `gates` and `ups` are the gradients of what they were.
            by_gate_low, by_up_low = gate.by_low(gates), up.by_low(ups)
            if ctx.needs_input_grad[0]:
                parts = gate.through(gates, by_gate_low), up.through(ups, by_up_low)
                by_states = _sum_of(*parts, ctx.dtype).view(ctx.shape)
            gate.of_layer(gates, flat)
            gate.of_adapter(gates, by_gate_low, flat, low_gates)
            up.of_layer(ups, flat)
            up.of_adapter(ups, by_up_low, flat, low_ups)
        LENDER.given_back(gates, ups)
        return by_states, None, None, *gate.found, *up.found, *down.found


def _layers(tensors: tuple[Tensor | None, ...] | list[Tensor | None], scales: list[float]) -> Iterator[Weights]:
    for number, scale in enumerate(scales):
        weight, bias, down, up = tensors[number * TENSORS : (number + 1) * TENSORS]
        assert weight is not None, "every linear layer has a weight"
        yield Weights(weight, bias, down, up, scale)


def _blocks(features: int, size: int) -> Iterator[slice]:
    for start in range(0, features, size):
        yield slice(start, min(start + size, features))


def _raised(states: Tensor, layer: Weights) -> tuple[Tensor, Tensor | None]:
    """What a layer gives, `[tokens, intermediate]` in borrowed memory, and its low-rank states."""
    result = LENDER.borrowed(states, states.shape[0], layer.weight.shape[0])
    if layer.down is None or layer.up is None:
        return product_into(result, states, layer.weight.t(), layer.bias), None
    if has_kernels(layer.weight):
        low = product(states, layer.down.t())
        terms = Term(states, layer.weight.t()), Term(low, layer.up.t(), layer.scale)
        if kernels.multiply(result, *terms, bias=layer.bias):
            return result, low
    torch.mm(states, layer.weight.t(), out=result)
    if layer.bias is not None:
        result += layer.bias
    return result, add_low_rank(result, states, layer.down, layer.up, layer.scale)


def _lowered(
    result: Tensor, gates: Tensor, ups: Tensor, activation: Activation, layer: Weights, size: int
) -> Tensor | None:
    """`down(activation(gate) * up)` into `result`, `[tokens, hidden]`; gives the low-rank states of `down`."""
    low = None
    room = LENDER.borrowed(gates, gates.shape[0], min(size, gates.shape[1]))
    for block in _blocks(gates.shape[1], size):
        between = multiplied(activation, gates[:, block], ups[:, block], room)
        put = add_product if block.start else product_into
        put(result, between, layer.weight[:, block].t())
        if layer.down is not None:
            low = gates.new_empty(gates.shape[0], layer.down.shape[0]) if low is None else low
            put(low, between, transposed(layer.down[:, block]))
    LENDER.given_back(room)
    if layer.bias is not None:
        kernels.caught_up()
        result += layer.bias
    if low is not None and layer.up is not None:
        add_product(result, low, transposed(layer.up), layer.scale)
    return low


class _Gradients:
    """The gradients of a linear layer's tensors, as far as they are needed."""

    def __init__(self, ctx: Any, number: int, layer: Weights) -> None:
        start = number * TENSORS
        self.layer = layer
        self._given: tuple[Tensor | None, ...] = ctx.given[start : start + TENSORS]
        needs = ctx.needs_input_grad[FIRST + start : FIRST + start + TENSORS]
        self.of_weight, self._of_bias = needs[:2]
        self.found: list[Tensor | None] = [None] * TENSORS

    def of_layer(self, gradient: Tensor, states: Tensor) -> None:
        """From the gradient of what the layer gave, and what it was given: `[tokens, features]` both."""
        weight = self._given[0]
        if self.of_weight and weight is not None:
            self.found[0] = IN_PLACE.add_product(weight, gradient.t(), states)
        if self._of_bias and self.found[1] is None:
            kernels.caught_up()
            self.found[1] = gradient.sum(0)

    def by_low(self, gradient: Tensor) -> Tensor | None:
        """The gradient of the low-rank states; None without an adapter."""
        up = self.layer.up
        return None if up is None or self.layer.down is None else by_low_rank(gradient, up, self.layer.scale)

    def through(self, gradient: Tensor, by_low: Tensor | None) -> list[Term]:
        """What is to be added up to the gradient of what the layer was given."""
        terms = [Term(gradient, self.layer.weight)]
        return terms if by_low is None or self.layer.down is None else [*terms, Term(by_low, self.layer.down)]

    def of_adapter(self, gradient: Tensor, by_low: Tensor | None, states: Tensor, low: Tensor | None) -> None:
        """From the gradients of what the layer gave and of its low-rank states, and what it was given."""
        if by_low is not None and low is not None:
            self.found[2:] = low_rank_gradients(gradient, by_low, states, low, self.layer.scale)


def _sum_of(gate: list[Term], up: list[Term], dtype: torch.dtype) -> Tensor:
    """The gradient of what both layers were given; the sum of the two in its own dtype."""
    like, columns = gate[0].left, gate[0].right.shape[1]
    if like.dtype != dtype and kernels.multiplies(like.dtype):
        total = like.new_empty(like.shape[0], columns, dtype=dtype)
        if kernels.multiply(total, *gate, *up):
            return total
        del total
    result = like.new_empty(like.shape[0], columns)
    if like.dtype == dtype:
        return sum_into(result, *gate, *up)
    second = sum_into(like.new_empty(like.shape[0], columns), *up)
    return sum_into(result, *gate).to(dtype).add_(second)


def _through_activation(
    gradient: Tensor,
    gates: Tensor,
    ups: Tensor,
    low: Tensor | None,
    activation: Activation,
    gradients: _Gradients,
    size: int,
) -> None:
    """Gradients of the down projection's tensors; those of `gates` and `ups` are written over them."""
    layer = gradients.layer
    by_low, by_lora_down = gradients.by_low(gradient), None
    if by_low is not None and low is not None and layer.down is not None:
        by_lora_down = torch.empty_like(layer.down)
        gradients.found[2:] = by_lora_down, product(low.t(), gradient, layer.scale).t()
    rooms = [LENDER.borrowed(gates, gates.shape[0], min(size, gates.shape[1])) for _ in range(2)]
    for block in _blocks(gates.shape[1], size):
        gate, up = gates[:, block], ups[:, block]
        by_between, between = (room[:, : gate.shape[1]] for room in rooms)
        sum_into(
            by_between, *(term._replace(right=term.right[:, block]) for term in gradients.through(gradient, by_low))
        )
        asked = between if by_low is not None or gradients.of_weight else None
        at_once = is_silu(activation) and kernels.silu_gradient(by_between, gate, up, gate, up, asked)
        room = None if at_once else LENDER.borrowed(gates, *gate.shape)
        active, slope = (gate, None) if room is None else with_slope(activation, gate, room)
        if slope is not None and asked is not None:
            torch.mul(active, up, out=asked)
        gradients.of_layer(gradient, between)
        if by_low is not None and by_lora_down is not None:
            product_into(by_lora_down[:, block], by_low.t(), between)
        if room is None or slope is None:
            continue
        kernels.caught_up()
        by_active = torch.mul(by_between, up, out=between)
        torch.mul(by_between, active, out=up)
        found = slope(by_active, gate)
        if found is not gate:
            gate.copy_(found)
        LENDER.given_back(room)
    LENDER.given_back(*rooms)
