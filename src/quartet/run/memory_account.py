"""A run's memory as predicted and as measured, phase by phase: shown and checked at the start, kept in plan.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from quartet.config import Config
from quartet.distributed import ProcessEngine
from quartet.errors import QuartetError, brief
from quartet.memory.admission import predicted_and_measured, refuse_too_large
from quartet.memory.choices import choices_of
from quartet.memory.estimate import estimator_for
from quartet.memory.figures import Estimate
from quartet.memory.free import free_memory
from quartet.memory.merging import still_merges
from quartet.memory.parallel import still_in_parallel
from quartet.memory.report import compact
from quartet.memory.trace import NotTraceable
from quartet.models.plan import SharingPlan
from quartet.models.precision import resolve_device
from quartet.run.memory_probe import PeakMemory, quick_anonymous_bytes
from quartet.run.progress import Progress
from quartet.run.setup import Inputs

PHASES = ("load", "rollout", "scoring", "update")
_GROWN = 1.01
"""Factor by which a peak must have grown to be written again."""


class MemoryAccount:
    """Measures the phases of a run on its device, over what the process held before the models were loaded."""

    def __init__(self, device: torch.device, before: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            before: what `as_dict` gave earlier in the run; its prediction and its peaks are kept.
        """
        self.peak = PeakMemory(device)
        self._device = device
        self._record: dict[str, Any] = dict(before or {})
        self._record.setdefault("phases", {})
        self._record["measure"] = _measure(device)
        self._floor = 0
        self._written: dict[str, int] = {}

    def predict(
        self, config: Config, inputs: Inputs, progress: Progress, engine: ProcessEngine, *, force: bool
    ) -> None:
        """Show the prediction, and refuse a run that would not fit.

        A model whose memory cannot be predicted is said to be one, and passes.

        Args:
            force: let what does not fit pass too.

        Raises:
            ConfigError: the predicted peak is over the free memory.
            QuartetError: a mistake that loading would come upon as well.
        """
        free = free_memory(self._device, engine.processes_here)
        try:
            estimate = predicted(config, inputs, engine, free)
        except NotTraceable as error:
            reason = str(error)
        except QuartetError:
            raise
        except Exception as error:  # the prediction is advice: no model may fail to train for want of it
            reason = f"{type(error).__name__}: {brief(error)}"
        else:
            progress.show(compact(estimate, free))
            refuse_too_large(estimate, free, force=force)
            self._record = predicted_and_measured(estimate, {}) | {"measure": self._record["measure"], "free": free}
            return
        progress.say(f"the memory of this run is not predicted: {reason}")
        if config.run.parallel_passes is True:
            progress.say("run.parallel_passes=true has no effect: without a prediction passes come one after the other")
        if config.rollout.merge_adapters is True:
            progress.say("rollout.merge_adapters=true has no effect: without a prediction adapters are not merged")
        self._record["not_predicted"] = reason

    @property
    def tight(self) -> bool:
        """Whether the predicted peak takes more than half of the host memory that was free."""
        peaks = [phase.get("peak") or 0 for phase in self._record["phases"].values()]
        free = self._record.get("free")
        return self._device.type == "cpu" and free is not None and max(peaks, default=0) > free / 2

    @property
    def fleeting(self) -> bool:
        """Whether more than half of the predicted peak is tensors that come and go within a phase."""
        phases = [phase for phase in self._record["phases"].values() if phase.get("peak")]
        highest = max(phases, key=lambda phase: phase["peak"], default=None)
        if self._device.type != "cpu" or highest is None:
            return False
        lasting = sum(highest[kind] for kind in ("weights", "optimizer", "gradients", "libraries"))
        return bool(lasting < highest["peak"] / 2)

    @property
    def parallel_passes(self) -> bool:
        """Whether policy and value were to take their passes at the same time when the run started; not where the memory of
        that was not predicted."""
        return bool(self._record.get("choices", {}).get("parallel_passes"))

    def in_parallel(self, config: Config, plan: SharingPlan, engine: ProcessEngine, say: Callable[[str], None]) -> bool:
        """Whether they are to do so now.

        Raises:
            ConfigError: the configuration, edited since, asks for what cannot be.
        """
        if "choices" not in self._record:
            return False
        choices = choices_of(config, self._device, world_size=engine.world_size, engine=engine.name)
        if self.parallel_passes and torch.get_num_threads() == 1:
            say(
                "torch has one thread here (OMP_NUM_THREADS): policy and value take their passes one after the other, and no "
                "longer at the same time, so that the last digits of the results may change"
            )
        return still_in_parallel(plan, choices, self.parallel_passes)

    def merges(self, config: Config, plan: SharingPlan, engine: ProcessEngine) -> bool:
        """Whether the rollout multiplies with weights that hold the policy's adapter; not where the memory of that was not
        predicted.

        Raises:
            ConfigError: the configuration, edited since, asks for what cannot be.
        """
        if "choices" not in self._record:
            return False
        choices = choices_of(config, self._device, world_size=engine.world_size, engine=engine.name)
        return still_merges(plan, choices, bool(self._record["choices"].get("merge_adapters")))

    @contextmanager
    def measuring(self, phase: str) -> Iterator[None]:
        """Take the peak of a phase; stages that are not in `PHASES` are let run unmeasured."""
        if phase not in PHASES:
            yield
            return
        if phase == "load":
            self._floor = _in_use(self._device)
        with self.peak.phase() as found:
            yield
        if found.peak is not None:
            kept = self._record["phases"].setdefault(phase, {})
            kept["measured"] = max(kept.get("measured") or 0, found.peak - self._floor)

    def grown(self) -> bool:
        """Whether a peak is notably larger than when this was asked last."""
        now = {name: phase.get("measured") or 0 for name, phase in self._record["phases"].items()}
        if all(count <= _GROWN * self._written.get(name, 0) for name, count in now.items()):
            return False
        self._written = now
        return True

    def as_dict(self) -> dict[str, Any]:
        """For plan.json: the prediction's figures, and `measured` beside each phase's."""
        return self._record


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else quick_anonymous_bytes() or 0


def predicted(config: Config, inputs: Inputs, engine: ProcessEngine, free: int | None) -> Estimate:
    """The estimate of a run that is about to start, for one process; raises NotTraceable, or as loading.

    Args:
        free: bytes for one process before loading; None where unknown.
    """
    evaluation = () if inputs.evaluation is None else inputs.evaluation.tokens
    longest = max(inputs.prompts.longest, *map(len, evaluation), 1)
    estimator = estimator_for(config, inputs.sft, inputs.reward, longest_prompt=longest, evaluated=len(evaluation))
    choices = choices_of(config, estimator.device, world_size=engine.world_size, engine=engine.name)
    return estimator.estimate(inputs.plan, choices, free)


def _measure(device: torch.device) -> str:
    """What `measured` is, in words."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated in the phase, over what was allocated before loading"
    if quick_anonymous_bytes() is None:
        return "nothing: this system has no /proc/self/statm"
    return "anonymous memory of the process (/proc/self/statm, every 10 ms), over what it was before loading"


def account_for(config: Config, before: Mapping[str, Any] | None = None) -> MemoryAccount:
    """The account of a run that begins or goes on now, before its models are loaded."""
    return MemoryAccount(resolve_device(config.models.device), before)
