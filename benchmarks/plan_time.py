"""How long `quartet plan` takes for 70 billion parameters: wall and CPU seconds of the whole command, imports included.

The checkpoints are those of Llama 3 70B as far as the planner looks: configurations and safetensors headers, on sparse files
that take no room. Planned are LoRA runs in bfloat16, as configured and with a search for what fits into `--memory`.

usage: python benchmarks/plan_time.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from harness import heading, machine, own_versions, write_json

SIZES = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
CASES = {
    "as configured": [],
    "eight processes, zero3": ["--processes", "8", "--engine", "zero3"],
    "search, 80 GiB": ["--memory", "80GiB"],
}


def write_checkpoint(folder: Path, loader: Any) -> None:
    """A configuration, and a safetensors file of bfloat16 tensors that is all header."""
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)
    with torch.device("meta"):
        model = loader.from_config(config)
    config.save_pretrained(folder)
    header, offset = {}, 0
    for name, parameter in model.named_parameters():
        end = offset + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)


def seconds(root: Path, arguments: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of one `quartet plan`."""
    command = [sys.executable, "-W", "ignore", "-m", "quartet", "plan", str(root / "run.yaml"), "--json", *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):  # 2: nothing fits
        raise SystemExit(done.stderr[-3000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "code": done.returncode}


def main() -> None:
    """Print the table; write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--json", type=Path, help="write all raw figures here")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    versions = {"quartet": own_versions()}
    print(heading(versions, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))))
    print(f"load average {os.getloadavg()[0]:.1f}\n\n| Llama 3 70B, LoRA | wall s | CPU s |\n|---|---|---|")
    figures: dict[str, Any] = {"machine": machine(), "versions": versions, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, loader in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
            write_checkpoint(root / name, loader)
        models = {"sft": str(root / "sft"), "reward": str(root / "reward"), "lora": {"r": 16}, "dtype": "bfloat16"}
        (root / "run.yaml").write_text(yaml.safe_dump({"models": models, "data": {"prompts": "unread"}}))
        for name, arguments in list(CASES.items())[: 1 if options.quick else None]:
            taken = seconds(root, arguments)
            figures["rows"].append({"case": name, **taken})
            write_json(options.json, figures)
            print(f"| {name} | {taken['wall']:.1f} | {taken['cpu']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
