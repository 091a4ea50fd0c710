"""Sizes of what is trained: LoRA adapters that do not exist yet (counted by attaching them to small models) or are on
disk, and the optimizer state that belongs to their tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quartet.config import LoraConfig
from quartet.memory.shapes import BackboneShape, empty_model
from quartet.models import adapters
from quartet.models.checkpoint_info import PEFT_PREFIX, CheckpointInfo
from quartet.models.plan import AdapterSpec, Task

SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
"""bitsandbytes: the smallest tensor whose state is held in 8 bit, and elements that share a scale."""
SMALLEST_PAGED = 100_000
"""bitsandbytes: the smallest tensor whose state is paged."""


@dataclass(frozen=True, slots=True)
class TensorSizes:
    """How many tensors there are of each number of elements."""

    counts: tuple[tuple[int, int], ...] = ()
    """(elements, tensors), by elements."""

    @staticmethod
    def of(elements: Iterable[int]) -> TensorSizes:
        """Sizes of tensors with these numbers of elements."""
        return TensorSizes(tuple(sorted(Counter(elements).items())))

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(elements * tensors for elements, tensors in self.counts)

    def repeated(self, further: TensorSizes, times: int) -> TensorSizes:
        """These, and `times` times what `further` has beyond these."""
        mine, theirs = dict(self.counts), dict(further.counts)
        found = {n: mine.get(n, 0) + times * (theirs.get(n, 0) - mine.get(n, 0)) for n in mine.keys() | theirs.keys()}
        return TensorSizes(tuple(sorted(found.items())))

    def state_bytes(self, optimizer: str) -> int:
        """Bytes of the optimizer's state.

        adamw: two float32 moments an element and a float32 counter a tensor. The 8-bit ones (arXiv 2110.02861): two bytes
        an element and two float32 scales a block of 256; small tensors keep float32 moments, and counters are no tensors.
        """
        if optimizer == "adamw":
            return sum(tensors * (8 * elements + 4) for elements, tensors in self.counts)
        return sum(tensors * _state_8bit(elements) for elements, tensors in self.counts)

    def paged_bytes(self, optimizer: str) -> int:
        """The part of `state_bytes` that is in managed memory, which leaves the GPU under pressure."""
        if optimizer != "paged_adamw8bit":
            return 0
        return sum(2 * elements * tensors for elements, tensors in self.counts if elements >= SMALLEST_PAGED)


def _state_8bit(elements: int) -> int:
    if elements < SMALLEST_8BIT:
        return 8 * elements
    return 2 * elements + 8 * -(-elements // BLOCK_8BIT)


def adapter_size(
    adapter: AdapterSpec,
    owner: CheckpointInfo,
    base: CheckpointInfo,
    task: Task,
    lora: LoraConfig | None,
    shape: BackboneShape,
) -> TensorSizes:
    """Size of one adapter.

    Args:
        owner: the checkpoint that a frozen adapter comes from.
        base: the checkpoint of the backbone.
        lora: of trained adapters.
        shape: of the backbone.
    """
    if not adapter.trainable:
        stored = [math.prod(t.shape) for name, t in owner.adapter_tensors.items() if ".lora_" in name]
        return TensorSizes.of(stored)
    assert lora is not None
    return fresh_size(base, task, lora, shape)


def fresh_size(base: CheckpointInfo, task: Task, lora: LoraConfig, shape: BackboneShape) -> TensorSizes:
    """Size of a new adapter on all layers.

    Layers repeat with `shape.period`, so that the size is linear in the repetitions: two small models tell it. An adapter that
    is not on all layers alike is attached to all of them.

    Raises:
        ConfigError: `target_modules` names nothing.
    """
    small = 1 + (shape.layers - 1) % shape.period
    large = small + shape.period
    if large >= shape.layers or _names_layers(lora):
        return _size(_attached(base, task, lora, None))
    low, high = _size(_attached(base, task, lora, small)), _size(_attached(base, task, lora, large))
    times = (shape.layers - small) // shape.period
    return low.repeated(high, times)


def everywhere(
    adapter: AdapterSpec, lora: LoraConfig | None, owner: CheckpointInfo, base: CheckpointInfo, task: Task
) -> LoraConfig | None:
    """An adapter of the same modules on all layers, to be attached to a model of few layers; None where no layer has one.

    Args:
        as `adapter_size`.

    Raises:
        ConfigError: `target_modules` names nothing.
    """
    if not adapter.trainable:
        names = _of_layers(owner.adapter_tensors)
        return LoraConfig(r=stored_rank(owner), target_modules=names) if names else None
    assert lora is not None
    if not _names_layers(lora):
        return lora
    return lora.model_copy(update={"target_modules": _of_layers(_attached(base, task, lora, None))})


def stored_rank(owner: CheckpointInfo) -> int:
    """The largest rank of a checkpoint's adapter."""
    return max((t.shape[0] for name, t in owner.adapter_tensors.items() if ".lora_A." in name), default=0)


def merged_weights(owner: CheckpointInfo) -> set[str]:
    """Names of the weights that a checkpoint's adapter changes when it is merged."""
    return {
        f"{name.removeprefix(PEFT_PREFIX).split('.lora_')[0]}.weight"
        for name in owner.adapter_tensors
        if ".lora_" in name
    }


def _names_layers(lora: LoraConfig) -> bool:
    """Whether the targets may single out layers: an expression, or names with a number in them."""
    targets = lora.target_modules
    if isinstance(targets, str):
        return targets != "all-linear"
    return any(part.isdigit() for target in targets for part in target.split("."))


def _of_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the adapted modules within layers, from those of their matrices (`….layers.3.self_attn.q_proj.lora_A.…`)."""
    paths = [name.split(".lora_A.")[0].split(".") for name in names if ".lora_A." in name]
    return tuple(sorted({path[-1] for path in paths if any(part.isdigit() for part in path)}))


def _attached(base: CheckpointInfo, task: Task, lora: LoraConfig, depth: int | None) -> dict[str, int]:
    """Elements of a new adapter's tensors by name."""
    with torch.device("meta"):
        model = empty_model(base, task, depth=depth)
        adapters.attach_fresh(model, "counted", lora, seed=0)
    return {name: p.numel() for name, p in adapters.adapter_parameters(model, "counted")}


def _size(tensors: dict[str, int]) -> TensorSizes:
    return TensorSizes.of(tensors.values())
