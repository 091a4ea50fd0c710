"""Updates computed in two ways, in turn, in one process: a machine whose speed changes changes both of a pair alike."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds_in_turn(
    options: argparse.Namespace, ways: tuple[str, str], switch: Callable[[Any, str], None]
) -> dict[str, Any]:
    """Seconds of one epoch in both ways, pair by pair, after a pair that warms up.

    Args:
        options: those of `quartet_worker.py`, and `pairs`.
        ways: their names.
        switch: given what is loaded and a name, has the next update computed in that way.

    Returns:
        `seconds` by way, and the numbers of `tokens` and, filled up to rectangles, of `padded` ones.
    """
    from quartet_worker import configuration

    from quartet.distributed import SingleProcess
    from quartet.run.progress import Progress
    from quartet.run.session import Session
    from quartet.stages.advantages import compute_advantages
    from quartet.stages.batching import SequenceTable, microbatches
    from quartet.stages.update import Updater

    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        config = configuration(options, Path(folder))
        session = Session.start(config, progress, SingleProcess())
        loaded = session.loaded
        batch = compute_advantages(
            session.score(loaded.rollout.generate(session.next_prompts())), config.ppo, kl_coef=session.state.kl_coef
        )
        updater = Updater(loaded.trained, loaded.optimizer, loaded.engine, config.ppo, temperature=1.0, seed=7)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.pairs + 1):
            for name in sorted(found, reverse=turn % 2 == 0):
                switch(loaded, name)
                start = time.perf_counter()
                updater.update(batch, iteration=1)
                if turn:
                    found[name].append(time.perf_counter() - start)
        table = SequenceTable.of(batch.scored.rollout)
        rows = range(len(table))
        padded = sum(part.input_ids.numel() for _, part in microbatches(table, rows, config.ppo.microbatch_rows))
        return {"seconds": found, "tokens": sum(map(table.length, rows)), "padded": padded}


def worker(ways: tuple[str, str], switch: Callable[[Any, str], None]) -> None:
    """One case; its options are those of `quartet_worker.py`, and at the end the number of pairs."""
    from probe import write_result
    from quartet_worker import parse

    pairs = int(sys.argv.pop())
    options = parse()
    options.pairs = pairs
    write_result(options.out, seconds_in_turn(options, ways, switch))
