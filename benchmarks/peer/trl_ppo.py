"""TRL 1.12.0's PPOTrainer, the last release that has one, on the benchmarks' checkpoints, phase by phase.

Run by the benchmarks with the peer's Python: `--root FOLDER/SIZE --out FILE.json`, workload options below. Nothing of
TRL is changed but for timers around its functions: generation begins at `batch_generation`, scoring when that returns,
the update at the first forward pass with gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl.experimental.ppo.ppo_trainer as ppo_trainer
from datasets import Dataset
from peft import LoraConfig
from probe import LORA_ALPHA, LORA_LINEARS, LORA_RANK, Probe, settle, warm_up, write_result
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


def parse() -> argparse.Namespace:
    """The workload; the names are those of Quartet's worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--policy", default="policy")
    parser.add_argument("--stop", choices=("eos", "none"), default="none")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sample-memory", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def configuration(options: argparse.Namespace, folder: str) -> PPOConfig:
    """TRL's defaults, but for what the workload fixes on both sides."""
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=options.episodes // options.rows,
        num_ppo_epochs=options.epochs,
        num_mini_batches=1,
        total_episodes=options.episodes * options.iterations,
        response_length=options.response_length,
        temperature=1.0,
        stop_token="eos" if options.stop == "eos" else None,
        num_sample_generations=0,
        report_to="none",
        bf16=False,
        use_cpu=options.device == "cpu",
        learning_rate=3e-6,
        adam_epsilon=1e-5,
        seed=7,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )


class PhaseTimer(TrainerCallback):
    """Tells the probe where TRL's loop is."""

    def __init__(self, probe: Probe, device: str) -> None:
        self.probe = probe
        self.device = device
        self.iterations: list[dict[str, Any]] = []
        self.tokens: dict[str, int] = {}
        self.scoring = False

    def install(self, pad: int) -> None:
        """Wrap the functions that the loop calls."""
        generate, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def batch_generation(model: Any, queries: Any, *rest: Any, **named: Any) -> Any:
            self.probe.enter("rollout")
            result = generate(model, queries, *rest, **named)
            settle(self.device)
            self.probe.enter("scoring")
            self.scoring = True
            prompts, sequences = queries.shape, result[0].shape
            self.tokens = {
                "prompt_tokens": int((queries != pad).sum()),
                "response_tokens": sequences[0] * (sequences[1] - prompts[1]),
            }
            return result

        def forward_pass(*arguments: Any, **named: Any) -> Any:
            if self.scoring and torch.is_grad_enabled():
                self.scoring = False
                settle(self.device)
                self.probe.enter("update")
            return forward(*arguments, **named)

        truncate = ppo_trainer.truncate_response

        def truncate_response(*arguments: Any, **named: Any) -> Any:
            kept = truncate(*arguments, **named)
            self.tokens["response_tokens"] = int((kept != pad).sum())
            return kept

        ppo_trainer.batch_generation, ppo_trainer.forward = batch_generation, forward_pass
        ppo_trainer.truncate_response = truncate_response

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An iteration is over."""
        settle(self.device)
        self.probe.enter("between")
        logged = state.log_history[-1] if state.log_history else {}
        self.iterations.append({"phases": self.probe.take(), **self.tokens, "load_average": os.getloadavg()[0]})
        self.iterations[-1]["score"] = logged.get("objective/scores")
        self.tokens = {}


def load(options: argparse.Namespace) -> dict[str, Any]:
    """The models as TRL's own script loads them."""
    root, kept = options.root, {"dtype": getattr(torch, options.dtype)}
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=LORA_LINEARS, task_type="CAUSAL_LM"
    )
    full = options.mode == "full"
    classifier = AutoModelForSequenceClassification.from_pretrained
    return {
        "model": AutoModelForCausalLM.from_pretrained(root / options.policy, **kept),
        "ref_model": AutoModelForCausalLM.from_pretrained(root / options.policy, **kept) if full else None,
        "value_model": classifier(root / "value", num_labels=1, **kept),
        "reward_model": classifier(root / "reward", num_labels=1, **kept),
        "peft_config": None if full else lora,
    }


def main() -> None:
    """Train; write the phases of every iteration."""
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.root / "policy", padding_side="left")
    warm_up()
    probe = Probe(sample=options.sample_memory)
    probe.enter("load")
    models = load(options)
    lines = (options.root / "prompts.jsonl").read_text().splitlines()[: options.episodes]
    prompts = Dataset.from_dict({"input_ids": [json.loads(line)["input_ids"] for line in lines]})
    timer = PhaseTimer(probe, options.device)
    timer.install(tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=configuration(options, folder),
            processing_class=tokenizer,
            train_dataset=prompts,
            eval_dataset=prompts.select(range(options.rows)),
            callbacks=[timer],
            **models,
        )
        probe.enter("between")
        start = probe.take()
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    result = {
        "floor": probe.floor,
        "load": start["load"],
        "iterations": timer.iterations,
        "optimizer": f"{type(optimizer).__name__}(fused={optimizer.defaults.get('fused')})",
        "threads": torch.get_num_threads(),
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
