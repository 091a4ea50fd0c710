"""Predicted against measured memory: `quartet plan` and two PPO iterations of the same configuration, phase by phase.

Each configuration runs in a process of its own. The first iteration fills the optimizer state; the second is measured. On
CUDA the measure is `torch.cuda.max_memory_allocated`; on a CPU it is the process's anonymous memory, sampled every 4 ms,
less what it was after imports and a first small forward and backward pass.

glibc keeps freed blocks below a threshold that grows to 32 MiB, and cuts new blocks out of them, so that what a process
holds depends on the order of its allocations. The processes therefore run with MALLOC_MMAP_THRESHOLD_=65536, under which a
freed tensor goes back to the system at once; `--default-malloc` leaves glibc as it is and shows the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "S": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
    "M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 2048,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}
PHASES = ("load", "rollout", "scoring", "update")
PROMPT, RESPONSE = 32, 32
SEED = 0
QUICK = ("S full", "S lora paired", "S lora single checkpointing")


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
    add("S full, 3 layers frozen", "S", freeze_layers=3)
    add("S lora separate", "S", **paired | {"sharing": "separate"})
    add("S lora paired checkpointing", "S", **paired, gradient_checkpointing=True)
    add("S lora paired bfloat16", "S", **paired, dtype="bfloat16")
    add("S lora paired 4bit", "S", **paired, quantization="4bit")
    add("S lora paired 8bit", "S", **paired, quantization="8bit")
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
            "run": {"seed": SEED},
        }
    )


def write_checkpoints(root: Path, size: str) -> None:
    """Random float32 checkpoints: `sft`, `reward`, and `reward-lora`, an adapter over `sft`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=1024, num_labels=1, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(root / size / "sft")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(root / size / "reward")
    base = AutoModelForSequenceClassification.from_pretrained(root / size / "sft", num_labels=1)
    adapted = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS"))
    adapted.save_pretrained(root / size / "reward-lora")


