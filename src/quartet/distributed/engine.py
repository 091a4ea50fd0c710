"""The process engine: everything that differs between one process and many sits behind this interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from quartet import kernels
from quartet.distributed.pieces import Piece, piece_of

T = TypeVar("T")


@dataclass(frozen=True)
class BackboneWeights:
    """A backbone as an engine that takes over its weights needs to know it."""

    module: nn.Module
    """The backbone; its forward passes begin with its method `entry`."""
    layers: Sequence[nn.Module]
    """Its decoder layers, in order."""
    entry: str
    head: Sequence[nn.Module]
    """What of it runs after `entry`, on its own."""
    dtype: torch.dtype
    """In which it computes."""
    on_host: bool = False
    """Shares rest in host memory; what is put together from them comes to the device for as long as it runs."""


def is_share(weight: Tensor) -> bool:
    """Whether this process holds but a share of a weight, or nothing of it until it is fetched."""
    return hasattr(weight, "device_mesh") or not weight.numel()  # fsdp2, ZeRO-3


class WeightKeeper(Protocol):
    """Where the weights of one backbone are when they are not needed."""

    are_whole: bool
    """Whether they stay where they are for now, so that copies of them in another format may stay too."""
    device: torch.device | None
    """Where they are while they run; None: where they always are."""

    def head(self) -> AbstractContextManager[None]:
        """Hold the LM head, which runs after the decoder layers did; closes a forward pass."""
        ...

    def done(self) -> AbstractContextManager[None]:
        """Closes a forward pass that needs no LM head."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Hold all weights whole, for many forward passes without gradients."""
        ...


class WholeWeights:
    """Weights that are always whole."""

    device: torch.device | None = None

    def __init__(self, *, are_whole: bool = True) -> None:
        """`are_whole=False` stands for weights that come and go, without moving any."""
        self.are_whole = are_whole

    def head(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def done(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Nothing to do."""
        before, self.are_whole = self.are_whole, True
        try:
            yield
        finally:
            self.are_whole = before


class ProcessEngine(Protocol):
    """What the rest of the code needs of the processes that run it. Methods are collective: every process calls them, in
    the same order."""

    name: str
    """none, ddp, zero2, zero3 or fsdp2."""
    rank: int
    world_size: int
    cuts_weights: bool
    """Whether a process holds only its share of every backbone."""
    shares_state: bool
    """Whether a process holds only its share of the optimizer's state."""
    one_module: bool
    """Whether `prepare` wraps the trained weights, so that every pass with gradients has to be one call of the whole."""
    processes_here: int
    """Processes on this machine, which share its memory."""
    first_here: bool
    """Whether this is the one process of its machine that makes files which are made once."""

    # Between processes

    def sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over all processes."""
        ...

    def maximum(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum over all processes."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        ...

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes one below the other, by rank; each brings as many."""
        ...

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; for small Python objects."""
        ...

    def agree(self, act: Callable[[], T]) -> T:
        """The result of `act`, which calls nothing collective; where it raises a QuartetError in one process, every process
        raises that error."""
        ...

    # Weights

    def keep(self, weights: BackboneWeights) -> WeightKeeper:
        """Take over the weights of a backbone; they are used through what this returns from then on."""
        ...

    def whole(self, tensor: Tensor) -> Tensor | None:
        """A whole weight on the host in the main process, None in the others."""
        ...

    # Training

    def prepare(self, trained: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Take over the trained weights, after `keep`: called once, before the first step.

        Returns:
            What is to be called in place of `trained` where gradients are needed.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of a microbatch; `last` in its minibatch."""
        ...

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale all gradients together to at most `max_norm`; returns the norm before, on the device. After the last
        `backward` of a minibatch, before `step`."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights along the gradients."""
        ...

    def held(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """This process's own parts of the trained weights, where they lie; not collective."""
        ...

    def piece(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
        """This process's own part of a trained weight with the optimizer's state, for a checkpoint."""
        ...

    def restored(self) -> None:
        """The pieces were written to."""
        ...


class SingleProcess:
    """One process: sums are what they are, and nobody is waited for."""

    name = "none"
    rank = 0
    world_size = 1
    cuts_weights = False
    shares_state = False
    one_module = False
    processes_here = 1
    first_here = True

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, value: T) -> list[T]:
        """A list of one."""
        return [value]

    def agree(self, act: Callable[[], T]) -> T:
        """The result of `act`."""
        return act()

    def keep(self, weights: BackboneWeights) -> WeightKeeper:
        """The weights stay where they are."""
        return WholeWeights()

    def whole(self, tensor: Tensor) -> Tensor | None:
        """The tensor itself, on the host."""
        return tensor.detach().cpu()

    def prepare(self, trained: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Nothing to do."""
        return trained

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients."""
        loss.backward()

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients to at most `max_norm` (2-norm over all); None only measures."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = kernels.norm_of_all(gradients)
        if norm is None:
            norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step."""
        optimizer.step()

    def held(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """All trained weights."""
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    def piece(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
        """The whole weight."""
        return piece_of(parameter, parameter, optimizer)

    def restored(self) -> None:
        """Nothing to do."""
