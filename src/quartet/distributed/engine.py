"""The process engine: everything that differs between one process and many sits behind this interface."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class ProcessEngine(Protocol):
    """What the trainer needs of the processes that run it."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over all processes."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a microbatch."""
        ...

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale all gradients together to at most `max_norm`; returns the norm before, on the device."""
        ...


class SingleProcess:
    """One process: sums are what they are, and nobody is waited for."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients to at most `max_norm` (2-norm over all); None only measures."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def start_engine() -> ProcessEngine:
    """The engine for this process."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise AssertionError("a process group of several processes needs an engine of its own")
    return SingleProcess()
