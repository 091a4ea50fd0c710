"""The cheapest change of a configuration that fits into a given memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quartet.config import Config, parse_config
from quartet.distributed import CUTTING, engine_name, refuse_impossible
from quartet.errors import ConfigError
from quartet.memory.choices import Choices, choices_of
from quartet.memory.estimate import Estimator
from quartet.memory.figures import Estimate, Ledger, PhaseBytes
from quartet.memory.phases import PHASES
from quartet.memory.refusals import refuse_unloadable
from quartet.models.loading import plan_for
from quartet.models.offload import refuse_unmovable
from quartet.models.plan import SharingPlan

Change = dict[str, Any]
"""New values by dotted configuration key."""

SHARING, QUANTIZATION = "models.sharing", "models.quantization"
CHECKPOINTING, DTYPE, OFFLOAD = "models.gradient_checkpointing", "models.dtype", "models.offload"
OPTIMIZER = "ppo.optimizer.name"
PARALLEL = "run.parallel_passes"
MERGED = "rollout.merge_adapters"
MICROBATCH, ROLLOUT_ROWS = "ppo.microbatch_rows", "rollout.batch_rows"


@dataclass(frozen=True)
class Option:
    """One value of one setting."""

    key: str
    value: Any
    cost: float
    """What it costs in speed or precision, in steps of "half as many rows at once"; orders the search."""
    given: bool = False


@dataclass(frozen=True)
class Candidate:
    """A configuration that was looked at."""

    change: Change
    cost: float
    config: Config
    exceeded: PhaseBytes | None
    """A phase that does not fit, or None."""
    estimate: Estimate | None
    """Of a candidate that fits."""
    at_fewest: bool = False
    """`exceeded` is too large even with one row at once and checkpointing, so that this candidate need not be computed."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    chosen: Candidate | None
    nearer: tuple[Candidate, ...]
    """Cheaper candidates that do not fit, cheapest first."""
    smallest: PhaseBytes
    """The largest phase of the candidate that needs least."""
    smallest_change: Change


def options(config: Config, estimator: Estimator) -> list[list[Option]]:
    """The values of every setting that may be changed, the given one first, at cost 0.

    Sharing costs nothing: under LoRA the plans compute the same. Fewer rows cost speed alone, checkpointing about a third
    more time in the update, offloading a transfer of the weights every use; bfloat16, quantization and optimizer state in
    8 bit change numbers. Under LoRA that state is too small to be worth a change.
    """
    models, lora = config.models, config.models.lora is not None
    sharing = [Option(SHARING, name, 0.01 * rank) for rank, name in enumerate(("paired", "single"), 1) if lora]
    quantization = [Option(QUANTIZATION, "8bit", 5.0), Option(QUANTIZATION, "4bit", 6.0)]
    axes = [
        [Option(SHARING, models.sharing, 0.0, True), *(o for o in sharing if o.value != models.sharing)],
        [Option(CHECKPOINTING, False, 0.0, True), Option(CHECKPOINTING, True, 2.5)],
        [Option(DTYPE, models.dtype, 0.0, True), Option(DTYPE, "bfloat16", 3.0)],
        [Option(QUANTIZATION, models.quantization, 0.0, True), *quantization],
        [Option(OFFLOAD, "none", 0.0, True), Option(OFFLOAD, "cpu", 4.0)],
        _rows(MICROBATCH, config.ppo.microbatch_rows),
        _rows(ROLLOUT_ROWS, config.rollout.batch_rows),
    ]
    if models.gradient_checkpointing:
        axes[1] = [Option(CHECKPOINTING, True, 0.0, True)]
    if models.dtype == "bfloat16" or choices_of(config, estimator.device).dtype == "bfloat16":
        axes[2] = axes[2][:1]
    if models.quantization is not None or models.freeze_layers:
        axes[3] = axes[3][:1]
    if models.offload != "none":
        axes[4] = [Option(OFFLOAD, "cpu", 0.0, True)]
    elif estimator.device.type == "cpu":
        del axes[4]
    if config.run.parallel_passes is True:
        axes.append([Option(PARALLEL, True, 0.0, True), Option(PARALLEL, "auto", 0.5)])
    if config.rollout.merge_adapters is True:
        axes.append([Option(MERGED, True, 0.0, True), Option(MERGED, "auto", 0.5)])
    if not lora and config.ppo.optimizer.name == "adamw":
        axes.append(_optimizers(estimator.device.type))
    return axes


