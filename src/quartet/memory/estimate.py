"""What a run costs in bytes: for each backbone and role, and for each phase at its peak. Nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quartet.config import LoraConfig
from quartet.memory.adapter_sizes import AdapterSize, adapter_size
from quartet.memory.choices import Choices, Workload, torch_dtype
from quartet.memory.phases import Working, working_memory
from quartet.memory.shapes import BackboneShape, shape_of
from quartet.memory.trace import ACTIVATIONS, CACHE, GRADIENTS, LOGITS
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.plan import ROLES, BackboneSpec, Role, SharingPlan, Task

FLOAT = 4
"""Bytes of a float32: trained weights, adapters, heads, gradients and Adam's moments."""


@dataclass(frozen=True, slots=True)
class BackboneBytes:
    """One backbone in one process."""

    name: str
    checkpoint: str
    roles: tuple[str, ...]
    """The roles that look at it."""
    parameters: int
    """Of the whole model, LM head included, adapters not."""
    trained: bool
    weights: float
    """LM head and buffers included."""
    mapped: float
    """Part of `weights` that stays in the file's pages (CPU): it is not anonymous memory."""
    adapters: float


@dataclass(frozen=True, slots=True)
class RoleBytes:
    """What a role holds of its own in one process, beside the backbone that it looks at."""

    role: str
    backbone: str
    trained_parameters: int
    """Of the whole role, not of the process's share."""
    adapters: float
    head: float
    """The LM head where it is not tied (part of the backbone's weights), or the scalar head."""
    gradients: float
    optimizer: float


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """One process in one phase, at the phase's peak."""

    phase: str
    weights: float
    """Backbones, adapters and heads that are in the device's memory (on a CPU: anonymous memory)."""
    optimizer: float
    gradients: float
    activations: float
    kv_cache: float
    logits: float
    gathered: float
    """Weights of layers that are whole for as long as they run (sharded engines)."""
    at: str
    """The stretch of code where the peak is."""

    @property
    def peak(self) -> float:
        """All together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """The bytes by name."""
        names = ("weights", "optimizer", "gradients", "activations", "kv_cache", "logits", "gathered")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Estimate:
    """The whole prediction, per process."""

    plan: SharingPlan
    device: str
    choices: Choices
    workload: Workload
    backbones: tuple[BackboneBytes, ...]
    roles: tuple[RoleBytes, ...]
    phases: tuple[PhaseBytes, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> PhaseBytes:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    def phase(self, name: str) -> PhaseBytes:
        """A phase by name."""
        return next(phase for phase in self.phases if phase.phase == name)


class Estimator:
    """Estimates for two checkpoints; what was learned for one choice is kept for the next."""

    def __init__(self, sft: CheckpointInfo, reward: CheckpointInfo, workload: Workload, device: torch.device) -> None:
        self.sft, self.reward, self.workload, self.device = sft, reward, workload, device
        self._shapes: dict[Task, BackboneShape] = {}
        self._adapters: dict[tuple[str, str, LoraConfig | None], AdapterSize] = {}
        self._working: dict[tuple[object, ...], dict[str, Working]] = {}

    def shape(self, task: Task) -> BackboneShape:
        """Shape of the SFT checkpoint's or the reward checkpoint's backbone."""
        if task not in self._shapes:
            self._shapes[task] = shape_of(self.sft if task == "language_model" else self.reward, task)
        return self._shapes[task]

    def info(self, spec: BackboneSpec) -> CheckpointInfo:
        """The checkpoint that a backbone is loaded from."""
        return self.sft if spec.task == "language_model" else self.reward

    def estimate(self, plan: SharingPlan, choices: Choices) -> Estimate:
        """Predict one plan under one set of choices.

        Raises:
            CheckpointError: a checkpoint whose model cannot be built from its configuration.
        """
        backbones = tuple(self._backbone(plan, spec, choices) for spec in plan.backbones)
        roles = tuple(self._role(plan, role, choices) for role in ROLES)
        working = self._work(plan, choices)
        phases = [self._load(plan, backbones, roles)]
        phases += [self._phase(name, work, plan, backbones, roles, choices) for name, work in working.items()]
        return Estimate(plan, self.device.type, choices, self.workload, backbones, roles, tuple(phases))

    def _backbone(self, plan: SharingPlan, spec: BackboneSpec, choices: Choices) -> BackboneBytes:
        shape, info = self.shape(spec.task), self.info(spec)
        dtype = torch.float32 if spec.trainable else torch_dtype(choices.dtype)
        weights = shape.parameters * dtype.itemsize + shape.buffer_bytes
        mapped = 0
        if self.device.type == "cpu" and not (spec.trainable or spec.merged_adapter):
            mapped = shape.mapped_parameters(info, dtype) * dtype.itemsize
        share = shards(choices)
        adapters = FLOAT * sum(self._adapter(spec, a.name, choices).parameters for a in spec.adapters)
        return BackboneBytes(
            name=spec.name,
            checkpoint=spec.checkpoint,
            roles=tuple(view.role for view in plan.views if view.backbone == spec.name),
            parameters=shape.parameters,
            trained=spec.trainable,
            weights=weights / share,
            mapped=mapped / share,
            adapters=adapters / share,
        )

    def _adapter(self, spec: BackboneSpec, name: str, choices: Choices) -> AdapterSize:
        key = (spec.name, name, choices.lora)
        if key not in self._adapters:
            adapter = next(a for a in spec.adapters if a.name == name)
            owner = self.sft if name in ("policy", "reference", "sft") else self.reward
            shape = self.shape(spec.task)
            self._adapters[key] = adapter_size(adapter, owner, self.info(spec), spec.task, choices.lora, shape)
        return self._adapters[key]

    def _role(self, plan: SharingPlan, role: Role, choices: Choices) -> RoleBytes:
        view = plan.view(role)
        spec = next(spec for spec in plan.backbones if spec.name == view.backbone)
        shape = self.shape(spec.task)
        adapter = AdapterSize(0, 0) if view.adapter is None else self._adapter(spec, view.adapter, choices)
        own = AdapterSize(shape.parameters, len(shape.tensors)) if spec.trainable else adapter
        scalar = shape.hidden if view.head != "lm" else 0
        trained = own.parameters + scalar if view.trainable else 0
        tensors = own.tensors + (scalar > 0) if view.trainable else 0
        share, optimizer_share = shards(choices), optimizer_shards(choices)
        dtype = torch.float32 if spec.trainable else torch_dtype(choices.dtype)
        return RoleBytes(
            role=role,
            backbone=view.backbone,
            trained_parameters=trained,
            adapters=adapter.parameters * FLOAT / share,
            head=scalar * FLOAT if scalar else shape.head_parameters * dtype.itemsize / share,
            gradients=trained * FLOAT / gradient_shards(choices),
            optimizer=(2 * trained + tensors) * FLOAT / optimizer_share,
        )

    def _work(self, plan: SharingPlan, choices: Choices) -> dict[str, Working]:
        key = (
            plan.name,
            choices.lora,
            choices.dtype,
            choices.checkpointing,
            choices.microbatch_rows,
            choices.batch_rows,
            choices.world_size,
            choices.quantization,
            choices.freeze_layers,
        )
        if key not in self._working:
            shapes = {spec.name: self.shape(spec.task) for spec in plan.backbones}
            self._working[key] = working_memory(plan, self.sft, self.reward, choices, self.workload, shapes)
        return self._working[key]

    def _load(self, plan: SharingPlan, backbones: tuple[BackboneBytes, ...], roles: tuple[RoleBytes, ...]) -> PhaseBytes:
        """After loading: on a CPU what is trained is still mapped, until the first optimizer step writes to it."""
        weights = sum(b.weights - b.mapped + b.adapters for b in backbones) + scalar_heads(roles)
        if self.device.type == "cpu":
            for spec, backbone in zip(plan.backbones, backbones, strict=True):
                if spec.trainable and not spec.merged_adapter:
                    shape = self.shape(spec.task)
                    mapped = shape.mapped_parameters(self.info(spec), torch.float32) / max(1, shape.parameters)
                    weights -= mapped * backbone.weights
        return PhaseBytes("load", weights, 0, 0, 0, 0, 0, 0, "weights")

    def _phase(
        self,
        name: str,
        work: Working,
        plan: SharingPlan,
        backbones: tuple[BackboneBytes, ...],
        roles: tuple[RoleBytes, ...],
        choices: Choices,
    ) -> PhaseBytes:
        """From the second iteration on: weights written, optimizer state there, last gradients not yet freed."""
        gradients = sum(role.gradients for role in roles)
        if name == "update":
            gradients = work.held[GRADIENTS] / gradient_shards(choices)
        return PhaseBytes(
            phase=name,
            weights=sum(b.weights - b.mapped + b.adapters for b in backbones) + scalar_heads(roles),
            optimizer=sum(role.optimizer for role in roles),
            gradients=gradients,
            activations=work.held[ACTIVATIONS],
            kv_cache=work.held[CACHE],
            logits=work.held[LOGITS],
            gathered=0,
            at=work.at,
        )


def scalar_heads(roles: tuple[RoleBytes, ...]) -> float:
    """Value and score head."""
    return sum(role.head for role in roles if role.role in ("value", "reward"))


def shards(choices: Choices) -> int:
    """Into how many processes weights are cut."""
    return choices.world_size if choices.engine in ("zero3", "fsdp2") else 1


def gradient_shards(choices: Choices) -> int:
    """Into how many processes gradients are cut."""
    return choices.world_size if choices.engine in ("zero2", "zero3", "fsdp2") else 1


def optimizer_shards(choices: Choices) -> int:
    """Into how many processes the optimizer state is cut."""
    return gradient_shards(choices)
