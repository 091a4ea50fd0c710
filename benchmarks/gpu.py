"""One PPO iteration on a GPU: decoding against memory bandwidth, the update against the rate of matrix products, TRL beside.

Random models of 0.5 and 1.5 billion parameters in bfloat16, 64 episodes of 256 response tokens that run to the limit, two
epochs, microbatches of `--rows` sequences. All rows are decoded at once, by both sides. The first iteration of a process
warms up and does not count. The floors are those of floor.py with the GPU's own rates, measured at the start. TRL 1.12 runs
where `--peer` names a Python that has it (bfloat16 weights), after all of Quartet's cases; elsewhere its column is empty.

`--device cpu --sizes S` runs the same on a CPU, to see that it works.

usage: python benchmarks/gpu.py [--quick] [--json benchmarks/results/gpu.json] [--peer PYTHON] [--only TEXT ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from harness import heading, machine, make_models, own_versions, parser, peer_versions, run_worker, write_json
from iteration_table import floor_of, medians

EPISODES, RESPONSE, ROWS, EPOCHS, ITERATIONS = 64, 256, 16, 2, 3
PLANS = {False: "separate", True: "paired"}
TO_REACH = {"rollout": 0.5, "update": 0.5}
"""Shares of the floor."""


def episodes_of(arguments: argparse.Namespace) -> int:
    """Episodes of an iteration."""
    return 8 if arguments.quick else EPISODES


def options_of(arguments: argparse.Namespace) -> list[str]:
    """The workload, for both sides."""
    episodes, response = episodes_of(arguments), 32 if arguments.quick else RESPONSE
    rows = min(arguments.rows, episodes)
    return [
        *("--episodes", str(episodes), "--response-length", str(response), "--rows", str(rows)),
        *("--epochs", str(EPOCHS), "--iterations", str(ITERATIONS), "--stop", "none", "--device", arguments.device),
    ]


def measure(arguments: argparse.Namespace, size: str, lora: bool, side: str) -> dict[str, Any]:
    """Some iterations of one side; the first warms up."""
    root = ["--root", str(arguments.models / size)]
    if side == "TRL":
        dtype = "bfloat16" if arguments.device == "cuda" else "float32"
        own = ["--mode", "lora" if lora else "full", "--dtype", dtype]
        raw = run_worker(arguments.peer, "peer/trl_ppo.py", [*root, *options_of(arguments), *own], arguments.threads)
    else:
        own = ["--plan", PLANS[lora], "--dtype", "auto", "--batch-rows", str(episodes_of(arguments))]
        raw = run_worker(sys.executable, "quartet_worker.py", [*root, *options_of(arguments), *own], arguments.threads)
    row = {"size": size, "lora": lora, "side": side, "raw": raw, "counted": raw["iterations"][1:]}
    print(f"{name_of(size, lora)}, {side}: {medians([row])['seconds']:.2f} s", flush=True)
    return row


def name_of(size: str, lora: bool) -> str:
    """A case, for the table and for --only."""
    return f"{size} {'LoRA' if lora else 'full'}"


def report(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]], rates: dict[str, float]) -> str:
    """One line of the table."""
    row, peer = rows["Quartet"], rows.get("TRL")
    found, models = medians([row]), arguments.models / row["size"]
    setting = {"episodes": episodes_of(arguments), "epochs": EPOCHS, "rates": rates, "lora": row["lora"]}
    least = floor_of(found, found["decode_steps"], setting, models)
    shares = {stage: least[stage] / found[f"{stage} wall"] for stage in TO_REACH}
    ratio = "" if peer is None else f"{found['seconds'] / medians([peer])['seconds']:.2f}"
    cells = "".join(f"{found[f'{stage} wall']:9.2f} ({share:4.0%})" for stage, share in shares.items())
    name = name_of(row["size"], row["lora"])
    speed = found["response_tokens"] / found["rollout wall"]
    return f"{name:12}{found['seconds']:9.2f}{cells}{found['scoring wall']:9.2f}{speed:11.0f}{ratio:>8}"


def main() -> None:
    """Print the table; write the raw figures."""
    found = parser(__doc__)
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--sizes", nargs="+", default=["0.5B", "1.5B"])
    found.add_argument("--rows", type=int, default=ROWS, help="sequences of a microbatch, on both sides")
    arguments = found.parse_args()
    gpu = _gpu() if arguments.device == "cuda" else None
    if arguments.device == "cuda" and gpu is None:
        raise SystemExit(
            "torch sees no GPU here; run this on a machine with one, or see that it works with --device cpu"
        )
    sizes = arguments.sizes[:1] if arguments.quick else arguments.sizes
    versions = {"quartet": own_versions()} | (
        {"peer": peer_versions(arguments.peer)} if arguments.peer.exists() else {}
    )
    make_models(arguments, sizes, early=False)
    rates = run_worker(sys.executable, "floor.py", ["--device", arguments.device], arguments.threads)
    print(heading(versions, arguments.threads))
    if gpu is not None:
        print(", ".join(f"{name} {value}" for name, value in gpu.items()))
    print(", ".join(f"{name} {rate / 1e9:.0f} G{'B' if name == 'copy' else 'FLOP'}/s" for name, rate in rates.items()))
    figures: dict[str, Any] = {"machine": machine() | {"gpu": gpu}, "versions": versions, "rates": rates, "rows": []}
    figures["microbatch"] = arguments.rows
    cases = [(size, lora) for size in sizes for lora in (False, True)]
    cases = [case for case in cases if any(text in name_of(*case) for text in arguments.only)]
    rows: dict[tuple[str, bool], dict[str, dict[str, Any]]] = {case: {} for case in cases}
    for side in ["Quartet", "TRL"] if arguments.peer.exists() else ["Quartet"]:
        for case in cases:
            rows[case][side] = measure(arguments, *case, side)
            figures["rows"].append(rows[case][side])
            write_json(arguments.json, figures)
    columns = f"{'seconds':>9}{'rollout (floor)':>16}{'update (floor)':>16}{'scoring':>8}{'tokens/s':>11}{'/ TRL':>8}"
    print(f"{'':12}{columns}")
    for case in cases:
        print(report(arguments, rows[case], rates))


def _gpu() -> dict[str, Any] | None:
    """The GPU's name and its libraries, asked in a process of its own, which leaves no memory on it; None without one."""
    code = (
        "import json, torch; here = torch.cuda.is_available(); print(json.dumps({'name': torch.cuda.get_device_name(), "
        "'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version()} if here else None))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] | None = json.loads(printed)
    return found


if __name__ == "__main__":
    main()
