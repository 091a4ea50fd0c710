"""The four roles of a plan on fake tensors: the code that trains, without a byte of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quartet.distributed import CUTTING, WholeWeights
from quartet.memory.adapter_sizes import everywhere
from quartet.memory.choices import Choices, torch_dtype
from quartet.memory.quantized import quantize
from quartet.memory.shapes import decoder_layers, empty_model, hidden_size
from quartet.memory.trace import FakeTensors, LayerLabels, MemoryTrace, vocabulary_of
from quartet.models import adapters
from quartet.models.attention import use_own_attention
from quartet.models.backbone import Backbone
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.fused import use_fused_layers
from quartet.models.heads import LogitHead, ScalarHead
from quartet.models.linears import Weights, restore_linears, use_fast_linears
from quartet.models.loading import finished, views_of
from quartet.models.packing import assume_packing, longest_packed
from quartet.models.plan import BackboneSpec, SharingPlan, Task
from quartet.models.precision import chunk_tokens_of, planned_for, tile_of
from quartet.models.residency import Residency
from quartet.models.roles import Roles
from quartet.records import Sequences


@dataclass(frozen=True, slots=True)
class PlannedSequences(Sequences):
    """n sequences of one length: what the roles ask of `Sequences`, answered from shapes alone."""

    response: int = 0
    """Response tokens of every sequence."""

    @staticmethod
    def of(rows: int, length: int, response: int) -> PlannedSequences:
        """Fake sequences, to be made under a fake mode."""
        counts = torch.empty(rows, dtype=torch.int64)
        return PlannedSequences(
            torch.empty((rows, length), dtype=torch.int64),
            counts,
            counts.clone(),
            prompts=(length - response,) * rows,
            responses=(response,) * rows,
            response=response,
        )

    def places(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One place for each place of the mask, as if all were True."""
        return torch.empty(mask.numel(), dtype=torch.int64), torch.empty(mask.numel(), dtype=torch.int64)

    def mask(self) -> Tensor:
        """bool `[n, response]`."""
        return torch.empty((len(self.input_ids), self.response), dtype=torch.bool)


class _MarkedHead:
    """A logit head that tells the trace when it runs; on the CPU it is taken apart as it is in a run."""

    def __init__(self, head: LogitHead, trace: MemoryTrace, role: str, *, on_cpu: bool) -> None:
        self._head, self._trace, self._role, self._on_cpu = head, trace, role, on_cpu

    def __call__(self, hidden: Tensor) -> Tensor:
        self._trace.enter(f"{self._role} logits")
        return self._head(hidden)

    @property
    def trainable(self) -> bool:
        return self._head.trainable

    @property
    def linear(self) -> Weights | None:
        self._trace.enter(f"{self._role} logits")
        return self._head.linear if self._on_cpu else None


Depths = Mapping[Task, int]
"""Decoder layers of the two kinds of backbones."""


def fake_roles(
    plan: SharingPlan, sft: CheckpointInfo, reward: CheckpointInfo, choices: Choices, depths: Depths, mode: FakeTensors
) -> Roles:
    """The roles as `load_roles` would make them, with so many layers, on fake tensors of a mode."""
    dtype = torch_dtype(choices.dtype)
    by_source = {"policy": sft, "reference": sft, "sft": sft, "value": reward, "reward": reward}
    backbones: dict[str, Backbone] = {}
    for spec in plan.backbones:
        if spec.top_of is not None:
            info = sft if spec.task == "language_model" else reward
            backbones[spec.name] = _twin(spec, info, backbones[spec.top_of], depths[spec.task], mode)
            continue
        info = sft if spec.task == "language_model" else reward
        with torch.device("meta"):
            model = empty_model(info, spec.task, depth=depths[spec.task], dtype=_held(spec, choices))
            if choices.quantization is not None and not spec.trainable:
                quantize(model, choices.quantization)
            for adapter in spec.adapters:
                lora = everywhere(adapter, choices.lora, by_source[adapter.name], info, spec.task)
                if lora is not None:
                    adapters.attach_fresh(model, adapter.name, lora, seed=0)
        _to_fake(model, mode)
        backbones[spec.name] = finished(spec, model, dtype, choices.checkpointing)
        backbones[spec.name].weights = WholeWeights(are_whole=choices.engine not in CUTTING)
        if choices.engine in CUTTING:
            restore_linears(model)
    on_policy = plan.view("value").backbone == plan.view("policy").backbone
    with mode:
        score = ScalarHead(torch.empty(hidden_size(reward)), "score.weight")
        value = ScalarHead(torch.empty(hidden_size(sft if on_policy else reward)), "score.weight")
    score.requires_grad_(False)
    device = torch.device(choices.device)
    for backbone in backbones.values():
        backbone.tile, backbone.chunk_tokens = tile_of(device, dtype), chunk_tokens_of(device)
    roles = views_of(plan, backbones, score, value, Residency())
    for view in (roles.policy, roles.value):
        assume_packing(view.backbone, longest_packed(view.backbone))
    return roles


