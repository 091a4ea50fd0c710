"""DeepSpeed, made ready: without a compiler on CPUs, on the process group that is there already, and quiet."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch

from quartet.distributed.choose import Travel

NOT_HERE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
"""What DeepSpeed asks for and Quartet decides by itself."""

LATER = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.parameter_offload",
    "deepspeed.runtime.zero.stage3",
)
"""What DeepSpeed imports while it makes an engine, with what these import."""


def import_deepspeed(device: torch.device) -> Any:
    """The package, told which device is meant."""
    os.environ["DS_ACCELERATOR"] = device.type
    # Its logger writes to standard output.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed
    from deepspeed import ops

    for name in LATER:
        with suppress(Exception):  # another version may do without it, or not get as far
            import_module(name)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Else the first use of a process group compiles an operator: forty seconds, and g++ is needed.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def configuration(stage: int, device: torch.device, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        stage: of ZeRO.
        zero: further settings of `zero_optimization`.
    """
    bucket = Travel.of(cuda=device.type == "cuda").bucket
    return {
        **NOT_HERE,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **zero,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
