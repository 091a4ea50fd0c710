"""What a run costs in bytes: for each backbone and role, and for each phase at its peak. Nothing is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from quartet.config import Config
from quartet.distributed import gathers_for_rollout
from quartet.memory.choices import Choices, Workload, plan_device, torch_dtype, workload_of
from quartet.memory.figures import Estimate, Ledger, PhaseBytes, PhaseTraffic
from quartet.memory.holdings import Holdings
from quartet.memory.libraries import kernels
from quartet.memory.merging import merges_adapters
from quartet.memory.parallel import passes_in_parallel
from quartet.memory.phases import PHASES
from quartet.memory.refusals import refuse_unloadable
from quartet.memory.sharding import (
    FLOAT,
    extra_bytes,
    gradient_shards,
    resting_gradients,
    resting_on_host,
    widened,
)
from quartet.memory.simulator import Simulator
from quartet.memory.trace import ACTIVATIONS, CACHE, GRADIENTS, LOGITS
from quartet.memory.traffic import traffic, travel_bytes
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.pickled import open_checkpoint
from quartet.models.plan import Role, SharingPlan


class Estimator:
    """Estimates for two checkpoints; what was learned for one choice is kept for the next."""

    def __init__(self, sft: CheckpointInfo, reward: CheckpointInfo, workload: Workload, device: torch.device) -> None:
        self.sft, self.reward, self.workload, self.device = sft, reward, workload, device
        self.holdings = Holdings(sft, reward, device)
        self._simulator = Simulator(sft, reward, workload)

    def estimate(self, plan: SharingPlan, choices: Choices, free: float | None = None) -> Estimate:
        """Predict one plan under one set of choices.

        Args:
            free: bytes for one process before loading, as far as they are known; decides what is left to `auto`.

        Raises:
            CheckpointError: a checkpoint whose model cannot be built from its configuration.
            ConfigError: settings that the model cannot follow (adapters without a place, too many frozen layers), or that
                loading would refuse.
        """
        refuse_unloadable(plan, choices, self.holdings, self.device)
        choices = self.decided(plan, choices, ledger := self.holdings.ledger(plan, choices), free)
        phases = (ledger.load, *(self.phase(name, plan, choices, ledger) for name in PHASES))
        carried = self._traffic(plan, choices, ledger)
        return Estimate(plan, self.device.type, choices, self.workload, ledger.backbones, ledger.roles, phases, carried)

    def _traffic(self, plan: SharingPlan, choices: Choices, ledger: Ledger) -> tuple[PhaseTraffic, ...]:
        """What the network carries."""
        found = {
            spec.name: travel_bytes(
                spec, self.holdings.shape(spec.task, 0), self.holdings.whole(spec, choices), choices
            )
            for spec in plan.backbones
        }
        trained = FLOAT * sum(role.trained_parameters for role in ledger.roles)
        return traffic(plan, choices, self.workload, found, trained)

    def decided(self, plan: SharingPlan, choices: Choices, ledger: Ledger, free: float | None) -> Choices:
        """The choices with what is left to `auto` decided as a run decides it; `free` unknown counts as enough."""
        spec = next(spec for spec in plan.backbones if spec.name == plan.view("policy").backbone)
        whole = self.holdings.whole(spec, choices) * torch_dtype(choices.dtype).itemsize
        gather = gathers_for_rollout(choices.gather_for_rollout, whole, free and free - ledger.load.peak)
        choices = replace(choices, gather_for_rollout=gather)
        names = {plan.view("policy").backbone, plan.view("value").backbone}
        hidden = max(self.holdings.shape(one.task, 0).hidden for one in plan.backbones if one.name in names)
        both = partial(self.phase, "update", plan, replace(choices, parallel_passes=True), ledger)
        choices = replace(choices, parallel_passes=passes_in_parallel(plan, choices, hidden, free, both))

        def phase(name: str, merged: bool) -> PhaseBytes:
            return self.phase(name, plan, replace(choices, merge_adapters=merged), ledger)

        return replace(choices, merge_adapters=merges_adapters(plan, choices, phase))

    def phase(
        self, name: str, plan: SharingPlan, choices: Choices, ledger: Ledger, *, kernels: bool = True
    ) -> PhaseBytes:
        """One phase, from the second iteration on: weights written, optimizer state there, last gradients not freed.

        Args:
            kernels: count what the phases leave compiled.
        """
        work = self._simulator.working(name, plan, choices, self.holdings.shapes(plan))
        fixed, cuda = ledger.fixed(name), self.device.type == "cuda"
        extra = partial(extra_bytes, name, choices, self.holdings.pieces(plan, choices), cuda=cuda)
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
            libraries=fixed.libraries + (self.kernels(plan, choices) if kernels else 0),
            at=at,
        )

    def counts_kernels(self, choices: Choices) -> bool:
        """Whether the phases leave kernels compiled: more of them the more batches there are."""
        return self.device.type == "cpu" and choices.dtype == "bfloat16"

    def kernels(self, plan: SharingPlan, choices: Choices, like: Choices | None = None) -> float:
        """What the phases leave compiled.

        Args:
            like: choices whose matrix products are counted in place of these choices' own, which would have to be traced.
        """
        if not self.counts_kernels(choices):
            return 0
        shapes = self.holdings.shapes(plan)
        products = {name: len(self._simulator.working(name, plan, like or choices, shapes).products) for name in PHASES}
        return kernels(products, choices, self.workload)

    def _trunk_states(self, plan: SharingPlan, choices: Choices) -> float:
        """States after the frozen layers, of all episodes; they are in host memory."""
        if self.device.type != "cpu":
            return 0
        width = sum(self.holdings.shape(spec.task, 0).hidden for spec in plan.backbones if spec.frozen_layers)
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


def estimator_for(
    config: Config,
    sft: CheckpointInfo | None = None,
    reward: CheckpointInfo | None = None,
    *,
    longest_prompt: int | None = None,
    evaluated: int | None = None,
) -> Estimator:
    """The estimator of a configuration.

    Args:
        sft, reward: where they were read already.
        longest_prompt, evaluated: as `workload_of`.
    """
    sft = sft or open_checkpoint(config.models, "sft", headers_only=True)
    reward = reward or open_checkpoint(config.models, "reward", headers_only=True)
    return Estimator(sft, reward, workload_of(config, longest_prompt, evaluated), plan_device(config.models.device))
