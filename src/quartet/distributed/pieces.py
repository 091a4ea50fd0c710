"""A process's own part of a trained weight and of the optimizer's state for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's states that have a number for each weight."""


@dataclass(frozen=True)
class Piece:
    """Numbers `start` to `stop` of a weight that is laid out flat; writing to the tensors changes the run."""

    start: int
    stop: int
    tensors: dict[str, Tensor]
    """`weight`, and each of MOMENTS, `[stop - start]`."""
    step: Tensor
    """Adam's count of steps."""
    own: bool
    """Whether this process is the one to save it; others may hold it too."""


def piece_of(
    parameter: nn.Parameter, held: Tensor, optimizer: torch.optim.Optimizer, start: int = 0, *, own: bool = True
) -> Piece:
    """The piece that starts at `start` of the whole weight; makes the optimizer's state where there is none yet.

    Args:
        parameter: as the optimizer knows it.
        held: this process's elements of it.
    """
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    tensors = {"weight": _flat(held), **{key: _flat(local(state[key])) for key in MOMENTS}}
    return Piece(start, start + held.numel(), tensors, state["step"], own)


def local(tensor: Tensor) -> Tensor:
    """This process's elements of a tensor."""
    found = getattr(tensor, "to_local", None)
    result: Tensor = tensor if found is None else found()
    return result


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)
