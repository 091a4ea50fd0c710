"""What a run costs in bytes: for each backbone and role, and for each phase at its peak. Nothing is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from quartet.config import Config, LoraConfig
from quartet.distributed import CUTTING, gathers_for_rollout
from quartet.memory.adapter_sizes import TensorSizes, adapter_size
from quartet.memory.choices import Choices, Workload, plan_device, torch_dtype, workload_of
from quartet.memory.figures import BackboneBytes, Estimate, Ledger, PhaseBytes, PhaseTraffic, RoleBytes
from quartet.memory.libraries import KERNEL, KERNELS, converting, libraries_at_load, libraries_in_phases
from quartet.memory.parallel import passes_in_parallel
from quartet.memory.phases import PHASES, Simulator
from quartet.memory.quantized import quantized_bytes
from quartet.memory.shapes import BackboneShape, shape_of
from quartet.memory.sharding import (
    FLOAT,
    Pieces,
    extra_bytes,
    gradient_shards,
    loading_bytes,
    pieces_of,
    resting_gradients,
    resting_on_host,
    shards,
    widened,
)
from quartet.memory.trace import ACTIVATIONS, CACHE, GRADIENTS, LOGITS
from quartet.memory.traffic import traffic, travel_bytes
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.pickled import open_checkpoint
from quartet.models.plan import ROLES, BackboneSpec, Role, SharingPlan, Task


@dataclass(frozen=True, slots=True)
class _WeightBytes:
    weights: float
    mapped: float
    """From the first optimizer step on."""
    mapped_at_first: float


class Estimator:
    """Estimates for two checkpoints; what was learned for one choice is kept for the next."""

    def __init__(self, sft: CheckpointInfo, reward: CheckpointInfo, workload: Workload, device: torch.device) -> None:
        self.sft, self.reward, self.workload, self.device = sft, reward, workload, device
        self._shapes: dict[tuple[Task, int], BackboneShape] = {}
        self._adapters: dict[tuple[str, str, LoraConfig | None], TensorSizes] = {}
        self._simulator = Simulator(sft, reward, workload)

    def estimate(self, plan: SharingPlan, choices: Choices, free: float | None = None) -> Estimate:
        """Predict one plan under one set of choices.

        Args:
            free: bytes for one process before loading, as far as they are known; decides what is left to `auto`.

        Raises:
            CheckpointError: a checkpoint whose model cannot be built from its configuration.
            ConfigError: settings that the model cannot follow (adapters without a place, too many frozen layers).
        """
        choices = self.decided(plan, choices, ledger := self.ledger(plan, choices), free)
        phases = (ledger.load, *(self.phase(name, plan, choices, ledger) for name in PHASES))
        carried = self._traffic(plan, choices, ledger)
        return Estimate(plan, self.device.type, choices, self.workload, ledger.backbones, ledger.roles, phases, carried)

    def _traffic(self, plan: SharingPlan, choices: Choices, ledger: Ledger) -> tuple[PhaseTraffic, ...]:
        """What the network carries."""
        found = {
            spec.name: travel_bytes(spec, self._shape(spec.task, 0), self._whole(spec, choices), choices)
            for spec in plan.backbones
        }
        trained = FLOAT * sum(role.trained_parameters for role in ledger.roles)
        return traffic(plan, choices, self.workload, found, trained)

    def decided(self, plan: SharingPlan, choices: Choices, ledger: Ledger, free: float | None) -> Choices:
        """The choices with what is left to `auto` decided as a run decides it; `free` unknown counts as enough."""
        spec = next(spec for spec in plan.backbones if spec.name == plan.view("policy").backbone)
        whole = self._whole(spec, choices) * torch_dtype(choices.dtype).itemsize
        gather = gathers_for_rollout(choices.gather_for_rollout, whole, free and free - ledger.load.peak)
        choices = replace(choices, gather_for_rollout=gather)
        both = partial(self.phase, "update", plan, replace(choices, parallel_passes=True), ledger)
        return replace(choices, parallel_passes=passes_in_parallel(plan, choices, free, both))

    def ledger(self, plan: SharingPlan, choices: Choices) -> Ledger:
        """What is in memory for the whole run."""
        weights = [self._backbone(plan, spec, choices) for spec in plan.backbones]
        roles = tuple(self._role(plan, role, choices) for role in ROLES)
        heads = sum(role.head for role in roles if role.role in ("value", "reward"))
        home = resting_on_host(plan, choices)
        after_load = sum(fresh for backbone, fresh in weights if backbone.name not in home) + heads
        on_cpu = self.device.type == "cpu"
        trained = sum(role.gradients for role in roles)  # as many bytes as the weights
        tensors = self._pieces(plan, choices).tensors
        extra = loading_bytes(choices, trained, after_load - trained, tensors, cuda=not on_cpu)
        shapes = [self._shape(spec.task, 0) for spec in plan.backbones]
        adapters = [self._adapter(spec, a.name, choices) for spec in plan.backbones for a in spec.adapters]
        more = converting(plan, choices, self._info) if on_cpu else 0
        libraries = libraries_at_load(plan, roles, shapes, adapters, choices.quantization, more) if on_cpu else 0
        load = PhaseBytes("load", after_load, 0, 0, 0, 0, 0, 0, extra, libraries, "weights")
        kept = libraries_in_phases(choices.engine, choices.quantization) if on_cpu else 0
        return Ledger(tuple(backbone for backbone, _ in weights), roles, heads, kept, load)

    def phase(self, name: str, plan: SharingPlan, choices: Choices, ledger: Ledger) -> PhaseBytes:
        """One phase, from the second iteration on: weights written, optimizer state there, last gradients not freed."""
        work = self._simulator.working(name, plan, choices, self._shape("language_model", 0))
        fixed, cuda = ledger.fixed(name), self.device.type == "cuda"
        extra = partial(extra_bytes, name, choices, self._pieces(plan, choices), cuda=cuda)
        at = max(work.peaks, key=lambda label: sum(work.peaks[label].values()) + extra(at=label))
        held = work.peaks[at]
        return replace(
            fixed,
            weights=fixed.weights - self._away(name, plan, choices, ledger),
            gradients=held[GRADIENTS] * widened(choices, plan) / gradient_shards(choices)
            if name == "update"
            else resting_gradients(choices, fixed.gradients),
            activations=held[ACTIVATIONS],
            kv_cache=held[CACHE],
            logits=held[LOGITS],
            trunk_states=0 if name == "rollout" else self._trunk_states(plan, choices),
            gathered=extra(at=at),
            libraries=fixed.libraries + self._kernels(plan, choices),
            at=at,
        )

    def _kernels(self, plan: SharingPlan, choices: Choices) -> float:
        """Kernels that the phases leave compiled: each batch has a width of its own, and so have its products' shapes."""
        if self.device.type != "cpu" or choices.dtype != "bfloat16":
            return 0
        shape, rows = self._shape("language_model", 0), self.workload.process_rows(choices.world_size)
        step = min(choices.microbatch_rows, self.workload.minibatch_rows(choices.world_size))
        batches = {"rollout": 1, "scoring": -(-rows // choices.scoring_rows), "update": -(-rows // step)}
        counts = [batches[name] * len(self._simulator.working(name, plan, choices, shape).products) for name in PHASES]
        return KERNEL * min(sum(counts), KERNELS)

    def _shape(self, task: Task, frozen_layers: int) -> BackboneShape:
        key = (task, frozen_layers)
        if key not in self._shapes:
            self._shapes[key] = shape_of(self.sft if task == "language_model" else self.reward, task, frozen_layers)
        return self._shapes[key]

    def _info(self, spec: BackboneSpec) -> CheckpointInfo:
        return self.sft if spec.task == "language_model" else self.reward

    def _owner(self, plan: SharingPlan, spec: BackboneSpec) -> BackboneSpec:
        """The backbone whose bottom this one shares, or itself."""
        return spec if spec.top_of is None else next(s for s in plan.backbones if s.name == spec.top_of)

    def _backbone(self, plan: SharingPlan, spec: BackboneSpec, choices: Choices) -> tuple[BackboneBytes, float]:
        """Its bytes, and how many of them are in memory (CPU: not mapped) before the first optimizer step."""
        shape = self._shape(spec.task, self._owner(plan, spec).frozen_layers)
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
            if self.device.type != "cpu" or spec.merged_adapter is not None:
                return _WeightBytes(weights, 0, 0)
            stored = shape.in_file(info, torch.float32)
            kept = shape.count(frozen & stored) * FLOAT if dtype == torch.float32 else 0
            return _WeightBytes(weights, kept, kept + shape.count(shape.trained & stored) * FLOAT)
        if choices.quantization is not None:
            plain = shape.tensors.keys() - shape.linear
            small = sum(
                quantized_bytes(shape.tensors[name], choices.quantization, dtype.itemsize) for name in shape.linear
            )
            stored = shape.in_file(info, dtype) & plain if self.device.type == "cpu" else set()
            mapped = shape.count(stored) * dtype.itemsize
            return _WeightBytes(small + shape.count(plain) * dtype.itemsize + shape.buffer_bytes, mapped, mapped)
        weights = shape.parameters * dtype.itemsize + shape.buffer_bytes
        if self.device.type != "cpu":
            return _WeightBytes(weights, 0, 0)
        # Another dtype than the file's is converted once, on disk, and mapped from there.
        stored = shape.in_file(info, dtype if info.trust_remote_code else None)
        mapped = shape.count(stored) * dtype.itemsize
        return _WeightBytes(weights, mapped, mapped)

    def _adapter(self, spec: BackboneSpec, name: str, choices: Choices) -> TensorSizes:
        key = (spec.name, name, choices.lora)
        if key not in self._adapters:
            adapter = next(a for a in spec.adapters if a.name == name)
            owner = self.sft if name in ("policy", "reference", "sft") else self.reward
            shape = self._shape(spec.task, 0)
            self._adapters[key] = adapter_size(adapter, owner, self._info(spec), spec.task, choices.lora, shape)
        return self._adapters[key]

    def _role(self, plan: SharingPlan, role: Role, choices: Choices) -> RoleBytes:
        view, policy = plan.view(role), plan.view("policy")
        spec = next(spec for spec in plan.backbones if spec.name == view.backbone)
        shape = self._shape(spec.task, self._owner(plan, spec).frozen_layers)
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

    def _trunk_states(self, plan: SharingPlan, choices: Choices) -> float:
        """States after the frozen layers, of all episodes; they are in host memory."""
        if self.device.type != "cpu":
            return 0
        width = sum(self._shape(spec.task, 0).hidden for spec in plan.backbones if spec.frozen_layers)
        tokens = self.workload.process_rows(choices.world_size) * self.workload.longest
        return tokens * width * torch_dtype(choices.dtype).itemsize

    def _away(self, phase: str, plan: SharingPlan, choices: Choices, ledger: Ledger) -> float:
        """Offloading: weights of frozen backbones that are in host memory while the phase does not use them.

        The policy's backbone is always there; in scoring the others take turns, and the largest of them counts. Shares of a
        backbone in which nothing is trained are always away, those of others never.
        """
        if choices.offload == "none" or self.device.type == "cpu":
            return 0
        if home := resting_on_host(plan, choices):
            return sum(b.weights + b.adapters for b in ledger.backbones if b.name in home)
        learning = {s.name for s in plan.backbones if s.learns}
        frozen = {
            b.name: b.weights + (0 if b.name in learning else b.adapters) for b in ledger.backbones if not b.trained
        }
        frozen.pop(plan.view("policy").backbone, None)
        users: dict[str, tuple[Role, ...]] = {"rollout": (), "update": ("value",)}
        if phase == "scoring":
            return sum(frozen.values()) - max(frozen.values(), default=0)
        used = {plan.view(role).backbone for role in users[phase]}
        return sum(count for name, count in frozen.items() if name not in used)

    def _pieces(self, plan: SharingPlan, choices: Choices) -> Pieces:
        """What several processes depend on."""
        shapes = {spec: self._shape(spec.task, self._owner(plan, spec).frozen_layers) for spec in plan.backbones}
        adapters = [self._adapter(spec, a.name, choices) for spec in shapes for a in spec.adapters if a.trainable]
        policy = next(spec for spec in plan.backbones if spec.name == plan.view("policy").backbone)
        return pieces_of(shapes, adapters, self._whole(policy, choices), choices)

    def _whole(self, spec: BackboneSpec, choices: Choices) -> int:
        """Numbers of a backbone, adapters included."""
        adapters = sum(self._adapter(spec, adapter.name, choices).parameters for adapter in spec.adapters)
        return self._shape(spec.task, 0).parameters + adapters


def estimator_for(
    config: Config,
    sft: CheckpointInfo | None = None,
    reward: CheckpointInfo | None = None,
    *,
    longest_prompt: int | None = None,
) -> Estimator:
    """The estimator of a configuration.

    Args:
        sft, reward: where they were read already.
        longest_prompt: tokens, where the prompts are known; `data.max_prompt_tokens` otherwise.
    """
    sft = sft or open_checkpoint(config.models, "sft", headers_only=True)
    reward = reward or open_checkpoint(config.models, "reward", headers_only=True)
    return Estimator(sft, reward, workload_of(config, longest_prompt), plan_device(config.models.device))
