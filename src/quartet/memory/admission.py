"""What `quartet train` asks of the planner before it loads anything."""

from __future__ import annotations

from typing import Any

from quartet.errors import ConfigError
from quartet.memory.figures import Estimate
from quartet.memory.report import as_dict
from quartet.memory.sizes import format_bytes


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