def _optimizers(device: str) -> list[Option]:
    paged = [Option(OPTIMIZER, "paged_adamw8bit", 4.5)] if device == "cuda" else []
    return [Option(OPTIMIZER, "adamw", 0.0, True), Option(OPTIMIZER, "adamw8bit", 3.5), *paged]


def search(
    config: Config, estimator: Estimator, memory: int, *, world_size: int = 1, engine: str | None = None
) -> Found:
    """Look at all combinations, cheapest first, until one fits.

    Args:
        memory: bytes of one process.
        world_size, engine: as `choices_of`.
    """
    trial = _Trial(estimator, memory, world_size, engine)
    nearer: list[Candidate] = []
    for change, cost in combinations(options(config, estimator)):
        candidate = trial(config, change, cost)
        if candidate is None:
            continue
        if candidate.estimate is not None:
            return Found(candidate, tuple(nearer), candidate.estimate.peak, change)
        nearer.append(candidate)
    return Found(None, tuple(nearer), *trial.least(nearer))


def combinations(axes: list[list[Option]]) -> Iterator[tuple[Change, float]]:
    """Every combination as a change with its cost, cheapest first; among equals, fewer changes first."""
    found = []
    for chosen in itertools.product(*axes):
        change = {option.key: option.value for option in chosen if not option.given}
        found.append((sum(option.cost for option in chosen), len(change), change))
    for cost, _, change in sorted(found, key=lambda item: item[:2]):
        yield change, cost


