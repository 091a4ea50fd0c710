"""A whole decoder layer in one pass: norms, attention, gated MLP and what goes around them.

It computes what the passes of its parts compute one by one, number for number. Autograd and the library's code around them take
their time once a layer, and where kernels multiply all kernels of a layer are two calls, up to its MLP and from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.models.causal import Causal
from quartet.models.gated import Activation
from quartet.models.gated_mlp import GatedMLP
from quartet.models.layout import Places
from quartet.models.linears import LinearPass, LoraPass
from quartet.models.projections import Projections
from quartet.models.rotary import Turned

FIRST = 4
"""Arguments of the pass before its tensors."""
TENSORS = 4
"""Of a linear layer: weight, bias, A, B."""
LINEARS = 7
"""Of a layer: queries, keys, values, output; gate, up, down."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What a layer computes with beside tensors that may get a gradient."""

    normed: bool
    """Queries and keys have norms of their own."""
    eps: tuple[float, ...]
    size: int
    scaling: float
    scales: list[float]
    """Of the adapters of all linear layers."""
    activation: Activation
    bounds: Tensor
    starts: Tensor
    """The bounds as a GPU reads them: int32, on the states' device."""
    longest: int
    read: Places | None
    """The tokens whose states are read, where only these are computed after the attention."""
    by_kernels: bool
    kept: bool
    """There will be a backward pass."""


class _Part:
    """What the pass of a part has of autograd, inside that of the layer."""

    def __init__(self, needs: tuple[bool, ...], *, kept: bool) -> None:
        self.needs_input_grad = needs
        self._kept = kept
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep them, if there will be a backward pass."""
        if self._kept:
            self.saved_tensors = tensors


class _There:
    """The forward passes of the parts, noted down for the way back."""

    def __init__(self, *, need: bool, kept: bool) -> None:
        self._need, self._kept = need, kept
        self.parts: list[tuple[Any, _Part]] = []

    def __call__(self, function: Any, own: Sequence[bool], *given: Any) -> Any:
        """What a part gives.

        Args:
            own: which of the last things given need a gradient; those before are states.
        """
        states = len(given) - len(own)
        part = _Part((self._need,) * states + tuple(own), kept=self._kept)
        self.parts.append((function, part))
        self._need = self._need or any(own)
        result: Any = function.forward(part, *given)
        return result


class _Back:
    """The backward passes of the parts, the last one first."""

    def __init__(self, parts: list[tuple[Any, _Part]], counts: list[int], saved: Sequence[Tensor | None]) -> None:
        self._parts, self._counts, self._saved = list(parts), list(counts), tuple(saved)

    def __call__(self, *gradients: Tensor) -> Any:
        """Gradients of what the last part left was given, by those of what it gave."""
        function, part = self._parts.pop()
        place = len(self._saved) - self._counts.pop()
        part.saved_tensors, self._saved = self._saved[place:], self._saved[:place]
        found: Any = function.backward(part, *gradients)
        part.saved_tensors = ()
        return found


class _Norm:
    """The pass of a norm."""

    @staticmethod
    def forward(part: Any, states: Tensor, weight: Tensor, eps: float, sums: Tensor | None = None) -> Tensor:
        """Of the states, or of the sum of both, which takes the place of `sums`."""
        found = kernels.rms_norm(states, weight, eps, sums=sums)
        assert found is not None, "looked for in `decoder_layer.py`"
        part.save_for_backward(states if sums is None else sums, weight, found[1])
        return found[0]

    @staticmethod
    def backward(part: Any, gradient: Tensor, also: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the states, with another one added, and of the weight."""
        states, weight, scales = part.saved_tensors
        of_weight = part.needs_input_grad[1]
        found = kernels.rms_norm_gradient(gradient, states, weight, scales, of_weight=of_weight, also=also)
        assert found is not None, "looked for in `decoder_layer.py`"
        return found


