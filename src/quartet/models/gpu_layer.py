"""A whole decoder layer in one pass on a GPU, over sequences side by side: matrix products, FlashAttention, and kernels for
what lies between.

It is the layer of `layer_pass.py` in bfloat16. Autograd and the library's code around the operations take longer than the GPU
does, so that they come once a layer here, and everything else is called directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet.kernels import flash, gpu, gpu_forward, gpu_training
from quartet.models.converted import CONVERTED
from quartet.models.gradients import IN_PLACE
from quartet.models.layer_pass import FIRST, LINEARS, TENSORS, Rest
from quartet.models.linears import Weights
from quartet.models.precision import on_cpu
from quartet.models.products import wide_product

TOGETHER = ((0, 1, 2), (3,), (4, 5), (6,))
"""Linear layers that are given the same states: queries, keys and values; output; gate and up; down."""


def fits_gpu(states: Tensor, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    """Whether this pass computes with such states, here or in the run that is planned."""
    return (
        (gpu.usable(states) if states.is_cuda else not on_cpu(states))
        and flash.are_there()
        and flash.fits(heads, key_heads, size, dtype)
        and size % 2 == 0
        and gpu_training.norm_fits(states)
    )


class GpuLayerPass(torch.autograd.Function):
    """`y = x + o(attention(norm(x)))`, and `y + mlp(norm(y))`.

    Arguments are those of `LayerPass`.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, cosines: Tensor, sines: Tensor, rest: Rest, *tensors: Tensor | None
    ) -> Tensor:
        first, second, *of_heads = (norm for norm in tensors[: len(rest.eps)] if norm is not None)
        layers = _layers(tensors[len(rest.eps) :], rest)
        x, angles = states.squeeze(0), (cosines.squeeze(0), sines.squeeze(0))
        size, dtype = rest.size, torch.bfloat16
        normal, _, scales = gpu_training.rms_norm(x, first, rest.eps[0], dtype)
        found, low_heads = _raised(normal, layers[:3])
        query, key, value = (one.view(len(x), -1, size) for one in found)
        before: list[Tensor] = []
        if rest.normed:
            query, *before = _heads_normed(query, of_heads[0], rest.eps[2])
            key, *more = _heads_normed(key, of_heads[1], rest.eps[3])
            before += more
        gpu_training.turn(query, key, *angles, back=False)
        mixed, more = flash.attention(query, key, value, rest.starts, rest.longest, rest.scaling)
        flat = mixed.flatten(1)
        there, read = x, rest.read
        if read is not None:
            there, flat = (one.index_select(0, read.in_long) for one in (x, flat))
        (out,), low_out = _raised(flat, layers[3:4])
        between, sums, scales_between = gpu_training.rms_norm(there, second, rest.eps[1], dtype, out)
        (gate, up), low_gates = _raised(between, layers[4:6])
        (result,), low_down = _raised(gpu_forward.silu_product(gate, up), layers[6:])
        ctx.rest, ctx.given = rest, tensors
        ctx.scales_of = [layer.scale for layer in layers]
        if rest.kept:
            ctx.save_for_backward(
                *(x, *angles, normal, scales, query, key, value, mixed, *more, flat, sums, between, scales_between),
                *(gate, up, low_heads, low_out, low_gates, low_down),
                *(tensor for layer in layers for tensor in (layer.weight, layer.down, layer.up)),
                *before,
            )
        result = sums + result
        return (result if read is None else result.index_select(0, read.in_short)).unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rest: Rest = ctx.rest
        x, cosines, sines, normal, scales, query, key, value, mixed, *others = ctx.saved_tensors
        more, (flat, sums, between, scales_between, gate, up, *others) = others[:3], others[3:]
        lows, weights, before = others[:4], others[4 : 4 + 3 * LINEARS], others[4 + 3 * LINEARS :]
        by_norms: list[Tensor | None] = [None] * len(rest.eps)
        of_norms, (first, second, *of_heads) = ctx.needs_input_grad[FIRST:], ctx.given[: len(rest.eps)]
        back = _Gradients(ctx, weights)
        g = gradient.squeeze(0)
        if rest.read is not None:
            g = rest.read.shortened(g)
        g = g.contiguous()
        narrow = g.to(torch.bfloat16)
        by_product = back.through(3, [narrow], lows[3])
        assert by_product is not None
        gpu_training.silu_gradient(by_product, gate, up)
        back.of_tensors(3, [narrow], by_product, lows[3])
        del by_product  # as large as the gate: its memory is free for what follows
        by_between = back.through(2, [gate, up], lows[2])
        assert by_between is not None
        back.of_tensors(2, [gate, up], between, lows[2])
        g, by_norms[1] = gpu_training.rms_norm_gradient(
            by_between, sums, second, scales_between, of_weight=of_norms[1], also=g
        )
        narrow = g.to(torch.bfloat16)
        by_flat = back.through(1, [narrow], lows[1])
        assert by_flat is not None
        back.of_tensors(1, [narrow], flat, lows[1])
        if rest.read is not None:
            g, by_flat = rest.read.lengthened(g), rest.read.lengthened(by_flat)
        by_heads = flash.attention_gradient(
            *(by_flat.view(mixed.shape), query, key, value, mixed, more, rest.starts, rest.longest, rest.scaling)
        )
        by_query, by_key, by_value = (one.contiguous() for one in by_heads)
        gpu_training.turn(by_query, by_key, cosines, sines, back=True)
        if rest.normed:
            by_query, by_norms[2] = _by_heads(by_query, of_heads[0], *before[:2], of_weight=of_norms[2])
            by_key, by_norms[3] = _by_heads(by_key, of_heads[1], *before[2:], of_weight=of_norms[3])
        parts = [one.flatten(1) for one in (by_query, by_key, by_value)]
        by_states = None
        by_normal = back.through(0, parts, lows[0], wanted=ctx.needs_input_grad[0] or of_norms[0])
        back.of_tensors(0, parts, normal, lows[0])
        if by_normal is not None:
            g, by_norms[0] = gpu_training.rms_norm_gradient(by_normal, x, first, scales, of_weight=of_norms[0], also=g)
            by_states = g.unsqueeze(0) if ctx.needs_input_grad[0] else None
        return by_states, None, None, None, *by_norms, *back.found


