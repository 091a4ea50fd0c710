"""Queries, keys and values of an attention in one pass over its states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.kernels import Term
from quartet.models.as_in_training import computes_as_in_training
from quartet.models.converted import CONVERTED
from quartet.models.gated_mlp import by_kernels, in_one_pass
from quartet.models.gradients import IN_PLACE
from quartet.models.linears import READY, Weights, weights_of
from quartet.models.low_rank import transposed, upright
from quartet.models.products import (
    by_transposed,
    computed_in,
    has_kernels,
    linear_product,
    product,
    sum_into,
)

NAMES = ("q_proj", "k_proj", "v_proj")
"""Layers of an attention, in the source of every family that keeps the three apart."""
TENSORS = 4
"""Of a linear layer: weight, bias, A, B."""
FIRST = 2
"""Arguments of the pass before those of its layers."""

Forward = Callable[..., Any]


def projects(kind: type[nn.Module]) -> bool:
    """Whether an attention gives the three layers the states that it is given."""
    try:
        source = inspect.getsource(kind.forward)
        first = list(inspect.signature(kind.forward).parameters)[1:2]
    except (OSError, TypeError, ValueError):
        return False
    return first == ["hidden_states"] and all(source.count(f"self.{name}(hidden_states)") == 1 for name in NAMES)


def with_projections(forward: Forward) -> Forward:
    """The forward of such an attention, whose three layers find what they are to give computed already."""

    def projected(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Some layers of some families have no keys and values of their own.
        with projected_once(hidden_states, [getattr(self, name, None) for name in NAMES]):
            return forward(self, hidden_states, *args, **kwargs)

    return projected


@contextmanager
def projected_once(states: Tensor, layers: Sequence[nn.Module | None]) -> Iterator[None]:
    """Compute some linear layers of the same states in one pass, if they are such as can be, and have each give its result
    when it is called with these states in the block."""
    present = [layer for layer in layers if layer is not None] if computes_as_in_training() else []
    known = [found for found in map(weights_of, present) if found is not None]
    if len(known) < len(layers) or not in_one_pass(states, known):
        yield
        return
    apply: Callable[..., tuple[Tensor, ...]] = Projections.apply
    tensors = [tensor for layer in known for tensor in (layer.weight, layer.bias, layer.down, layer.up)]
    results = apply(states, [layer.scale for layer in known], *tensors)
    with READY.holding(states, dict(zip(present, results, strict=True))):
        del results  # each belongs to the layer that gives it
        yield


class Projections(torch.autograd.Function):
    """`x W^T + b + s x A^T B^T` of several layers: their low-rank states are one product, and so is what passes through them
    back to x where sums of products are.

    Tensors after the scales: weight, bias, A and B of each layer; None for what it lacks.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, scales: list[float], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        dtype = computed_in(states)
        layers = _layers([None if tensor is None else CONVERTED.of(tensor, dtype) for tensor in tensors], scales)
        wide = states.to(dtype)
        flat = wide.flatten(0, -2)
        downs = [layer.down for layer in layers if layer.down is not None]
        joined = torch.cat(downs) if downs else None
        results, place = [], 0
        with kernels.together(by_kernels(layers)):
            low = None if joined is None else product(flat, transposed(joined))
            for layer in layers:
                part = None
                if low is not None and layer.down is not None:
                    part = low[:, place : place + layer.down.shape[0]]
                    place += layer.down.shape[0]
                results.append(_result(wide, layer, part))
        ctx.scales, ctx.shape, ctx.states_dtype = scales, states.shape, states.dtype
        ctx.given = tensors  # themselves: what is saved may be a copy, in another dtype
        wanted = any(ctx.needs_input_grad[FIRST::TENSORS]) or low is not None
        kept = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.down, layer.up)]
        ctx.save_for_backward(flat if wanted else None, joined, low, *kept)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat, joined, low, *tensors = ctx.saved_tensors
        layers, flats = _layers(tensors, ctx.scales), [gradient.flatten(0, -2) for gradient in gradients]
        found: list[Tensor | None] = [None] * len(tensors)
        by_low = None if low is None else low.new_empty(low.shape)
        place = 0
        with kernels.together(by_kernels(layers)):
            for number, (layer, gradient) in enumerate(zip(layers, flats, strict=True)):
                start = number * TENSORS
                weight, bias, _, up = ctx.given[start : start + TENSORS]
                needs = ctx.needs_input_grad[FIRST + start : FIRST + start + TENSORS]
                if needs[0]:
                    found[start] = IN_PLACE.add_product(weight, gradient.t(), flat)
                if needs[1]:
                    kernels.caught_up()
                    found[start + 1] = gradient.sum(0).to(bias.dtype)
                if by_low is None or layer.down is None or layer.up is None:
                    continue
                part = slice(place, place + layer.down.shape[0])
                place = part.stop
                narrow, up_as_read = by_low[:, part], transposed(layer.up).t()
                if not kernels.multiply(narrow, Term(gradient, up_as_read, layer.scale)):
                    torch.mm(gradient, up_as_read, out=narrow).mul_(layer.scale)
                if low is not None and needs[3]:
                    found[start + 3] = product(low[:, part].t(), gradient, layer.scale).t().to(up.dtype)
            if by_low is not None and joined is not None:
                _of_downs(found, ctx, product(by_low.t(), flat))
            by_states = _by_states(ctx, layers, flats, by_low, joined) if ctx.needs_input_grad[0] else None
        return by_states, None, *found


