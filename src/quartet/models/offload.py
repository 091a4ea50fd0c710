"""Frozen weights in host memory while no role that needs them runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quartet.config import ModelsConfig
from quartet.errors import ConfigError
from quartet.models.backbone import Backbone
from quartet.models.mapped import Mapped, can_drop_pages
from quartet.models.page_locked import page_locked_copies
from quartet.models.plan import BackboneSpec, Role, SharingPlan
from quartet.models.residency import Residency


class Offloaded(Residency):
    """Frozen weights live in host memory; those of the roles that are about to run are copied to the device.

    Frozen weights never change, so moving out writes nothing back: the copy on the device is dropped. Trained weights,
    heads, buffers and tensors that several backbones share stay where they are, and so does the policy's backbone, which
    is in use nearly always.
    """

    def __init__(
        self, plan: SharingPlan, backbones: Mapping[str, Backbone], device: torch.device, *, pin: bool = True
    ) -> None:
        """Move the frozen weights to host memory.

        Args:
            pin: page-locked host memory, from which a GPU copies without waiting.
        """
        self._plan = plan
        self._device = device
        owners: dict[int, set[str]] = {}
        for name, backbone in backbones.items():
            for parameter in backbone.model.parameters():
                owners.setdefault(_storage(parameter), set()).add(name)
        self._homes: dict[str, list[tuple[Tensor, list[nn.Parameter]]]] = {}
        for name, backbone in backbones.items():
            if name == plan.view("policy").backbone:
                continue
            own: dict[int, list[nn.Parameter]] = {}
            for parameter in backbone.model.parameters():
                if not parameter.requires_grad and owners[_storage(parameter)] == {name}:
                    own.setdefault(_storage(parameter), []).append(parameter)
            groups = list(own.values())
            weights = [tied[0].detach() for tied in groups]
            homes = page_locked_copies(weights) if pin else weights
            self._homes[name] = list(zip(homes, groups, strict=True))
        self._inside = set(self._homes)
        self.use("policy")

    def use(self, *roles: Role) -> None:
        """Move out what these roles do not need, then move in what they do."""
        needed = {self._plan.view(role).backbone for role in roles} & self._homes.keys()
        for name in sorted(self._inside - needed):
            for home, tied in self._homes[name]:
                for parameter in tied:
                    parameter.data = home
        for name in sorted(needed - self._inside):
            for home, tied in self._homes[name]:
                copy = torch.empty_like(home, device=self._device, pin_memory=False)
                copy.copy_(home, non_blocking=True)
                for parameter in tied:
                    parameter.data = copy
        self._inside = needed


def refuse_unmovable(models: ModelsConfig, plan: SharingPlan, device: torch.device, *, cut: bool) -> None:
    """Check that `models.offload` finds something that it can move; before anything is loaded.

    Args:
        device: where the models are to be.
        cut: a process engine cuts the weights into shares.

    Raises:
        ConfigError: nothing can be moved: the models are on the CPU already, there is no backbone but the policy's, its
            layers keep references to their weights; or weights are cut, and something is trained in each backbone.
    """
    if models.offload == "none":
        return
    if device.type == "cpu":
        raise ConfigError(
            "models.offload=cpu moves frozen weights between GPU and host memory, and the models are on the CPU already; "
            "use models.offload=none"
        )
    if models.quantization not in (None, "4bit"):
        raise ConfigError(
            f"models.offload=cpu cannot move layers of models.quantization={models.quantization}, which keep their weights to "
            "themselves; use models.quantization=4bit or null, or models.offload=none"
        )
    if len(plan.backbones) == 1:
        raise ConfigError(
            f"models.offload=cpu has nothing to move under the {plan.name} plan, whose one backbone is always in use; use "
            "models.offload=none"
        )
    if cut and not any(rests_on_host(spec) for spec in plan.backbones):
        raise ConfigError(
            f"models.offload=cpu has nothing to move under the {plan.name} plan where weights are cut into shares: something "
            "is trained in each of its backbones; use models.sharing=separate, or models.offload=none"
        )


def make_residency(
    kind: str, plan: SharingPlan, backbones: Mapping[str, Backbone], device: torch.device, *, cut: bool = False
) -> Residency:
    """What `models.offload` asks for; on the CPU, without it, pages of mapped files come and go.

    Args:
        kind: none or cpu; `refuse_unmovable` has nothing against it.
        cut: a process engine cuts the weights into shares, and keeps those of `rests_on_host` in host memory by itself.
    """
    if kind == "none":
        return Mapped(plan, backbones) if device.type == "cpu" and can_drop_pages() else Residency()
    return Residency() if cut else Offloaded(plan, backbones, device)


def rests_on_host(spec: BackboneSpec) -> bool:
    """Whether all of a backbone whose weights are cut stays in host memory under `models.offload: cpu`: each unit of it is
    copied to the device as it is put together."""
    return not spec.learns


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
