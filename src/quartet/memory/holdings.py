"""What is in memory whatever the phase: backbones, adapters, heads, gradients, optimizer state; and what loading takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from quartet.config import LoraConfig
from quartet.distributed import CUTTING
from quartet.memory.adapter_sizes import TensorSizes, adapter_size, merged_weights
from quartet.memory.choices import Choices, torch_dtype
from quartet.memory.figures import BackboneBytes, Ledger, PhaseBytes, RoleBytes
from quartet.memory.libraries import converting, libraries_at_load, libraries_in_phases, model_objects
from quartet.memory.quantized import quantized_bytes
from quartet.memory.shapes import BackboneShape, shape_of
from quartet.memory.sharding import (
    FLOAT,
    Pieces,
    gradient_shards,
    loading_bytes,
    pieces_of,
    resting_on_host,
    shards,
)
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.plan import ROLES, BackboneSpec, Role, SharingPlan, Task


@dataclass(frozen=True, slots=True)
class _WeightBytes:
    weights: float
    mapped: float
    """From the first optimizer step on."""
    mapped_at_first: float


class Holdings:
    """Sizes of the tensors that two checkpoints make, under any plan and choices; shapes that were looked at are kept."""

    def __init__(self, sft: CheckpointInfo, reward: CheckpointInfo, device: torch.device) -> None:
        self._sft, self._reward, self._device = sft, reward, device
        self._shapes: dict[tuple[Task, int], BackboneShape] = {}
        self._adapters: dict[tuple[str, str, LoraConfig | None], TensorSizes] = {}

    def ledger(self, plan: SharingPlan, choices: Choices) -> Ledger:
        """What is in memory for the whole run."""
        weights = [self._backbone(plan, spec, choices) for spec in plan.backbones]
        roles = tuple(self._role(plan, role, choices) for role in ROLES)
        heads = sum(role.head for role in roles if role.role in ("value", "reward"))
        home = resting_on_host(plan, choices)
        after_load = sum(fresh for backbone, fresh in weights if backbone.name not in home) + heads
        on_cpu = self._device.type == "cpu"
        trained = sum(role.gradients for role in roles)  # as many bytes as the weights
        tensors = self.pieces(plan, choices).tensors
        extra = loading_bytes(choices, trained, after_load - trained, tensors, cuda=not on_cpu)
        shapes = [self.shape(spec.task, 0) for spec in plan.backbones]
        adapters = [self._adapter(spec, a.name, choices) for spec in plan.backbones for a in spec.adapters]
        libraries = kept = 0.0
        if on_cpu:
            objects, more = model_objects(shapes, adapters), converting(plan, choices, self._info)
            if choices.engine not in CUTTING:  # whole weights leave room for as much when they are cut
                libraries = libraries_at_load(plan, roles, shapes, choices.quantization, objects, more)
            kept = libraries_in_phases(choices, objects)
        load = PhaseBytes("load", after_load, 0, 0, 0, 0, 0, 0, extra, libraries, "weights")
        return Ledger(tuple(backbone for backbone, _ in weights), roles, heads, kept, load)

    def shape(self, task: Task, frozen_layers: int) -> BackboneShape:
        """Of one checkpoint's model, the bottom layers frozen."""
        key = (task, frozen_layers)
        if key not in self._shapes:
            self._shapes[key] = shape_of(self._sft if task == "language_model" else self._reward, task, frozen_layers)
        return self._shapes[key]

    def shapes(self, plan: SharingPlan) -> dict[Task, BackboneShape]:
        """Of the kinds of backbones that a plan has, whole."""
        return {spec.task: self.shape(spec.task, 0) for spec in plan.backbones}

    def _info(self, spec: BackboneSpec) -> CheckpointInfo:
        return self._sft if spec.task == "language_model" else self._reward

    def _owner(self, plan: SharingPlan, spec: BackboneSpec) -> BackboneSpec:
        """The backbone whose bottom this one shares, or itself."""
        return spec if spec.top_of is None else next(s for s in plan.backbones if s.name == spec.top_of)

    def _backbone(self, plan: SharingPlan, spec: BackboneSpec, choices: Choices) -> tuple[BackboneBytes, float]:
        """Its bytes, and how many of them are in memory (CPU: not mapped) before the first optimizer step."""
        shape = self.shape(spec.task, self._owner(plan, spec).frozen_layers)
        size, share = self._in_process(self._sizes(spec, shape, choices), spec, choices), shards(choices)
        adapters = FLOAT * sum(self._adapter(spec, a.name, choices).parameters for a in spec.adapters) / share
        found = BackboneBytes(
            name=spec.name,
            checkpoint=spec.checkpoint,
            roles=tuple(view.role for view in plan.views if view.backbone == spec.name),
            parameters=shape.count(shape.trained) if spec.top_of else shape.parameters,
            trained=spec.trainable,
            weights=size.weights / share,
            mapped=size.mapped / share,
            adapters=adapters,
        )
        return found, (size.weights - size.mapped_at_first) / share + adapters

    def _in_process(self, size: _WeightBytes, spec: BackboneSpec, choices: Choices) -> _WeightBytes:
        """A share of a mapped weight is a copy; ddp and zero2 write to what is trained before the first step does."""
        if choices.engine in CUTTING:
            return replace(size, mapped=0, mapped_at_first=0)
        if spec.trainable and (choices.engine == "zero2" or choices.world_size > 1):
            return replace(size, mapped_at_first=size.mapped)
        return size

    def _sizes(self, spec: BackboneSpec, shape: BackboneShape, choices: Choices) -> _WeightBytes:
        dtype, info = torch_dtype(choices.dtype), self._info(spec)
        trained = shape.count(shape.trained) * FLOAT
        if spec.top_of is not None:
            return _WeightBytes(trained, 0, 0)  # a copy of what its twin trains
        if spec.trainable:
            frozen = shape.tensors.keys() - shape.trained
            weights = trained + shape.count(frozen) * dtype.itemsize + shape.buffer_bytes
            if self._device.type != "cpu":
                return _WeightBytes(weights, 0, 0)
            written = merged_weights(info) if spec.merged_adapter is not None else set()
            stored = shape.in_file(info, torch.float32) - written
            kept = shape.count(frozen & stored) * FLOAT if dtype == torch.float32 else 0
            return _WeightBytes(weights, kept, kept + shape.count(shape.trained & stored) * FLOAT)
        if choices.quantization is not None:
            plain = shape.tensors.keys() - shape.linear.keys()
            small = sum(quantized_bytes(shape.tensors[name], choices.quantization) for name in shape.linear)
            stored = shape.in_file(info, dtype) & plain if self._device.type == "cpu" else set()
            mapped = shape.count(stored) * dtype.itemsize
            return _WeightBytes(small + shape.count(plain) * dtype.itemsize + shape.buffer_bytes, mapped, mapped)
        weights = shape.parameters * dtype.itemsize + shape.buffer_bytes
        if self._device.type != "cpu":
            return _WeightBytes(weights, 0, 0)
        # Another dtype than the file's is converted once, on disk, and mapped from there.
        stored = shape.in_file(info, dtype if info.trust_remote_code else None)
        mapped = shape.count(stored) * dtype.itemsize
        return _WeightBytes(weights, mapped, mapped)

    def _adapter(self, spec: BackboneSpec, name: str, choices: Choices) -> TensorSizes:
        key = (spec.name, name, choices.lora)
        if key not in self._adapters:
            adapter = next(a for a in spec.adapters if a.name == name)
            owner = self.owner(name)
            shape = self.shape(spec.task, 0)
            self._adapters[key] = adapter_size(adapter, owner, self._info(spec), spec.task, choices.lora, shape)
        return self._adapters[key]

    def owner(self, adapter: str) -> CheckpointInfo:
        """The checkpoint that an adapter of this name is for."""
        return self._sft if adapter in ("policy", "reference", "sft") else self._reward

    def _role(self, plan: SharingPlan, role: Role, choices: Choices) -> RoleBytes:
        view, policy = plan.view(role), plan.view("policy")
        spec = next(spec for spec in plan.backbones if spec.name == view.backbone)
        shape = self.shape(spec.task, self._owner(plan, spec).frozen_layers)
        adapter = TensorSizes() if view.adapter is None else self._adapter(spec, view.adapter, choices)
        own = TensorSizes.of(math.prod(shape.tensors[name]) for name in shape.trained) if spec.trainable else adapter
        if role == "value" and (view.backbone, view.adapter) == (policy.backbone, policy.adapter):
            own = adapter = TensorSizes()  # a head on the policy's states
        scalar = shape.hidden if view.head != "lm" else 0
        head = TensorSizes.of([scalar] if scalar else [])
        learned = (own, head) if view.trainable else ()
        trained = sum(sizes.parameters for sizes in learned)
        share = gradient_shards(choices)
        width = FLOAT if spec.trainable or spec.top_of else torch_dtype(choices.dtype).itemsize
        return RoleBytes(
            role=role,
            backbone=view.backbone,
            trained_parameters=trained,
            adapters=adapter.parameters * FLOAT / shards(choices),
            head=scalar * FLOAT if scalar else shape.count(shape.head) * width / shards(choices),
            gradients=trained * FLOAT / share,
            optimizer=sum(sizes.state_bytes(choices.optimizer) for sizes in learned) / share,
            paged=sum(sizes.paged_bytes(choices.optimizer) for sizes in learned) / share,
        )

    def pieces(self, plan: SharingPlan, choices: Choices) -> Pieces:
        """What several processes depend on."""
        shapes = {spec: self.shape(spec.task, self._owner(plan, spec).frozen_layers) for spec in plan.backbones}
        adapters = [self._adapter(spec, a.name, choices) for spec in shapes for a in spec.adapters if a.trainable]
        policy = next(spec for spec in plan.backbones if spec.name == plan.view("policy").backbone)
        return pieces_of(plan, shapes, adapters, self.whole(policy, choices), choices)

    def whole(self, spec: BackboneSpec, choices: Choices) -> int:
        """Numbers of a backbone, adapters included."""
        adapters = sum(self._adapter(spec, adapter.name, choices).parameters for adapter in spec.adapters)
        return self.shape(spec.task, 0).parameters + adapters
