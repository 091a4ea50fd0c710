"""ZeRO stage 2 (DeepSpeed): each process holds all weights, and its share of gradients and optimizer state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quartet.distributed.deepspeed_setup import configuration, import_deepspeed
from quartet.distributed.group import ProcessGroup, squares
from quartet.distributed.pieces import MOMENTS, Piece


class TrainedAlone(nn.Module):
    """What DeepSpeed sees of the models: the trained weights and nothing of the frozen ones, which it would broadcast (and so
    copy, where they lie in mapped files)."""

    def __init__(self, trained: nn.Module, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        object.__setattr__(self, "_trained", trained)  # no submodule
        self.weights = nn.ParameterList(parameters)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The trained module's."""
        trained: nn.Module = object.__getattribute__(self, "_trained")
        return trained(*arguments, **options)


def share_masters(masters: list[Tensor], computing: list[Tensor]) -> None:
    """Let the optimizer move the weights that compute: DeepSpeed gives it a copy of its share, which mixed precision needs,
    and trained weights are float32 here."""
    for master, weights in zip(masters, computing, strict=True):
        assert master.dtype == weights.dtype
        master.data = weights.data


class ZeroEngine(ProcessGroup):
    """What the stages of ZeRO have in common: backward and step are DeepSpeed's."""

    stage = 0
    shares_state = True
    one_module = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._deepspeed = import_deepspeed(device)
        self._engine: Any = None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; DeepSpeed averages over the processes, and the loss is divided by the tokens of all."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the microbatch and moves nothing

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """The norm of all shares together; DeepSpeed clips in its step."""
        zero = self._engine.optimizer
        zero.clip_grad = max_norm or 0.0
        own = [gradient for group in zero.averaged_gradients.values() for gradient in group]
        return self.sum(squares(own, self._device)).sqrt()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """DeepSpeed clips, steps and gathers in one go; where the norm is not finite it takes no step."""
        self._engine.step()


class Zero2(ZeroEngine):
    """Stage 2."""

    name = "zero2"

    def prepare(self, trained: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Give the trained weights to DeepSpeed, which lays them out flat."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._engine, *_ = self._deepspeed.initialize(
            model=TrainedAlone(trained, parameters),
            optimizer=optimizer,
            config=configuration(2, self._device),
            dist_init_required=False,
        )
        zero = self._engine.optimizer
        shares = [parts[self.rank] for parts in zero.parallel_partitioned_bit16_groups]
        share_masters(zero.single_partition_of_fp32_groups, shares)
        for parameter in parameters:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:  # a view, which would keep the copy
                place, flat = mapping.get_hp_fragment_address(), shares[mapping.param_group_index]
                mapping.hp_fragment = flat.narrow(0, place.start, place.numel)
        result: nn.Module = self._engine
        return result

    def piece(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
        """The part of a weight that lies in this process's share of the flat weights; empty where none does."""
        mapping = getattr(parameter, "_hp_mapping", None)
        groups = self._engine.optimizer.single_partition_of_fp32_groups
        flat = groups[0 if mapping is None else mapping.param_group_index]
        state: dict[str, Any] = optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat)
        if mapping is None:
            empty = {key: flat.detach()[:0] for key in ("weight", *MOMENTS)}
            return Piece(0, 0, empty, state["step"], False)
        place, own = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        tensors = {"weight": flat.detach(), **{key: state[key] for key in MOMENTS}}
        parts = {key: tensor.narrow(0, own.start, own.numel) for key, tensor in tensors.items()}
        return Piece(place.start, place.start + place.numel, parts, state["step"], True)

    def restored(self) -> None:
        """Bring the weights that compute up to date with the shares."""
        self._engine.optimizer.update_lp_params()
