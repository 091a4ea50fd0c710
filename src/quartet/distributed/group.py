"""Many processes talking to each other through torch.distributed; what every engine of several processes has in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quartet.distributed.engine import BackboneWeights, WeightKeeper, WholeWeights
from quartet.distributed.pieces import Piece, local, piece_of
from quartet.errors import QuartetError

T = TypeVar("T")


class ProcessGroup:
    """Sums, gathering and agreement over all processes; the weights are whole in each of them."""

    name = ""
    cuts_weights = False
    shares_state = False
    one_module = False

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.first_here = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        self._device = device

    def sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over all processes."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum over all processes."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.maximum(torch.tensor(int(flag))))

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes one below the other, by rank; each brings as many."""
        kind = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
        mine = tensor.to(kind).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts).to(tensor.dtype)

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; for small Python objects."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def agree(self, act: Callable[[], T]) -> T:
        """The result of `act`, which calls nothing collective; where it raises a QuartetError in one process, every process
        raises that error."""
        try:
            result = act()
        except QuartetError as error:
            self.gather(error)
            raise
        none: QuartetError | None = None
        for found in self.gather(none):
            if found is not None:
                raise found
        return result

    def keep(self, weights: BackboneWeights) -> WeightKeeper:
        """The weights stay whole."""
        return WholeWeights()

    def whole(self, tensor: Tensor) -> Tensor | None:
        """The weight on the host in the main process, None in the others."""
        return tensor.detach().cpu() if self.rank == 0 else None

    def prepare(self, trained: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Nothing to do."""
        return trained

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, in each process on what it owns."""
        optimizer.step()

    def held(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """What the optimizer moves in this process."""
        return [local(p.detach()) for group in optimizer.param_groups for p in group["params"]]

    def piece(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
        """The whole weight in the main process."""
        return piece_of(parameter, local(parameter), optimizer, own=self.rank == 0)

    def restored(self) -> None:
        """Nothing to do."""

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = tensor.detach().clone()
        dist.all_reduce(result, operation)
        return result


def squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack([norm.square() for norm in torch._foreach_norm(list(tensors))]).sum()
