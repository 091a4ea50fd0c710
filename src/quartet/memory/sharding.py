"""What the process engines add to a process's memory: weights that are whole while they run, and buffers in which weights
and gradients travel. How each engine works is in `quartet.distributed`; measured by benchmarks/scaling.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quartet.distributed import CUTTING, SHARING_STATE, Travel
from quartet.memory.adapter_sizes import TensorSizes
from quartet.memory.choices import Choices, torch_dtype
from quartet.memory.shapes import BackboneShape
from quartet.models.offload import rests_on_host
from quartet.models.plan import BackboneSpec, SharingPlan

FLOAT = 4
"""Bytes of a float32: trained weights and all gradients."""
HOOKS = 4 * 2**10
"""Bytes of host memory for each weight of ZeRO-3: the hooks on the module that holds it, and what DeepSpeed keeps of a weight
(what making its engine takes, over their number)."""


def shards(choices: Choices) -> int:
    """Into how many processes weights are cut."""
    return choices.world_size if choices.engine in CUTTING else 1


def gradient_shards(choices: Choices) -> int:
    """Into how many processes gradients and optimizer state are cut."""
    return choices.world_size if choices.engine in SHARING_STATE else 1


def resting_on_host(plan: SharingPlan, choices: Choices) -> set[str]:
    """Backbones whose shares are on the device only while a part of them runs."""
    if choices.offload == "none" or choices.engine not in CUTTING:
        return set()
    return {spec.name for spec in plan.backbones if rests_on_host(spec)}


@dataclass(frozen=True, slots=True)
class Pieces:
    """Sizes of a plan's backbones that sharding depends on; numbers, not bytes, unless said otherwise."""

    policy_bytes: float
    """Of the policy's backbone with its adapters, as its weights travel."""
    width: int
    """Bytes of a number that travels."""
    layer: int
    """The largest decoder layer."""
    outside: Mapping[str, int]
    """By role, what is outside of the decoder layers of its backbone: embeddings, last norm, LM head."""
    head: int
    """The LM head."""
    largest: int
    """The largest tensor."""
    largest_in_layer: int
    """The largest tensor in a decoder layer."""
    trained: int
    """All that is trained."""
    largest_trained: int
    """The largest tensor of it."""
    full: bool
    """Whether the layers themselves are trained, and not only adapters on them."""
    tensors: int
    """Weights of all backbones, counted as tensors."""


def pieces_of(
    plan: SharingPlan,
    shapes: Mapping[BackboneSpec, BackboneShape],
    adapters: Sequence[TensorSizes],
    whole: int,
    choices: Choices,
) -> Pieces:
    """The sizes of a plan.

    Args:
        shapes: of the plan's backbones.
        adapters: those that are trained.
        whole: numbers of the policy's backbone, adapters included.
    """
    trained = [math.prod(s.tensors[name]) for spec, s in shapes.items() if spec.trainable for name in s.trained]
    full = any(spec.trainable for spec in shapes)
    outside = {spec.name: shape.outside for spec, shape in shapes.items()}
    # fsdp2 sends what the computation needs, ZeRO-3 what it holds.
    width = FLOAT if choices.engine == "zero3" and full else torch_dtype(choices.dtype).itemsize
    return Pieces(
        policy_bytes=whole * width,
        width=width,
        layer=max(shape.largest_layer for shape in shapes.values()),
        outside={view.role: outside[view.backbone] for view in plan.views},
        head=max(shape.count(shape.head) for shape in shapes.values()),
        largest=max(math.prod(size) for shape in shapes.values() for size in shape.tensors.values()),
        largest_in_layer=max(shape.largest_in_layer for shape in shapes.values()),
        trained=sum(trained) + sum(sizes.parameters for sizes in adapters),
        largest_trained=max([*trained, *(count for sizes in adapters for count, _ in sizes.counts)]),
        full=full,
        tensors=sum(len(shape.tensors) for shape in shapes.values())
        + sum(tensors for sizes in adapters for _, tensors in sizes.counts),
    )


