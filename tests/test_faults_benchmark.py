"""The benchmark of faults, with two kills: what it does to whole runs is not done elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quartet

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.mark.parametrize("kind", ["killed", "killed while saving"])
def test_a_killed_run_goes_on_bit_by_bit(kind: str, tmp_path: Path) -> None:
    figures = tmp_path / "faults.json"
    command = [sys.executable, "-W", "ignore", str(BENCHMARK), "--kills", "2", "--only", kind, "--json", str(figures)]
    paths = os.pathsep.join([str(Path(quartet.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ) | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (outcome,) = json.loads(figures.read_text())["outcomes"]
    assert (outcome["injected"], outcome["survived"], outcome["lost"], outcome["problems"]) == (2, 2, 0, [])
    assert outcome["most_repeated"] <= 2
