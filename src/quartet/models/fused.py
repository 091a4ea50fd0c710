"""Gated MLPs and RMS norms that keep less for the backward pass than the operations they are written with, and the layers
that take passes of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.models.as_in_training import computes_as_in_training
from quartet.models.decoder_layer import layer_class
from quartet.models.gated import multiplied
from quartet.models.gated_mlp import gated_mlp
from quartet.models.known import GATED, RMS_NORM, library_kind, own_class
from quartet.models.layout import packed_now
from quartet.models.linears import is_replaced
from quartet.models.precision import on_cpu
from quartet.models.projections import projects, with_projections
from quartet.models.rotary import turning_class

_kinds: dict[type[nn.Module], type[nn.Module] | None] = {}


def use_fused_layers(model: nn.Module) -> None:
    """Let gated MLPs, RMS norms and the rotary embeddings of attention take their own passes where gradients are taken.

    Layers are known by what the source of their forward says, whatever their class is called; others stay as they are.
    Without gradients every layer computes, bit for bit, what the library's does, but where its numbers are compared with
    those of a training pass (`as_in_training`).
    """
    for module in model.modules():
        stands_in = library_kind(type(module)) is not type(module)
        kind = None if stands_in or is_replaced(module) else _fused_kind(type(module))
        if kind is not None:
            module.__class__ = kind


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * w` over the last dimension (arXiv 1910.07467), computed in float32.

    Keeps x and one number for each row. The weight gets its gradient only where it needs one.
    """
    apply: Callable[..., Tensor] = _RMSNorm.apply
    return apply(states, weight, eps)


def _fused_kind(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class with passes of its own that stands in for a layer's class; None where there is none."""
    if kind not in _kinds:
        try:
            source = inspect.getsource(kind.forward)
        except (OSError, TypeError):
            source = ""
        made = _gated_class(kind) if GATED in source else _attention_class(kind)
        made = _norm_class(kind) if all(line in source for line in RMS_NORM) else made
        _kinds[kind] = layer_class(kind) if made is None else made
    return _kinds[kind]


def _gated_class(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        packed = packed_now() if self.is_last else None
        if packed is not None:
            x = packed.read.shorten(x.squeeze(0)).unsqueeze(0)
        if computes_as_in_training():
            result = gated_mlp(x, self.gate_proj, self.up_proj, self.act_fn, self.down_proj)
        else:  # the library's arithmetic, with one tensor less
            gate, up = self.gate_proj(x), self.up_proj(x)
            result = self.down_proj(multiplied(self.act_fn, gate, up))
        return result if packed is None else packed.read.lengthen(result.squeeze(0)).unsqueeze(0)

    # `is_last`: the MLP of the last layer; in a packed layout it computes only the tokens whose states are read.
    return own_class(kind, forward, is_last=False)


def _attention_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    made = turning_class(kind)
    if not projects(kind):
        return made
    forward = with_projections(kind.forward if made is None else made.forward)
    return own_class(kind, forward)


def _norm_class(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not computes_as_in_training():
            plain: Tensor = kind.forward(self, hidden_states)
            return plain
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return own_class(kind, forward)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        found = kernels.rms_norm(states, weight, eps) if on_cpu(states) else None
        if found is not None:
            ctx.save_for_backward(states, weight, found[1])
            return found[0]
        wide = states.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(states, weight, scale)
        normal = (wide * scale).to(states.dtype)
        return normal.mul_(weight) if normal.dtype == weight.dtype else weight * normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, weight, scale = ctx.saved_tensors
        if on_cpu(states):
            of_weight = ctx.needs_input_grad[1]
            found = kernels.rms_norm_gradient(gradient.contiguous(), states, weight, scale, of_weight=of_weight)
            if found is not None:
                return *found, None
        normal = states.float() * scale
        gradient = gradient.float()
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (gradient * normal).flatten(0, -2).sum(0).to(weight.dtype)
        slope = gradient * weight
        along = (slope * normal).mean(-1, keepdim=True)
        by_states = torch.addcmul(slope, normal, along, value=-1.0).mul_(scale).to(states.dtype)
        return by_states, by_weight, None
