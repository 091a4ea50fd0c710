"""What it saves to compute sequences side by side: updates with and without padding, in turn, in one process.

A machine whose speed changes from minute to minute changes both of a pair alike. Each case is a process of its own.

usage: python benchmarks/packing.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness import chosen_cases, heading, machine, make_models, own_versions, parser, run_worker, write_json

CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}, {'ends early' if early else 'to the limit'}": (size, plan, early)
    for size, early in (("S", False), ("S", True), ("M", False))
    for plan in ("separate", "paired")
}
LONGEST = sys.maxsize


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one epoch in both layouts, pair by pair."""
    from quartet_worker import configuration

    from quartet.distributed import SingleProcess
    from quartet.models.packing import assume_packing
    from quartet.run.progress import Progress
    from quartet.run.session import Session
    from quartet.stages.advantages import compute_advantages
    from quartet.stages.batching import SequenceTable, microbatches
    from quartet.stages.update import Updater

    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        config = configuration(options, Path(folder))
        session = Session.start(config, progress, SingleProcess())
        loaded = session.loaded
        assert loaded.roles.policy.backbone.packs_up_to
        batch = compute_advantages(
            session.score(loaded.rollout.generate(session.next_prompts())), config.ppo, kl_coef=session.state.kl_coef
        )
        updater = Updater(loaded.trained, loaded.optimizer, loaded.engine, config.ppo, temperature=1.0, seed=7)
        found: dict[str, list[float]] = {"padded": [], "side by side": []}
        for turn in range(options.pairs + 1):
            for name in sorted(found, reverse=turn % 2 == 0):
                for view in (loaded.roles.policy, loaded.roles.value):
                    assume_packing(view.backbone, LONGEST if name == "side by side" else 0)
                start = time.perf_counter()
                updater.update(batch, iteration=1)
                if turn:  # the first pair warms up
                    found[name].append(time.perf_counter() - start)
        table = SequenceTable.of(batch.scored.rollout)
        rows = range(len(table))
        padded = sum(part.input_ids.numel() for _, part in microbatches(table, rows, config.ppo.microbatch_rows))
        return {"seconds": found, "tokens": sum(map(table.length, rows)), "padded": padded}


def worker() -> None:
    """One case; its options are those of `quartet_worker.py`."""
    from probe import write_result
    from quartet_worker import parse

    pairs = int(sys.argv.pop())
    options = parse()
    options.pairs = pairs
    write_result(options.out, work(options))


def main() -> None:
    """Run the cases and print their ratios."""
    options = parser(__doc__).parse_args()
    chosen = chosen_cases(options, CASES)
    make_models(options, sorted({size for size, _, _ in chosen.values()}), early=any(e for *_, e in chosen.values()))
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    print("\n| one epoch | tokens | with padding | pairs | seconds, padded | side by side | ratio of a pair (median) |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for name, (size, plan, early) in chosen.items():
        ending = ["--policy", "policy-early", "--stop", "eos"] if early else ["--stop", "none"]
        arguments = ["--root", str(options.models / size), "--plan", plan, "--epochs", "1", *ending]
        pairs = 3 if options.quick or size == "M" else 9
        found = run_worker(sys.executable, "packing.py", [*arguments, str(pairs)], options.threads)
        padded, packed = found["seconds"]["padded"], found["seconds"]["side by side"]
        ratio = median(b / a for a, b in zip(padded, packed, strict=True))
        results[name] = {**found, "ratio": ratio}
        cells = (name, found["tokens"], found["padded"], len(padded))
        print(
            f"| {' | '.join(map(str, cells))} | {median(padded):.2f} | {median(packed):.2f} | {ratio:.2f} |", flush=True
        )
    write_json(
        options.json,
        {"machine": machine(), "versions": versions, "threads": options.threads, "seed": 7, "cases": results},
    )


if __name__ == "__main__":
    worker() if "--out" in sys.argv else main()
