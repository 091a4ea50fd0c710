"""Host memory while loading: at most 1.1 times the largest checkpoint beside what stays, under every plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_adapter, write_model

SIZES = {"hidden_size": 320, "intermediate_size": 1600, "num_hidden_layers": 5, "num_attention_heads": 4}
VOCABULARY = 260
CHECKPOINT = 4 * 5 * (2 * 320 * 320 + 2 * 320 * 160 + 3 * 320 * 1600)
"""Bytes of the layers, 37 MiB; embeddings and norms are small."""
CASES: dict[str, dict[str, Any]] = {
    "separate": {},
    "separate, bfloat16": {"dtype": "bfloat16"},
    "frozen layers": {"freeze_layers": 3},
    "paired": {"lora": {"r": 4}, "sharing": "paired"},
    "paired, bfloat16": {"lora": {"r": 4}, "sharing": "paired", "dtype": "bfloat16"},
    "paired, 8bit": {"lora": {"r": 4}, "sharing": "paired", "quantization": "8bit"},
    "single": {"lora": {"r": 4}, "sharing": "single"},
    "single, 4bit": {"lora": {"r": 4}, "sharing": "single", "quantization": "4bit"},
}
SCRIPT = """
import json, os, re, sys
from pathlib import Path
from quartet.config import ModelsConfig
from quartet.models.checkpoint_info import read_checkpoint
from quartet.models.loading import load_roles, plan_for
from quartet.run.memory_probe import PeakMemory, quick_anonymous_bytes
import torch
torch.set_num_threads(1)

def load(models):
    models = ModelsConfig(**models)
    sft, reward = read_checkpoint(models.sft, "sft"), read_checkpoint(models.reward, "reward")
    with PeakMemory("cpu").phase() as found:
        roles = load_roles(models, plan_for(models, sft, reward), sft, reward, seed=0)
        after = quick_anonymous_bytes()
    return roles, found.peak, after

first, *cases = json.loads(sys.argv[1])
load(first)  # what libraries take when they load their first model
found = []
for models in cases:
    reading, writing = os.pipe()
    if os.fork() == 0:  # memory of one case must not serve the next
        floor = quick_anonymous_bytes()
        roles, peak, after = load(models)
        os.write(writing, json.dumps([peak - floor, after - floor]).encode())
        os._exit(0)
    os.wait()
    found.append(json.loads(os.read(reading, 1000)))
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks")
def test_peak_while_loading(library: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "sft", "llama", **SIZES)
    write_model(tmp_path / "reward", "llama", task="classifier", **SIZES)
    write_adapter(tmp_path / "adapter", tmp_path / "sft", task="classifier")

    def models(values: dict[str, Any]) -> dict[str, Any]:
        reward = tmp_path / ("adapter" if values.get("sharing") == "single" else "reward")
        return {"dtype": "float32", "device": "cpu"} | values | {"sft": str(tmp_path / "sft"), "reward": str(reward)}

    warm = {n: {"sft": str(library.path("llama", "sft")), "reward": str(library.path("llama", "reward"))} for n in "x"}
    cases = [models({}) | warm["x"], *(models(values) for values in CASES.values())]
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (peak, stays) in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        print(f"{name}: peak {peak / CHECKPOINT:.2f}, stays {stays / CHECKPOINT:.2f} checkpoints")
        assert peak <= stays + 1.1 * CHECKPOINT, name
