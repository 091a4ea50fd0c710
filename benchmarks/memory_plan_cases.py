"""The configurations whose predicted and measured memory `memory_plan.py` compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sizes

SIZES = {name: sizes.SIZES[name] for name in ("S", "M")}
PROMPT, RESPONSE = 32, 32
SEED = 0


def configurations() -> dict[str, dict[str, Any]]:
    """Name to the `models` section (checkpoints by size and kind) and the rows."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, size: str, rows: int = 8, **models: Any) -> None:
        found[name] = {"size": size, "rows": rows, "models": {"dtype": "float32", "sharing": "separate"} | models}

    paired: dict[str, Any] = {"lora": {"r": 16}, "sharing": "paired"}
    single = paired | {"sharing": "single"}
    for size, rows in (("S", 8), ("M", 4)):
        add(f"{size} full", size, rows)
        add(f"{size} full checkpointing", size, rows, gradient_checkpointing=True)
        add(f"{size} full bfloat16", size, rows, dtype="bfloat16")
        add(f"{size} lora paired", size, rows, **paired)
        add(f"{size} lora single", size, rows, **single)
        add(f"{size} lora single checkpointing", size, rows, **single, gradient_checkpointing=True)
        add(f"{size} lora paired bfloat16", size, rows, **paired, dtype="bfloat16")
        add(f"{size} lora paired 4bit", size, rows, **paired, quantization="4bit")
    for name, models in (("full", {}), ("lora paired", paired)):
        add(f"S {name} bfloat16 parallel", "S", **models, dtype="bfloat16")
        found[f"S {name} bfloat16 parallel"]["parallel"] = True
    add("S full, 3 layers frozen", "S", freeze_layers=3)
    add("S lora separate", "S", **paired | {"sharing": "separate"})
    add("S lora paired checkpointing", "S", **paired, gradient_checkpointing=True)
    add("S lora paired 8bit", "S", **paired, quantization="8bit")
    add("S lora paired torchao-int8", "S", **paired, quantization="torchao-int8")
    return found


def run_config(root: Path, spec: dict[str, Any]) -> Any:
    """The Quartet configuration of one entry of `configurations`."""
    from quartet.config import parse_config

    folder = root / spec["size"]
    reward = "reward-lora" if spec["models"]["sharing"] == "single" else "reward"
    return parse_config(
        {
            "models": {"sft": str(folder / "sft"), "reward": str(folder / reward), **spec["models"]},
            "data": {"prompts": "unused", "max_prompt_tokens": PROMPT},
            "rollout": {"batch_size": 2 * spec["rows"], "response_length": RESPONSE, "batch_rows": 2 * spec["rows"]},
            "ppo": {"epochs": 1, "minibatches": 1, "microbatch_rows": spec["rows"]},
            "run": {"seed": SEED, "parallel_passes": spec.get("parallel", False)},
        }
    )
