"""What each phase of an iteration holds beside the weights, found by running its code on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from quartet.errors import brief
from quartet.memory.choices import Choices, Workload
from quartet.memory.phases import RUNS
from quartet.memory.shapes import BackboneShape
from quartet.memory.skeleton import Depths, fake_roles, tensors_of, traced
from quartet.memory.trace import SETUP, Bytes, FakeTensors, MemoryTrace, NotTraceable, at_depth, largest
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.packing import assume_packing
from quartet.models.plan import SharingPlan, Task
from quartet.models.roles import Roles


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


@dataclass(frozen=True)
class _Line:
    """Numbers of layers: two to run, and one to follow the line through them to."""

    few: int
    more: int
    total: int


def _lines(phase: str, plan: SharingPlan, shapes: Mapping[Task, BackboneShape]) -> dict[Task, _Line]:
    """By kind of backbone. The deeper of two is so in all that is run: memory that one lends the other goes by the larger."""
    found: dict[Task, _Line] = {}
    least = 0
    for task, shape in sorted(shapes.items(), key=lambda item: item[1].layers):
        frozen = max(spec.frozen_layers for spec in plan.backbones if spec.task == task)
        trunk = min(frozen, 1)
        # Layers that the phase repeats: all in the rollout, those above the trunk where the trunk is left out.
        total = shape.layers if phase == "rollout" else shape.layers - frozen + trunk
        few = min(total, trunk + 2 + max(total - trunk - 2, 0) % shape.period)
        if any(line.total < total for line in found.values()):
            few = min(total, few + max(least - few + shape.period - 1, 0) // shape.period * shape.period)
        found[task] = _Line(few, min(few + shape.period, total), total)
        least = found[task].more
    return found


class Simulator:
    """Runs the phases on fake tensors, at two depths, and extends their peaks to the full number of layers.

    Every stretch of the code is linear in the number of layers, so that this adds no error. What was run once is kept.
    """

    def __init__(self, sft: CheckpointInfo, reward: CheckpointInfo, workload: Workload) -> None:
        self._sft, self._reward, self._workload = sft, reward, workload
        self._small: dict[tuple[object, ...], _Small] = {}
        self._found: dict[tuple[object, ...], Working] = {}

    def working(self, phase: str, plan: SharingPlan, choices: Choices, shapes: Mapping[Task, BackboneShape]) -> Working:
        """Peak of one phase at full depth; the gradients of the update are included.

        Args:
            shapes: of the two kinds of backbones, as far as the plan has them.

        Raises:
            NotTraceable: a model whose code needs data and not only shapes.
        """
        rows = {"rollout": choices.batch_rows, "scoring": choices.scoring_rows, "update": choices.microbatch_rows}[
            phase
        ]
        parallel = phase == "update" and choices.parallel_passes
        merged = phase == "rollout" and choices.merge_adapters is True
        key = (phase, rows, choices.world_size, parallel, merged, *_what(plan, choices))
        if key not in self._found:
            self._found[key] = self._run(phase, plan, choices, shapes)
        return self._found[key]

    def _run(self, phase: str, plan: SharingPlan, choices: Choices, shapes: Mapping[Task, BackboneShape]) -> Working:
        lines = _lines(phase, plan, shapes)
        few = {task: line.few for task, line in lines.items()}
        # Backbones that are alike grow together, in one step; others one after the other.
        steps = [lines] if len(set(lines.values())) == 1 else [{task: line} for task, line in lines.items()]
        start = self._trace(phase, plan, choices, few)
        larger, products = [], set(start.products)
        for grown in steps:
            line = next(iter(grown.values()))
            if line.more > line.few:
                trace = self._trace(phase, plan, choices, few | dict.fromkeys(grown, line.more))
                larger.append((_labelled(trace), (line.total - line.few) / (line.more - line.few)))
                products |= trace.products
        peaks = at_depth(_labelled(start), larger)
        return Working(*largest(peaks), peaks, frozenset(products))

    def _trace(self, phase: str, plan: SharingPlan, choices: Choices, depths: Depths) -> MemoryTrace:
        small = self._roles(plan, choices, depths)

        def traced_once() -> MemoryTrace:
            with _quiet(), traced(small.roles, small.mode, choices.device) as trace:
                RUNS[phase](trace, small.roles, choices, self._workload)
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

    def _roles(self, plan: SharingPlan, choices: Choices, depths: Depths) -> _Small:
        key = (*depths.items(), *_what(plan, choices))
        if key not in self._small:
            specs = [replace(spec, frozen_layers=min(spec.frozen_layers, 1)) for spec in plan.backbones]
            mode = FakeTensors()
            shallow = replace(plan, backbones=tuple(specs))
            roles = fake_roles(shallow, self._sft, self._reward, choices, depths, mode)
            self._small[key] = _Small(roles, mode)
        return self._small[key]


def _pad(roles: Roles) -> bool:
    """Pad from now on; whether policy or value was packed."""
    packed = [view.backbone for view in (roles.policy, roles.value) if view.backbone.packs_up_to]
    for backbone in packed:
        assume_packing(backbone, 0)
    return bool(packed)


def _labelled(trace: MemoryTrace) -> dict[str, Bytes]:
    return {label: held for label, held in trace.peaks.items() if label and not label.startswith(SETUP)}


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
