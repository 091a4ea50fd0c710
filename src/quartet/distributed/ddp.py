"""Data parallel: each process has all weights and its share of the episodes; gradients are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quartet.distributed.choose import Travel
from quartet.distributed.group import ProcessGroup


class DataParallel(ProcessGroup):
    """Sums the gradients of a minibatch once, in buckets that travel while the last microbatch's backward still runs."""

    name = "ddp"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._buckets = Buckets([])

    def prepare(self, trained: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Start from the main process's weights."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)
        self._buckets = Buckets(parameters)
        return trained

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; after the last microbatch they are those of all processes."""
        if not last:
            loss.backward()
            return
        with self._buckets:
            loss.backward()

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients to at most `max_norm`; all processes hold the same ones."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


class Buckets:
    """Sums gradients over all processes; within the context each bucket leaves as soon as its gradients are there.

    Buckets leave in one fixed order, which is that of a backward pass, so that all processes agree on it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._buckets = _cut(parameters)
        self._bucket_of: dict[Tensor, int] = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._left: list[int] = []
        self._next = 0
        self._flying: list[dist.Work] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._left = [len(bucket) for bucket in self._buckets]
        self._next = 0
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._bucket_of]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is not None:
            return
        while self._next < len(self._buckets):  # weights that this microbatch did not reach
            self._leave()
        for work in self._flying:
            work.wait()
        self._flying.clear()

    def _arrived(self, parameter: Tensor) -> None:
        self._left[self._bucket_of[parameter]] -= 1
        while self._next < len(self._buckets) and self._left[self._next] == 0:
            self._leave()

    def _leave(self) -> None:
        bucket = self._buckets[self._next]
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        # The gradients are parts of the bucket from here on, so that they exist once.
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
        self._flying.append(work)
        self._next += 1


def _cut(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Buckets of limited size, last weights first: their gradients come first."""
    buckets: list[list[nn.Parameter]] = []
    size, limit = 0, Travel.of(cuda=False).ddp_bucket
    for parameter in reversed(parameters):
        size += parameter.numel() * parameter.element_size()
        if not buckets or size > limit:
            buckets.append([])
            size = parameter.numel() * parameter.element_size()
        buckets[-1].append(parameter)
    return buckets
