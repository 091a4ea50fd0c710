"""Everything that may go wrong with a run, done to it: what survived, what had to be repeated, what was lost.

Runs of a tiny model are killed, interrupted, starved of disk and memory, fed damaged checkpoints and failing rewards, then
resumed. Where nothing may differ, metrics and weights are compared bit by bit with a run that nothing happened to. Each run
is a forked process that goes through the command line; exit codes and sentences are those a user sees.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faults_injected as injected
from faults_runs import ITERATIONS, SAVE_EVERY, Bench

NAMES = (
    "killed",
    "killed while saving",
    "interrupted",
    "disk full",
    "damaged",
    "out of memory",
    "not finite",
    "rewards",
)


@dataclass
class Outcome:
    """One kind of fault."""

    name: str
    injected: int = 0
    survived: int = 0
    repeated: int = 0
    """Iterations computed a second time."""
    most_repeated: int = 0
    """The same after a single fault; at most `save_every`."""
    lost: int = 0
    """Files that a user had before the fault and not after it, or that could not be read."""
    problems: list[str] = field(default_factory=list)

    def count(self, problem: str | None, *, repeated: int = 0, lost: int = 0) -> None:
        """Take in one fault; `problem` is None where it was survived."""
        self.injected += 1
        self.repeated += repeated
        self.most_repeated = max(self.most_repeated, repeated)
        self.lost += lost
        if problem is None:
            self.survived += 1
        else:
            self.problems.append(problem)


def killed(bench: Bench, draw: random.Random, kills: int, *, saving: bool) -> Outcome:
    """SIGKILL at random moments, over as many runs as it takes; each run is finished and compared with the undisturbed one."""
    outcome = Outcome("killed while saving" if saving else "killed")
    seconds = bench.seconds_of_a_run()
    run, number = None, 0
    while outcome.injected < kills:
        run = run or bench.new_run(f"{outcome.name.replace(' ', '-')}-{number}")
        number += 1
        if saving:
            hit = bench.start(run, injected.kill_at_operation(draw.randrange(1, 40))) == -9
        else:
            hit = bench.start(run, kill_after=draw.uniform(0.0, seconds)) == -9
        if hit:
            done, kept = bench.iterations_done(run), bench.newest_checkpoint(run)
            problem = None if done - kept <= SAVE_EVERY else f"{done - kept} iterations would be repeated"
            outcome.count(problem, repeated=max(0, done - kept), lost=bench.unreadable(run))
        else:
            bench.compare(run, outcome.problems)
            run = None
    if run is not None:
        bench.finish(run, outcome.problems)
    return outcome


def interrupted(bench: Bench, draw: random.Random, times: int) -> Outcome:
    """Ctrl-C and SIGTERM at random moments: exit 130, a checkpoint, nothing repeated."""
    import signal

    outcome = Outcome("interrupted")
    seconds = bench.seconds_of_a_run()
    while outcome.injected < times:
        run = bench.new_run(f"interrupted-{time.monotonic_ns()}")
        number = signal.SIGINT if outcome.injected % 2 else signal.SIGTERM
        code = bench.start(
            run, kill_after=draw.uniform(0.5, 0.9) * seconds, signal_number=number, only_while_training=True
        )
        if code == 0:
            continue
        done, kept = bench.iterations_done(run), bench.newest_checkpoint(run)
        # After the last iteration a signal ends the export, which resuming does again.
        fine = done == kept and (code == 130 or kept == ITERATIONS)
        problem = None if fine else f"exit {code} at iteration {done}, checkpoint {kept}"
        outcome.count(problem, repeated=done - kept, lost=bench.unreadable(run))
        bench.finish(run, outcome.problems)
    return outcome


def disk_full(bench: Bench, draw: random.Random, times: int) -> Outcome:
    """No file may grow beyond a limit that falls into the second checkpoint's files, one after the other."""
    outcome = Outcome("disk full")
    sizes = bench.checkpoint_sizes()
    for name in sorted(sizes, key=sizes.__getitem__)[-times:]:
        run = bench.new_run(f"disk-{name}")
        code = bench.start(run, injected.limit_file_size(after_checkpoint=SAVE_EVERY, limit=sizes[name] // 2))
        kept, said = bench.newest_checkpoint(run), bench.said(run)
        fine = code == 2 and kept == SAVE_EVERY and "could not be written" in said
        problem = None if fine else f"exit {code}, checkpoint {kept}: {said[-200:]}"
        outcome.count(problem, repeated=bench.iterations_done(run) - kept, lost=bench.unreadable(run))
        bench.finish(run, outcome.problems)
    return outcome


def damaged(bench: Bench, draw: random.Random, times: int) -> Outcome:
    """Truncated files and flipped bits in the newest checkpoint: named, and the one before is offered and works."""
    outcome = Outcome("damaged")
    for number in range(times):
        run = bench.copy_of_whole(f"damaged-{number}")
        file = draw.choice(sorted((run / "checkpoints" / f"step-{ITERATIONS:06d}").iterdir()))
        content = bytearray(file.read_bytes())
        if number % 2:
            content = content[: draw.randrange(len(content))]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        code, said = bench.start(run), bench.said(run)
        before = f"step-{ITERATIONS - SAVE_EVERY:06d}"
        named = code == 2 and str(file.parent) in said and f"--from {before}" in said
        outcome.count(None if named else f"{file.name}: exit {code}: {said[-200:]}", repeated=SAVE_EVERY)
        bench.finish(run, outcome.problems, "--from", before)
    return outcome


def expected_exit(bench: Bench, name: str, cases: list[injected.Case]) -> Outcome:
    """Faults that a run reports and ends with, or goes on in spite of; then it is resumed where it can be."""
    outcome = Outcome(name)
    for case in cases:
        run = bench.new_run(f"{name.replace(' ', '-')}-{case.name}")
        code = bench.start(run, case.prepare, *case.overrides)
        said = bench.said(run)
        fine = code == case.code and all(part in said for part in case.said) and said.count("Traceback") == 0
        done, kept = bench.iterations_done(run), bench.newest_checkpoint(run)
        problem = None if fine else f"{case.name}: exit {code}: {said[-300:]}"
        outcome.count(problem, repeated=max(0, done - kept), lost=bench.unreadable(run))
        if case.resumed:
            bench.finish(run, outcome.problems, "--trust", compared=False)
    return outcome


def main() -> int:
    """Print the table; write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few faults of each kind")
    parser.add_argument("--json", type=Path, help="write all raw figures here")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places of the faults")
    parser.add_argument("--only", choices=NAMES, help="one kind of fault")
    parser.add_argument("--kills", type=int, help="how often to kill (default 20, quick 4)")
    options = parser.parse_args()
    kills = options.kills or (4 if options.quick else 20)
    few = 2 if options.quick else 6
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="quartet-faults-"))
    with Bench(folder) as bench:
        kinds = {
            "killed": lambda: killed(bench, draw, kills, saving=False),
            "killed while saving": lambda: killed(bench, draw, kills, saving=True),
            "interrupted": lambda: interrupted(bench, draw, few),
            "disk full": lambda: disk_full(bench, draw, min(few, 4)),
            "damaged": lambda: damaged(bench, draw, 2 * few),
            "out of memory": lambda: expected_exit(bench, "out of memory", injected.MEMORY),
            "not finite": lambda: expected_exit(bench, "not finite", injected.NOT_FINITE),
            "rewards": lambda: expected_exit(bench, "rewards", injected.REWARDS[: 3 if options.quick else None]),
        }
        outcomes = [make() for name, make in kinds.items() if options.only in (None, name)]
    shutil.rmtree(folder)
    report(outcomes, options)
    return 0 if all(o.survived == o.injected and not o.lost and not o.problems for o in outcomes) else 1


def report(outcomes: list[Outcome], options: argparse.Namespace) -> None:
    """The table, the problems, the raw figures."""
    print(f"seed {options.seed}; runs of {ITERATIONS} iterations with a checkpoint every {SAVE_EVERY}\n")
    print(
        "| fault | injected | survived | iterations repeated | most after one fault | files lost |\n|---|---|---|---|---|---|"
    )
    for o in outcomes:
        print(f"| {o.name} | {o.injected} | {o.survived} | {o.repeated} | {o.most_repeated} | {o.lost} |")
    for o in outcomes:
        for problem in o.problems:
            print(f"{o.name}: {problem}", file=sys.stderr)
    if options.json is not None:
        versions: dict[str, Any] = {
            "python": platform.python_version(),
            "machine": platform.platform(),
            "cpus": os.cpu_count(),
        }
        from importlib.metadata import version

        versions |= {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
        content = {"seed": options.seed, "versions": versions, "outcomes": [asdict(o) for o in outcomes]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
