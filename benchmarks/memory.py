"""Peak memory of PPO beside TRL 1.12's PPOTrainer, and beside LoRA supervised fine-tuning of one model with TRL 1.16.

Every case runs in a process of its own: the same checkpoints and prompts, 32 episodes of 64 response tokens,
microbatches of 8, two iterations of two epochs (Adam's state exists from the first step on, so that more epochs add
nothing). The fine-tuning trains on as many tokens a step: the same prompts with 64 more tokens each.

Two measures, both the peak over what the process held after imports and a first tiny training step:
resident   VmHWM, with the pages of memory-mapped weights and of libraries that were touched
anonymous  memory that no file backs (RssAnon, sampled every 2 ms): what cannot be dropped and read again

The allocator is glibc's with its defaults, as users have it; rows marked `returned` set `run.return_memory: true`, under
which Quartet has freed tensors go back to the system at once (otherwise it is off here, whatever memory is free).
`--malloc` measures every row again with MALLOC_MMAP_THRESHOLD_=65536, which has the same effect on the peers too.

usage: make bench-peer; python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    BENCH,
    heading,
    machine,
    make_models,
    own_versions,
    parser,
    peer_versions,
    require,
    run_worker,
    write_json,
)

COMMON = ["--iterations", "2", "--sample-memory"]
EPOCHS = ["--epochs", "2"]
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


def tables(options: argparse.Namespace, sizes: list[str], figures: dict[str, Any]) -> None:
    """Measure and print a table for each size; the raw figures are written as they come."""
    rows: list[dict[str, Any]] = figures["rows"]
    runs = [("float32", "default"), ("default", "default")] + [("float32", "returned")] * options.malloc
    for size in sizes:
        print(f"\nsize {size}, MiB over imports, resident / anonymous; the phase is that of the peak")
        print(f"{'':18}{'float32':>18}{'':10}{'default dtype':>18}" + "     float32, returned" * options.malloc)
        for name, case in CASES.items():
            if options.only not in name:
                continue
            line = f"{name:18}"
            for precision, malloc in runs:
                if precision == "default" and case.default is None:
                    line += f"{'':18}"
                    continue
                row = measure(options, size, name, precision, malloc)
                rows.append(row)
                write_json(options.json, figures)
                line += f"{row['resident'] / 2**20:9.0f} /{row['anonymous'] / 2**20:7.0f}"
                line += f"  {row['phase']:8}" if (precision, malloc) == runs[0] else ""
            print(line, flush=True)
        bounds(rows, size)


def bounds(rows: list[dict[str, Any]], size: str) -> None:
    """Print what was to be reached beside what was."""
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
    found.add_argument("--sft", type=Path, default=BENCH / "sft/bin/python", help="Python with TRL 1.16")
    found.add_argument("--malloc", action="store_true", help="measure again with freed memory returned at once")
    options = found.parse_args()
    require(options.peer)
    require(options.sft)
    sizes = ["S"] if options.quick else ["S", "M"]
    make_models(options, sizes, early=False)
    versions = {
        "quartet": own_versions(),
        "peer": peer_versions(options.peer),
        "fine-tuning": peer_versions(options.sft),
    }
    print(heading(versions, options.threads))
    figures = {"machine": machine(), "versions": versions, "threads": options.threads, "rows": []}
    tables(options, sizes, figures)


if __name__ == "__main__":
    main()
