"""What `quartet train` asks of the planner before it loads anything."""

from __future__ import annotations

from typing import Any

from quartet.config import Config
from quartet.errors import ConfigError
from quartet.memory.choices import choices_of
from quartet.memory.estimate import estimator_for
from quartet.memory.figures import Estimate
from quartet.memory.report import as_dict
from quartet.memory.sizes import format_bytes
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.plan import SharingPlan


def predict(
    config: Config,
    plan: SharingPlan,
    sft: CheckpointInfo,
    reward: CheckpointInfo,
    *,
    longest_prompt: int,
    evaluated: int,
    world_size: int = 1,
    engine: str | None = None,
    free: int | None = None,
) -> Estimate:
    """The estimate of a run that is about to start, for one process.

    Args:
        longest_prompt: tokens.
        evaluated: prompts of an evaluation.
        world_size, engine: processes and what shares the work between them, as `choices_of`.
        free: bytes for one process before loading; None where unknown.

    Raises:
        NotTraceable: a family whose code needs data and not only shapes.
        ConfigError, CheckpointError: as loading.
    """
    estimator = estimator_for(config, sft, reward, longest_prompt=longest_prompt, evaluated=evaluated)
    choices = choices_of(config, estimator.device, world_size=world_size, engine=engine)
    return estimator.estimate(plan, choices, free)


def refuse_too_large(estimate: Estimate, free: int | None, *, force: bool = False) -> None:
    """Check a prediction against the memory there is.

    Args:
        free: bytes for one process, from `free_memory`; None where unknown, which passes.
        force: pass in any case.

    Raises:
        ConfigError: the predicted peak is over it.
    """
    peak = estimate.peak
    if force or free is None or peak.peak <= free:
        return
    raise ConfigError(
        f"the {peak.phase} phase is predicted to need {format_bytes(peak.peak)} and {estimate.device} has "
        f"{format_bytes(free)} free; quartet plan --memory {max(1, free // 2**20)}MiB finds a configuration that fits, "
        "--force runs this one"
    )


def predicted_and_measured(estimate: Estimate, measured: dict[str, int]) -> dict[str, Any]:
    """For plan.json: the prediction, and beside each phase's peak what was measured (bytes by phase)."""
    result = as_dict(estimate)
    for name, phase in result["phases"].items():
        phase["measured"] = measured.get(name)
    return result
