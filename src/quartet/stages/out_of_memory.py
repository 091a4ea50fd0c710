"""Memory that runs out in a forward or backward pass."""

from __future__ import annotations

import torch

from quartet.models.converted import CONVERTED
from quartet.models.gradients import IN_PLACE
from quartet.models.lending import LENDER

_TEXTS = ("DefaultCPUAllocator", "CUDA error: out of memory", "ALLOC_FAILED")
"""Of torch's CPU allocator, of CUDA itself, and of its libraries (CUBLAS_STATUS_ALLOC_FAILED)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's CUDA allocator has an error class for it, others only a text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _TEXTS)
    )


def release_memory() -> None:
    """Give cached blocks back, so that a smaller pass finds them whole."""
    LENDER.forget()
    IN_PLACE.forget()
    CONVERTED.forget()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lacks_memory(stage: str) -> str:
    """What to say where `stage` ran out of memory and no smaller pass is left to try."""
    rows = "ppo.microbatch_rows" if stage == "update" else "rollout.batch_rows"
    return f"memory ran out in the {stage}; lower {rows}, or ask `quartet plan --memory` what fits"
