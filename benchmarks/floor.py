"""The floor of an iteration: what its arithmetic and its memory traffic cost on this machine at the least.

Arithmetic is counted from non-padding tokens only, over the machine's own rate of matrix products; a decode step moves
its weights and cache once, over the machine's own rate of copying. Run as a script this prints both rates, measured with
OMP_NUM_THREADS threads.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe import LORA_RANK, settle, write_result

SIZES = {"cpu": (2048, 256 * 2**20), "cuda": (8192, 2 * 2**30)}
"""Side of the matrices, bytes of the buffer."""
BYTES = {"float32": 4, "bfloat16": 2}


def rates(device: str) -> dict[str, float]:
    """FLOP/s of a wide matrix product by dtype that the device computes in, and bytes/s of a copy (read and written); the
    best of several."""
    import torch

    found, (side, buffer) = {}, SIZES[device]
    for name in BYTES:
        if name == "bfloat16" and device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue  # computed one number at a time there, for minutes, and used by nobody
        left, right = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(left)
        found[name] = 2 * side**3 / _best(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), device)
    source, target = (torch.ones(buffer // 4, device=device) for _ in range(2))
    found["copy"] = 2 * buffer / _best(lambda: target.copy_(source), device)
    return found


def _best(act: Any, device: str, times: int = 12) -> float:
    seconds = []
    for _ in range(times):
        settle(device)
        start = time.perf_counter()
        act()
        settle(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    keys: float
    """Key and value heads over query heads."""

    @staticmethod
    def of(folder: Path) -> Shape:
        """From a checkpoint's config.json."""
        config = json.loads((folder / "config.json").read_text())
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
        return Shape(*(config[name] for name in names), config["num_key_value_heads"] / config["num_attention_heads"])

    @property
    def backbone(self) -> int:
        """Parameters in linear layers, the head aside."""
        attention = (2 + 2 * self.keys) * self.hidden**2
        return round(self.layers * (attention + 3 * self.hidden * self.inner))

    @property
    def adapters(self) -> int:
        """Parameters of one LoRA adapter on all of them."""
        attention = (2 * 2 + 2 * (1 + self.keys)) * self.hidden
        return round(self.layers * LORA_RANK * (attention + 3 * (self.hidden + self.inner)))

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True)
class Work:
    """Non-padding tokens of one iteration."""

    episodes: int
    prompt_tokens: int
    response_tokens: int
    decode_steps: int
    epochs: int

    @property
    def tokens(self) -> int:
        """Prompts and responses."""
        return self.prompt_tokens + self.response_tokens


def flops(shape: Shape, work: Work, *, lora: bool) -> dict[str, float]:
    """Floating-point operations of each stage, two for each multiplication with addition.

    A forward pass takes 2 for each parameter and token, and attention 4 * hidden for each pair of token and earlier token.
    A backward pass takes twice that of attention, as much as forward for the inputs of linear layers, and as much again for
    weights that are trained. Logits are needed at response
    tokens only. The adapters' own products count where they are trained and in the values' scoring; in the rollout they can
    be merged.
    """
    mean = work.tokens / work.episodes
    attention = shape.layers * 4 * shape.hidden * work.tokens * (mean + 1) / 2
    linear = 2 * shape.backbone * work.tokens
    head = 2 * shape.head * work.response_tokens
    adapters = 2 * shape.adapters * work.tokens if lora else 0
    sampled_last = 2 * shape.backbone * work.episodes
    forward = linear + attention
    backward = (linear if lora else 2 * linear) + 2 * attention + 2 * adapters
    head_backward = head if lora else 2 * head
    return {
        "rollout": forward - sampled_last + head,
        "scoring": 3 * forward + head + adapters,
        "update": work.epochs * (2 * (forward + adapters + backward) + head + head_backward),
    }


def floors(shape: Shape, work: Work, machine: dict[str, float], dtype: str, *, lora: bool) -> dict[str, float]:
    """Seconds of each stage at the least; of the rollout the larger of arithmetic and traffic."""
    seconds = {stage: count / machine[dtype] for stage, count in flops(shape, work, lora=lora).items()}
    weights = BYTES[dtype] * (shape.backbone + shape.head) * work.decode_steps
    context = (work.prompt_tokens + work.response_tokens / 2) / work.episodes
    cache = BYTES[dtype] * 2 * shape.layers * shape.hidden * shape.keys * context * work.response_tokens
    seconds["rollout"] = max(seconds["rollout"], (weights + cache) / machine["copy"])
    return seconds


def main() -> None:
    """Measure the rates, as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    options = parser.parse_args()
    write_result(options.out, rates(options.device))


if __name__ == "__main__":
    main()
