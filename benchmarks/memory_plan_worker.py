"""One configuration of the memory benchmark: its checkpoints, its two iterations, its prediction.

Run by memory_plan.py in a process of its own: `--root FOLDER --spec JSON [--merged]` measures and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory_plan_cases import PROMPT, RESPONSE, SEED, SIZES, run_config
from probe import status_bytes


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
    """Bytes of this process that no file backs."""
    return status_bytes("RssAnon")


def measure(root: Path, spec: dict[str, Any], *, merged: bool) -> dict[str, Any]:
    """Two iterations; in this process.

    Args:
        merged: generate with weights that hold the policy's adapter, as it was predicted.
    """
    import torch

    from quartet.allocator import return_gaps
    from quartet.models.checkpoint_info import read_checkpoint
    from quartet.models.loading import load_roles, plan_for
    from quartet.models.packing import allow_packing
    from quartet.records import Prompts
    from quartet.rollout.choose import make_engine
    from quartet.rollout.engine import SamplingSettings
    from quartet.stages.advantages import compute_advantages
    from quartet.stages.batching import scoring_rows
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
        from quartet.distributed import SingleProcess

        roles = load_roles(config.models, plan_for(config.models, sft, reward), sft, reward, seed=SEED)
        optimizer = make_optimizer(roles, config.ppo)
    settings = SamplingSettings(RESPONSE, 1.0, 1.0, None, 0, config.rollout.batch_rows, SEED)
    allow_packing(roles)
    at_once = scoring_rows(config.rollout.batch_rows, "cuda" if cuda else "cpu", cut=False)
    generator = make_engine(config.rollout.engine, roles.policy, settings, print_aside, merged=merged)
    parallel = config.run.parallel_passes is True
    updater = Updater(
        roles.trained, optimizer, SingleProcess(), config.ppo, temperature=1.0, seed=SEED, at_once=parallel
    )
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
        if merged:
            return_gaps()  # as `Session.generate` does
        with probe.phase("scoring"):
            scored = score_rollout(rollout, roles, temperature=1.0, placement="stop", rows=at_once)
        batch = compute_advantages(scored, config.ppo, kl_coef=0.05)
        with probe.phase("update"):
            roles.use("policy", "value")
            updater.update(batch, iteration=iteration)
        return_gaps()
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

    modules = [*(backbone.model for backbone in roles.backbones.values()), roles.value.head, roles.reward.head]
    storages: dict[int, int] = {}
    for module in modules:
        for part in module.modules():
            for held in (*part._parameters.values(), *part._buffers.values(), getattr(part, "state", None)):
                add_storages(held, storages)
    gradients = sum(p.grad.nbytes for group in optimizer.param_groups for p in group["params"])
    state = sum(v.nbytes for held in optimizer.state.values() for v in held.values() if isinstance(v, torch.Tensor))
    return {"parameters": sum(storages.values()), "gradients": gradients, "optimizer": state}


def add_storages(held: Any, storages: dict[int, int]) -> None:
    """Storages of a tensor, and of the scales that belong to a quantized one."""
    import torch

    if hasattr(held, "__tensor_flatten__"):
        for name in held.__tensor_flatten__()[0]:
            add_storages(getattr(held, name), storages)
    elif isinstance(held, torch.Tensor):
        storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    for extra in ("quant_state", "state2", "absmax", "code", "offset", "SCB", "CB"):
        if (further := getattr(held, extra, None)) is not None:
            add_storages(further, storages)


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
    merged = estimate.choices.merge_adapters
    return {"phases": phases, "exact": exact, "merged": merged, "seconds": seconds}


def main() -> None:
    """Measure one configuration; its result as JSON on the last line of stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--merged", action="store_true")
    options = parser.parse_args()
    print("\n" + json.dumps(measure(options.root, options.spec, merged=options.merged)))


if __name__ == "__main__":
    main()
