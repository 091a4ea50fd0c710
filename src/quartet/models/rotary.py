"""Rotary position embeddings of queries and keys by a kernel, in training passes on a CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.models.as_in_training import computes_as_in_training
from quartet.models.known import own_class
from quartet.models.precision import on_cpu

NAME, HALVES = "apply_rotary_pos_emb", "rotate_half"
"""Functions of a family's module that its attention calls, the first by its name."""
TURNED = ("q_embed = (q * cos) + (rotate_half(q) * sin)", "k_embed = (k * cos) + (rotate_half(k) * sin)")
HALF = ("x1 = x[..., : x.shape[-1] // 2]", "x2 = x[..., x.shape[-1] // 2 :]", "return torch.cat((-x2, x1), dim=-1)")
"""What the two compute, in the source of every family whose positions turn halves of a head."""

Turn = Callable[..., tuple[Tensor, Tensor]]


def turning_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that stands in for that of an attention: the library's forward, which finds another function under the name of
    the one that turns queries and keys. None where the attention does something else."""
    forward: Any = kind.forward
    if not turns_halves(kind):
        return None
    known = forward.__globals__
    names = {**known, NAME: _turn_in_place_of(known[NAME])}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__, own.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    return own_class(kind, own)


def turns_halves(kind: type[nn.Module]) -> bool:
    """Whether a library's attention turns the halves of its queries and keys."""
    forward: Any = kind.forward
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return False
    known = forward.__globals__
    return _says(known.get(NAME), TURNED) and _says(known.get(HALVES), HALF)


@cache
def _says(function: Any, lines: tuple[str, ...]) -> bool:
    """Whether the source of a function holds these lines: asked for each layer of each rollout."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return False
    return all(line in source for line in lines)


def _turn_in_place_of(library: Turn) -> Turn:
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        fits = not args and not kwargs and computes_as_in_training() and on_cpu(q)
        if not fits or not all(kernels.rotary_fits(states, cos, sin) for states in (q, k)):
            return library(q, k, cos, sin, *args, **kwargs)
        apply: Turn = Turned.apply
        return apply(q, k, cos, sin)

    return turn


class Turned(torch.autograd.Function):
    """Queries and keys in their own dtype: from bfloat16 the library goes to the angles' float32, which the attention under
    autocast rounds to the same numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return kernels.rotary(q, cos, sin, back=False), kernels.rotary(k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_q: Tensor, by_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        by_q, by_k = (by if by.stride(3) == 1 else by.contiguous() for by in (by_q, by_k))
        return kernels.rotary(by_q, cos, sin, back=True), kernels.rotary(by_k, cos, sin, back=True), None, None
