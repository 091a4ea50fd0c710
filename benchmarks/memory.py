"""Peak memory of PPO beside TRL 1.12's PPOTrainer, and beside LoRA supervised fine-tuning of one model with TRL 1.16.

Every case runs in a process of its own: the same checkpoints and prompts, 32 episodes of 64 response tokens,
microbatches of 8, two iterations of one epoch (Adam's state exists from the first step on, so that more epochs add
nothing). The fine-tuning trains on as many tokens a step: the same prompts with 64 more tokens each.

Two measures, both the peak over what the process held after imports and a first tiny training step:
resident   VmHWM, with the pages of memory-mapped weights and of libraries that were touched
anonymous  memory that no file backs (RssAnon, sampled every 2 ms): what cannot be dropped and read again

The allocator is glibc's with its defaults, as users have it; Quartet has one heap for all threads and sets
`run.return_memory: auto`, which is its default, and in rows marked `returned` true, under which all freed tensors go back to
the system at once.
`--malloc` measures every row again with MALLOC_MMAP_THRESHOLD_=65536, which has the same effect on the peers too.

usage: make bench-peer; python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    BENCH,
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

from quartet.models.precision import resolve_dtype

COMMON = ["--iterations", "2", "--sample-memory"]
EPOCHS = ["--epochs", "1"]
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MEASURES = ("resident", "anonymous")
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One row of the table: a script and its options in float32 and in the side's default precision."""

    script: str
    options: tuple[str, ...]
    default: tuple[str, ...] | None
    """Options that choose the default precision; None where that is float32."""

    def arguments(self, precision: str) -> list[str]:
        """Command line of a precision."""
        epochs = [] if self.script.endswith("trl_sft.py") else EPOCHS
        return [*COMMON, *epochs, *self.options, *((self.default or ()) if precision == "default" else ())]


def _ours(*options: str) -> Case:
    return Case("quartet_worker.py", options, ("--dtype", "auto"))


CASES = {
    "TRL PPO full": Case("peer/trl_ppo.py", ("--mode", "full"), None),
    "TRL PPO LoRA": Case("peer/trl_ppo.py", ("--mode", "lora"), None),
    "TRL SFT LoRA": Case("peer/trl_sft.py", (), ("--bf16",)),
    "separate (full)": _ours("--plan", "separate"),
    "paired": _ours("--plan", "paired"),
    "single": _ours("--plan", "single"),
    "single 4bit": _ours("--plan", "single", "--quantization", "4bit"),
    "paired, returned": _ours("--plan", "paired", "--return-memory"),
    "single, returned": _ours("--plan", "single", "--return-memory"),
    "4bit, returned": _ours("--plan", "single", "--quantization", "4bit", "--return-memory"),
}
BOUNDS = (
    ("single", "TRL SFT LoRA", 1.15),
    ("single", "TRL PPO LoRA", 0.25),
    ("single, returned", "TRL PPO LoRA", 0.25),
    ("paired", "TRL PPO LoRA", 0.35),
    ("paired, returned", "TRL PPO LoRA", 0.35),
    ("separate (full)", "TRL PPO full", 0.70),
)


def measure(options: argparse.Namespace, size: str, name: str, precision: str, malloc: str) -> dict[str, Any]:
    """One case in a process of its own; bytes by measure, with the phase of the peak."""
    case = CASES[name]
    python: Path | str = sys.executable
    if case.script.startswith("peer/"):
        python = options.sft if case.script.endswith("trl_sft.py") else options.peer
    arguments = ["--root", str(options.models / size), *case.arguments(precision)]
    environment = RETURNED if malloc == "returned" else {}
    raw = run_worker(python, case.script, arguments, options.threads, **environment)
    peaks = [("load", raw["load"])] + [item for turn in raw["iterations"] for item in turn["phases"].items()]
    found: dict[str, Any] = {"size": size, "case": name, "precision": precision, "malloc": malloc, "raw": raw}
    for kind in MEASURES:
        found["phase"], held = max(peaks, key=lambda item: item[1][kind])
        found[kind] = held[kind]
    return found