def _held(spec: BackboneSpec, choices: Choices) -> torch.dtype:
    """The dtype in which a backbone's weights are there when they compute; fsdp2 converts them before they travel."""
    dtype = torch_dtype(choices.dtype)
    return torch.float32 if spec.trainable and choices.engine != "fsdp2" else dtype


def _twin(spec: BackboneSpec, info: CheckpointInfo, below: Backbone, depth: int, mode: FakeTensors) -> Backbone:
    """The frozen twin of a backbone that trains its top, as `load_roles` copies it."""
    with torch.device("meta"):
        model = empty_model(info, spec.task, depth=depth)
    theirs = below.model
    frozen: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        shared = theirs.get_parameter(name)
        if not shared.requires_grad:
            frozen[id(parameter)] = shared
    for name, buffer in model.named_buffers():
        frozen[id(buffer)] = theirs.get_buffer(name)
    _to_fake(model, mode, frozen)
    model.eval().requires_grad_(False)
    use_own_attention(model)
    use_fast_linears(model)
    use_fused_layers(model)
    return Backbone(spec, model, dtype=below.dtype, below=below)


def _to_fake(model: nn.Module, mode: FakeTensors, made: dict[int, Tensor] | None = None) -> None:
    """Put fake CPU tensors in place of a model's meta tensors; what was shared stays shared.

    Args:
        made: what to put in place of some of them, by id.
    """
    made = {} if made is None else made

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        registers: tuple[Any, ...] = (module._parameters, module._buffers)
        for held in registers:
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)


def models_of(roles: Roles) -> list[PreTrainedModel]:
    """The distinct models."""
    return [backbone.model for backbone in roles.backbones.values()]


def tensors_of(roles: Roles) -> list[Tensor]:
    """All parameters and buffers, heads included."""
    found: list[Tensor] = [roles.value.head.weight, roles.reward.head.weight]
    for model in models_of(roles):
        found += [*model.parameters(), *model.buffers()]
    return found


@contextmanager
def traced(roles: Roles, mode: FakeTensors, device: str) -> Iterator[MemoryTrace]:
    """A trace over the roles' layers and logit heads; the block runs under `mode`, in place of a device of this kind."""
    vocabulary = max(vocabulary_of(model) for model in models_of(roles))
    trace = MemoryTrace(tensors_of(roles), vocabulary=vocabulary)
    labels = LayerLabels(trace)
    for name, backbone in roles.backbones.items():
        labels.watch(decoder_layers(backbone.model), _namer(roles, name), frozen=backbone.spec.frozen_layers)
    views: list[Any] = [roles.policy, roles.reference]
    heads = [view.head for view in views]
    for view, role in zip(views, ("policy", "reference"), strict=True):
        view.head = _MarkedHead(view.head, trace, role, on_cpu=device == "cpu")
    try:
        with planned_for(device), mode.counted_by(trace):
            yield trace
    finally:
        labels.remove()
        for view, head in zip(views, heads, strict=True):
            view.head = head


def _namer(roles: Roles, backbone: str) -> Any:
    """A function that says which role runs on a backbone, by the adapter that is on."""
    by_adapter: dict[str | None, str] = {}
    for view in roles.plan.views:
        if view.backbone == backbone:
            by_adapter.setdefault(view.adapter, view.role)
    switch = roles.backbones[backbone].adapters
    return lambda: by_adapter.get(switch.active, backbone)
