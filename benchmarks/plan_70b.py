"""On paper: what a device needs for policy, reference, value and reward model of 70 billion parameters, by `quartet plan`.

Writes two checkpoints without weights (config.json, and a safetensors header before a body that takes no room on disk), in the
shape of Llama 3 70B, and plans full fine-tuning and LoRA under zero3 and fsdp2 on 8, 16 and 64 GPUs. Nothing is trained: the
figures are predictions, and `fits` leaves a tenth of 80 GB for what the planner does not see (fragmentation, kernels' buffers).
`seconds` is the wall time of the whole command, which each row runs in a process of its own.

usage: python benchmarks/plan_70b.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import machine, own_versions, write_json
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

SHAPE = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
DEVICE, KEPT = 80e9, 0.9
GIB = 2**30
RUN: dict[str, Any] = {
    "data": {"prompts": "unread", "max_prompt_tokens": 512},
    "rollout": {"batch_size": 512, "response_length": 512, "batch_rows": 8},
    "ppo": {"epochs": 1, "minibatches": 1, "microbatch_rows": 1},
}
PHASES = ("load", "rollout", "scoring", "update")


def write_checkpoints(folder: Path) -> None:
    """`sft` and `reward`, in bfloat16, without a weight in them."""
    for name, loader in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        config = LlamaConfig(**SHAPE, num_labels=1, pad_token_id=0)
        with torch.device("meta"):
            model = loader.from_config(config)
        config.save_pretrained(folder / name)
        header, offset = {}, 0
        for key, parameter in model.named_parameters():
            size = 2 * math.prod(parameter.shape)
            header[key] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        with (folder / name / "model.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)


def plan(folder: Path, lora: bool, engine: str, devices: int) -> tuple[dict[str, Any], float]:
    """What `quartet plan --json` prints, and the seconds that it takes."""
    models = {"sft": str(folder / "sft"), "reward": str(folder / "reward"), "device": "cuda", "dtype": "bfloat16"}
    values = {**RUN, "models": {**models, "gradient_checkpointing": True, "lora": {"r": 16} if lora else None}}
    values["distributed"] = {"gather_for_rollout": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    arguments = ["plan", str(folder / "run.yaml"), "--processes", str(devices), "--engine", engine, "--json"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "quartet", *arguments], stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result, seconds


def line(name: str, found: dict[str, Any], seconds: float) -> str:
    """One row of the table."""
    cells = "".join(f" | {found['phases'][phase]['peak'] / GIB:.1f}" for phase in PHASES)
    fits = "yes" if found["peak"]["bytes"] <= KEPT * DEVICE else "no"
    carried = [found["traffic"][phase]["total"] / GIB for phase in PHASES[1:]]
    return f"| {name}{cells} | {fits} | " + " | ".join(f"{one:,.0f}" for one in carried) + f" | {seconds:.1f} |"


def main() -> None:
    """Plan every combination and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 devices only")
    parser.add_argument("--json", type=Path, help="write all plans here")
    options = parser.parse_args()
    plans = []
    print("| | load | rollout | scoring | update | fits 80 GB | sent in rollout | in scoring | in update | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        write_checkpoints(Path(temporary))
        for lora in (False, True):
            for engine in ("zero3", "fsdp2"):
                for devices in (8,) if options.quick else (8, 16, 64):
                    found, seconds = plan(Path(temporary), lora, engine, devices)
                    plans.append(
                        {"lora": lora, "engine": engine, "devices": devices, "seconds": seconds, "plan": found}
                    )
                    print(
                        line(f"{'LoRA' if lora else 'full'}, {engine}, {devices} devices", found, seconds), flush=True
                    )
    write_json(
        options.json, {"machine": machine(), "versions": own_versions(), "shape": SHAPE, "run": RUN, "plans": plans}
    )


if __name__ == "__main__":
    main()
