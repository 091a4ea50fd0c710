"""Whether the pass of a decoder layer on a GPU gives here what its formula says: tried on a small layer before it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from quartet.errors import brief
from quartet.models.converted import CONVERTED
from quartet.models.gpu_layer import GpuLayerPass
from quartet.models.gradients import IN_PLACE, add_wide_product
from quartet.models.layer_pass import LINEARS, TENSORS, Rest

TOLERANCE = 0.1
"""Norm of an error over that of what is right; some roundings to bfloat16 come to 0.02."""
HIDDEN, INNER, HEADS, SHARED, SIZE, RANK = 64, 96, 4, 2, 16, 8
LENGTHS = (5, 9, 2)
EPS = 1e-5

_log = logging.getLogger("quartet")


@cache
def works(device: torch.device) -> bool:
    """Whether the pass and its gradients are right on a device; asked once in a process. If not, a warning says why."""
    try:
        worst = _worst_error(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, another torch, another GPU
        reason = f"it fails with {type(error).__name__}: {brief(error)}"
    else:
        if worst <= TOLERANCE:
            return True
        reason = f"its numbers are off by {worst:.0%}"
    _log.warning("Decoder layers are not computed in one pass on this GPU, updates take longer: %s", reason)
    return False


def _worst_error(device: torch.device) -> float:
    """Of states and gradients, between the pass in bfloat16 and plain operations in float32."""
    # Its tensors are none of a pass that is computed again, which may be the first to ask.
    with IN_PLACE.added(False), CONVERTED.keeping(False), torch.enable_grad(), saved_tensors_hooks(_same, _same):
        states, angles, norms, linears = _drawn(device)
        trained = [states, *norms, *(tensor for tensors in linears for tensor in tensors)]
        for tensor in trained:
            tensor.requires_grad_()
        results = []
        for compute in (_in_one_pass, _plain):
            with torch.autocast(device.type, enabled=False):
                found = compute(states, angles, norms, linears)
            weights = torch.linspace(-1, 1, found.numel(), device=device).view(found.shape)
            results.append([found.detach(), *torch.autograd.grad((found * weights).sum(), trained)])
        results[0] += _sums(device, add_wide_product)
        results[1] += _sums(device, _add_plainly)
        errors = [(one - right).norm() / right.norm() for one, right in zip(*results, strict=True)]
        worst = torch.stack(errors).max()
        return float(worst) if bool(worst.isfinite()) else float("inf")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _drawn(device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor], list[list[Tensor]]]:
    """States, angles, weights of norms, and weight, bias, A and B of the linear layers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    heads, shared = HEADS * SIZE, SHARED * SIZE
    shapes = [(heads, HIDDEN), (shared, HIDDEN), (shared, HIDDEN), (HIDDEN, heads)]
    shapes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    linears = [
        [draw(out, given, scale=given**-0.5), draw(out), draw(RANK, given, scale=given**-0.5), draw(out, RANK)]
        for out, given in shapes
    ]
    tokens = sum(LENGTHS)
    angle = draw(tokens, SIZE // 2).repeat(1, 2)
    return draw(tokens, HIDDEN), (angle.cos(), angle.sin()), [1 + draw(HIDDEN, scale=0.1) for _ in range(2)], linears


def _sums(device: torch.device, add: Callable[..., None]) -> list[Tensor]:
    """A gradient that a product is put over, and one that it is added to."""
    found = []
    for filled in (False, True):
        gradient = torch.linspace(-30, 30, INNER * HIDDEN, device=device).view(INNER, HIDDEN)
        left, right = (torch.linspace(-3, 3, 16 * size, device=device).view(16, size).cos() for size in (INNER, HIDDEN))
        add(gradient, left.bfloat16().t(), right.bfloat16(), filled=filled)
        found.append(gradient)
    return found


def _add_plainly(gradient: Tensor, left: Tensor, right: Tensor, *, filled: bool) -> None:
    gradient.mul_(float(filled)).add_(left.float() @ right.float())


def _in_one_pass(
    states: Tensor, angles: tuple[Tensor, Tensor], norms: list[Tensor], linears: list[list[Tensor]]
) -> Tensor:
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0)
    rest = Rest(
        normed=False,
        eps=(EPS, EPS),
        size=SIZE,
        scaling=SIZE**-0.5,
        scales=[0.5] * LINEARS,
        activation=nn.SiLU(),
        bounds=bounds,
        starts=bounds.int().to(states.device),
        longest=max(LENGTHS),
        read=None,
        by_kernels=False,
        kept=True,
    )
    tensors = [tensor for tensors in linears for tensor in tensors]
    assert len(tensors) == LINEARS * TENSORS
    apply: Callable[..., Tensor] = GpuLayerPass.apply
    found = apply(states[None], angles[0][None], angles[1][None], rest, *norms, *tensors)
    return found[0].float()


def _plain(states: Tensor, angles: tuple[Tensor, Tensor], norms: list[Tensor], linears: list[list[Tensor]]) -> Tensor:
    def normal(given: Tensor, weight: Tensor) -> Tensor:
        return given * (given.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight

    def linear(given: Tensor, number: int) -> Tensor:
        weight, bias, down, up = linears[number]
        return given @ weight.t() + bias + 0.5 * (given @ down.t()) @ up.t()

    def turned(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        return heads * angles[0][:, None] + torch.cat((-second, first), -1) * angles[1][:, None]

    given = normal(states, norms[0])
    query, key, value = (linear(given, number).view(len(states), -1, SIZE) for number in range(3))
    mixed = _attended(turned(query), turned(key), value)
    between = states + linear(mixed.flatten(1), 3)
    given = normal(between, norms[1])
    return between + linear(nn.functional.silu(linear(given, 4)) * linear(given, 5), 6)


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    found: list[Tensor] = []
    parts: Sequence[tuple[Tensor, ...]] = list(zip(*(one.split(LENGTHS) for one in (query, key, value)), strict=True))
    for q, k, v in parts:
        k, v = (one.repeat_interleave(HEADS // SHARED, 1) for one in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * SIZE**-0.5
        future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        found.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(future, float("-inf")).softmax(-1), v))
    return torch.cat(found)