def collect(options: argparse.Namespace, sizes: list[str], figures: dict[str, Any]) -> None:
    """Measure what is asked for and not in the figures yet; they are written as they come."""
    rows: list[dict[str, Any]] = figures["rows"]
    # Where the processor does not compute in bfloat16, the default is float32, and fine-tuning in bfloat16 takes for ever.
    differs = [("default", "default")] * (resolve_dtype("auto", torch.device("cpu")) != torch.float32)
    runs = [("float32", "default"), *differs, *[("float32", "returned")] * options.malloc]
    for size, (precision, malloc), (name, case) in itertools.product(sizes, runs, CASES.items()):
        known = any(_key(row) == (size, name, precision, malloc) for row in rows)
        if known or not any(text in name for text in options.only) or (precision == "default" and case.default is None):
            continue
        row = measure(options, size, name, precision, malloc)
        rows.append(row)
        write_json(options.json, figures)
        print(f"{size} {name:18}{precision:9}{malloc:9} {_cell(row)} MiB, at its peak in {row['phase']}", flush=True)


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["size"], row["case"], row["precision"], row["malloc"]


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['resident'] / 2**20:.0f} / {row['anonymous'] / 2**20:.0f}"


def tables(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table of each size, and what was to be reached."""
    by_key = {_key(row): row for row in rows}
    for size in dict.fromkeys(row["size"] for row in rows):
        malloc = [("float32", "returned")] * any(_key(row)[0::3] == (size, "returned") for row in rows)
        runs = [("float32", "default"), ("default", "default"), *malloc]
        print(
            f"\n| {size}, MiB, resident / anonymous | float32 | peak in | default dtype |"
            + " freed memory returned |" * len(malloc)
        )
        print("|---|---|---|---|" + "---|" * len(malloc))
        for name in CASES:
            cells = [by_key.get((size, name, *run)) for run in runs]
            if any(cells):
                phase = cells[0]["phase"] if cells[0] else ""
                print(f"| {name} | " + " | ".join([_cell(cells[0]), phase, *map(_cell, cells[1:])]) + " |")
        bounds(rows, size)


def bounds(rows: list[dict[str, Any]], size: str) -> None:
    """Print what was to be reached beside what was."""
    print()
    for malloc in dict.fromkeys(row["malloc"] for row in rows):
        known = {r["case"]: r for r in rows if (r["size"], r["precision"], r["malloc"]) == (size, "float32", malloc)}
        for mine, other, limit in BOUNDS:
            if mine not in known or other not in known:
                continue
            ratios = {kind: known[mine][kind] / known[other][kind] for kind in MEASURES}
            verdict = "reached" if ratios["resident"] <= limit else "MISSED"
            figures = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items())
            setting = "" if malloc == "default" else f" (MALLOC_MMAP_THRESHOLD_={RETURNED['MALLOC_MMAP_THRESHOLD_']})"
            print(f"  {mine} / {other}: {figures}; to reach {limit}: {verdict}{setting}")


def main() -> None:
    """Print the tables; write the raw figures."""
    found = parser(__doc__)
    found.add_argument("--sizes", nargs="+", default=["S", "M"], choices=("S", "M"))
    found.add_argument("--sft", type=Path, default=BENCH / "sft/bin/python", help="Python with TRL 1.16")
    found.add_argument(
        "--resume", action="store_true", help="keep what the file of --json holds, measure what it lacks"
    )
    found.add_argument("--malloc", action="store_true", help="measure again with freed memory returned at once")
    options = found.parse_args()
    require(options.peer)
    require(options.sft)
    sizes = ["S"] if options.quick else options.sizes
    make_models(options, sizes, early=False)
    versions = {
        "quartet": own_versions(),
        "peer": peer_versions(options.peer),
        "fine-tuning": peer_versions(options.sft),
    }
    print(heading(versions, options.threads))
    figures = {"machine": machine(), "versions": versions, "threads": options.threads, "rows": []}
    if options.resume:
        figures["rows"] = rows_of_before(options.json, versions)
    collect(options, sizes, figures)
    tables(figures["rows"])


if __name__ == "__main__":
    main()
