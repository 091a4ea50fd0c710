"""ZeRO stage 3 (DeepSpeed): each process holds its share of every weight, of its gradient and of the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quartet.allocator import return_gaps
from quartet.distributed.choose import Travel
from quartet.distributed.deepspeed_setup import configuration
from quartet.distributed.engine import BackboneWeights, WeightKeeper
from quartet.distributed.pieces import MOMENTS, Piece
from quartet.distributed.stage3 import lean_stage3, make_gradients
from quartet.distributed.stage3_weights import place_for_shares
from quartet.distributed.zero2 import ZeroEngine, share_masters

HELD = -1
"""Among the modules that DeepSpeed counts as using a weight: a holder of ours."""


class Zero3(ZeroEngine):
    """Stage 3: policy and value are one DeepSpeed engine with two learning rates; backbones that neither of them uses are
    engines of their own without an optimizer."""

    name = "zero3"
    cuts_weights = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._kept: list[tuple[nn.Module, Zero3Weights]] = []
        travel = Travel.of(cuda=device.type == "cuda")
        self._configuration = configuration(
            3,
            device,
            sub_group_size=travel.bucket,  # what is stepped together, with temporary gradients of that size
            stage3_param_persistence_threshold=0,
            stage3_max_reuse_distance=0,
            stage3_prefetch_bucket_size=travel.ahead,
        )

    def keep(self, weights: BackboneWeights) -> WeightKeeper:
        """The weights are cut in `prepare`; up to there they lie in mapped files."""
        head = [p for part in weights.head for p in part.parameters()]
        keeper = Zero3Weights(weights.module, head, self._device, on_host=weights.on_host)
        self._kept.append((weights.module, keeper))
        return keeper

    def prepare(self, trained: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Cut what is trained, into one flat tensor, then the rest of policy and value; give them to DeepSpeed; then cut the
        frozen backbones, which rest in their files until then."""
        inside = set(trained.modules())
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        self._cut(moved, self._configuration, moved)
        return_gaps()  # whole adapters were there
        self._cut(trained.parameters(), self._configuration)
        self._engine = self._initialized(self._configuration, model=trained, optimizer=optimizer)
        zero = self._engine.optimizer
        share_masters(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat)
        for module, keeper in self._kept:
            if module in inside:
                keeper.hooks = zero.parameter_offload
            else:
                place = self._at_home() if keeper.on_host else self._configuration
                self._cut(module.parameters(), place)
                keeper.hooks = self._initialized(place, model=module).optimizer
        result: nn.Module = self._engine
        return result

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients, for which the first call makes room."""
        make_gradients(self._engine.optimizer)
        super().backward(loss, last=last)

    def whole(self, tensor: Tensor) -> Tensor | None:
        """A whole weight on the host in the main process."""
        if not hasattr(tensor, "ds_id"):
            return super().whole(tensor)
        with self._deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone() if self.rank == 0 else None

    def held(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """This process's shares, without the padding that the last of them may end in."""
        return [self._share(p)[-1] for group in self._engine.optimizer.fp16_groups for p in group]

    def piece(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
        """This process's share of a weight laid out flat; the last one may end in padding."""
        start, offset, flat, weight = self._share(parameter)
        state: dict[str, Any] = optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat)
        count = weight.numel()
        moments = {key: state[key].narrow(0, offset, count) for key in MOMENTS}
        return Piece(start, start + count, {"weight": weight, **moments}, state["step"], True)

    def _share(self, parameter: Any) -> tuple[int, int, Tensor, Tensor]:
        """Of a weight: where this process's share begins in it; where in which flat tensor that lies; the share itself."""
        zero: Any = self._engine.optimizer
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        flat: Tensor = zero.fp32_partitioned_groups_flat[group]
        start = min(self.rank * size, parameter.ds_numel)
        count = min(size, parameter.ds_numel - start)
        return start, offset, flat, flat.detach().narrow(0, offset, count)

    def restored(self) -> None:
        """Nothing to do: the optimizer's shares are those that compute."""

    def _at_home(self) -> dict[str, Any]:
        """The configuration of a backbone whose shares rest in host memory."""
        zero = self._configuration["zero_optimization"]
        home = {"device": "cpu", "pin_memory": self._device.type == "cuda"}
        return {**self._configuration, "zero_optimization": {**zero, "offload_param": home}}

    def _cut(
        self, weights: Iterable[nn.Parameter], configuration: dict[str, Any], moved: Sequence[Tensor] = ()
    ) -> None:
        """Cut weights one by one, the largest first: one at a time is whole beside the shares of those before it.

        Args:
            moved: those that the optimizer moves, in its order.
        """
        left = sorted((w for w in weights if not hasattr(w, "ds_id")), key=lambda w: -w.numel())
        with lean_stage3() as known:
            places = place_for_shares(moved, self.world_size, self._device) if known and moved else {}
            self._deepspeed.zero.Init(
                module=Copies(left, places),
                config_dict_or_path=configuration,
                mem_efficient_linear=False,
                dtype=torch.float32,
            )

    def _initialized(self, configuration: dict[str, Any], **options: Any) -> Any:
        with lean_stage3():
            engine, *_ = self._deepspeed.initialize(config=configuration, dist_init_required=False, **options)
        return engine


class Copies(nn.Module):
    """Gives weights one by one, each as a copy made just then: DeepSpeed writes the main process's numbers into them, and pages
    of a mapped file that were written to stay in memory as long as the file is mapped."""

    def __init__(self, weights: list[nn.Parameter], places: Mapping[Tensor, Tensor]) -> None:
        """
        Args:
            places: where a weight's share goes when it has been cut, if not where DeepSpeed puts it.
        """
        super().__init__()
        self._weights, self._places = weights, places  # a list, of which no module takes note

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The weights."""
        for parameter in self._weights:
            parameter.data = parameter.data.clone()
            yield parameter
            if parameter in self._places:
                share = vars(parameter)["ds_tensor"]
                share.data = self._places[parameter].copy_(share)


class Zero3Weights:
    """One backbone whose weights are cut. DeepSpeed's hooks fetch a module's weights before it runs and give them back."""

    are_whole = False

    def __init__(self, module: nn.Module, head: list[nn.Parameter], device: torch.device, *, on_host: bool) -> None:
        self.device: torch.device | None = device
        self.on_host = on_host
        self.hooks: Any = None
        """DeepSpeed's object that put the hooks there."""
        self._all: list[Any] = list(module.parameters())
        self._head: list[Any] = head

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold the LM head, which runs chunk by chunk."""
        with self._held(self._head):
            yield

    @contextmanager
    def done(self) -> Iterator[None]:
        """Nothing is left over."""
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold everything, and take the hooks off: they are many, and would only find that all is there."""
        hooks = self.hooks
        with self._held(self._all):
            for handle in (*hooks.forward_hooks, *hooks.backward_hooks):
                handle.remove()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            self.are_whole = True
            try:
                yield
            finally:
                self.are_whole = False
                with lean_stage3():
                    hooks._register_deepspeed_module(hooks.module)

    @contextmanager
    def _held(self, weights: list[Any]) -> Iterator[None]:
        if weights:
            weights[0].all_gather(weights)
        for weight in weights:
            weight.ds_active_sub_modules.add(HELD)
        try:
            yield
        finally:
            for weight in weights:
                weight.ds_active_sub_modules.discard(HELD)
            if weights:
                weights[0].partition(weights)
