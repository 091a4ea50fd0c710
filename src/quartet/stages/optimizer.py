"""One optimizer for policy and value, two learning rates, a schedule that is a pure function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from quartet.config import PPOConfig
from quartet.errors import ConfigError
from quartet.models.roles import Roles

PAGED = "paged_adamw8bit"


def make_optimizer(roles: Roles, ppo: PPOConfig) -> torch.optim.Optimizer:
    """AdamW over two groups, `policy` and `value`; fused, which is the fastest on CPU and CUDA alike.

    Raises:
        ConfigError: an 8-bit optimizer without bitsandbytes, or a paged one without a GPU.
    """
    options = ppo.optimizer
    value_rate = ppo.learning_rate if ppo.value_learning_rate is None else ppo.value_learning_rate
    groups = [
        {"params": [p for _, p in roles.trained_parameters("policy")], "lr": ppo.learning_rate, "name": "policy"},
        {"params": [p for _, p in roles.trained_parameters("value")], "lr": value_rate, "name": "value"},
    ]
    for group in groups:
        group["base_lr"] = group["lr"]
    given: dict[str, Any] = {"betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}
    if options.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **given)
    return _eight_bit(options.name, roles)(groups, **given)


def _eight_bit(name: str, roles: Roles) -> Callable[..., torch.optim.Optimizer]:
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"ppo.optimizer.name={name} needs bitsandbytes, which is not installed; pip install quartet-rlhf[quantization]"
        )
    refuse_paging(name, roles.value.head.weight.device)
    paged = name == PAGED
    library: Any = import_module("bitsandbytes.optim")
    kind: Callable[..., torch.optim.Optimizer] = library.PagedAdamW8bit if paged else library.AdamW8bit
    return kind


def refuse_paging(name: str, device: torch.device) -> None:
    """Paged state needs a GPU.

    Raises:
        ConfigError: it is asked for on a CPU.
    """
    if name == PAGED and device.type == "cpu":
        raise ConfigError(
            f"ppo.optimizer.name={PAGED} pages optimizer state between GPU and host memory, and the models are on the CPU; "
            "use adamw8bit or adamw"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, ppo: PPOConfig, iteration: int) -> float:
    """Set both groups' rates for an iteration (counted from 0); returns the policy's."""
    factor = schedule_factor(
        ppo.optimizer.schedule, iteration, total=ppo.iterations, warmup=ppo.optimizer.warmup_iterations
    )
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def schedule_factor(schedule: str, iteration: int, *, total: int, warmup: int) -> float:
    """Factor of the learning rate: linear rise over `warmup` iterations, then constant, linear or cosine to zero.

    The iteration after the last would have factor 0, so every iteration that runs trains.
    """
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = (iteration - warmup) / max(1, total - warmup)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
