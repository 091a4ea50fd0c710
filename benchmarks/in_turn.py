"""Updates computed in two ways, in turn, in one process: a machine whose speed changes changes both of a pair alike."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from harness import chosen_cases, heading, machine, make_models, own_versions, parser, run_worker, write_json


def seconds_in_turn(
    options: argparse.Namespace, ways: tuple[str, str], switch: Callable[[Any, str], None], at_once: str | None = None
) -> dict[str, Any]:
    """Seconds of one epoch in both ways, pair by pair, after a pair that warms up.

    Args:
        options: those of `quartet_worker.py`, and `pairs`.
        ways: their names.
        switch: given what is loaded and a name, has the next update computed in that way.
        at_once: the way in which policy and value take their passes at the same time.

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
        given = loaded.trained, loaded.optimizer, loaded.engine, config.ppo
        updaters = {name: Updater(*given, temperature=1.0, seed=7, at_once=name == at_once) for name in ways}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.pairs + 1):
            for name in sorted(found, reverse=turn % 2 == 0):
                switch(loaded, name)
                start = time.perf_counter()
                updaters[name].update(batch, iteration=1)
                if turn:
                    found[name].append(time.perf_counter() - start)
        table = SequenceTable.of(batch.scored.rollout)
        rows = range(len(table))
        padded = sum(part.input_ids.numel() for _, part in microbatches(table, rows, config.ppo.microbatch_rows))
        return {"seconds": found, "tokens": sum(map(table.length, rows)), "padded": padded}


def worker(ways: tuple[str, str], switch: Callable[[Any, str], None], at_once: str | None = None) -> None:
    """One case; its options are those of `quartet_worker.py`, and at the end the number of pairs."""
    from probe import write_result
    from quartet_worker import parse

    pairs = int(sys.argv.pop())
    options = parse()
    options.pairs = pairs
    write_result(options.out, seconds_in_turn(options, ways, switch, at_once))


class Case(NamedTuple):
    """What an update is measured on."""

    size: str
    plan: str
    dtype: str
    early: bool
    """Responses that end after 5 to 60 tokens, in place of running to the limit."""


def compare(
    script: str,
    doc: str | None,
    cases: dict[str, Case],
    ways: tuple[str, str],
    pairs: int,
    counted: dict[str, str] | None = None,
) -> None:
    """Measure every case in a process of its own, and print the medians of both ways and of their ratio.

    Args:
        script: the file that calls this, which is the worker too.
        ways: their names, also in the table.
        pairs: at size S; fewer at M and with `--quick`.
        counted: further columns: what is counted, by its heading.
    """
    options, counted = parser(doc).parse_args(), counted or {}
    chosen = chosen_cases(options, cases)
    for early in sorted({case.early for case in chosen.values()}):
        make_models(options, sorted({case.size for case in chosen.values() if case.early is early}), early=early)
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    columns = ["one epoch", *counted, "pairs", f"seconds, {ways[0]}", ways[1], "ratio of a pair (median)"]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    results = {}
    for name, case in chosen.items():
        arguments = [
            "--root",
            str(options.models / case.size),
            "--plan",
            case.plan,
            "--dtype",
            case.dtype,
            "--epochs",
            "1",
        ]
        arguments += ["--policy", "policy-early", "--stop", "eos"] if case.early else ["--stop", "none"]
        some = 3 if options.quick or case.size == "M" else pairs
        found = run_worker(sys.executable, Path(script).name, [*arguments, str(some)], options.threads)
        first, second = (found["seconds"][way] for way in ways)
        results[name] = {**found, "ratio": median(b / a for a, b in zip(first, second, strict=True))}
        cells = [name, *(str(found[key]) for key in counted.values()), str(len(first))]
        cells += [f"{number:.2f}" for number in (median(first), median(second), results[name]["ratio"])]
        print(f"| {' | '.join(cells)} |", flush=True)
    write_json(
        options.json,
        {"machine": machine(), "versions": versions, "threads": options.threads, "seed": 7, "cases": results},
    )
