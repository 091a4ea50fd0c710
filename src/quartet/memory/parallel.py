"""Whether policy and value take their passes of the update at the same time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quartet import kernels
from quartet.memory.choices import Choices
from quartet.memory.figures import PhaseBytes
from quartet.memory.refusals import refuse_asked_for
from quartet.models.plan import SharingPlan

KEY = "run.parallel_passes"
SHARE = 0.5
"""Of the free memory that a run may take with the activations of both models, for `auto` to choose it."""
SMALL = 384
"""Features of the hidden states up to which `auto` chooses it in float32 (measured: 256 and 768)."""


def passes_in_parallel(
    plan: SharingPlan, choices: Choices, hidden: int, free: float | None, update: Callable[[], PhaseBytes]
) -> bool:
    """What `run.parallel_passes` means for a plan.

    Args:
        hidden: features of the hidden states of policy or value, whichever has more.
        free: bytes before loading; None where unknown, which counts as enough.
        update: gives the update with both passes at the same time.

    Raises:
        ConfigError: asked for, where it is not possible.
    """
    wanted = choices.parallel_passes
    if not wanted:
        return False
    reason = _why_not(plan, choices)
    if wanted is True:
        refuse_asked_for(KEY, reason)
        return True
    return reason is None and _pays(choices, hidden) and (free is None or update().peak <= SHARE * free)


def still_in_parallel(plan: SharingPlan, choices: Choices, before: bool) -> bool:
    """The same of a run that goes on, whose configuration may say something else than it did.

    Args:
        before: what was decided when the run started.

    Raises:
        ConfigError: asked for, where it is not possible.
    """
    wanted, reason = choices.parallel_passes, _why_not(plan, choices)
    if wanted is True and not before:
        refuse_asked_for(KEY, reason)
    return bool(wanted) and reason is None and (before or wanted is True)


def _pays(choices: Choices, hidden: int) -> bool:
    """Whether it takes less time.

    In bfloat16 updates took 0.80 to 0.92 of the time. In float32 products keep all threads busy, but not what lies between
    them: with compiled kernels updates took 0.85 to 0.90 of it at hidden size 256. At 768 they took 0.92 to 0.99, which is
    not worth the memory of two models' activations. Both on two threads of an Intel processor with AVX-512
    (benchmarks/parallel_passes.py); other processors, where it may be otherwise, are left out in float32, more threads were
    not measured.
    """
    if choices.dtype == "bfloat16":
        return True
    return hidden <= SMALL and kernels.is_intel() and kernels.multiplies(torch.float32)


def _why_not(plan: SharingPlan, choices: Choices) -> str | None:
    if choices.device != "cpu":
        return f"policy and value share the one device {choices.device}"
    if choices.engine != "none":
        return f"distributed.engine={choices.engine} orders the passes of its processes"
    if plan.view("policy").backbone == plan.view("value").backbone:
        return f"in the {plan.name} plan policy and value are one backbone"
    if choices.checkpointing:
        return "models.gradient_checkpointing=true is there to save memory, which this takes"
    if choices.quantization is not None:
        return f"with models.quantization={choices.quantization} it has not been tried"
    if torch.get_num_threads() < 2:
        return "torch has one thread (OMP_NUM_THREADS)"
    return None