class Probe:
    """Peak memory of each phase over a floor."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.floor = 0
        self.peaks: dict[str, int] = {}
        self._largest = 0
        self._running = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            yield
            self.peaks[name] = torch.cuda.max_memory_allocated()
            return
        self._largest, self._running = anonymous(), True
        thread = threading.Thread(target=self._sample, daemon=True)
        thread.start()
        yield
        self._running = False
        thread.join()
        self.peaks[name] = self._largest - self.floor

    def _sample(self) -> None:
        while self._running:
            self._largest = max(self._largest, anonymous())
            time.sleep(0.004)


def anonymous() -> int:
    """Bytes of this process that no file backs (RssAnon)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(root: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Two iterations; in this process."""
    import torch

    from quartet.models.checkpoint_info import read_checkpoint
    from quartet.models.loading import load_roles, plan_for
    from quartet.records import Prompts
    from quartet.rollout.choose import make_engine
    from quartet.rollout.engine import SamplingSettings
    from quartet.stages.advantages import compute_advantages
    from quartet.stages.optimizer import make_optimizer
    from quartet.stages.scoring import score_rollout
    from quartet.stages.update import Updater

    config = run_config(root, spec)
    cuda = torch.cuda.is_available()
    probe = Probe(cuda)
    warm_up(torch.device("cuda" if cuda else "cpu"))
    probe.floor = 0 if cuda else anonymous()
    sft, reward = read_checkpoint(config.models.sft, "sft"), read_checkpoint(config.models.reward, "reward")
    with probe.phase("load"):
        from quartet.distributed import start_engine

        roles = load_roles(config.models, plan_for(config.models, sft, reward), sft, reward, seed=SEED)
        optimizer = make_optimizer(roles, config.ppo)
    settings = SamplingSettings(RESPONSE, 1.0, 1.0, None, 0, config.rollout.batch_rows, SEED)
    generator = make_engine(config.rollout.engine, roles.policy, settings, print_aside)
    updater = Updater(roles.trained, optimizer, start_engine(), config.ppo, temperature=1.0, seed=SEED)
    torch.manual_seed(SEED)
    count = config.rollout.batch_size
    # Half of the prompts are shorter, as in a real batch; the longest ones decide the peak.
    lengths = [PROMPT if row % 2 == 0 else PROMPT - row % 16 for row in range(count)]
    vocabulary = SIZES[spec["size"]]["vocab_size"]
    tokens = tuple(torch.randint(1, vocabulary, (length,)) for length in lengths)
    prompts = Prompts(tuple(range(count)), ("",) * count, tokens)
    for iteration in (1, 2):
        with probe.phase("rollout"):
            rollout = generator.generate(prompts)
        with probe.phase("scoring"):
            scored = score_rollout(rollout, roles, temperature=1.0, placement="stop", rows=config.rollout.batch_rows)
        batch = compute_advantages(scored, config.ppo, kl_coef=0.05)
        with probe.phase("update"):
            updater.update(batch, iteration=iteration)
    return {"measured": probe.peaks, "floor": probe.floor, "exact": exact_bytes(roles, optimizer)}


def print_aside(line: str) -> None:
    """Notices go to stderr: stdout holds the result."""
    print(line, file=sys.stderr)


def warm_up(device: Any) -> None:
    """Start the thread pools and the libraries that the first matrix product brings in."""
    import torch

    layer = torch.nn.Linear(64, 64, device=device)
    layer(torch.ones(64, 64, device=device)).sum().backward()


def exact_bytes(roles: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state that exist."""
    import torch

    from quartet.models.loading import count_bytes

    modules = [*(backbone.model for backbone in roles.backbones.values()), roles.value.head, roles.reward.head]
    gradients = sum(p.grad.nbytes for group in optimizer.param_groups for p in group["params"])
    state = sum(v.nbytes for held in optimizer.state.values() for v in held.values() if isinstance(v, torch.Tensor))
    return {"parameters": count_bytes(modules), "gradients": gradients, "optimizer": state}


def predict(root: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """What the planner says."""
    import torch

    from quartet.memory.choices import choices_of, workload_of
    from quartet.memory.estimate import Estimator
    from quartet.models.checkpoint_info import read_checkpoint
    from quartet.models.loading import plan_for

    config = run_config(root, spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sft, reward = read_checkpoint(config.models.sft, "sft"), read_checkpoint(config.models.reward, "reward")
    start = time.perf_counter()
    estimator = Estimator(sft, reward, workload_of(config), device)
    estimate = estimator.estimate(plan_for(config.models, sft, reward), choices_of(config, device))
    seconds = time.perf_counter() - start
    exact = {
        "parameters": sum(b.weights + b.adapters for b in estimate.backbones)
        + sum(r.head for r in estimate.roles if r.role in ("value", "reward")),
        "gradients": sum(r.gradients for r in estimate.roles),
        "optimizer": sum(r.optimizer for r in estimate.roles),
    }
    phases = {phase.phase: {"peak": phase.peak, "at": phase.at, **phase.parts()} for phase in estimate.phases}
    return {"phases": phases, "exact": exact, "seconds": seconds}


def in_process(task: str, root: Path, spec: dict[str, Any], default_malloc: bool) -> dict[str, Any]:
    """Run `measure` or `predict` in a fresh interpreter."""
    environment = dict(os.environ) | {"QUARTET_CACHE": str(root / "cache")}
    if not default_malloc:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--task",
        task,
        "--root",
        str(root),
        "--spec",
        json.dumps(spec),
    ]
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
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's thresholds as they are")
    parser.add_argument("--task", choices=("measure", "predict"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        result = (
            measure(options.root, options.spec) if options.task == "measure" else predict(options.root, options.spec)
        )
        print(json.dumps(result))
        return
    table(options)


def table(options: argparse.Namespace) -> None:
    """Run every configuration and print predicted, measured and their difference."""
    chosen = {n: s for n, s in configurations().items() if (not options.quick or n in QUICK) and options.only in n}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for size in sorted({spec["size"] for spec in chosen.values()}):
            write_checkpoints(root, size)
        print(f"{'configuration':32}" + "".join(f"{phase:>27}" for phase in PHASES) + f"{'exact':>10}")
        print(f"{'':32}" + f"{'predicted measured  off MiB':>27}" * 4 + f"{'off':>10}")
        for name, spec in chosen.items():
            predicted = in_process("predict", root, spec, options.default_malloc)
            measured = in_process("measure", root, spec, options.default_malloc)
            rows.append({"name": name, "spec": spec, "predicted": predicted, **measured})
            print(line(name, predicted, measured), flush=True)
    compared = ("rollout", "scoring", "update")
    worst = max((abs(difference(row, phase)), row["name"], phase) for row in rows for phase in compared)
    print(f"largest difference in rollout, scoring and update: {worst[0]:.1%} ({worst[1]}, {worst[2]})")
    loads = max(abs(r["predicted"]["phases"]["load"]["peak"] - r["measured"]["load"]) for r in rows) / 2**20
    print(f"largest difference in load: {loads:.1f} MiB")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "options": vars_of(options), "rows": rows}, indent=2))


def line(name: str, predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """One row of the table."""
    cells = []
    for phase in PHASES:
        mine, real = predicted["phases"][phase]["peak"], measured["measured"][phase]
        cells.append(f"{mine / 2**20:10.1f} {real / 2**20:8.1f} {mine / max(real, 2**20) - 1:+7.1%}")
    off = max(abs(predicted["exact"][k] / v - 1) for k, v in measured["exact"].items())
    return f"{name:32}" + "".join(cells) + f"{off:10.3%}"


def difference(row: dict[str, Any], phase: str) -> float:
    """Predicted over measured, less one."""
    ratio: float = row["predicted"]["phases"][phase]["peak"] / row["measured"][phase]
    return ratio - 1


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that matter, as plain values."""
    return {"quick": options.quick, "only": options.only, "default_malloc": options.default_malloc}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch
    import transformers

    return {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sizes": SIZES,
        "seed": SEED,
        "prompt_tokens": PROMPT,
        "response_tokens": RESPONSE,
    }


if __name__ == "__main__":
    main()
