"""Predicted against measured memory: `quartet plan` and two PPO iterations of the same configuration, phase by phase.

Each configuration runs in a process of its own. The first iteration fills the optimizer state; the second is measured. On
CUDA the measure is `torch.cuda.max_memory_allocated`; on a CPU it is the process's anonymous memory, sampled every 4 ms,
less what it was after imports and a first small forward and backward pass.

glibc keeps freed blocks below a threshold that grows to 32 MiB, and cuts new blocks out of them, so that what a process
holds depends on the order of its allocations. The processes therefore run with MALLOC_MMAP_THRESHOLD_=65536, under which a
freed tensor goes back to the system at once; `--default-malloc` leaves it out and shows the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import machine, own_versions
from memory_plan_cases import PROMPT, RESPONSE, SEED, SIZES, configurations
from memory_plan_worker import predict, write_checkpoints

from quartet.models.precision import resolve_device, resolve_dtype

PHASES = ("load", "rollout", "scoring", "update")
QUICK = ("S full", "S lora paired", "S lora single checkpointing")
WORKER = Path(__file__).with_name("memory_plan_worker.py")


def measured_alone(root: Path, spec: dict[str, Any], default_malloc: bool, *, merged: bool) -> dict[str, Any]:
    """Peaks of two iterations in a fresh interpreter."""
    environment = dict(os.environ)
    if spec.get("parallel"):
        environment["OMP_NUM_THREADS"] = "2"
    if not default_malloc:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-W", "ignore", str(WORKER), "--root", str(root), "--spec", json.dumps(spec)]
    command += ["--merged"] if merged else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{spec} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print the table; write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three small configurations")
    parser.add_argument("--json", type=Path, help="write all raw figures here")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument(
        "--resume", action="store_true", help="keep what the file of --json holds, measure what it lacks"
    )
    parser.add_argument(
        "--predict", action="store_true", help="predict anew what the file of --json holds, and measure nothing"
    )
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's thresholds as they are")
    options = parser.parse_args()
    table(options)


def table(options: argparse.Namespace) -> None:
    """Run every configuration and print predicted, measured and their difference."""
    chosen = {n: s for n, s in configurations().items() if (not options.quick or n in QUICK) and options.only in n}
    if resolve_dtype("auto", resolve_device("auto")) == torch.float32:
        print("bfloat16 is left out: this processor does not multiply matrices in it, and takes other paths")
        chosen = {name: spec for name, spec in chosen.items() if spec["models"]["dtype"] != "bfloat16"}
    rows: list[dict[str, Any]] = []
    if (options.resume or options.predict) and options.json and options.json.exists():
        rows = rows_of_before(options)
    known = {row["name"]: row for row in rows}
    if options.predict:
        chosen = {name: spec for name, spec in chosen.items() if name in known}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["QUARTET_CACHE"] = str(root / "cache")  # prediction and measurement see the same conversions there
        for size in sorted({spec["size"] for spec in chosen.values()}):
            write_checkpoints(root, size)
        shown = ("processor", "cores", "threads", "device", "torch", "transformers")
        print(", ".join(f"{k} {v}" for k, v in setting().items() if k in shown))
        print("\n| MiB, predicted / measured | " + " | ".join(PHASES) + " | exact |")
        print("|---|" + "---|" * (len(PHASES) + 1))
        for name, spec in chosen.items():
            if name not in known or options.predict:
                with threads(2 if spec.get("parallel") else torch.get_num_threads()):
                    predicted = predict(root, spec)
                if options.predict:
                    known[name]["predicted"] = predicted
                else:
                    measured = measured_alone(root, spec, options.default_malloc, merged=predicted["merged"])
                    known[name] = {"name": name, "spec": spec, "predicted": predicted, **measured}
                    rows.append(known[name])
                save(options, rows)
            print(line(name, known[name]["predicted"], known[name]), flush=True)
    compared = ("rollout", "scoring", "update")
    worst = max((abs(difference(row, phase)), row["name"], phase) for row in rows for phase in compared)
    print(f"largest difference in rollout, scoring and update: {worst[0]:.1%} ({worst[1]}, {worst[2]})")
    loads = max(abs(r["predicted"]["phases"]["load"]["peak"] - r["measured"]["load"]) for r in rows) / 2**20
    print(f"largest difference in load: {loads:.1f} MiB")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Plan for a process with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of_before(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier run; it must have been one on the same machine and versions."""
    before = json.loads(options.json.read_text())
    if before["machine"] != setting():
        raise SystemExit(f"{options.json} was measured otherwise; leave out --resume to measure all rows again")
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the raw figures, if asked to."""
    if options.json:
        options.json.write_text(json.dumps({"machine": setting(), "options": vars_of(options), "rows": rows}, indent=2))


def line(name: str, predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """One row of the table, in Markdown."""
    cells = []
    for phase in PHASES:
        mine, real = predicted["phases"][phase]["peak"], measured["measured"][phase]
        cells.append(f"{mine / 2**20:.0f} / {real / 2**20:.0f} ({mine / max(real, 2**20) - 1:+.1%})")
    off = max(abs(predicted["exact"][k] / v - 1) for k, v in measured["exact"].items())
    return f"| {name} | " + " | ".join(cells) + f" | {off:.3%} |"


def difference(row: dict[str, Any], phase: str) -> float:
    """Predicted over measured, less one."""
    ratio: float = row["predicted"]["phases"][phase]["peak"] / row["measured"][phase]
    return ratio - 1


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that matter, as plain values."""
    return {"quick": options.quick, "only": options.only, "default_malloc": options.default_malloc}


def setting() -> dict[str, Any]:
    """What the figures were taken on, and of what."""
    here = {name: value for name, value in machine().items() if name != "load_average"}
    more = {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "sizes": SIZES,
        "seed": SEED,
        "prompt_tokens": PROMPT,
        "response_tokens": RESPONSE,
    }
    return here | own_versions() | more


if __name__ == "__main__":
    main()
