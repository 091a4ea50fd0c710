"""Time and memory of a PPO iteration in each of 1, 2 and 4 processes under every process engine.

Every case is one torchrun on this machine with OMP_NUM_THREADS=1 in each process. The episodes of an iteration grow with
the processes (weak scaling), so that at perfect scaling the seconds stay as they are; `efficiency` is the tokens per second
over N times those of one process. Processes beyond the cores share them: there the seconds only show that it works.

seconds    median wall time of an iteration after the first (which makes the optimizer's state)
peak       largest anonymous memory (RssAnon, every 2 ms) of any process in the phase, over what it held after imports, a first
           small training step and the meeting of the processes; of the iterations after the first
ratio      what `quartet plan` predicts for a process, over the peak
load/share peak while loading, over 1/N of the bytes of all weights (backbones and adapters)

Memory freed by tensors goes back to the system at once (MALLOC_MMAP_THRESHOLD_=65536, as `run.return_memory: true`), which
costs time in every case alike.

usage: python benchmarks/scaling.py [--quick] [--json FILE] [--size S|M] [--only TEXT ...]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from harness import HERE, heading, machine, make_models, own_versions, parser, write_json
from probe import LORA_ALPHA, LORA_LINEARS, LORA_RANK

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
CUTTING = ("zero3", "fsdp2")
PHASES = ("load", "rollout", "scoring", "update")
SEED, EPISODES, ROWS, RESPONSE = 7, 8, 4, 16
MIB = 2**20


def cases(quick: bool) -> list[dict[str, Any]]:
    """Full fine-tuning under every engine and number of processes; LoRA on two, and on four where weights are cut."""
    counts = (1, 2) if quick else (1, 2, 4)
    found = [{"plan": "separate", "engine": engine, "processes": n} for engine in ENGINES for n in counts]
    if not quick:
        found += [{"plan": "paired", "engine": engine, "processes": 2} for engine in ENGINES]
        found += [{"plan": "paired", "engine": engine, "processes": 4} for engine in ENGINES if engine in CUTTING]
    for case in found:
        case["name"] = f"{case['plan']} {case['engine']} {case['processes']}"
    return found


def configuration(case: dict[str, Any], checkpoints: Path, folder: Path) -> dict[str, Any]:
    """The run of a case, as a user would write it."""
    lora = {"r": LORA_RANK, "alpha": LORA_ALPHA, "target_modules": LORA_LINEARS}
    return {
        "models": {
            "sft": str(checkpoints / "policy"),
            "reward": str(checkpoints / "reward"),
            "sharing": case["plan"],
            "lora": lora if case["plan"] == "paired" else None,
            "dtype": "float32",
            "device": "cpu",
        },
        "data": {"prompts": str(checkpoints / "prompts.jsonl"), "column": "text", "eval_count": 0},
        "rollout": {
            "batch_size": EPISODES * case["processes"],
            "response_length": RESPONSE,
            "batch_rows": EPISODES,
            "stop": None,
        },
        "ppo": {"iterations": 9, "epochs": 1, "microbatch_rows": ROWS, "learning_rate": 3e-6},
        "run": {"dir": str(folder / "run"), "seed": SEED, "return_memory": True},
        "distributed": {"engine": case["engine"]},
    }


def measure(case: dict[str, Any], options: argparse.Namespace, iterations: int) -> list[dict[str, Any]]:
    """One torchrun; what each process wrote, by rank."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "run.yaml").write_text(yaml.safe_dump(configuration(case, options.models / options.size, folder)))
        count = case["processes"]
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        command += ["--master-port", str(free_port()), str(HERE / "scaling_worker.py"), "--iterations", str(iterations)]
        command += ["--config", str(folder / "run.yaml"), "--out", str(folder)]
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": str(options.threads),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])),
            "QUARTET_CACHE": str(options.models / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{case['name']} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def summary(case: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds, tokens a second, peaks and their ratios of a case."""
    main, count = ranks[0], case["processes"]
    later = main["iterations"][1:]
    seconds = median(one["seconds"] for one in later)
    peaks = {"load": max(rank["load"]["anonymous"] for rank in ranks)}
    for phase in PHASES[1:]:
        peaks[phase] = max(one["phases"][phase]["anonymous"] for rank in ranks for one in rank["iterations"][1:])
    predicted = {phase: main["predicted"]["phases"][phase]["peak"] for phase in PHASES}
    cut = count if case["engine"] in CUTTING else 1
    weights = cut * sum(backbone["weights"] + backbone["adapters"] for backbone in main["predicted"]["backbones"])
    return {
        **case,
        "seconds": seconds,
        "tokens_per_second": later[0]["response_tokens"] / seconds,
        "peaks": peaks,
        "predicted": predicted,
        "ratios": {phase: predicted[phase] / peaks[phase] for phase in PHASES},
        "load_share": peaks["load"] / (weights / count),
        "weights": weights,
    }


def line(row: dict[str, Any], alone: dict[str, Any] | None) -> str:
    """One row of the table."""
    speed = row["tokens_per_second"]
    ideal = None if alone is None else alone["tokens_per_second"] * row["processes"]
    efficiency = f"{speed / ideal:6.0%}" if ideal else "     -"
    cells = "".join(f"{row['peaks'][phase] / MIB:8.0f} {row['ratios'][phase]:5.2f}" for phase in PHASES)
    return f"{row['name']:18}{row['seconds']:8.1f}{speed:8.1f} {efficiency:>6}{cells}{row['load_share']:9.2f}"


def main() -> None:
    """Measure every case, print the table, write the raw figures."""
    found = parser(__doc__)
    found.set_defaults(threads=1)
    found.add_argument("--size", choices=("S", "M"), default="S")
    options = found.parse_args()
    make_models(options, [options.size], early=False)
    iterations = 2 if options.quick else 3
    versions = own_versions() | {"deepspeed": version("deepspeed")}
    print(heading({"quartet": versions}, options.threads))
    workload = f"{EPISODES} episodes a process, {RESPONSE} response tokens, 1 epoch, microbatches of {ROWS}, float32"
    print(f"size {options.size}, {workload}; MiB, predicted / measured")
    print(
        f"{'plan engine N':18}{'seconds':>8}{'tok/s':>8} effic." + "".join(f"{p:>8} ratio" for p in PHASES) + "load/shr"
    )
    about = {
        "machine": machine(),
        "versions": versions,
        "size": options.size,
        "seed": SEED,
        "threads": options.threads,
        "workload": workload,
    }
    rows, raw = [], []
    for case in cases(options.quick):
        if not any(text in case["name"] for text in options.only):
            continue
        ranks = measure(case, options, iterations)
        rows.append(summary(case, ranks))
        raw.append({"case": case, "ranks": ranks})
        same = {"plan": case["plan"], "engine": case["engine"], "processes": 1}
        alone = next((row for row in rows if same.items() <= row.items()), None)
        print(line(rows[-1], alone), flush=True)
        write_json(options.json, {**about, "rows": rows, "raw": raw})


if __name__ == "__main__":
    main()
