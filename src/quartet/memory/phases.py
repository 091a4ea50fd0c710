"""What each phase of an iteration holds beside the weights, found by running its code on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quartet.errors import brief
from quartet.memory.choices import Choices, Workload
from quartet.memory.decoding import decoding
from quartet.memory.shapes import BackboneShape
from quartet.memory.skeleton import PlannedSequences, fake_roles, tensors_of, traced
from quartet.memory.trace import GRADIENTS, Bytes, FakeTensors, MemoryTrace, NotTraceable, at_depth, largest
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.converted import CONVERTED
from quartet.models.gradients import IN_PLACE
from quartet.models.lending import LENDER
from quartet.models.packing import assume_packing
from quartet.models.plan import SharingPlan
from quartet.models.roles import Roles
from quartet.records import Sequences

TOGETHER = ("zero2", "zero3")
"""Engines under which policy and value are one module with one backward pass."""
PHASES = ("rollout", "scoring", "update")


@dataclass(frozen=True)
class Working:
    """The working memory of a phase at its peak."""

    at: str
    """The stretch of code where the peak is."""
    held: Bytes
    peaks: dict[str, Bytes]
    """Of every stretch of the code."""
    products: frozenset[tuple[object, ...]] = frozenset()
    """Its different matrix products in bfloat16."""


@dataclass(frozen=True)
class _Small:
    """The roles with few layers, to be run in place of all layers."""

    roles: Roles
    mode: FakeTensors
    layers: int
    frozen: int


class Simulator:
    """Runs the phases on fake tensors, at two depths, and extends their peaks to the full number of layers.

    Every stretch of the code is linear in the number of layers, so that this adds no error. What was run once is kept.
    """

    def __init__(self, sft: CheckpointInfo, reward: CheckpointInfo, workload: Workload) -> None:
        self._sft, self._reward, self._workload = sft, reward, workload
        self._small: dict[tuple[object, ...], _Small] = {}
        self._found: dict[tuple[object, ...], Working] = {}

    def working(self, phase: str, plan: SharingPlan, choices: Choices, shape: BackboneShape) -> Working:
        """Peak of one phase at full depth; the gradients of the update are included.

        Args:
            shape: of the language model; the other backbones are taken to be as deep.

        Raises:
            NotTraceable: a model whose code needs data and not only shapes.
        """
        rows = {"rollout": choices.batch_rows, "scoring": choices.scoring_rows, "update": choices.microbatch_rows}[
            phase
        ]
        parallel = phase == "update" and choices.parallel_passes
        key = (phase, rows, choices.world_size, parallel, *_what(plan, choices))
        if key not in self._found:
            self._found[key] = self._run(phase, plan, choices, shape)
        return self._found[key]

    def _run(self, phase: str, plan: SharingPlan, choices: Choices, shape: BackboneShape) -> Working:
        frozen = max(spec.frozen_layers for spec in plan.backbones)
        trunk = min(frozen, 1)
        # Layers that the phase repeats: all in the rollout, those above the trunk where the trunk is left out.
        total = shape.layers if phase == "rollout" else shape.layers - frozen + trunk
        few = min(total, trunk + 2 + (total - trunk - 2) % shape.period) if total > trunk + 2 else total
        more = min(few + shape.period, total)
        traces = [self._trace(phase, plan, choices, depth, trunk) for depth in dict.fromkeys((few, more))]
        share = 0.0 if more == few else (total - few) / (more - few)
        peaks = at_depth(_labelled(traces[0]), _labelled(traces[-1]), share)
        return Working(*largest(peaks), peaks, frozenset(traces[-1].products))

    def _trace(self, phase: str, plan: SharingPlan, choices: Choices, depth: int, trunk: int) -> MemoryTrace:
        small = self._roles(plan, choices, depth, trunk)
        run: Callable[[MemoryTrace, Roles, Choices, Workload], None]
        run = {"rollout": decoding, "scoring": _scoring, "update": _update}[phase]

        def traced_once() -> MemoryTrace:
            with _quiet(), traced(small.roles, small.mode, choices.device) as trace:
                run(trace, small.roles, choices, self._workload)
            return trace

        try:
            try:
                trace = traced_once()
            except Exception:
                if not _pad(small.roles):
                    raise
                trace = traced_once()  # a family that does not run side by side
        except Exception as error:  # the code of any family may ask for data, which fake tensors do not have
            raise NotTraceable(
                f"the memory of {self._sft.key}={self._sft.name!r} cannot be planned: its {phase} does not run without "
                f"weights ({type(error).__name__}: {brief(error)})"
            ) from error
        for tensor in tensors_of(small.roles):
            tensor.grad = None
        return trace

    def _roles(self, plan: SharingPlan, choices: Choices, depth: int, trunk: int) -> _Small:
        key = (depth, *_what(plan, choices))
        if key not in self._small:
            specs = [replace(spec, frozen_layers=min(spec.frozen_layers, trunk)) for spec in plan.backbones]
            mode = FakeTensors()
            shallow = replace(plan, backbones=tuple(specs))
            roles = fake_roles(shallow, self._sft, self._reward, choices, depth, mode)
            self._small[key] = _Small(roles, mode, depth, trunk)
        return self._small[key]


def _pad(roles: Roles) -> bool:
    """Pad from now on; whether policy or value was packed."""
    packed = [view.backbone for view in (roles.policy, roles.value) if view.backbone.packs_up_to]
    for backbone in packed:
        assume_packing(backbone, 0)
    return bool(packed)


def _labelled(trace: MemoryTrace) -> dict[str, Bytes]:
    return {label: held for label, held in trace.peaks.items() if label and not label.startswith("setup")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging an operation that fails; the error says the same."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _what(plan: SharingPlan, choices: Choices) -> tuple[object, ...]:
    """All that the small models depend on."""
    models = plan, choices.lora, choices.dtype, choices.checkpointing, choices.quantization
    return *models, choices.rollout_engine, choices.engine, choices.gather_for_rollout


def _scoring(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    rows = min(choices.scoring_rows, workload.process_rows(choices.world_size))
    plain = PlannedSequences.of(rows, workload.longest, workload.response_length)
    mask = plain.mask()
    with torch.no_grad():
        trace.enter("trunk embeddings")
        sequences = replace(plain, trunks=roles.trunk_states(plain))
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
        trace.enter("gradients")
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        trace.mark([p.grad for p in trainable if p.grad is not None], GRADIENTS)
    plain = PlannedSequences.of(rows, workload.longest, workload.response_length)
    one_pass = roles.trained.one_pass or choices.engine in TOGETHER
    alone = choices.engine == "none"
    keeps = alone and not choices.checkpointing
    with LENDER.keeping(), CONVERTED.keeping(keeps), IN_PLACE.added(alone and choices.device == "cpu"):
        if one_pass:
            _pass(trace, roles, "both", plain, workload)
        elif choices.parallel_passes:
            _both(trace, roles, plain, workload)
        else:
            for role in ("policy", "value"):
                _pass(trace, roles, role, plain, workload)
    for handle in handles:
        handle.remove()


def _pass(trace: MemoryTrace, roles: Roles, role: str, plain: PlannedSequences, workload: Workload) -> None:
    _backward(trace, role, _forward(trace, roles, role, plain, workload))


def _both(trace: MemoryTrace, roles: Roles, plain: PlannedSequences, workload: Workload) -> None:
    """Policy and value at the same time: the policy's passes beside all that the value's come to."""
    value = _forward(trace, roles, "value", plain, workload)
    kept = trace.total
    trace.restart()
    _backward(trace, "value", value, last=False)
    more = torch.empty(int(max(trace.highest - kept, 0)), dtype=torch.uint8)
    value = _forward(trace, roles, "value", plain, workload)
    _backward(trace, "policy", _forward(trace, roles, "policy", plain, workload), last=False)
    del more
    _backward(trace, "value", value)


def _forward(trace: MemoryTrace, roles: Roles, role: str, plain: PlannedSequences, workload: Workload) -> list[Tensor]:
    """The loss of a role; in a list, so that its graph can end with the backward pass."""
    trace.stage = "forward"
    trace.enter(f"{'policy' if role == 'both' else role} embeddings")
    view = roles.value if role == "value" else roles.policy
    trunks = _trunk_blocks(roles, len(plain.input_ids), plain.input_ids.shape[1])
    own = trunks if role == "both" else {name: block for name, block in trunks.items() if name == view.backbone.trunk}
    del trunks
    sequences = replace(plain, trunks=own)
    return [_loss(roles, role, sequences, plain.mask(), workload)]


def _backward(trace: MemoryTrace, role: str, loss: list[Tensor], *, last: bool = True) -> None:
    trace.stage = "backward"
    trace.enter(f"{'policy' if role == 'both' else role} start")
    loss.pop().backward()
    if last:
        CONVERTED.forget()


def _loss(roles: Roles, role: str, sequences: Sequences, mask: Tensor, workload: Workload) -> Tensor:
    """What the update takes the gradient of for a role, or for both in one pass."""
    trained = roles.trained
    wanted = {
        "temperature": workload.temperature,
        "with_entropy": True,
        "entropy_grad": workload.entropy_gradient,
    }
    if role == "value":
        return torch.as_tensor(trained.value(sequences, mask).sum())
    if role == "both":
        logprobs, entropy, values = trained(sequences, mask, mask, **wanted)
        loss = logprobs.sum() + values.sum()
    else:
        logprobs, entropy = trained.policy(sequences, mask, **wanted)
        loss = logprobs.sum()
    if workload.entropy_gradient and entropy is not None:
        loss = loss + entropy.sum()
    return torch.as_tensor(loss)


def _trunk_blocks(roles: Roles, rows: int, length: int) -> dict[str, Tensor]:
    """What `with_trunks` brings along."""
    found = {}
    for name, backbone in roles.backbones.items():
        if backbone.spec.frozen_layers:
            width = backbone.model.config.get_text_config().hidden_size
            found[name] = torch.empty((rows, length, width), dtype=backbone.dtype)
    return found
