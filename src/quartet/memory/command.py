"""`quartet plan`."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console

from quartet.config import load_config
from quartet.distributed import CUTTING, engine_name, refuse_impossible
from quartet.memory.choices import choices_of
from quartet.memory.estimate import estimator_for
from quartet.memory.report import as_dict, search_dict, show, show_search
from quartet.memory.search import search
from quartet.memory.sizes import parse_bytes
from quartet.models.loading import plan_for
from quartet.models.offload import refuse_unmovable
from quartet.models.tokenizers import refuse_long_responses

WIDTH = 180
"""Columns where the output is no terminal."""


def run_plan(options: argparse.Namespace) -> int:
    """Predict the memory of a configuration; with `--memory`, search for one that fits.

    Returns:
        0, or 2 where nothing fits.

    Raises:
        ConfigError, CheckpointError: as reading the configuration and the checkpoints.
    """
    config = load_config(options.config, options.overrides)
    memory = None if options.memory is None else parse_bytes(options.memory)
    engine = options.engine or engine_name(config, options.processes)
    refuse_impossible(config, engine, options.processes)
    estimator = estimator_for(config)
    refuse_long_responses((estimator.sft, estimator.reward), config.rollout.response_length)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    refuse_unmovable(config.models, plan, estimator.device, cut=engine in CUTTING)
    given = {"world_size": options.processes, "engine": options.engine}
    estimate = estimator.estimate(plan, choices_of(config, estimator.device, **given), memory)
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
        if memory is None and config.distributed.gather_for_rollout == "auto" and estimate.choices.gather_for_rollout:
            console.print("assumed: the whole policy fits beside the rest while it generates; --memory SIZE decides it")
        if found is not None and memory is not None:
            show_search(found, memory, console)
    return 0 if found is None or found.chosen is not None else 2