def _layers(tensors: list[Any], scales: list[float]) -> list[Weights]:
    parts = zip(*(tensors[number::TENSORS] for number in range(TENSORS)), scales, strict=True)
    return [Weights(weight, bias, down, up, scale) for weight, bias, down, up, scale in parts]


def _result(states: Tensor, layer: Weights, low: Tensor | None) -> Tensor:
    """What a layer gives; no view, so that whoever gets it may write into it."""
    if low is None or layer.up is None:
        return linear_product(states, layer.weight, layer.bias)
    if has_kernels(layer.weight):
        result = states.new_empty(*states.shape[:-1], layer.weight.shape[0])
        terms = Term(states.flatten(0, -2), layer.weight.t()), Term(low, layer.up.t(), layer.scale)
        if kernels.multiply(result.flatten(0, -2), *terms, bias=layer.bias):
            return result
    result = linear_product(states, layer.weight, layer.bias)
    kernels.caught_up()
    result.flatten(0, -2).addmm_(low, upright(layer.up), alpha=layer.scale)
    return result


def _of_downs(found: list[Tensor | None], ctx: Any, by_joined: Tensor) -> None:
    """Share out the gradient of all A among those that need one."""
    place = 0
    for number, down in enumerate(ctx.given[2::TENSORS]):
        if down is None:
            continue
        if ctx.needs_input_grad[FIRST + number * TENSORS + 2]:
            found[number * TENSORS + 2] = by_joined[place : place + len(down)].to(down.dtype)
        place += len(down)


def _by_states(
    ctx: Any, layers: list[Weights], gradients: list[Tensor], by_low: Tensor | None, joined: Tensor | None
) -> Tensor:
    """The gradient of what the layers were given; the parts are summed up in its dtype."""
    like, dtype = gradients[0], ctx.states_dtype
    terms = [Term(gradient, layer.weight) for gradient, layer in zip(gradients, layers, strict=True)]
    if by_low is not None and joined is not None:
        terms.append(Term(by_low, joined))
    if like.dtype == dtype:
        return sum_into(like.new_empty(like.shape[0], ctx.shape[-1]), *terms).view(ctx.shape)
    if kernels.multiplies(like.dtype):
        total = like.new_empty(like.shape[0], ctx.shape[-1], dtype=dtype)
        if kernels.multiply(total, *terms):
            return total.view(ctx.shape)
        del total
    parts = [by_transposed(gradient, layer.weight) for gradient, layer in zip(gradients, layers, strict=True)]
    if by_low is not None and joined is not None:
        parts.append(product(by_low, joined))
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total += part
    return total.view(ctx.shape)
