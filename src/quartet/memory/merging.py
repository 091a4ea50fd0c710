"""Whether the rollout multiplies with weights that hold the policy's adapter."""

from __future__ import annotations

from collections.abc import Callable

from quartet.distributed import CUTTING
from quartet.memory.choices import Choices
from quartet.memory.figures import PhaseBytes
from quartet.memory.refusals import refuse_asked_for
from quartet.models.plan import SharingPlan

KEY = "rollout.merge_adapters"


def merges_adapters(plan: SharingPlan, choices: Choices, phase: Callable[[str, bool], PhaseBytes]) -> bool:
    """What `rollout.merge_adapters` means for a plan; `auto` takes the time that it saves where the run's peak stays.

    In float32 the copies are twice as large and less is gained: a tenth of a rollout (benchmarks/rollout.py), a hundredth of
    an iteration.

    Args:
        phase: gives a phase by its name, with merged adapters or without.

    Raises:
        ConfigError: asked for, where it is not possible.
    """
    wanted = choices.merge_adapters
    if not wanted or (wanted == "auto" and choices.dtype != "bfloat16"):
        return False
    reason = _why_not(plan, choices)
    if reason is None and phase("rollout", True).peak == phase("rollout", False).peak:
        reason = "no layer of this model takes an adapter in, or the static engine cannot drive it"
    if wanted is True:
        refuse_asked_for(KEY, reason)
        return True
    if reason is not None:
        return False
    return phase("rollout", True).peak <= max(phase(name, False).peak for name in ("rollout", "scoring", "update"))


def still_merges(plan: SharingPlan, choices: Choices, before: bool) -> bool:
    """The same of a run that goes on, whose configuration may say something else than it did.

    Args:
        before: what was decided when the run started.

    Raises:
        ConfigError: asked for, where it is not possible.
    """
    wanted, reason = choices.merge_adapters, _why_not(plan, choices)
    if wanted is True:
        refuse_asked_for(KEY, reason)
        return True
    return wanted == "auto" and before and reason is None and choices.dtype == "bfloat16"


def _why_not(plan: SharingPlan, choices: Choices) -> str | None:
    if plan.view("policy").adapter is None:
        return "the policy has no adapter (models.lora)"
    if choices.quantization is not None:
        return f"models.quantization={choices.quantization} leaves no weights that adapters can be added to"
    if choices.engine in CUTTING:
        return f"distributed.engine={choices.engine} cuts the weights"
    if choices.rollout_engine in ("dynamic", "vllm"):
        return f"rollout.engine={choices.rollout_engine} multiplies with the weights as they are"
    return None
