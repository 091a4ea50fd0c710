"""Quartet: PPO-based RLHF for language models, the four models of PPO in the memory of one.

from quartet import train
train({"models": {"sft": ..., "reward": ...}, "data": {"prompts": ...}, "run": {"dir": ...}})
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Large tensors in huge pages, which take fewer page faults: torch reads this once, at its first large tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from quartet.allocator import one_heap
from quartet.config import Config, load_config, parse_config
from quartet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    QuartetError,
    RewardError,
    RolloutError,
    TrainingError,
)

if TYPE_CHECKING:
    from quartet.trainer import resume, train

one_heap()  # where torch has no threads yet, which would have their own

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Interrupted",
    "QuartetError",
    "RewardError",
    "RolloutError",
    "TrainingError",
    "load_config",
    "parse_config",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    """`train` and `resume` load torch and transformers, so they are fetched when first asked for."""
    if name in ("train", "resume"):
        from quartet import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'quartet' has no attribute {name!r}")
