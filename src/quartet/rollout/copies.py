"""Where copies of weights lie for the time of a rollout: those that multiply the same states, one below the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that multiply the same states."""


def rooms_of(
    model: nn.Module, copied: Callable[[nn.Module], Tensor | None], dtype: torch.dtype
) -> dict[nn.Module, Tensor]:
    """Room for the copies of layers with the same states, all of which are copied: rows of one matrix.

    It is made before the copies: to move these later would leave the allocator with holes of their sizes.

    Args:
        copied: gives the weight of a layer that is copied.
        dtype: of the copies.

    Returns:
        For each such layer, room `[out, in]`.
    """
    rooms: dict[nn.Module, Tensor] = {}
    for parent in model.modules():
        for names in SIDE_BY_SIDE:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), nn.Module)]
            weights = [weight for layer in layers if (weight := copied(layer)) is not None]
            if len(weights) == len(names) and len({weight.shape[1] for weight in weights}) == 1:
                heights = [len(weight) for weight in weights]
                whole = torch.empty(sum(heights), weights[0].shape[1], dtype=dtype, device=weights[0].device)
                rooms.update(zip(layers, whole.split(heights), strict=True))
    return rooms


def copy_into(room: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight in its room, or anywhere; the weight itself where it needs neither."""
    return weight.to(dtype) if room is None else room.copy_(weight)


def as_one(weights: Sequence[Tensor]) -> Tensor | None:
    """The matrix whose rows these are, one weight below the other; None where they lie apart.

    Args:
        weights: `[out, in]` each.
    """
    first, width = weights[0], weights[0].shape[1]
    end, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for weight in weights:
        like = weight.is_contiguous() and weight.dtype == first.dtype and weight.shape[1] == width
        if not like or weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage:
            return None
        end += weight.numel() * weight.element_size()
    return first.as_strided((sum(len(weight) for weight in weights), width), (width, 1))