def _heads_normed(heads: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The RMS norm of each head, `[tokens, heads, size]`; for the gradient the heads before it, and their scales."""
    rows = heads.flatten(0, 1)
    found, _, scales = gpu_training.rms_norm(rows, weight, eps, heads.dtype)
    return found.view(heads.shape), rows, scales


def _by_heads(
    gradient: Tensor, weight: Tensor, rows: Tensor, scales: Tensor, *, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of what `_heads_normed` was given."""
    found, by_weight = gpu_training.rms_norm_gradient(gradient.flatten(0, 1), rows, weight, scales, of_weight=of_weight)
    return found.view(gradient.shape), by_weight


def _layers(flat: Sequence[Tensor | None], rest: Rest) -> list[Weights]:
    """The linear layers, in bfloat16."""
    held = [None if tensor is None else CONVERTED.of(tensor, torch.bfloat16) for tensor in flat]
    found = []
    for number, scale in enumerate(rest.scales):
        weight, bias, down, up = held[number * TENSORS : (number + 1) * TENSORS]
        assert weight is not None, "every linear layer has a weight"
        found.append(Weights(weight, bias, down, up, scale))
    return found


def _raised(states: Tensor, layers: list[Weights]) -> tuple[list[Tensor], Tensor | None]:
    """What linear layers of the same states give, `[tokens, out]` each, and the low-rank states of all their adapters."""
    results = [nn.functional.linear(states, layer.weight, layer.bias) for layer in layers]
    joined = _joined([layer.down for layer in layers])
    if joined is None:
        return results, None
    low, place = states @ joined.t(), 0
    for result, layer in zip(results, layers, strict=True):
        if layer.down is not None and layer.up is not None:
            part = low[:, place : place + len(layer.down)]
            place += len(layer.down)
            result.addmm_(part, layer.up.t(), alpha=layer.scale)
    return results, low


def _joined(downs: Sequence[Tensor | None]) -> Tensor | None:
    """All A, one below the other."""
    present = [down for down in downs if down is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat(present)


class _Gradients:
    """The gradients of all linear layers' tensors, as they are found."""

    def __init__(self, ctx: Any, weights: Sequence[Tensor | None]) -> None:
        self._given = ctx.given[len(ctx.rest.eps) :]
        self._needs = ctx.needs_input_grad[FIRST + len(ctx.rest.eps) :]
        self._scales: list[float] = ctx.scales_of
        self._weights, self._downs, self._ups = weights[::3], weights[1::3], weights[2::3]
        self._by_low: Tensor | None = None
        self.found: list[Tensor | None] = [None] * (LINEARS * TENSORS)

    def through(self, group: int, gradients: list[Tensor], low: Tensor | None, *, wanted: bool = True) -> Tensor | None:
        """The gradient of what some layers were given, by those of what they gave; None where it is not wanted."""
        numbers = TOGETHER[group]
        self._by_low = None if low is None else self._of_low(numbers, gradients, low)
        if not wanted:
            return None
        total: Tensor | None = None
        for number, gradient in zip(numbers, gradients, strict=True):
            weight = self._weights[number]
            assert weight is not None
            total = gradient @ weight if total is None else total.addmm_(gradient, weight)
        joined = _joined([self._downs[number] for number in numbers])
        if total is not None and self._by_low is not None and joined is not None:
            total.addmm_(self._by_low, joined)
        return total

    def _of_low(self, numbers: Sequence[int], gradients: list[Tensor], low: Tensor) -> Tensor:
        """The gradient of the low-rank states of some layers' adapters."""
        found, place = torch.empty_like(low), 0
        for number, gradient in zip(numbers, gradients, strict=True):
            up = self._ups[number]
            if up is not None:
                part = found[:, place : place + up.shape[1]]
                place += up.shape[1]
                torch.mm(gradient, up, out=part)
                if self._scales[number] != 1.0:
                    part.mul_(self._scales[number])
        return found

    def of_tensors(self, group: int, gradients: list[Tensor], states: Tensor, low: Tensor | None) -> None:
        """The gradients of the layers' tensors, after `through`."""
        by_joined = None if self._by_low is None else wide_product(self._by_low.t(), states)
        place = 0
        for number, gradient in zip(TOGETHER[group], gradients, strict=True):
            at = number * TENSORS
            weight, bias, _, _ = self._given[at : at + TENSORS]
            of_weight, of_bias, _, _ = self._needs[at : at + TENSORS]
            if of_weight:
                self.found[at] = IN_PLACE.add_wide_product(weight, gradient.t(), states)
            if of_bias:
                self.found[at + 1] = gradient.sum(0, dtype=torch.float32).to(bias.dtype)
            up = self._ups[number]
            if up is None or by_joined is None or low is None:
                continue
            part = slice(place, place + up.shape[1])
            place = part.stop
            self.found[at + 2] = by_joined[part]
            self.found[at + 3] = wide_product(gradient.t(), low[:, part]).mul_(self._scales[number])
