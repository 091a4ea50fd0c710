"""Time of a PPO iteration, TRL 1.12 and Quartet in turn (A B A B), on the same checkpoints, prompts and settings.

32 episodes, 64 response tokens, 4 epochs, microbatches of 8, one minibatch, AdamW; LoRA of rank 16 on all linear layers.
Cases: size S (15M parameters) and M (110M); full fine-tuning and LoRA; responses that run to the limit, and responses that
end after 5 to 60 tokens. A round of a case runs TRL, Quartet in float32 and Quartet in its default precision, each in a
process of its own that has the machine to itself. At S the first iteration of a process warms up and does not count; at
M, where TRL takes minutes, there is but one, which counts on every side, unless `--iterations` asks for more: the first
fetches gigabytes from the system, for the optimizer, the gradients and the activations of all that come.

Rounds follow a list, the most telling first, as long as the next one fits into `--minutes`. Seconds are medians of wall
time; `tokens/s` are response tokens over the whole iteration; the floor is that of floor.py, with the machine's rates
measured at the start, `share` is the floor over the measured time, and `update` the same for the update alone.

usage: make bench-peer
       python benchmarks/ppo_iteration.py [--quick] [--minutes 25] [--only TEXT ...] [--json FILE]
       python benchmarks/ppo_iteration.py --growth docs/growth.svg
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from growth import run_growth
from harness import (
    heading,
    machine,
    make_models,
    own_versions,
    parser,
    peer_versions,
    require,
    rows_of_before,
    run_worker,
    write_json,
)
from iteration_table import print_case

from quartet.models.precision import resolve_dtype

EPISODES, EPOCHS = 32, 4
PLANS = {False: "separate", True: "paired"}
SIDES = ("TRL", "Quartet float32", "Quartet default")
EXPECTED = {"S": 120.0, "M": 400.0}
"""Seconds of a round that was not run yet."""


@dataclass(frozen=True)
class Case:
    """One kind of iteration."""

    size: str
    lora: bool
    early: bool

    @property
    def name(self) -> str:
        """For the table and for --only."""
        return f"{self.size} {'LoRA' if self.lora else 'full'}, {'ends early' if self.early else 'to the limit'}"

    def arguments(self, side: str, iterations: int) -> list[str]:
        """The worker's options."""
        found = ["--policy", "policy-early", "--stop", "eos"] if self.early else ["--stop", "none"]
        found += [
            "--episodes",
            str(EPISODES),
            "--epochs",
            str(EPOCHS),
            "--iterations",
            str(2 if self.size == "S" else iterations),
        ]
        if side == "TRL":
            return [*found, "--mode", "lora" if self.lora else "full"]
        return [*found, "--plan", PLANS[self.lora], "--dtype", "float32" if side == "Quartet float32" else "auto"]


def schedule(options: argparse.Namespace) -> list[Case]:
    """The rounds in order."""
    small = [Case("S", lora, early) for early in (False, True) for lora in (False, True)]
    if options.quick:
        order = [Case("S", False, False), Case("S", True, True)]
    else:
        large = [Case("M", False, False), Case("M", True, False), Case("M", True, True)]
        order = [*small, *large, *small, Case("M", False, True), *small, *large]
    return [case for case in order if any(text in case.name for text in options.only)]


def one_round(options: argparse.Namespace, case: Case) -> list[dict[str, Any]]:
    """Every side once, one after the other."""
    found = []
    for side in SIDES if options.default_differs else SIDES[:2]:
        python: Path | str = options.peer if side == "TRL" else sys.executable
        script = "peer/trl_ppo.py" if side == "TRL" else "quartet_worker.py"
        arguments = ["--root", str(options.models / case.size), *case.arguments(side, options.iterations)]
        raw = run_worker(python, script, arguments, options.threads)
        counted = raw["iterations"][1:] or raw["iterations"]
        found.append({"case": case.name, "side": side, "raw": raw, "counted": counted})
    return found


def all_rounds(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Run rounds until the next would be too long."""
    begin, taken = time.monotonic(), dict[str, float]()
    for case in schedule(options):
        start = time.monotonic()
        expected = EXPECTED[case.size] * (1 if case.size == "S" else options.iterations)
        if start - begin + taken.get(case.name, expected) > 60 * options.minutes:
            continue
        figures["rows"] += one_round(options, case)
        taken[case.name] = time.monotonic() - start
        print(f"{(time.monotonic() - begin) / 60:5.1f} min: {case.name}, {taken[case.name]:.0f} s", file=sys.stderr)
        write_json(options.json, figures)


def compare(options: argparse.Namespace) -> None:
    """Measure both sides; print the table."""
    require(options.peer)
    cases = schedule(options)
    for early in (False, True):
        make_models(options, sorted({case.size for case in cases if case.early is early}), early=early)
    versions = {"quartet": own_versions(), "peer": peer_versions(options.peer)}
    print(heading(versions, options.threads), flush=True)
    rates = run_worker(sys.executable, "floor.py", [], options.threads)
    print(", ".join(f"{name} {rate / 1e9:.0f} G{'B' if name == 'copy' else 'FLOP'}/s" for name, rate in rates.items()))
    options.default_differs = resolve_dtype("auto", torch.device("cpu")) != torch.float32
    if not options.default_differs:
        print("this processor does not multiply matrices in bfloat16: Quartet's default precision is float32 here")
    figures: dict[str, Any] = {"machine": machine(), "versions": versions, "threads": options.threads, "rates": rates}
    rows = rows_of_before(options.json, versions) if options.resume else []
    figures |= {"episodes": EPISODES, "epochs": EPOCHS, "rows": rows}
    all_rounds(options, figures)
    medians: dict[str, Any] = {}
    for name, case in {case.name: case for case in cases}.items():
        rows = [row for row in figures["rows"] if row["case"] == name]
        if not rows:
            print(f"\n{name}: not measured, a round does not fit into what is left of {options.minutes:g} minutes")
            continue
        setting = {"episodes": EPISODES, "epochs": EPOCHS, "rates": rates, "lora": case.lora}
        medians[name] = print_case(name, rows, setting, options.models / case.size)
    write_json(options.json, figures | {"medians": medians})


def main() -> None:
    """Compare with the peer, or show growth."""
    found = parser(__doc__)
    found.add_argument("--minutes", type=float, default=24.0, help="start no round that would end later (default 24)")
    found.add_argument("--iterations", type=int, default=1, help="of a process at size M (default 1)")
    found.add_argument("--resume", action="store_true", help="add rounds to those in the file of --json")
    found.add_argument("--growth", type=Path, metavar="IMAGE", help="measure growth instead and plot it here")
    options = found.parse_args()
    if options.growth is None:
        compare(options)
    else:
        run_growth(options)


if __name__ == "__main__":
    main()
