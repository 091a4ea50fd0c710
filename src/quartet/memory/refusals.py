"""What loading would refuse once the weights are read, seen from headers."""

from __future__ import annotations

import torch

from quartet.errors import ConfigError
from quartet.memory.adapter_sizes import stored_rank
from quartet.memory.choices import Choices
from quartet.memory.holdings import Holdings
from quartet.models.continuation import refuse_smaller_rank
from quartet.models.plan import SharingPlan
from quartet.models.quantize import refuse_partial_blocks
from quartet.stages.optimizer import refuse_paging


def refuse_unloadable(plan: SharingPlan, choices: Choices, holdings: Holdings, device: torch.device) -> None:
    """Check a plan before anything is loaded, or shown as one that fits.

    Raises:
        ConfigError: rows that nf4 cannot hold, a paged optimizer on a CPU, or an adapter too small for the one that it starts
            from.
    """
    refuse_paging(choices.optimizer, device)
    for spec in plan.backbones:
        if choices.quantization == "4bit" and not spec.trainable:
            for name, inputs in holdings.shape(spec.task, 0).linear.items():
                refuse_partial_blocks(name.removesuffix(".weight"), inputs)
        for adapter in spec.adapters:
            if adapter.trainable and adapter.source is not None and choices.lora is not None:
                owner = holdings.owner(adapter.name)
                refuse_smaller_rank(owner, stored_rank(owner), choices.lora.r)


def refuse_asked_for(key: str, reason: str | None) -> None:
    """Refuse a setting that is true and has no effect here for some reason; raises ConfigError."""
    if reason is not None:
        raise ConfigError(f"{key}=true, and {reason}; use {key}=auto")