def extra_bytes(phase: str, choices: Choices, pieces: Pieces, *, cuda: bool, at: str = "") -> float:
    """Bytes in a phase beside a process's share of weights, gradients and state.

    Args:
        at: the stretch of the code.
    """
    engine, travel = choices.engine, Travel.of(cuda=cuda)
    bucket = min(travel.bucket, pieces.trained) * FLOAT
    if engine == "ddp":
        # Gradients are put together in buckets, one of which stands beside what it is made of.
        bucket = min(max(travel.ddp_bucket, pieces.largest_trained * FLOAT), pieces.trained * FLOAT)
    summed = bucket if phase == "update" and _sums(at, one_bucket=bucket == pieces.trained * FLOAT) else 0
    if engine == "ddp":
        return summed
    if engine == "zero2":
        return 2 * summed  # the bucket, and the copy of it that is summed
    if engine not in CUTTING:
        return 0
    hooks = 0 if cuda else HOOKS * pieces.tensors
    kept = bucket + hooks if engine == "zero3" else 0
    if phase == "rollout" and choices.gather_for_rollout:
        return pieces.policy_bytes + kept
    if engine == "zero3":
        return (_gathered_by_zero3(pieces, at) + travel.ahead) * pieces.width + kept + summed
    return _fsdp2_bytes(phase, choices, pieces, cuda=cuda, at=at)


def _gathered_by_zero3(pieces: Pieces, at: str) -> int:
    """Whole weights, and gradients that the trace does not see, as numbers; on a GPU there is what is fetched ahead as well.

    Of a weight there are two: itself, and the parts that it was put together from. In the backward pass, which policy and
    value share, the embeddings of the value and their gradient, which waits to be summed, are still there at the policy's LM
    head, which comes next.
    """
    head = pieces.head or pieces.largest
    if "logits" in at:
        return 2 * head + (2 * pieces.largest if pieces.full and at.startswith("backward") else 0)
    if at.endswith(("layer", "layers", "start")):
        return 2 * pieces.largest_in_layer
    return 2 * pieces.largest


def _fsdp2_bytes(phase: str, choices: Choices, pieces: Pieces, *, cuda: bool, at: str) -> float:
    """Whole weights and gradients of `fully_shard`, as far as the trace does not see them.

    What is outside of the layers is whole for the whole pass, and a layer while it runs; each comes in a buffer as large as
    itself, which stays until the next one has come. In the backward pass the next layer is on its way while a layer's
    gradients are made, and those of the layer before, in the dtype they are added in, are on theirs.
    """
    outside = next((n for role, n in pieces.outside.items() if role in at), max(pieces.outside.values()))
    root, layer = outside * pieces.width, pieces.layer * pieces.width
    # Without an LM head of its own the first gradient waits for the embeddings' second one in autograd, where it is seen.
    head = pieces.head * pieces.width if phase == "update" and pieces.full and "policy" in at else 0
    sent = pieces.layer * FLOAT if pieces.full else 0
    if "logits" in at or at.endswith("start"):  # between forward and backward: no layer is there
        return root + head
    if not at.startswith("backward"):
        away = max(layer, root) // choices.world_size if phase == "scoring" and choices.offload != "none" else 0
        return root + 2 * layer + away + (root if at.endswith(("embeddings", "first layer")) or not at else 0)
    if not at.endswith("embeddings"):
        return root + head + 2 * layer + (layer + sent if pieces.full else 0)
    # The last gradients are whole in the dtype that they are added in, in a buffer and, over gloo, in its copy.
    summed = ((1 if cuda else 2) + 1 / choices.world_size) * outside * FLOAT if pieces.full else 0
    return max(root + head + sent, summed - (root - head))


def _sums(at: str, *, one_bucket: bool) -> bool:
    """Whether gradients are summed in a stretch of the update: in a backward pass, and where one bucket takes all of them,
    when it is full at the first layers."""
    if at.startswith("forward") or at.endswith("start"):
        return False
    return not (one_bucket and at.endswith(("last layer", "logits")))


def loading_bytes(choices: Choices, trained: float, rest: float, tensors: int, *, cuda: bool) -> float:
    """Bytes at the peak of loading beside the weights.

    Stage 2 copies its share of what is trained and makes gradients for it. Stage 3 makes gradients for one group of it and
    lets go of them before the frozen backbones come; its hooks stay.

    Args:
        trained, rest: bytes of a process's share of what is trained, and of what comes after it.
        tensors: weights of all backbones.
    """
    if choices.engine == "zero2":
        return 2 * trained
    if choices.engine != "zero3":
        return 0
    hooks = 0 if cuda else HOOKS * tensors
    return max(0, min(Travel.of(cuda=cuda).bucket * FLOAT, trained) - rest) + hooks


def resting_gradients(choices: Choices, gradients: float) -> float:
    """Of a process's share of the gradients, what exists outside of the update: stage 2 lets go of it after the step."""
    return 0 if choices.engine == "zero2" else gradients


def widened(choices: Choices, plan: SharingPlan) -> float:
    """Bytes of a gradient that is kept, over those of one as it comes: fsdp2 adds up in float32."""
    if choices.engine != "fsdp2" or not any(spec.trainable for spec in plan.backbones):
        return 1.0
    return FLOAT / torch_dtype(choices.dtype).itemsize
