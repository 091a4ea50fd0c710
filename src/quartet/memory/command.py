"""`quartet plan`, and what `quartet train` asks of the planner before it loads anything."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quartet.config import Config, load_config
from quartet.errors import ConfigError
from quartet.memory.choices import choices_of, plan_device, workload_of
from quartet.memory.estimate import Estimator
from quartet.memory.figures import Estimate
from quartet.memory.report import as_dict, search_dict, show, show_search
from quartet.memory.search import search
from quartet.memory.sizes import format_bytes, parse_bytes
from quartet.models.checkpoint_info import CheckpointInfo, read_checkpoint
from quartet.models.loading import plan_for

WIDTH = 180
"""Columns where the output is no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `quartet plan`."""
    parser.add_argument("config", help="the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="override single keys")
    parser.add_argument("--memory", metavar="SIZE", help="find the cheapest change that fits, such as 24GiB or 80g")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share the work")
    parser.add_argument("--engine", choices=("ddp", "zero2", "zero3", "fsdp2"), help="how they share it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run_plan(options: argparse.Namespace) -> int:
    """Predict the memory of a configuration; with `--memory`, search for one that fits.

    Returns:
        0, or 2 where nothing fits.

    Raises:
        ConfigError, CheckpointError: as reading the configuration and the checkpoints.
    """
    if options.processes < 1:
        raise ConfigError(f"--processes={options.processes} is not a number of processes; give 1 or more")
    config = load_config(options.config, options.overrides)
    memory = None if options.memory is None else parse_bytes(options.memory)
    estimator = estimator_for(config)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    given = {"world_size": options.processes, "engine": options.engine}
    estimate = estimator.estimate(plan, choices_of(config, estimator.device, **given))
    found = None if memory is None else search(config, estimator, memory, **given)
    if options.json:
        result = as_dict(estimate)
        if found is not None and memory is not None:
            result["search"] = search_dict(found, memory)
            if found.chosen is not None and found.chosen.estimate is not None:
                result["search"]["estimate"] = as_dict(found.chosen.estimate)
        print(json.dumps(result))
    else:
        # Into a file or a pipe the tables take the room they need.
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        show(estimate, console)
        if found is not None and memory is not None:
            show_search(found, memory, console)
    return 0 if found is None or found.chosen is not None else 2


def estimator_for(
    config: Config,
    sft: CheckpointInfo | None = None,
    reward: CheckpointInfo | None = None,
    *,
    longest_prompt: int | None = None,
) -> Estimator:
    """The estimator of a configuration.

    Args:
        sft, reward: where they were read already.
        longest_prompt: tokens, where the prompts are known; `data.max_prompt_tokens` otherwise.
    """
    models = config.models
    sft = sft or read_checkpoint(models.sft, "sft", trust_remote_code=models.trust_remote_code)
    reward = reward or read_checkpoint(models.reward, "reward", trust_remote_code=models.trust_remote_code)
    return Estimator(sft, reward, workload_of(config, longest_prompt), plan_device(models.device))


def predict(
    config: Config, sft: CheckpointInfo, reward: CheckpointInfo, *, longest_prompt: int, world_size: int = 1
) -> Estimate:
    """The estimate of a run that is about to start.

    Raises:
        ConfigError, CheckpointError: as planning.
    """
    estimator = estimator_for(config, sft, reward, longest_prompt=longest_prompt)
    plan = plan_for(config.models, sft, reward)
    return estimator.estimate(plan, choices_of(config, estimator.device, world_size=world_size))


def refuse_too_large(estimate: Estimate, free: int | None, *, force: bool = False) -> None:
    """Check a prediction against the memory there is.

    Args:
        free: bytes, from `free_memory`; None where unknown, which passes.
        force: pass in any case.

    Raises:
        ConfigError: the predicted peak is over it.
    """
    peak = estimate.peak
    if force or free is None or peak.peak <= free:
        return
    raise ConfigError(
        f"the {peak.phase} phase is predicted to need {format_bytes(peak.peak)} and {estimate.device} has "
        f"{format_bytes(free)} free; quartet plan --memory {free // 2**20}MiB finds a configuration that fits, "
        "--force runs this one"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take: of the GPU, or of host memory within the limit of its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), flags=re.MULTILINE)
    if found is None:
        return None
    free = int(found[1]) * 1024
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def predicted_and_measured(estimate: Estimate, measured: dict[str, int]) -> dict[str, Any]:
    """For plan.json: the prediction, and beside each phase's peak what was measured (bytes by phase)."""
    result = as_dict(estimate)
    for name, phase in result["phases"].items():
        phase["measured"] = measured.get(name)
    return result


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