def changed(config: Config, change: Mapping[str, Any]) -> Config:
    """The configuration with values set by dotted key.

    Raises:
        ConfigError: the values exclude each other.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    for key, value in change.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return parse_config(tree)


class _Trial:
    """Judges candidates."""

    def __init__(self, estimator: Estimator, memory: int, world_size: int, engine: str | None) -> None:
        self._estimator, self._memory = estimator, memory
        self._world_size, self._engine = world_size, engine
        self._plans: dict[str, SharingPlan | None] = {}
        self._hopeless: dict[tuple[object, ...], PhaseBytes | None] = {}

    def __call__(self, config: Config, change: Change, cost: float) -> Candidate | None:
        """None for a combination that the configuration or the checkpoints do not allow."""
        try:
            config = changed(config, change)
            refuse_impossible(config, self._engine or engine_name(config, self._world_size), self._world_size)
        except ConfigError:
            return None
        plan, choices = self._plan(config), self._choices(config)
        if plan is None or not _sensible(plan, choices):
            return None
        try:
            refuse_unmovable(config.models, plan, self._estimator.device, cut=choices.engine in CUTTING)
            refuse_unloadable(plan, choices, self._estimator.holdings, self._estimator.device)
        except ConfigError:
            return None
        exceeded = self._even_at_fewest(plan, choices)
        if exceeded is not None:
            return Candidate(change, cost, config, exceeded, None, at_fewest=True)
        try:
            exceeded = self._exceeded(plan, choices)
            estimate = self._estimator.estimate(plan, choices, self._memory) if exceeded is None else None
        except ConfigError:  # parallel passes or merged adapters where they cannot be
            return None
        return Candidate(change, cost, config, exceeded, estimate)

    def least(self, candidates: list[Candidate]) -> tuple[PhaseBytes, Change]:
        """The peak of the candidate that needs least, and its change: one of those with the fewest rows, or where more rows
        leave fewer kernels, one of all."""
        open_ones = []
        for place, candidate in enumerate(candidates):
            plan, choices = self._plan(candidate.config), self._choices(candidate.config)
            choices = replace(choices, parallel_passes=False, merge_adapters=False)
            if plan is not None and (choices == _fewest(choices) or self._estimator.counts_kernels(choices)):
                open_ones.append((self._least_of(plan, choices), place, plan, choices, candidate.change))
        best: tuple[PhaseBytes, int, Change] | None = None
        # Those that need more than another's peak at the very least need not be looked at.
        for least, place, plan, choices, change in sorted(open_ones, key=lambda item: item[:2]):
            if best is not None and least < math.inf and least > best[0].peak:
                continue
            peak = self._estimator.estimate(plan, choices, self._memory).peak
            # Among equals the cheapest, which comes first among the candidates.
            if best is None or (peak.peak, place) < (best[0].peak, best[1]):
                best = peak, place, change
        assert best is not None, "the configuration itself is possible, and so are its fewest rows"
        return best[0], best[2]

    def _least_of(self, plan: SharingPlan, choices: Choices) -> float:
        """What a candidate needs at least: its weights, and the kernels of its batches; infinite where that is unknown."""
        ledger = self._estimator.holdings.ledger(plan, choices)
        weights = max((phase.peak for phase in _at_least(choices, ledger)), default=math.inf)
        return weights + self._estimator.kernels(plan, choices, _fewest(choices))

    def _plan(self, config: Config) -> SharingPlan | None:
        sharing = config.models.sharing
        if sharing not in self._plans:
            try:
                self._plans[sharing] = plan_for(config.models, self._estimator.sft, self._estimator.reward)
            except ConfigError:
                self._plans[sharing] = None
        return self._plans[sharing]

    def _choices(self, config: Config) -> Choices:
        return choices_of(config, self._estimator.device, world_size=self._world_size, engine=self._engine)

    def _even_at_fewest(self, plan: SharingPlan, choices: Choices) -> PhaseBytes | None:
        """A phase that is too large however few rows there are; without kernels, of which fewer rows leave more."""
        frugal = _fewest(choices)
        key = (plan.name, frugal)
        if key not in self._hopeless:
            self._hopeless[key] = self._exceeded(plan, frugal, kernels=False)
        return self._hopeless[key]

    def _exceeded(self, plan: SharingPlan, choices: Choices, *, kernels: bool = True) -> PhaseBytes | None:
        ledger = self._estimator.holdings.ledger(plan, choices)
        for phase in (*_at_least(choices, ledger), ledger.load):
            if phase.peak > self._memory:
                return phase
        choices = self._estimator.decided(plan, choices, ledger, self._memory)
        # The update first: it needs most nearly always.
        for name in reversed(PHASES):
            phase = self._estimator.phase(name, plan, choices, ledger, kernels=kernels)
            if phase.peak > self._memory:
                return phase
        return None


def _at_least(choices: Choices, ledger: Ledger) -> list[PhaseBytes]:
    """What every phase holds; unknown where some of it is offloaded."""
    return [ledger.fixed("every phase")] if choices.offload == "none" else []


def _sensible(plan: SharingPlan, choices: Choices) -> bool:
    """Whether quantization finds frozen weights."""
    return choices.quantization is None or not all(spec.trainable for spec in plan.backbones)


def _fewest(choices: Choices) -> Choices:
    return replace(
        choices, microbatch_rows=1, batch_rows=1, checkpointing=True, parallel_passes=False, merge_adapters=False
    )


def _rows(key: str, given: int) -> list[Option]:
    """The given number, and halves of it down to 1."""
    found = [Option(key, given, 0.0, True)]
    rows, cost = given // 2, 1.0
    while rows >= 1:
        found.append(Option(key, rows, cost))
        rows, cost = rows // 2, cost + 1.0
    return found
