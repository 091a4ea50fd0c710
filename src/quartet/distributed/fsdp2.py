"""Fully sharded data parallel (torch's `fully_shard`): each process holds its share of every weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from quartet.distributed.engine import BackboneWeights, WeightKeeper
from quartet.distributed.group import ProcessGroup, squares
from quartet.distributed.pieces import Piece, piece_of


class FullyShardedDataParallel(ProcessGroup):
    """Every decoder layer is fetched before it runs and given back after; what is left of a backbone (embeddings, last norm,
    LM head) is one more such unit. Trained scalar heads, one row each, are whole everywhere and their gradients are summed."""

    name = "fsdp2"
    cuts_weights = True
    shares_state = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._mesh = init_device_mesh(device.type, (self.world_size,))

    def keep(self, weights: BackboneWeights) -> WeightKeeper:
        """Cut the backbone's weights, a layer at a time; where they lie in mapped files only this process's share is read."""
        return ShardedWeights(weights, self._mesh, self._device)

    def whole(self, tensor: Tensor) -> Tensor | None:
        """A whole weight on the host in the main process."""
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().cpu() if self.rank == 0 else None

    def prepare(self, trained: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Put weights that are cut and weights that are whole into groups of their own, as torch's optimizers need it."""
        for group in list(optimizer.param_groups):
            cut = [p for p in group["params"] if isinstance(p, DTensor)]
            if 0 < len(cut) < len(group["params"]):
                # The whole ones come last in their group, and theirs is the last group: the order stays as it was.
                rest = [p for p in group["params"] if not isinstance(p, DTensor)]
                group["params"] = cut
                optimizer.add_param_group({**group, "params": rest})
        return trained

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; those of cut weights are summed over the processes as each layer's are there."""
        loss.backward()

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients to at most `max_norm`, which is that of all shares together."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = [grad for grad in gradients if not isinstance(grad, DTensor)]
        for grad in whole:
            grad.copy_(self.sum(grad))
        cut = [grad.to_local() for grad in gradients if isinstance(grad, DTensor)]
        square = self.sum(squares(cut, self._device))
        norm = (square + squares(whole, self._device)).sqrt()
        if max_norm is not None:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for grad in [*cut, *whole]:
                grad.mul_(scale)
        return norm

    def piece(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
        """The rows of a weight that are this process's."""
        if not isinstance(parameter, DTensor):
            return piece_of(parameter, parameter, optimizer, own=self.rank == 0)
        rows = -(-parameter.shape[0] // self.world_size)
        start = min(self.rank * rows, parameter.shape[0]) * math.prod(parameter.shape[1:])
        return piece_of(parameter, parameter.to_local(), optimizer, start)


class ShardedWeights:
    """One backbone whose layers, and whose rest, are cut."""

    are_whole = False

    def __init__(self, weights: BackboneWeights, mesh: DeviceMesh, device: torch.device) -> None:
        self.device: torch.device | None = device
        layers, dtype = weights.layers, weights.dtype
        # The weights travel in the computation's dtype; autocast's own copies would outlive the layer.
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=None if dtype == torch.float32 else torch.float32,
            cast_forward_inputs=False,
        )
        home = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if weights.on_host else OffloadPolicy()
        common: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": home}
        for layer in layers:
            fully_shard(layer, reshard_after_forward=True, **common)
        root: Any = fully_shard(weights.module, reshard_after_forward=False, **common)
        # Losses are divided by the tokens of all processes: gradients are summed, not averaged.
        for unit in (*layers, root):
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(root, weights.entry)
        self._root: FSDPModule = root
        self._layers = [layer for layer in layers if isinstance(layer, FSDPModule)]
        # Whichever unit runs first becomes the root for good, and generation begins with a layer.
        root._get_fsdp_state()._lazy_init()

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold the embeddings and the LM head; without gradients they are given back."""
        self._root.unshard()
        with self.done():
            yield

    @contextmanager
    def done(self) -> Iterator[None]:
        """Give the embeddings back, without gradients."""
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                self._root.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold everything."""
        self._root.set_reshard_after_forward(False)
        for unit in (*self._layers, self._root):
            unit.unshard()
        self.are_whole = True
        try:
            yield
        finally:
            self.are_whole = False
            self._root.set_reshard_after_forward(True)
            self._root.set_reshard_after_forward(False, recurse=False)
            for unit in (*self._layers, self._root):
                unit.reshard()
