"""What the benchmark scripts share: workers in processes of their own, machine and versions, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / ".bench"
"""Environments and checkpoints of the benchmarks; `make bench-peer` fills it."""
PEER_PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark against the peer has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="minutes: size S only, one measurement each")
    found.add_argument("--json", type=Path, help="write all raw figures here")
    found.add_argument("--peer", type=Path, default=BENCH / "peer/bin/python", help="Python with TRL 1.12")
    found.add_argument("--models", type=Path, default=BENCH / "models", help="checkpoints, made where missing")
    found.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every worker")
    found.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only cases whose names contain one of these"
    )
    return found


def chosen_cases(options: argparse.Namespace, cases: dict[str, Any]) -> dict[str, Any]:
    """The cases, whose first entry is the size, that the options ask for; those of size M are not quick. Those in bfloat16 are
    left out where the processor would take for ever."""
    import torch

    wanted = {name: case for name, case in cases.items() if any(text in name for text in options.only)}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() and any("bfloat16" in case for case in wanted.values()):
        print("bfloat16 is left out: this processor does not multiply matrices in it")
        wanted = {name: case for name, case in wanted.items() if "bfloat16" not in case}
    return {name: case for name, case in wanted.items() if case[0] == "S" or not options.quick}


def require(python: Path) -> None:
    """End with one sentence where a peer's environment is missing."""
    if not python.exists():
        raise SystemExit(f"{python} does not exist; create the peer's environments with: make bench-peer")


def make_models(options: argparse.Namespace, sizes: list[str], *, early: bool) -> None:
    """Write the checkpoints that are missing."""
    if not sizes:
        return
    command = [sys.executable, "-W", "ignore", str(HERE / "peer/make_models.py"), "--out", str(options.models), *sizes]
    _run([*command, "--early"] if early else command, options.threads, {})


def run_worker(python: Path | str, script: str, arguments: list[str], threads: int, **environment: str) -> Any:
    """Run a worker script alone in a fresh interpreter; its result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [str(python), "-W", "ignore", str(HERE / script), "--out", str(out), *arguments]
        _run(command, threads, environment)
        return json.loads(out.read_text())


def _run(command: list[str], threads: int, extra: dict[str, str]) -> None:
    source = os.environ.get("PYTHONPATH", "")
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), str(HERE / "peer"), source])),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "processor": processor[1] if processor else platform.processor(),
        "extensions": extensions(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def extensions() -> list[str]:
    """What decides the rates of matrix products on a CPU: vectors, and products in bfloat16."""
    flags = re.search(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    known = set() if flags is None else set(flags[1].split())
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in known]


def own_versions() -> dict[str, str]:
    """Versions on Quartet's side; Quartet itself may run from its source, and bitsandbytes is for quantization only."""
    return {name: _version(name) for name in ("quartet-rlhf", "torch", "transformers", "peft", "bitsandbytes")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def peer_versions(python: Path) -> dict[str, str]:
    """Versions in a peer's environment."""
    code = (
        "import json; from importlib.metadata import version; "
        f"print(json.dumps({{n: version(n) for n in {PEER_PACKAGES}}}))"
    )
    printed = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(printed)
    return found


def heading(versions: dict[str, dict[str, str]], threads: int) -> str:
    """One line on machine and one for each side."""
    about = machine()
    name = f"{about['processor']} ({', '.join(about['extensions'])})"
    lines = [f"{name}, {about['cores']} cores, {about['memory_gib']} GiB, {threads} threads"]
    lines += [f"{side}: " + ", ".join(f"{k} {v}" for k, v in held.items()) for side, held in versions.items()]
    return "\n".join(lines)


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write raw figures, if asked to."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")


def rows_of_before(file: Path | None, versions: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same versions; none where there was no such run."""
    if file is None or not file.exists():
        return []
    before = json.loads(file.read_text())
    if before["versions"] != versions:
        raise SystemExit(f"{file} was measured with other versions; leave out --resume to measure all rows again")
    rows: list[dict[str, Any]] = before["rows"]
    return rows
