"""What each phase of an iteration holds beside the weights, found by running its code on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from quartet.memory.choices import Choices, Workload
from quartet.memory.shapes import BackboneShape
from quartet.memory.skeleton import PlannedSequences, fake_roles, tensors_of, traced
from quartet.memory.trace import CACHE, GRADIENTS, Bytes, MemoryTrace, at_depth, fake_mode, gradients_of, largest
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.plan import SharingPlan
from quartet.models.roles import Roles
from quartet.rollout.sampling import sample

PHASES = ("rollout", "scoring", "update")


@dataclass(frozen=True)
class Working:
    """The working memory of a phase at its peak."""

    at: str
    """The stretch of code where the peak is."""
    held: Bytes


def working_memory(
    plan: SharingPlan,
    sft: CheckpointInfo,
    reward: CheckpointInfo,
    choices: Choices,
    workload: Workload,
    shapes: dict[str, BackboneShape],
) -> dict[str, Working]:
    """Peak of each phase, at the full number of layers.

    The code runs with a few layers only, at two depths; every stretch of it is linear in the depth, so that the values
    at the full depth follow without error. Gradients of the update are included.

    Args:
        shapes: of the plan's backbones, by name.
    """
    layers = max(shape.layers for shape in shapes.values())
    period = max(shape.period for shape in shapes.values())
    small = min(2 + (layers - 2) % period if layers > 2 else layers, layers)
    large = min(small + period, layers)
    traces = {depth: _at(depth, plan, sft, reward, choices, workload) for depth in {small, large}}
    share = 0.0 if large == small else (layers - small) / (large - small)
    found = {}
    for phase in PHASES:
        peaks = at_depth(traces[small][phase], traces[large][phase], share)
        label, held = largest(peaks)
        found[phase] = Working(label, held)
    return found


def _at(
    depth: int, plan: SharingPlan, sft: CheckpointInfo, reward: CheckpointInfo, choices: Choices, workload: Workload
) -> dict[str, dict[str, Bytes]]:
    mode = fake_mode()
    roles = fake_roles(plan, sft, reward, choices, depth, mode)
    with mode, torch.device("cpu"):
        return {
            "rollout": _run(roles, lambda trace: _rollout(trace, roles, choices, workload)),
            "scoring": _run(roles, lambda trace: _scoring(trace, roles, choices, workload)),
            "update": _run(roles, lambda trace: _update(trace, roles, choices, workload)),
        }


def _run(roles: Roles, phase: Callable[[MemoryTrace], None]) -> dict[str, Bytes]:
    with traced(roles) as trace:
        phase(trace)
    return {label: held for label, held in trace.peaks.items() if not label.startswith("setup")}


def _rollout(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    """Prompts into the cache; then the last step, when the cache is longest."""
    rows = min(choices.batch_rows, workload.process_rows(choices.world_size))
    with torch.no_grad(), roles.policy.active():
        trace.stage = "prompts"
        _decode(trace, roles, workload, rows, workload.longest_prompt)
        trace.stage = "setup"
        cache = _decode(trace, roles, workload, rows, workload.longest - 1)
        trace.stage = "decoding"
        trace.enter("policy embeddings")
        _decode(trace, roles, workload, rows, 1, cache, before=workload.longest - 1)


def _decode(
    trace: MemoryTrace,
    roles: Roles,
    workload: Workload,
    rows: int,
    tokens: int,
    cache: Any = None,
    *,
    before: int = 0,
) -> Any:
    """One step of the growing-cache engine."""
    backbone = roles.policy.backbone
    cache = cache if cache is not None else DynamicCache(config=backbone.model.config)
    arguments: dict[str, Any] = {
        "input_ids": torch.empty((rows, tokens), dtype=torch.int64),
        "attention_mask": torch.empty((rows, before + tokens), dtype=torch.int64),
        "past_key_values": cache,
        "use_cache": True,
    }
    if "position_ids" in inspect.signature(backbone.transformer.forward).parameters:
        arguments["position_ids"] = torch.empty((rows, tokens), dtype=torch.int64)
    hidden = backbone.transformer(**arguments).last_hidden_state
    trace.mark([t for layer in cache.layers for t in (layer.keys, layer.values)], CACHE)
    logits = roles.policy.head(hidden[:, -1])
    uniform = torch.empty(rows, dtype=torch.float64)
    sample(logits, uniform, temperature=workload.temperature, top_p=workload.top_p)
    return cache


def _scoring(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    rows = min(choices.batch_rows, workload.process_rows(choices.world_size))
    sequences = PlannedSequences.of(rows, workload.longest, workload.response_length)
    mask = sequences.mask()
    with torch.no_grad():
        trace.enter("reference embeddings")
        roles.reference(sequences, mask, temperature=workload.temperature)
        trace.enter("value embeddings")
        roles.value(sequences, mask)
        trace.enter("reward embeddings")
        roles.reward.scores(sequences)


def _update(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    """One microbatch, after others of its minibatch where there are several: their gradients are there then."""
    count = workload.minibatch_rows(choices.world_size)
    rows = min(choices.microbatch_rows, count)
    trainable = [p for p in tensors_of(roles) if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: trace.mark([p.grad], GRADIENTS)) for p in trainable]
    if count > rows:
        trace.stage = "setup"
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        trace.mark([p.grad for p in trainable if p.grad is not None], GRADIENTS)
    sequences = PlannedSequences.of(rows, workload.longest, workload.response_length)
    mask = sequences.mask()
    trace.stage = "forward"
    trace.enter("policy embeddings")
    logprobs, entropy, values = roles.trained(
        sequences,
        mask,
        mask,
        temperature=workload.temperature,
        with_entropy=True,
        entropy_grad=workload.entropy_gradient,
    )
    loss = logprobs.sum() + values.sum()
    if workload.entropy_gradient and entropy is not None:
        loss = loss + entropy.sum()
    trace.stage = "backward"
    trace.enter("losses")
    loss.backward()
    for handle in handles:
        handle.remove()


def gradient_bytes(roles: Roles) -> int:
    """Bytes of the gradients of all models."""
    return sum(g.numel() * g.element_size() for model in roles.backbones.values() for g in gradients_of(model.model))