class LayerPass(torch.autograd.Function):
    """`y = x + o(attention(norm(x)))`, and `y + mlp(norm(y))`.

    Tensors after the rest: weights of the norms, then weight, bias, A and B of each linear layer; None for what one lacks.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, cosines: Tensor, sines: Tensor, rest: Rest, *tensors: Tensor | None
    ) -> Tensor:
        norms, linears = _sorted(tensors, rest)
        of_norms, needs = _sorted(ctx.needs_input_grad[FIRST:], rest)
        run = _There(need=ctx.needs_input_grad[0], kept=rest.kept)
        with kernels.together(rest.by_kernels):
            mixed = _attended(run, rest, states, (cosines, sines), (norms, of_norms), (linears, needs))
            if rest.read is not None:
                kernels.caught_up()
                states, mixed = (one.index_select(1, rest.read.in_long) for one in (states, mixed))
            out = _projected(run, rest.scales[3], mixed, linears[3], needs[3])
            ctx.dtype = out.dtype
            if out.dtype == states.dtype:
                normal = run(_Norm, (of_norms[1], False, False), states, norms[1], rest.eps[1], out)
            else:
                out = states + out
                normal = run(_Norm, (of_norms[1], False), out, norms[1], rest.eps[1])
            del mixed
            kernels.caught_up()  # the memory of what waited is free for the MLP
            given = rest.activation, rest.scales[4:], *chain(*linears[4:])
            result: Tensor = run(GatedMLP, (False, False, *chain(*needs[4:])), normal, *given)
            if not kernels.add(result, out):
                result = out + result
        ctx.rest, ctx.parts = rest, run.parts
        ctx.counts = [len(part.saved_tensors) for _, part in run.parts]
        ctx.save_for_backward(*chain(*(part.saved_tensors for _, part in run.parts)))
        for _, part in run.parts:
            part.saved_tensors = ()
        return result if rest.read is None else result.index_select(1, rest.read.in_short)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rest, back = ctx.rest, _Back(ctx.parts, ctx.counts, ctx.saved_tensors)
        of_norms: list[Tensor | None] = [None] * len(rest.eps)
        found: list[Any] = [None] * (LINEARS * TENSORS)
        by_states = by_mixed = None
        gradient = gradient.contiguous() if rest.read is None else rest.read.shortened(gradient.squeeze(0)).unsqueeze(0)
        with kernels.together(rest.by_kernels):
            by_normal, _, _, *found[4 * TENSORS :] = back(gradient.to(ctx.dtype))
            kernels.caught_up()  # the memory of what waited is free for the attention
            if by_normal is not None:
                gradient, of_norms[1] = back(by_normal, gradient)
                by_mixed, *found[3 * TENSORS : 4 * TENSORS] = _of_projected(back(gradient.to(ctx.dtype)))
            if by_mixed is not None:
                if rest.read is not None:
                    kernels.caught_up()
                    gradient, by_mixed = (
                        rest.read.lengthened(one.squeeze(0)).unsqueeze(0) for one in (gradient, by_mixed)
                    )
                by_query, by_key, by_value, *_ = back(by_mixed.view(*by_mixed.shape[:-1], -1, rest.size))
                by_query, by_key, *_ = back(by_query, by_key)
                by_query, by_key, by_value = (one.transpose(1, 2) for one in (by_query, by_key, by_value))
                if rest.normed:
                    by_key, of_norms[3] = back(by_key)
                    by_query, of_norms[2] = back(by_query)
                by_normal, _, *found[: 3 * TENSORS] = back(*(one.flatten(2) for one in (by_query, by_key, by_value)))
                if by_normal is not None:
                    by_states, of_norms[0] = back(by_normal, gradient)
        return by_states if ctx.needs_input_grad[0] else None, None, None, None, *of_norms, *found


def _attended(
    run: _There,
    rest: Rest,
    states: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Sequence[Any], Sequence[bool]],
    linears: tuple[Sequence[Any], Sequence[Any]],
) -> Tensor:
    """From the layer's states to what its attention gives, before the projection.

    Args:
        norms, linears: their tensors, and which of these need a gradient.
    """
    (weights, of_norms), (tensors, needs) = norms, linears
    normal = run(_Norm, (of_norms[0], False), states, weights[0], rest.eps[0])
    given = rest.scales[:3], *chain(*tensors[:3])
    found = run(Projections, (False, *chain(*needs[:3])), normal, *given)
    query, key, value = (one.view(*one.shape[:-1], -1, rest.size) for one in found)
    if rest.normed:
        query = run(_Norm, (of_norms[2], False), query, weights[2], rest.eps[2])
        key = run(_Norm, (of_norms[3], False), key, weights[3], rest.eps[3])
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    query, key = run(Turned, (False, False), query, key, *angles)
    mixed: Tensor = run(Causal, (False,) * 3, query, key, value, rest.bounds, rest.longest, rest.scaling)
    return mixed.flatten(2)


def _projected(run: _There, scale: float, states: Tensor, tensors: Sequence[Any], needs: Sequence[bool]) -> Tensor:
    """The pass of a single linear layer."""
    weight, bias, down, up = tensors
    if down is None:
        result: Tensor = run(LinearPass, needs[:2], states, weight, bias)
    else:
        result = run(LoraPass, (*needs, False), states, weight, bias, down, up, scale)
    return result


def _of_projected(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gradients of states, weight, bias, A and B from those that such a pass gives."""
    return (*found, None, None) if len(found) == 3 else found[:-1]


def _sorted(flat: Sequence[Any], rest: Rest) -> tuple[Sequence[Any], list[Sequence[Any]]]:
    """What stands for the tensors of a layer, norm by norm and linear layer by linear layer."""
    norms = len(rest.eps)
    return flat[:norms], [flat[at : at + TENSORS] for at in range(norms, len(flat), TENSORS)]
