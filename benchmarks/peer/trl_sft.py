"""LoRA supervised fine-tuning with TRL 1.16's SFTTrainer: the memory that training one model with LoRA takes anyway.

Run by benchmarks/memory.py with the Python of the second peer environment. Every step trains on `--episodes`
sequences of prompt and response together, in microbatches of `--rows`, like one epoch of PPO's update.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from probe import LORA_ALPHA, LORA_LINEARS, LORA_RANK, Probe, warm_up, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def parse() -> argparse.Namespace:
    """The workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--sample-memory", action="store_true")
    return parser.parse_args()


def sequences(options: argparse.Namespace) -> Dataset:
    """The prompts, each with as many random tokens as a response may have."""
    torch.manual_seed(0)
    lines = (options.root / "prompts.jsonl").read_text().splitlines()[: options.episodes]
    prompts = [json.loads(line)["input_ids"] for line in lines]
    highest = max(max(ids) for ids in prompts)
    responses = torch.randint(3, highest, (len(prompts), options.response_length)).tolist()
    return Dataset.from_dict({"input_ids": [p + r for p, r in zip(prompts, responses, strict=True)]})


def main() -> None:
    """Train; write one phase."""
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.root / "policy")
    warm_up()
    probe = Probe(sample=options.sample_memory)
    probe.enter("load")
    model = AutoModelForCausalLM.from_pretrained(options.root / "policy", dtype=torch.float32)
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=LORA_LINEARS, task_type="CAUSAL_LM"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=options.episodes // options.rows,
            max_steps=options.iterations,
            gradient_checkpointing=options.checkpointing,
            bf16=options.bf16,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=7,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=sequences(options),
            processing_class=tokenizer,
            peft_config=lora,
        )
        probe.enter("update")
        trainer.train()
        probe.enter(None)
    phases = probe.take()
    write_result(
        options.out,
        {"floor": probe.floor, "load": phases.pop("load"), "iterations": [{"phases": phases}]},
    )


if __name__ == "__main__":
    main()
