"""Parameters of LoRA adapters that do not exist yet (counted by attaching them to small models) or are on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quartet.config import LoraConfig
from quartet.memory.shapes import BackboneShape, empty_model
from quartet.models import adapters
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.plan import AdapterSpec, Task


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """How large an adapter is."""

    parameters: int
    tensors: int


def adapter_size(
    adapter: AdapterSpec,
    owner: CheckpointInfo,
    base: CheckpointInfo,
    task: Task,
    lora: LoraConfig | None,
    shape: BackboneShape,
) -> AdapterSize:
    """Size of one adapter.

    Args:
        owner: the checkpoint that a frozen adapter comes from.
        base: the checkpoint of the backbone.
        lora: of trained adapters.
        shape: of the backbone.
    """
    if not adapter.trainable:
        stored = [math.prod(t.shape) for name, t in owner.adapter_tensors.items() if ".lora_" in name]
        return AdapterSize(sum(stored), len(stored))
    assert lora is not None
    return fresh_size(base, task, lora, shape)


def fresh_size(base: CheckpointInfo, task: Task, lora: LoraConfig, shape: BackboneShape) -> AdapterSize:
    """Size of a new adapter on all layers.

    Layers repeat with `shape.period`, so that the size is linear in the repetitions: two small models tell it.

    Raises:
        ConfigError: `target_modules` names nothing.
    """
    small = 1 + (shape.layers - 1) % shape.period
    large = small + shape.period
    if large >= shape.layers:
        return _attached(base, task, lora, None)
    low, high = _attached(base, task, lora, small), _attached(base, task, lora, large)
    times = (shape.layers - small) // shape.period
    return AdapterSize(
        low.parameters + (high.parameters - low.parameters) * times,
        low.tensors + (high.tensors - low.tensors) * times,
    )


def _attached(base: CheckpointInfo, task: Task, lora: LoraConfig, depth: int | None) -> AdapterSize:
    with torch.device("meta"):
        model = empty_model(base, task, depth=depth)
        adapters.attach_fresh(model, "counted", lora, seed=0)
    found = [p.numel() for _, p in adapters.adapter_parameters(model, "counted")]
    return AdapterSize(sum(found), len(found))
